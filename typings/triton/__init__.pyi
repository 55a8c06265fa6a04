"""Triton's language is compiled, not run: its own annotations know neither launches (num_warps=) nor what a program's
`tl.range`, `tl.max` or constants are. All of it is Any here; what surrounds the programs is checked as everywhere.
"""

from typing import Any

def __getattr__(name: str) -> Any: ...
