"""Runs that kill themselves: a process that imports everything once and forks a run for every line of its input.

Each line is JSON {"tables": a config, "event": one of `EVENTS`, "count": n} or {"tables": a config, "after": seconds};
the run is killed by SIGKILL at the n-th event, or when that time is over. The answer is a line of JSON with the wait
status of the run: {"signal": 9} or {"exit": 0}.
"""

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from gemmascope.activations import Harvester
from gemmascope.suite import measure
from gemmascope.suite.config import SuiteConfig
from gemmascope.suite.run import train_suite
from gemmascope.training import SAETrainer, checkpoint

# Owner and name of what is called in each phase of a run.
EVENTS: dict[str, tuple[Any, str]] = {
    "writing": (os, "fsync"),
    "renaming": (os, "rename"),
    "replacing": (os, "replace"),
    "retention": (checkpoint, "_delete"),
    "harvesting": (Harvester, "_take"),
    "stepping": (SAETrainer, "update"),
}


def killing(call: Callable, count: int) -> Callable:
    left = [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def run(job: dict[str, Any]) -> None:
    if "event" in job:
        owner, name = EVENTS[job["event"]]
        setattr(owner, name, killing(getattr(owner, name), job["count"]))
    elif "after" in job:
        timer = threading.Timer(job["after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    measure.BUDGET = 0.0
    train_suite(SuiteConfig.from_dict(job["tables"]))


def main() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                run(json.loads(line))
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"signal": -code} if code < 0 else {"exit": code}), flush=True)


if __name__ == "__main__":
    main()
