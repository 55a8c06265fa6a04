"""Standard streams that can fail: closed, full, or without a reader."""

import contextlib
import os
from typing import IO


def divert(stream: IO[str]) -> None:
    """Send ``stream``, which cannot be written any more, to nowhere: Python fails on what is left in it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def open_missing() -> None:
    """Open those of the three standard descriptors that are closed, or the next file opened would take their place and
    with it what libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
