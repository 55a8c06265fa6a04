"""SIGKILL anywhere: the run goes on from a checkpoint that verifies, to the hash of one that nobody killed."""

import json
import random
import subprocess
import sys

import pytest

from gemmascope.suite.run import train_suite
from tests.suite.killed_runs import EVENTS
from tests.suite.small_runs import config, hash_of, tables

# Of each event there are at least so many in a run of `small_runs`, or in what is left of one after a few kills.
MOST = {"writing": 60, "renaming": 6, "replacing": 12, "retention": 3, "harvesting": 12, "stepping": 60}
KILLS_OF_A_RUN = 5


class Worker:
    def __init__(self):
        command = [sys.executable, "-m", "tests.suite.killed_runs"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **job) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def worker():
    found = Worker()
    yield found
    found.process.communicate()


def kill_and_go_on(worker, tmp_path, model_folder, text_file, wanted: dict[str, int], seconds: float) -> dict[str, int]:
    """Runs killed at random until each event has had its kills; each ends with the hash of an undisturbed one."""
    train_suite(config(model_folder, text_file, tmp_path / "undisturbed"))
    expected, draw, kills, number = hash_of(tmp_path / "undisturbed"), random.Random(0), dict.fromkeys(wanted, 0), 0
    while any(kills[event] < count for event, count in wanted.items()):
        out = tmp_path / f"run-{number}"
        made = tables(model_folder, text_file, out)
        for _ in range(KILLS_OF_A_RUN):
            missing = [event for event, count in wanted.items() if kills[event] < count]
            if not missing:
                break
            event = draw.choice(missing)
            when = {"after": draw.uniform(0, seconds)} if event == "time" else {"event": event, "count": 0}
            if event != "time":
                when["count"] = draw.randint(1, MOST[event])
            ended = worker(tables=made, **when)
            assert ended in ({"signal": 9}, {"exit": 0}), (event, when)
            kills[event] += ended == {"signal": 9}
        assert worker(tables=made) == {"exit": 0}
        assert hash_of(out) == expected, f"run {number}"
        number += 1
    return kills


def test_killed_in_every_phase(worker, tmp_path, model_folder, text_file):
    wanted = dict.fromkeys(EVENTS, 1) | {"time": 2}
    kills = kill_and_go_on(worker, tmp_path, model_folder, text_file, wanted, 1.5)
    assert sum(kills.values()) >= sum(wanted.values())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_a_hundred_times(worker, tmp_path, model_folder, text_file):
    wanted = dict.fromkeys(EVENTS, 12) | {"time": 40}
    kills = kill_and_go_on(worker, tmp_path, model_folder, text_file, wanted, 2.5)
    assert sum(kills.values()) >= 100
