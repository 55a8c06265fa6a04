"""SIGKILL anywhere: the run goes on from a checkpoint that verifies, to the hash of one that nobody killed."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.suite.small_runs import hash_of, tables

# Of each event there are at least so many in a run of `small_runs`, or in what is left of one after a few kills.
MOST = {"writing": 60, "renaming": 6, "replacing": 12, "retention": 3, "harvesting": 12, "stepping": 60}
KILLS_OF_A_RUN = 5


@pytest.fixture
def kill(worker, tmp_path, model_folder, text_file, undisturbed):
    return lambda wanted, seconds: kill_and_go_on(
        worker, lambda name: tables(model_folder, text_file, tmp_path / name), hash_of(undisturbed), wanted, seconds
    )


def kill_and_go_on(
    worker, make: Callable[[str], dict[str, Any]], expected: dict[str, str], wanted: dict[str, int], seconds: float
) -> dict[str, int]:
    """Runs killed at random until each event has had its kills; each ends with the hash of an undisturbed one."""
    draw, kills, number = random.Random(0), dict.fromkeys(wanted, 0), 0
    while any(kills[event] < count for event, count in wanted.items()):
        made = make(f"run-{number}")
        for _ in range(KILLS_OF_A_RUN):
            missing = [event for event, count in wanted.items() if kills[event] < count]
            if not missing:
                break
            event = draw.choice(missing)
            if event == "time":
                when = {"after": draw.uniform(0, seconds)}
            else:
                when = {"signals": [[event, draw.randint(1, MOST[event]), signal.SIGKILL]]}
            ended = worker(tables=made, **when)
            assert ended in ({"signal": 9}, {"exit": 0}), (event, when)
            if ended == {"exit": 0}:
                break
            kills[event] += 1
        assert worker(tables=made) == {"exit": 0}
        assert hash_of(Path(made["run"]["out"])) == expected, f"run {number}"
        number += 1
    return kills


def test_killed_in_every_phase(kill):
    wanted = dict.fromkeys(MOST, 1) | {"time": 2}
    kills = kill(wanted, 1.5)
    assert all(kills[event] >= count for event, count in wanted.items())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_a_hundred_times(kill):
    wanted = dict.fromkeys(MOST, 12) | {"time": 40}
    kills = kill(wanted, 2.5)
    print(kills)
    assert sum(kills.values()) >= 100
