"""What is asked of a finished run by the commands that a user would type: studies, probes, dashboards; what is kept."""

import shutil
import sys
from pathlib import Path
from typing import Any

from gemmascope.reporting.probing import PROBES, read_probing
from gemmascope.reporting.results import kind_of, read_studies
from gemmascope.suite.study import WITHOUT_OUTLIERS

STUDIES = ("position", "uniformity", "sparsity-fidelity", f"sparsity-fidelity{WITHOUT_OUTLIERS}")
STUDIED = ("--sequences", "24", "--control-tokens", "32768")
PROBED = ("site", "layer", "width", "l0", "seed")
KEPT = ("study", "conclusion", "model", "text", "seed", "draws", "level", "version")


def commands(out: Path) -> list[list[str]]:
    program = [sys.executable, "-m", "gemmascope"]
    studies = []
    for name in STUDIES:
        without = ["--no-outliers"] if name.endswith(WITHOUT_OUTLIERS) else []
        studies.append([*program, "study", name.removesuffix(WITHOUT_OUTLIERS), str(out), *STUDIED, *without])
    return [*studies, [*program, "probe", str(out)], [*program, "dashboards", str(out)]]


def keep_studies(out: Path, results: Path) -> list[dict[str, Any]]:
    """Copy the figure and the CSV of each of the `STUDIES` of a run to ``results``. Returns a row for each."""
    results.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, study in read_studies(out / "studies"):
        if path.stem in STUDIES:
            for suffix in (".csv", ".png"):
                shutil.copyfile(path.with_suffix(suffix), results / f"{path.stem}{suffix}")
            rows.append({"kind": "study", **{key: study[key] for key in KEPT}, "study": path.stem})
    return rows


def probe_rows(out: Path) -> list[dict[str, Any]]:
    """A row for each SAE of what `gemmascope probe` found of the run: balanced accuracies, means over all labels."""
    results = read_probing(out / "probing")
    probing, text = results["probing"], results["model"]
    how = {name: probing[name] for name in ("ks", "splits", "draws")}
    how |= {"tasks": len(probing["tasks"]), **{name: text[name] for name in ("documents", "token_rows")}}
    of_probes = [f"{probe}_balanced_accuracy" for probe in PROBES]
    rows = [
        {key: sae[key] for key in (*PROBED, *of_probes)} | {"architecture": kind_of(sae)} for sae in results["saes"]
    ]
    return [{"kind": "probe", **row, **how, "model": text["name"]} for row in rows]
