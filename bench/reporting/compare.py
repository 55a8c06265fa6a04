"""Ours against ours: at another revision, timed in turn on this machine, or from the rows of two files."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.cases import CONTENDERS, Case
from bench.reporting import records, tables
from bench.timing import measure, worker

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = ("suite", "shape", "tokens", "target_l0", "dtype", "skew", "beta1", "part", "contender")


class Server:
    """A process that times a contender's parts when asked to; its packages are those found under ``path``."""

    def __init__(self, path: Path, arguments: list[str]):
        command = [sys.executable, "-m", "bench", "serve", *arguments]
        self.process = subprocess.Popen(
            command, cwd=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self.parts: list[str] = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else f"ended with status {self.process.wait()}")
        return json.loads(line)

    def time(self, part: str) -> float:
        self.process.stdin.write(part + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.wait()


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder from which `bench` is this tree's and `gemmascope` that of another revision."""
    with tempfile.TemporaryDirectory() as folder:
        tree, path = Path(folder, "tree"), Path(folder, "path")
        done = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), revision], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"revision: {done.stderr.strip().splitlines()[-1]}")
        try:
            path.mkdir()
            shutil.move(tree / "kernels", tree / "gemmascope" / "kernels")
            (path / "gemmascope").symlink_to(tree / "gemmascope")
            (path / "bench").symlink_to(ROOT / "bench")
            yield path
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True)


def timed_in_turn(here: Server, there: Server, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Times by part, of both."""
    parts = [part for part in here.parts if part in there.parts]
    times: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part in parts}
    for _ in range(rounds):
        for part in parts:
            for server, found in zip((here, there), times[part], strict=True):
                found.append(server.time(part))
    return times


def revisions(revision: str, plan: list[Case], device: torch.device, rounds: int) -> int:
    """Print and return as JSON how ours compares with ours at ``revision``; 1 when this tree could not be timed."""
    rows, failed = [], False
    with checkout(revision) as other:
        for case in plan:
            for name in (name for name in case.contenders if CONTENDERS[name][0] == "bench.ours"):
                row = case.facts() | {"contender": name, "revision": revision}
                arguments = [*worker.arguments_of(case, name), "--device", str(device)]
                with contextlib.ExitStack() as stack:
                    servers = []
                    try:
                        for path in (ROOT, other):
                            servers.append(Server(path, arguments))
                            stack.callback(servers[-1].close)
                        times = timed_in_turn(*servers, rounds)
                    except RuntimeError as error:
                        side = ("this tree", revision)[min(len(servers), 1)]
                        failed |= not servers
                        rows.append(row | {"kind": "skipped", "reason": f"{side}: {error}"})
                        continue
                for part, (now, before) in times.items():
                    middle = [measure.percentiles(found)["p50_ms"] for found in (now, before)]
                    rows.append(row | {"kind": "compared", "part": part, "p50_ms": middle[0], "before_ms": middle[1]})
    print("\n".join(ratio_lines(rows)))
    print(json.dumps({"revision": revision, "rows": rows}))
    return int(failed)


def ratio_lines(rows: list[dict]) -> list[str]:
    table = [["case", "contender", "part", "before ms", "now ms", "now / before"]]
    notes = []
    for row in rows:
        if row["kind"] == "skipped":
            notes.append(f"{row['contender']}: {row['reason']}")
            continue
        times = [tables.milliseconds(row[key]) for key in ("before_ms", "p50_ms")]
        ratio = f"{row['p50_ms'] / row['before_ms']:.3f}"
        table.append([tables.case_title(row), row["contender"], row["part"], *times, ratio])
    return [*tables.aligned(table, 3), *notes]


def newest(rows: list[dict]) -> dict[tuple, dict]:
    """The last time row of every key."""
    return {tuple(row[key] for key in KEY): row for row in rows if row["kind"] == "time"}


def files(before: Path, after: Path) -> int:
    """Print the ratio of every time that both files have; the newest row of each counts."""
    old, new = (newest(records.read(path)) for path in (before, after))
    rows = [new[key] | {"kind": "compared", "before_ms": old[key]["p50_ms"]} for key in new if key in old]
    if not rows:
        raise ValueError(f"{after}: expected a case that {before} has too, found none")
    machines = {row["machine"]["device"] for found in (old, new) for row in found.values()}
    print("\n".join(ratio_lines(rows)))
    if len(machines) > 1:
        print(f"the rows are of different machines: {', '.join(sorted(machines))}")
    return 0
