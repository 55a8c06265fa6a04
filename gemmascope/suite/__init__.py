"""A whole run of `gemmascope train`: from a config and a model to judged SAEs."""
