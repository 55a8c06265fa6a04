"""Rows on disk: one JSON object a line, only ever appended, each with where it comes from."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"
SCHEMA = 1
REQUIRED = ("schema", "kind", "suite", "machine")


class DamagedRowError(ValueError):
    """A line that is not a row; the message names file and line."""


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The CPU's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Device, driver, threads, versions, commit and date. packages: distributions whose versions belong into it."""
    import gemmascope

    here = Path(gemmascope.__file__).resolve().parent
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cpu": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _output("git", "rev-parse", "--short", "HEAD", cwd=here),
        "dirty": bool(_output("git", "status", "--porcelain", cwd=here)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = _output(*query).partition("\n")[0]
        facts["cuda"] = torch.version.cuda or torch.version.hip
    return facts


def append(suite: str, rows: Iterable[Mapping[str, Any]], folder: Path | None = None) -> Path:
    """Add rows to ``<folder>/<suite>.jsonl``, whole lines in one write. Each row must have ``kind`` and ``machine``."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.jsonl"
    lines = [json.dumps({"schema": SCHEMA, "suite": suite} | dict(row), ensure_ascii=False) for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Every row of a file. Raises `DamagedRowError` for a line that is cut off, is not a row or has another schema.

    Times from before `bench run --beta1` are those without a first moment: their ``beta1`` is 0.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DamagedRowError(f"{path}, line {number}: not JSON ({error})") from None
            missing = [key for key in REQUIRED if not isinstance(row, dict) or key not in row]
            if missing:
                raise DamagedRowError(f"{path}, line {number}: expected a row, found none with {missing[0]!r}")
            if row["schema"] != SCHEMA:
                raise DamagedRowError(f"{path}, line {number}: expected schema {SCHEMA}, found {row['schema']!r}")
            rows.append({"beta1": 0.0} | row if "parts" in row else row)
    return rows
