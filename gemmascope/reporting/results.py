"""What a finished run leaves, read back and checked, and the names under which a reader sees it.

A run folder holds `results.json`, `train_log.jsonl` and `frequencies.npz`; `plots/` and `report.html` are added.
"""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadFileError
from ..formats.files import open_file, read_json

PLOTS = {
    "training_curves": "Fidelity and sparsity of each SAE while it trained, measured on the training batches.",
    "l0_fvu": "On held-out tokens. Filled marks: the SAEs. Hollow marks: PCA with as many components as the SAE has "
    "active latents. An SAE beats PCA where it lies below its hollow mark.",
    "firing_frequency": "Latents by the share of held-out tokens on which they fire. The grey bar counts those that "
    "never fired; those right of the dashed line fire on more than a tenth of all tokens.",
    "delta_loss": "How much worse the language model predicts held-out text with the site replaced by the SAE's "
    "reconstruction (filled) and by its mean (hollow). Close to zero, far left of the hollow mark, is good.",
}


# Key, heading of the terminal (None: on the page alone), heading of the page, format.
COLUMNS = (
    ("l0", "L0", "L0", ".1f"),
    ("fvu", "FVU", "FVU", ".3f"),
    ("pca_fvu", "PCA", "FVU of PCA", ".3f"),
    ("pair_table_fvu", "pairs", "FVU of byte pairs", ".3f"),
    ("median_fvu", "med.", "FVU, median token", ".3f"),
    ("pca_median_fvu", "PCA", "PCA, median token", ".3f"),
    ("top_error_share", None, "Error in top .1 %", ".0%"),
    ("top_variance_share", None, "Variance in top .1 %", ".0%"),
    ("delta_loss", "ΔLM", "ΔLM loss", "+.3f"),
    ("ablation_delta_loss", "ablated", "ΔLM loss, mean ablation", "+.3f"),
    ("loss_recovered", None, "Loss recovered", ".3f"),
    ("dead_fraction", "dead", "Dead", ".0%"),
    ("high_freq_fraction", ">10 %", "Fire on > 10 %", ".1%"),
)
REQUIRED_NUMBERS = ("l0", "fvu", "pca_fvu")


def read_results(run_dir: str | os.PathLike) -> dict[str, Any]:
    """The checked contents of ``run_dir``/results.json; measures that are missing become None.

    Raises BadFileError when the file is missing or is not what a finished run writes.
    """
    path = Path(run_dir) / "results.json"
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("model"), dict):
        raise BadFileError(f"{path}: expected an object with the object 'model'")
    if not isinstance(results.get("saes"), list) or not results["saes"]:
        raise BadFileError(f"{path}: expected a non-empty list 'saes'")
    for key in ("loss", "bigram_loss"):
        _number(f"{path}: model", key, results["model"].get(key))
    saes = [_checked_sae(path, position, sae) for position, sae in enumerate(results["saes"])]
    return {**results, "saes": saes}


def _checked_sae(path: Path, position: int, sae: Any) -> dict[str, Any]:
    where = f"{path}: saes[{position}]"
    if not isinstance(sae, dict) or not isinstance(sae.get("site"), str):
        raise BadFileError(f"{where}: expected an object with the string 'site'")
    for key in ("layer", "width"):
        if isinstance(sae.get(key), bool) or not isinstance(sae.get(key), int):
            raise BadFileError(f"{where}: expected an integer {key!r}, found {sae.get(key)!r}")
    sae = {**sae, **{key: _number(where, key, sae.get(key)) for key, *_ in COLUMNS}}
    for key in REQUIRED_NUMBERS:
        if sae[key] is None:
            raise BadFileError(f"{where}: expected a number {key!r}, found none")
    return sae


def _number(where: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadFileError(f"{where}: expected a number {key!r}, found {value!r}")
    return float(value)


def read_log(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of ``run_dir``/train_log.jsonl, one for each step and site: the last written, where a resume repeats.

    An incomplete last line, as a kill leaves it, is ignored. Raises BadFileError when anything else is not a row.
    """
    path = Path(run_dir) / "train_log.jsonl"
    with open_file(path) as file:
        lines = file.read().splitlines(keepends=True)
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["step"], row["site"]] = row
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise BadFileError(f"{path}: line {number}: expected an object with 'step' and 'site'") from None
    return sorted(rows.values(), key=lambda row: row["step"])


def read_frequencies(run_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Firing frequency of every latent, [width] by SAE name, from ``run_dir``/frequencies.npz."""
    path = Path(run_dir) / "frequencies.npz"
    try:
        with open_file(path) as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except BadFileError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadFileError(f"{path}: expected an npz of arrays, found {error}") from error


def beats_pca(sae: Mapping[str, Any]) -> bool:
    return sae["fvu"] < sae["pca_fvu"]


def summary(saes: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(map(beats_pca, saes))} of {len(saes)} SAEs beat PCA of the same rank"


def judged_on(model: Mapping[str, Any]) -> str:
    """Which rows all figures of a run are of, as far as its results say."""
    which = model.get("held_out")
    return "All figures are of held-out text" + (f": {which}" if isinstance(which, str) else "")


def formatted(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
