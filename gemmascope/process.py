"""What the command line shares with whoever runs it: standard streams that can fail, and interruptions."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import IO

INTERRUPTED = 130
# Commands that go on when they are run again, and from where.
GOES_ON = {
    "demo": "from the last finished stage",
    "train": "where it was",
    "harvest": "after the last finished superblock",
}


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


def interruption(arguments: Sequence[str]) -> str:
    """What to say when the command ``arguments`` was interrupted."""
    found = next((GOES_ON[name] for name in arguments if name in GOES_ON), None)
    if found is None:
        return "interrupted"
    command = "the same command without --fresh" if "--fresh" in arguments else "the same command"
    return f"interrupted; {command} goes on {found}"


@contextlib.contextmanager
def ending_when_interrupted(arguments: Sequence[str]) -> Iterator[None]:
    """In this block, where large packages are imported, an interruption ends the process at once.

    A KeyboardInterrupt may be swallowed there, turned into an ImportError or lead to complaints at exit. Nothing has
    been begun yet that would want to be cleaned up.
    """

    def end(number, frame) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"gemmascope: error: {interruption(arguments)}\n".encode())
        os._exit(INTERRUPTED)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored in the background, say
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
