"""Progress displays: arithmetic of rates, lines, live frames, and streams that go away."""

import io
import os
import re
import subprocess
import sys

import pytest
import rich.console

from gemmascope.reporting.progress import Meter, StageProgress, SuiteProgress, duration, progress

NAMES = [f"layer_{layer}/{site}" for layer in range(4) for site in ("att", "mlp", "resid")]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def plain(width=120):
    return rich.console.Console(file=io.StringIO(), width=width, force_terminal=False)


def terminal(width=100, height=30):
    return rich.console.Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, _environ={"TERM": "xterm"}
    )


def test_rate_and_eta():
    clock = Clock()
    meter = Meter(100, clock)
    assert (meter.rate, meter.eta) == (None, None)
    for step in range(1, 11):
        clock.now += 0.5
        meter.update(step)
    assert meter.rate == pytest.approx(2.0)
    assert meter.eta == pytest.approx(45.0)
    assert meter.elapsed == pytest.approx(5.0)


def test_eta_after_a_resume_counts_only_new_steps():
    clock = Clock()
    meter = Meter(1000, clock)
    clock.now += 60
    meter.update(900)
    assert meter.eta is None
    clock.now += 10
    meter.update(905)
    assert meter.rate == pytest.approx(0.5)
    assert meter.eta == pytest.approx(190.0)


def test_rate_follows_a_change_of_speed():
    clock = Clock()
    meter = Meter(10_000, clock)
    for step in range(1, 101):
        clock.now += 1.0
        meter.update(step)
    for step in range(110, 510, 10):
        clock.now += 1.0
        meter.update(step)
    assert meter.rate == pytest.approx(10.0)
    assert len(meter.samples) < 40, "no more history than the window"


def test_going_back_starts_over_and_standing_still_has_no_rate():
    clock = Clock()
    meter = Meter(100, clock)
    for step in (50, 60, 3):
        clock.now += 1.0
        meter.update(step)
    assert meter.rate is None
    clock.now += 1.0
    meter.update(3)
    assert meter.rate is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (None, "-:--"), (float("inf"), "-:--")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_come_every_few_seconds_and_at_the_end():
    clock, console = Clock(), plain()
    with SuiteProgress("SAEs", 600, NAMES, unit_per_step=1024, console=console, clock=clock) as bar:
        for step in range(1, 301):
            clock.now += 0.1
            bar.update(step, {"layer_3/resid": {"l0": 5.0, "fvu": 0.08}, "layer_0/att": {"l0": 9.0, "fvu": 0.02}})
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[-1] == ("SAEs  300/600 (50 %)  10,240 tok/s  elapsed 0:30  ETA 0:30  L0 5.0…9.0  FVU 0.020…0.080")
    assert "\x1b" not in console.file.getvalue()


def test_long_lines_are_not_folded():
    console = plain(width=20)
    with StageProgress("A long title of a stage", 10, console=console) as bar:
        bar.update(10, "loss 2.31 [not markup]")
    (line,) = console.file.getvalue().splitlines()
    assert line.endswith("loss 2.31 [not markup]")


def test_live_table_shows_every_sae():
    clock, console = Clock(), terminal()
    with SuiteProgress("SAEs", 600, NAMES, console=console, clock=clock) as bar:
        bar.update(1)
        clock.now += 1
        bar.update(5, {name: {"l0": 3.25 + i, "fvu": 0.5, "dead": 0.25} for i, name in enumerate(NAMES)})
        clock.now += 1
        bar.update(9, {"layer_0/att": {"l0": 77.7}})
    frame = console.file.getvalue().rpartition("SAEs")[2]
    assert all(name in frame for name in NAMES)
    assert "4,096 tok/s" in frame
    assert "77.7" in frame
    assert "14.2" in frame
    assert "0.500" in frame
    assert "25%" in frame


def test_live_table_is_cut_to_the_height_of_the_terminal():
    console = terminal(height=12)
    names = [f"layer_{layer}/resid" for layer in range(26)]
    with SuiteProgress("SAEs", 600, names, console=console) as bar:
        bar.update(1)
        console.file.truncate(0)
    assert "… 21 more" in console.file.getvalue()


def measured(l0, target=40.0, **changes):
    figures = {"fvu": 0.12, "dead": 0.05, "window": 0.0123, "threshold": 0.0456, "skipped": 2}
    return {"l0": l0, "target_l0": target} | figures | changes


def last_frame(console):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).rpartition("SAEs")[2]


SHARES = {"forward": 0.4, "gather": 0.05, "steps": 0.5, "waiting": 0.03, "checkpoint": 0.02}


def test_live_table_of_a_suite():
    clock, console = Clock(), terminal(width=120)
    with SuiteProgress("SAEs", 600, NAMES[:2], console=console, clock=clock) as bar:
        bar.update(1, {NAMES[0]: measured(41.3), NAMES[1]: measured(52.0, 50.0)}, shares=SHARES)
        clock.now += 1
        bar.update(3, parked={NAMES[1]: "NaN"})
    frame = last_frame(console)
    assert "2,048 tok/s" in frame
    assert "ETA 4:58" in frame
    assert "time: forward 40%, gather 5%, steps 50%, waiting 3%, checkpoint 2%" in frame
    lines = {line.split()[0]: line for line in frame.splitlines() if "layer" in line}
    assert lines[NAMES[0]].split() == [NAMES[0], "41.3", "40", "0.120", "5%", "1.23%", "0.0456", "2"]
    (parked,) = (line for line in frame.splitlines() if "✗" in line)
    assert NAMES[1] in parked
    head = next(line for line in frame.splitlines() if line.strip().startswith("SAE"))
    assert head.split() == ["SAE", "L0", "target", "FVU", "dead", "window", "θ", "skipped"]


def test_columns_that_no_sae_has_are_left_out():
    console = terminal()
    with SuiteProgress("SAEs", 600, NAMES[:1], console=console) as bar:
        bar.update(1, {NAMES[0]: {"l0": 3.0, "fvu": 0.1, "dead": None, "target_l0": None}})
    head = next(line for line in last_frame(console).splitlines() if line.strip().startswith("SAE"))
    assert head.split() == ["SAE", "L0", "FVU", "dead"]


def test_of_many_saes_the_worst_come_first_and_the_rest_is_summed_up():
    names = [f"layer_{layer}/resid" for layer in range(26)]
    rows = {name: measured(40 + layer, fvu=layer / 100) for layer, name in enumerate(names)}
    rows[names[3]] = measured(20.0)
    rows[names[4]] = measured(float("nan"))
    console = terminal(height=14)
    with SuiteProgress("SAEs", 600, names, console=console) as bar:
        bar.update(5, rows, shares=SHARES, parked={names[2]: "NaN"})
    shown = [line.replace("✗", "").split()[0] for line in last_frame(console).splitlines() if "layer" in line]
    assert shown == [names[i] for i in (2, 4, 25, 24, 23, 22)]
    assert "… 20 more  L0 20.0…61.0  FVU 0.000…0.210  dead 5%…5%" in last_frame(console)
    assert len(last_frame(console).splitlines()) <= 14


def test_without_targets_the_largest_fvu_is_worst():
    bar = SuiteProgress("SAEs", 600, NAMES[:3], console=plain())
    bar.update(1, {NAMES[0]: {"fvu": 0.1}, NAMES[1]: {"fvu": 0.3}})
    assert bar.worst_first() == [NAMES[1], NAMES[0], NAMES[2]]


def test_a_narrow_terminal_cuts_names_not_figures():
    names = [f"layer_{layer}/resid/width_16384/target_l0_40/seed_0" for layer in range(3)]
    console = terminal(width=80)
    with SuiteProgress("SAEs", 600, names, console=console) as bar:
        bar.update(1, dict.fromkeys(names, measured(41.3)))
    rows = [line.split() for line in last_frame(console).splitlines() if "layer" in line]
    assert [row[1:] for row in rows] == [["41.3", "40", "0.120", "5%", "1.23%", "0.0456", "2"]] * 3


def test_plain_lines_of_a_suite_say_the_same():
    clock, console = Clock(), plain()
    with SuiteProgress("SAEs", 600, NAMES[:3], console=console, clock=clock) as bar:
        bar.update(300)
        clock.now += 10
        rows = {NAMES[0]: measured(41.0), NAMES[1]: measured(30.0), NAMES[2]: measured(1.0)}
        bar.update(310, rows, shares=SHARES, parked={NAMES[2]: "NaN"})
    (_, line) = console.file.getvalue().splitlines()
    assert line == (
        "SAEs  310/600 (51 %)  1,024 tok/s  elapsed 0:10  ETA 4:50  L0 30.0…41.0  FVU 0.120…0.120  dead 5%…5%  "
        "window 1.2%…1.2%  worst L0/target layer_0/mlp 30.0/40  skipped 6  parked 1  "
        "time: forward 40%, gather 5%, steps 50%, waiting 3%, checkpoint 2%"
    )


def test_an_l0_that_is_not_a_number_is_the_worst():
    bar = SuiteProgress("SAEs", 600, NAMES[:3], console=plain())
    bar.update(1, {NAMES[0]: measured(90.0), NAMES[1]: measured(float("nan")), NAMES[2]: measured(1.0)})
    assert f"worst L0/target {NAMES[1]} nan/40" in bar.summary()
    assert "L0 1.0…90.0" in bar.summary()
    assert bar.worst_first()[0] == NAMES[1]


def test_frames_are_not_drawn_for_every_step():
    clock, console = Clock(), terminal()
    with StageProgress("stage", 10_000, console=console, clock=clock) as bar:
        for step in range(10_000):
            clock.now += 0.0001
            bar.update(step)
        assert console.file.getvalue().count("stage") < 20


@pytest.mark.parametrize("console", [terminal(width=40), plain()], ids=["narrow", "file"])
def test_no_live_display_where_it_does_not_fit(console):
    with SuiteProgress("SAEs", 2, NAMES, console=console) as bar:
        bar.update(1)
        assert bar.live is None


def test_an_exception_passes_and_the_terminal_is_restored():
    console = terminal()

    def interrupted():
        with StageProgress("stage", 10, console=console) as bar:
            bar.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize("make", [terminal, plain])
def test_a_closed_stream_silences_progress(make):
    console = make()
    console.file.close()
    with StageProgress("stage", 10, console=console) as bar:
        for step in range(10):
            bar.update(step)


def test_progress_yields_all_and_counts():
    console = plain()
    assert list(progress(["a", "b"], "letters", console=console)) == ["a", "b"]
    assert list(progress(3, "numbers", console=console)) == [0, 1, 2]
    assert list(progress((x for x in "xy"), "stream", total=2, console=console)) == ["x", "y"]
    lines = console.file.getvalue().splitlines()
    assert [line.partition(")")[0] for line in lines if "100 %" in line] == [
        "letters  2/2 (100 %", "numbers  3/3 (100 %", "stream  2/2 (100 %"
    ]  # fmt: skip


def test_nothing_to_do_is_not_a_division_by_zero():
    for console in (plain(), terminal()):
        assert list(progress([], "nothing", console=console)) == []


@pytest.mark.parametrize("redirection", ["2>&-", "2>&1 | true", "2>/dev/full"])
def test_a_stream_that_fails_does_not_end_the_run(tmp_path, redirection):
    done = tmp_path / "done"
    program = (
        "import sys, time\n"
        "from gemmascope.reporting.progress import ErrorConsole, SuiteProgress\n"
        "ErrorConsole().print('before')\n"
        "import gemmascope.reporting.progress as module\n"
        "module.SECONDS_BETWEEN_LINES = 0\n"
        "with SuiteProgress('SAEs', 50, ['a']) as bar:\n"
        "    for step in range(50):\n"
        "        bar.update(step)\n"
        "        time.sleep(0.005)\n"
        f"open({str(done)!r}, 'w').close()\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = f"set -o pipefail; {sys.executable} {tmp_path / 'program.py'} {redirection}"
    finished = subprocess.run(["bash", "-c", command], env=os.environ, timeout=120, check=False)
    assert done.exists()
    assert finished.returncode == 0
