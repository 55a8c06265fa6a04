"""Runs in processes of their own: one that imports everything once and forks a run for every line of its input.

A line is a job, or a list of jobs that run at the same time, as JSON. Each is {"tables": a config}, which runs
`train_suite`, or {"arguments": a command line, "output": a folder}, which runs the command and leaves there what it
writes to ``out`` and ``err``. Besides:

* ``signals`` [[event, n, number], …]: the signal comes at the n-th of that one of `EVENTS`, the second of these n
  events after the first, and so on
* ``after`` seconds: SIGKILL then
* ``limit`` bytes: no file grows beyond
* ``gone`` [1, 2]: standard output and standard error whose reader has gone away

The answer is a line of JSON for each job: {"signal": 9} or {"exit": 0}, and "peak", its resident memory in bytes.
"""

import json
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from gemmascope.__main__ import main as command
from gemmascope.activations import Harvester
from gemmascope.activations.packing import RowsWriter
from gemmascope.commands import judge, train
from gemmascope.suite import evaluate as suite_evaluate
from gemmascope.suite import measure, prepare
from gemmascope.suite import run as suite_run
from gemmascope.suite.config import SuiteConfig
from gemmascope.training import SAETrainer, checkpoint

# Owner and name of what is called in each phase of a run.
EVENTS: dict[str, tuple[Any, str]] = {
    "loading": (prepare, "load_model"),
    "tokenising": (RowsWriter, "add"),
    "measuring": (measure.Stopwatch, "step"),
    "writing": (os, "fsync"),
    "renaming": (os, "rename"),
    "replacing": (os, "replace"),
    "retention": (checkpoint, "_delete"),
    "harvesting": (Harvester, "_take"),
    "stepping": (SAETrainer, "update"),
    "saving": (suite_run, "save_suite"),
    "judging": (suite_run, "language_model_loss"),
    "controls": (suite_evaluate, "controls"),
}


def arm(signals: list[tuple[str, int, int]]) -> None:
    """Send this process the first of ``signals`` at its event, and then arm the others."""
    if not signals:
        return
    (event, count, number), *others = signals
    owner, name = EVENTS[event]
    call: Callable = getattr(owner, name)
    left = [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            arm(others)
            os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    setattr(owner, name, counted)


def redirect(descriptor: int, path: str | None) -> None:
    """To a file, or to a pipe that nobody reads."""
    if path is None:
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(write, descriptor)
    os.close(write)
    stream = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115
    setattr(sys, {1: "stdout", 2: "stderr"}[descriptor], stream)  # what was there remembers what it was opened for


def run(job: dict[str, Any]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gone = job.get("gone", ())
    if "output" in job:
        for descriptor, name in ((1, "out"), (2, "err")):
            redirect(descriptor, None if descriptor in gone else os.path.join(job["output"], name))
    if "limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    if "after" in job:
        timer = threading.Timer(job["after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    arm(job.get("signals", []))
    if "arguments" in job:
        return command(job["arguments"])
    suite_run.train_suite(SuiteConfig.from_dict(job["tables"]))
    return 0


def start(job: dict[str, Any]) -> int:
    """The process of a job."""
    process = os.fork()
    if process:
        return process
    try:
        os._exit(run(job))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def end(process: int) -> dict[str, int]:
    _, status, usage = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    ended = {"signal": -code} if code < 0 else {"exit": code}
    return ended | {"peak": usage.ru_maxrss * 1024}


def import_all() -> None:
    """What a run imports late; each process would do so anew."""
    import torch._dynamo
    import transformers

    torch.optim.Adam([torch.zeros(1)])
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Gemma2ForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)


def main() -> None:
    warnings.simplefilter("ignore")
    import_all()
    measure.BUDGET = 0.0
    train.present = lambda run, results: print(f"{len(results['saes'])} SAEs in {run}")
    judge.present_evaluation = lambda folder: None
    for line in sys.stdin:
        job = json.loads(line)
        if isinstance(job, list):
            print(json.dumps([end(process) for process in [start(each) for each in job]]), flush=True)
        else:
            print(json.dumps(end(start(job))), flush=True)


if __name__ == "__main__":
    main()
