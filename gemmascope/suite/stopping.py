"""Signals that end a run: the first saves and ends it in good order, the second ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """The run was asked to end. No Exception, so that nothing which survives failures survives this."""


class Stop:
    """Whether the run was asked to end, from `stopping`.

    Outside `held` blocks a signal raises `Stopped` where it arrives; inside them, where what is being done must not be
    left by halves, only `asked` is set, and `check` raises.
    """

    def __init__(self):
        self.asked = False
        self._held = 0

    def check(self) -> None:
        """Raise `Stopped` if that was asked for."""
        if self.asked:
            raise Stopped

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def arrived(self, number: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        if not self._held:
            raise Stopped


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """In this block `SIGNALS` go to the `Stop` that it yields; afterwards to whom they went before.

    Signals that were ignored, as SIGHUP under nohup, stay so. In another thread than the main one, where Python sets no
    handlers, signals do what they did.
    """
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop.arrived)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
