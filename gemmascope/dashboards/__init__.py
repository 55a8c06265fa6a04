"""What each latent of an SAE does: one sparse pass over text, a table of its findings, and files of it for others."""
