"""Progress on standard error: a live table on a terminal, a plain line every few seconds elsewhere.

Standard output stays free for results. Progress never fails a run: a stream that is closed, or whose reader goes away,
silences it. Times come from the monotonic clock, and rates from this process's own steps, so that an ETA right after
a resume does not count work that was done before.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from ..process import divert

Item = TypeVar("Item")

NARROWEST_LIVE = 60  # columns
SECONDS_BETWEEN_FRAMES = 0.125
SECONDS_BETWEEN_LINES = 5.0
RATE_WINDOW = 30.0  # seconds; long enough to smooth, short enough to follow a change of load


class ErrorConsole(rich.console.Console):
    """Standard error; falls silent when its reader has gone or its disk is full."""

    def __init__(self):
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        divert(self.file)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except (OSError, ValueError):  # "I/O operation on closed file" is a ValueError
            self.on_broken_pipe()


class Meter:
    """Steps against time: rate over the last ``window`` seconds, elapsed time and ETA.

    The first step reported only sets the starting point, be it step 0 or, after a resume, any other.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic, window: float = RATE_WINDOW):
        self.total, self.clock, self.window, self.step = total, clock, window, 0
        self.started = clock()
        self.samples: deque[tuple[float, int]] = deque()

    def update(self, step: int) -> None:
        now = self.clock()
        if self.samples and step < self.step:
            self.samples.clear()
        self.step = step
        self.samples.append((now, step))
        if self.window == math.inf and len(self.samples) > 2:
            del self.samples[1]
        while len(self.samples) > 2 and now - self.samples[1][0] >= self.window:
            self.samples.popleft()

    @property
    def elapsed(self) -> float:
        return self.clock() - self.started

    @property
    def rate(self) -> float | None:
        """Steps per second, or None before there are two steps to compare."""
        if len(self.samples) < 2:
            return None
        (first, first_step), (last, last_step) = self.samples[0], self.samples[-1]
        return (last_step - first_step) / (last - first) if last > first and last_step > first_step else None

    @property
    def eta(self) -> float | None:
        return None if self.rate is None or not self.total else max(self.total - self.step, 0) / self.rate


def duration(seconds: float | None) -> str:
    """1:02:03, 2:03 or -:--."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StageProgress:
    """One bar: ``with StageProgress("Training the model", 500) as bar: bar.update(step, "loss 2.3")``.

    total: steps in all, 0 where that is not known. unit: what a rate counts, ``unit_per_step`` of them a step. console,
    clock: for tests.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "step",
        unit_per_step: int = 1,
        *,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.unit, self.unit_per_step, self.note = title, unit, unit_per_step, ""
        self.console = console or ErrorConsole()
        self.clock, self.meter = clock, Meter(total, clock)
        self.live: rich.live.Live | None = None
        self.next_output = -math.inf
        self.printed_step: int | None = None

    def __enter__(self):
        self.meter.started = self.clock()
        console = self.console
        if console.is_terminal and not console.is_dumb_terminal and console.width >= NARROWEST_LIVE:
            # Frames are drawn by update() alone: a drawing thread would fail out of reach of the code below.
            live = rich.live.Live(console=console, auto_refresh=False, get_renderable=self.frame)
            self.live = live if self._quietly(live.start) else None
        return self

    def __exit__(self, *exception) -> None:
        if self.live is not None:
            self._quietly(self.live.refresh)
            self._quietly(self.live.stop)
            self.live = None
        elif self.meter.samples and self.printed_step != self.meter.step:
            self._print_line()

    def update(self, step: int, note: str | None = None) -> None:
        """``step`` steps are done in all. Cheap: draws only when the last frame or line is old enough."""
        self.meter.update(step)
        if note is not None:
            self.note = note
        now = self.clock()
        if now < self.next_output:
            return
        if self.live is not None:
            self.next_output = now + SECONDS_BETWEEN_FRAMES
            self._quietly(self.live.refresh)
        else:
            self.next_output = now + SECONDS_BETWEEN_LINES
            self._print_line()

    def _print_line(self) -> None:
        self.printed_step = self.meter.step
        text = rich.text.Text(self.line())
        self._quietly(lambda: self.console.print(text, soft_wrap=True))

    def _quietly(self, draw: Callable[[], None]) -> bool:
        """Whether ``draw`` succeeded."""
        try:
            draw()
        except (OSError, ValueError):  # as above
            self.console.quiet = True
            return False
        return True

    def speed(self) -> str:
        rate = self.meter.rate
        return f"- {self.unit}/s" if rate is None else f"{rate * self.unit_per_step:,.0f} {self.unit}/s"

    def line(self) -> str:
        meter = self.meter
        done = f"{meter.step:,}"
        if meter.total:
            done += f"/{meter.total:,} ({100 * meter.step // meter.total} %)"
        parts = [f"{self.title}  {done}", self.speed()]
        parts += [f"elapsed {duration(meter.elapsed)}", f"ETA {duration(meter.eta)}", self.summary()]
        return "  ".join(part for part in parts if part)

    def summary(self) -> str:
        """The end of the line: what is being achieved."""
        return self.note

    def frame(self) -> rich.console.RenderableType:
        meter = self.meter
        table = rich.table.Table.grid(padding=(0, 2))
        table.add_row(
            rich.text.Text(self.title, style="bold"),
            rich.progress_bar.ProgressBar(max(meter.total, 1), meter.step, width=20),
            f"{meter.step:,}/{meter.total:,}" if meter.total else f"{meter.step:,}",
            self.speed(),
            f"ETA {duration(meter.eta)}",
        )
        note = rich.text.Text(f"elapsed {duration(meter.elapsed)}  {self.note}".rstrip(), style="dim")
        return rich.console.Group(table, note)


# Measures of an SAE in the table: key, heading, format.
MEASURES = (
    ("l0", "L0", ".1f"),
    ("target_l0", "target", "g"),
    ("fvu", "FVU", ".3f"),
    ("dead", "dead", ".0%"),
    ("window", "window", ".2%"),
    ("threshold", "θ", ".3g"),
    ("skipped", "skipped", "g"),
)
# Columns that a suite whose rows never have them does without.
OPTIONAL_MEASURES = ("target_l0", "window", "threshold", "skipped")


class SuiteProgress(StageProgress):
    """Many SAEs trained together: the bar, how the time is spent, and a table of the latest measures of each.

        with SuiteProgress("SAEs", total_steps, names, unit_per_step=batch_size) as progress:
            progress.update(step, {"layer_3/resid": {"l0": 5.1, "fvu": 0.08, "dead": 0.3}}, shares={"forward": 0.4})

    names: the SAEs, in the order of the table. ``rows`` may name any of them, or be None when nothing was measured;
    missing measures show as "-", those of `OPTIONAL_MEASURES` that no SAE has not at all. ``dead`` and ``window``, the
    share of the entries that lie below θ in its window, are fractions. Where not all fit, the SAEs whose L0 is farthest
    from its target come first (without targets those of the largest FVU), and the last line says what the others do.
    A ✗ marks those that are parked.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        names: Sequence[str],
        unit: str = "tok",
        unit_per_step: int = 1024,
        *,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(title, total_steps, unit, unit_per_step, console=console, clock=clock)
        self.meter = Meter(total_steps, clock, math.inf)  # minutes of forwards come before seconds of steps
        self.rows: dict[str, Mapping[str, float | None]] = {str(name): {} for name in names}
        self.shares: dict[str, float] = {}
        self.parked: dict[str, str] = {}

    def update(
        self,
        step: int,
        rows: Mapping[str, Mapping[str, float | None]] | None = None,
        *,
        shares: Mapping[str, float] | None = None,
        parked: Mapping[str, str] | None = None,
    ) -> None:
        """``step`` steps are done in all; ``rows`` holds the newest measures of some SAEs.

        shares: of the time, by what it went into, each from 0 to 1. parked: the SAEs that train no more, and why. Both
        stay as they are when None.
        """
        for name, row in (rows or {}).items():
            self.rows[str(name)] = {**self.rows.get(str(name), {}), **row}
        if shares is not None:
            self.shares = dict(shares)
        if parked is not None:
            self.parked = dict(parked)
        super().update(step)

    def summary(self) -> str:
        training = {name: row for name, row in self.rows.items() if name not in self.parked}
        parts = _spans(training.values())
        misses = [(miss, name) for name, row in training.items() if (miss := _miss(row)) is not None]
        if misses:
            _, name = max(misses, key=lambda each: _number_or(each[0], 0.0))
            row = training[name]
            parts.append(f"worst L0/target {name} {row['l0']:.1f}/{row['target_l0']:g}")
        if skipped := sum(row.get("skipped") or 0 for row in self.rows.values()):
            parts.append(f"skipped {skipped:g}")
        if self.parked:
            parts.append(f"parked {len(self.parked)}")
        return "  ".join([*parts, *([self.spent()] if self.shares else [])])

    def spent(self) -> str:
        """How the time is spent."""
        return "time: " + ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())

    def worst_first(self) -> list[str]:
        """Parked SAEs, then those farthest from their target L0, then by FVU from the largest."""

        def badness(name: str) -> tuple[bool, float, float]:
            row = self.rows[name]
            return name in self.parked, _number_or(_miss(row), -1.0), _number_or(row.get("fvu"), -1.0)

        return sorted(self.rows, key=badness, reverse=True)

    def frame(self) -> rich.console.RenderableType:
        head = [super().frame()]
        if self.shares:
            head.append(rich.text.Text(self.spent(), style="dim"))
        names = list(self.rows)
        room = max(self.console.height - 5 - len(head), 3)
        shown = names if len(names) <= room else self.worst_first()[: room - 1]
        present = {key for row in self.rows.values() for key, value in row.items() if value is not None}
        measures = [each for each in MEASURES if each[0] not in OPTIONAL_MEASURES or each[0] in present]
        table = rich.table.Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("SAE", overflow="ellipsis")  # the one that gives way where it is narrow
        for _, heading, _ in measures:
            table.add_column(heading, justify="right", no_wrap=True)
        for name in shown:
            row = self.rows[name]
            cells = [_number(row.get(key), form) for key, _, form in measures]
            label = f"✗ {name}" if name in self.parked else name
            style = "red" if name in self.parked else ""
            table.add_row(rich.text.Text(label, no_wrap=True, overflow="ellipsis"), *cells, style=style)
        if len(shown) == len(names):
            return rich.console.Group(*head, table)
        rest = [self.rows[name] for name in names if name not in set(shown)]
        more = "  ".join([f"… {len(rest)} more", *_spans(rest)])
        return rich.console.Group(*head, table, rich.text.Text(more, style="dim", no_wrap=True, overflow="ellipsis"))


def _spans(rows: Iterable[Mapping[str, float | None]]) -> list[str]:
    """From the least to the largest of each measure."""
    rows, parts = list(rows), []
    for key, label, form in (
        ("l0", "L0", ".1f"),
        ("fvu", "FVU", ".3f"),
        ("dead", "dead", ".0%"),
        ("window", "window", ".1%"),
    ):
        values = [value for row in rows if (value := row.get(key)) is not None and math.isfinite(value)]
        if values:
            parts.append(f"{label} {min(values):{form}}…{max(values):{form}}")
    return parts


def _miss(row: Mapping[str, float | None]) -> float | None:
    """How far L0 is from its target, as a share of it."""
    l0, target = row.get("l0"), row.get("target_l0")
    return None if l0 is None or not target else abs(l0 / target - 1)


def _number_or(value: float | None, default: float) -> float:
    """NaN, of which nothing is known but that it is bad, counts as the worst."""
    return default if value is None else math.inf if math.isnan(value) else value


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def progress(
    items: Iterable[Item] | int,
    description: str,
    total: int | None = None,
    *,
    unit: str = "step",
    console: rich.console.Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Yield ``items`` (an int n stands for range(n)) under a `StageProgress`. total: where len() fails."""
    # Any: with an int, Item is int, which types cannot say without an overload.
    iterable: Any = range(items) if isinstance(items, int) else items
    total = len(iterable) if total is None else total
    with StageProgress(description, total, unit, console=console, clock=clock) as bar:
        bar.update(0)
        for done, item in enumerate(iterable, start=1):
            yield item
            bar.update(done)
