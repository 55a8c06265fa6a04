"""Files in and out: untrusted bytes become checked tensors, and nothing is written by halves."""
