"""Deliberate mistakes, one textual change of one file each: `python -m tests.mutants` makes them and runs the tests."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # in gemmascope/, that of the kernels in kernels/
    old: str  # occurs exactly once
    new: str
