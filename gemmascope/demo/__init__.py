"""The demo: a small Gemma 2, the text it learns, and the run that trains it and its SAEs."""
