"""What a finished run leaves, read back and checked, and the names under which a reader sees it.

A run folder holds `results.json`, `train_log.jsonl` and `frequencies.npz`; `plots/` and `report.html` are added. Like
all files they may be damaged or hostile, and what comes out of here can be drawn and shown.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..checks import dtype_name
from ..errors import BadFileError
from ..formats.arrays import Header, printable, read_npz
from ..formats.files import as_path, open_file, read_json, shown
from ..runs import check_finished

RESULTS, TRAIN_LOG, FREQUENCIES = "results.json", "train_log.jsonl", "frequencies.npz"
FINISHED = "results"  # the stage that leaves them
MAX_SAES, MAX_SITES, LARGEST = 300, 8, 1e30  # what figures have room for
MAX_LINE_BYTES = 1 << 16

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
    path = as_path("run_dir", run_dir) / RESULTS
    check_finished(run_dir, FINISHED)
    name, results = shown(path), read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("model"), dict):
        raise BadFileError(f"{name}: expected an object with the object 'model'")
    if not isinstance(results.get("saes"), list) or not 0 < len(results["saes"]) <= MAX_SAES:
        raise BadFileError(f"{name}: expected a list 'saes' of 1 to {MAX_SAES}")
    for key in ("environment", "seconds"):
        if not isinstance(results.get(key, {}), dict):
            raise BadFileError(f"{name}: expected an object {key!r}, found {results[key]!r:.40}")
    try:
        json.dumps(results, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadFileError(f"{name}: expected Unicode text, found half of a surrogate pair") from error
    for key in ("loss", "bigram_loss"):
        _number(f"{name}: model", key, results["model"].get(key))
    saes = [_checked_sae(name, position, sae) for position, sae in enumerate(results["saes"])]
    if len({sae["site"] for sae in saes}) > MAX_SITES:
        raise BadFileError(f"{name}: expected at most {MAX_SITES} different sites, found more")
    return {**results, "saes": saes}


def _checked_sae(path: str, position: int, sae: Any) -> dict[str, Any]:
    where = f"{path}: saes[{position}]"
    if not isinstance(sae, dict) or not isinstance(sae.get("site"), str):
        raise BadFileError(f"{where}: expected an object with the string 'site'")
    for key in ("layer", "width"):
        if type(sae.get(key)) is not int or not 0 <= sae[key] < 2**31:
            raise BadFileError(f"{where}: expected an integer {key!r}, found {sae.get(key)!r:.40}")
    sae = {**sae, **{key: _number(where, key, sae.get(key)) for key, *_ in COLUMNS}}
    for key in REQUIRED_NUMBERS:
        if sae[key] is None:
            raise BadFileError(f"{where}: expected a number {key!r}, found none")
    return sae


def _number(where: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_figure(value):
        raise BadFileError(f"{where}: expected a number {key!r}, found {value!r:.40}")
    return float(value)


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > LARGEST  # NaN, which JSON of ours has in logs alone, is one


def read_log(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of ``run_dir``/train_log.jsonl, one for each step and site: the last written, where a resume repeats.

    An incomplete last line, as a kill leaves it, is ignored. Raises BadFileError when anything else is not a row.
    """
    path = as_path("run_dir", run_dir) / TRAIN_LOG
    rows = {}
    with open_file(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            row = _log_row(line)
            if row is not None:
                rows[row["step"], row["site"]] = row
            elif line.endswith(b"\n") or len(line) == MAX_LINE_BYTES:
                raise BadFileError(f"{shown(path)}: line {number}: expected an object with 'step' and 'site'")
    return sorted(rows.values(), key=lambda row: row["step"])


def _log_row(line: bytes) -> dict[str, Any] | None:
    """A row, or None for what is none. Figures may be NaN or infinite, as those of a training that failed."""
    try:
        row = json.loads(line, parse_constant=lambda text: math.nan)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("site"), str):
        return None
    figures = (value for key, value in row.items() if key != "site")
    return row if all(value is None or _is_figure(value) for value in figures) else None


def read_frequencies(run_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Firing frequency of every latent, float32 [width] by SAE name, from ``run_dir``/frequencies.npz.

    Raises BadFileError for a file that holds anything else, or far more than its size.
    """
    path = as_path("run_dir", run_dir) / FREQUENCIES
    name = shown(path)

    def check(headers: dict[str, Header]) -> None:
        for key, header in headers.items():
            if header.dtype != torch.float32 or len(header.shape) != 1:
                what = f"{dtype_name(header.dtype)} {list(header.shape)}"
                raise BadFileError(f"{name}: {printable(key)}: expected float32 [width], found {what}")

    frequencies = {key: tensor.numpy() for key, tensor in read_npz(path, check).items()}
    for key, values in frequencies.items():
        if not ((values >= 0) & (values <= 1)).all():
            raise BadFileError(f"{name}: {printable(key)}: expected frequencies from 0 to 1, found others")
    return frequencies


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
