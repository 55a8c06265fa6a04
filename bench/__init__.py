"""Benchmarks: a gate before any time, rows with provenance, pictures from the rows."""
