"""The other end of `killed_runs`."""

import json
import subprocess
import sys
from typing import Any


class Worker:
    """Runs jobs in processes of their own; how each ended."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.suite.killed_runs"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak = 0
        """Of the resident memory of the last job, in bytes."""

    def _answer(self, job: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, **job: Any) -> dict[str, int]:
        ended = self._answer(job)
        self.peak = ended.pop("peak")
        return ended

    def at_once(self, *jobs: dict[str, Any]) -> list[dict[str, int]]:
        return [{key: value for key, value in ended.items() if key != "peak"} for ended in self._answer(list(jobs))]

    def close(self) -> None:
        self.process.communicate()
