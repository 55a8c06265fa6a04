"""A suite of SAEs on a real Gemma, from nothing: model and text from package indexes, `gemmascope train`, a verdict."""
