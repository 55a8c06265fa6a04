"""What is asked of a finished run: studies and dashboards by the commands that a user would type; and what is kept."""

import shutil
import sys
from pathlib import Path
from typing import Any

from gemmascope.reporting.results import read_studies

STUDIES = ("position", "uniformity", "sparsity-fidelity")
STUDIED = ("--sequences", "24", "--control-tokens", "32768")
KEPT = ("study", "conclusion", "model", "text", "seed", "draws", "level", "version")


def commands(out: Path) -> list[list[str]]:
    program = [sys.executable, "-m", "gemmascope"]
    return [*([*program, "study", name, str(out), *STUDIED] for name in STUDIES), [*program, "dashboards", str(out)]]


def keep(out: Path, results: Path) -> list[dict[str, Any]]:
    """Copy the figure and the CSV of each of the `STUDIES` of a run to ``results``. Returns a row for each."""
    results.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, study in read_studies(out / "studies"):
        if path.stem in STUDIES:
            for suffix in (".csv", ".png"):
                shutil.copyfile(path.with_suffix(suffix), results / f"{path.stem}{suffix}")
            rows.append({"kind": "study", **{key: study[key] for key in KEPT}})
    return rows
