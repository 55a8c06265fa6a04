"""What a finished run leaves, read back and checked, and the names under which a reader sees it.

A run folder holds `results.json`, `train_log.jsonl` and `frequencies.npz`; `plots/` and `report.html` are added. Like
all files they may be damaged or hostile, and what comes out of here can be drawn and shown.
"""

import json
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checks import dtype_name
from ..errors import BadFileError
from ..formats.arrays import Header, printable, read_npz
from ..formats.files import as_path, atomic_write, read_json, shown
from ..runs import check_finished
from ..training.config import KINDS
from .log import TRAIN_LOG, is_figure, read_rows

RESULTS, FREQUENCIES = "results.json", "frequencies.npz"
SAES_FOLDER = "saes"  # of a run: its SAEs
FINISHED = "results"  # the stage that leaves them
MAX_SAES, MAX_SITES = 1000, 8
MAX_MESSAGES = 10_000
_OF_STUDY = {"study": str, "conclusion": str, "plot": dict, "rows": list}
MOST_STUDIES, MOST_STUDY_BYTES = 100, 64 << 20

PLOTS = {
    "training_curves": "Fidelity and sparsity of each SAE while it trained, measured on the training batches.",
    "l0_fvu": "On held-out tokens. Filled marks: the SAEs, a line through those of one kind at one site. Hollow marks: "
    "PCA with as many components as the SAE has active latents. An SAE beats PCA where it lies below its hollow mark.",
    "firing_frequency": "Latents by the share of held-out tokens on which they fire. The grey bar counts those that "
    "never fired; those right of the dashed line fire on more than a tenth of all tokens.",
    "delta_loss": "How much worse the language model predicts held-out text with the site replaced by the SAE's "
    "reconstruction (filled) and by its mean (hollow). Close to zero, far from the hollow mark, is good.",
}


class Column(NamedTuple):
    """A figure of an SAE that tables show."""

    key: str
    short: str | None
    """Heading in the terminal; None: on the page alone."""
    heading: str
    """Heading on the page."""
    form: str
    optional: bool = False
    """Left out of tables of SAEs none of which has it."""


COLUMNS = (
    Column("target_l0", "target", "Target L0", "g", optional=True),
    Column("l0_coefficient", None, "L0 coefficient", ".3g", optional=True),
    Column("k", "k", "k", "g", optional=True),
    Column("seed", None, "Seed", ".0f", optional=True),
    Column("l0", "L0", "L0", ".1f"),
    Column("fvu", "FVU", "FVU", ".3f"),
    Column("pca_fvu", "PCA", "FVU of PCA", ".3f"),
    Column("linear_fvu", "linear", "FVU of a linear map", ".3f", optional=True),
    Column("random_fvu", "random", "FVU of a random dictionary", ".3f", optional=True),
    Column("pair_table_fvu", "pairs", "FVU of token pairs", ".3f"),
    Column("median_fvu", "med.", "FVU, median token", ".3f"),
    Column("pca_median_fvu", "PCA", "PCA, median token", ".3f"),
    Column("top_error_share", None, "Error in top .1 %", ".0%"),
    Column("top_variance_share", None, "Variance in top .1 %", ".0%"),
    Column("reconstruction_bias", None, "Reconstruction bias", ".3f", optional=True),
    Column("gamma", None, "γ", ".2f", optional=True),
    Column("outliers", "outl.", "Outliers", ".0f", optional=True),
    Column("l0_all", None, "L0, all tokens", ".1f", optional=True),
    Column("fvu_all", None, "FVU, all tokens", ".3f", optional=True),
    Column("pca_fvu_all", None, "FVU of PCA, all tokens", ".3f", optional=True),
    Column("random_fvu_all", None, "FVU of a random dictionary, all tokens", ".3f", optional=True),
    Column("delta_loss", "ΔLM", "ΔLM loss", "+.3f"),
    Column("ablation_delta_loss", "ablated", "ΔLM loss, mean ablation", "+.3f"),
    Column("loss_recovered", None, "Loss recovered", ".3f"),
    Column("delta_loss_all", None, "ΔLM loss, all tokens", "+.3f", optional=True),
    Column("loss_recovered_all", None, "Loss recovered, all tokens", ".3f", optional=True),
    Column("dead_fraction", "dead", "Dead", ".0%"),
    Column("high_freq_fraction", ">10 %", "Fire on > 10 %", ".1%"),
)
REQUIRED_NUMBERS = ("l0", "fvu", "pca_fvu")


def read_results(run_dir: str | os.PathLike, required: Collection[str] = REQUIRED_NUMBERS) -> dict[str, Any]:
    """The checked contents of ``run_dir``/results.json; measures that are missing become None, but for those
    ``required``.

    Every SAE has a ``name``: its own, or that of its site where the results have one SAE a site and no names. There
    are always ``warnings``, a list of what the run warned of, and ``parked``, {name: why} of the SAEs that trained no
    more. Raises BadFileError when the file is missing or is not what a finished run writes.
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
    if not isinstance(results.get("title", ""), str):
        raise BadFileError(f"{name}: expected a string 'title', found {results['title']!r:.40}")
    warned, parked = results.get("warnings", []), results.get("parked", {})
    if not isinstance(warned, list) or len(warned) > MAX_MESSAGES or not all(isinstance(text, str) for text in warned):
        raise BadFileError(f"{name}: expected a list of strings 'warnings', found {warned!r:.40}")
    if not isinstance(parked, dict) or not all(isinstance(why, str) for why in parked.values()):
        raise BadFileError(f"{name}: expected an object of strings 'parked', found {parked!r:.40}")
    try:
        json.dumps(results, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadFileError(f"{name}: expected Unicode text, found half of a surrogate pair") from error
    for key in ("loss", "bigram_loss"):
        checked_number(f"{name}: model", key, results["model"].get(key))
    saes = [_checked_sae(name, position, sae, required) for position, sae in enumerate(results["saes"])]
    if len({sae["site"] for sae in saes}) > MAX_SITES:
        raise BadFileError(f"{name}: expected at most {MAX_SITES} different sites, found more")
    return {**results, "saes": saes, "warnings": warned, "parked": parked}


def _checked_sae(path: str, position: int, sae: Any, required: Collection[str]) -> dict[str, Any]:
    where = f"{path}: saes[{position}]"
    if not isinstance(sae, dict) or not isinstance(sae.get("site"), str):
        raise BadFileError(f"{where}: expected an object with the string 'site'")
    for key in ("layer", "width"):
        if type(sae.get(key)) is not int or not 0 <= sae[key] < 2**31:
            raise BadFileError(f"{where}: expected an integer {key!r}, found {sae.get(key)!r:.40}")
    if not isinstance(sae.get("name", ""), str):
        raise BadFileError(f"{where}: expected a string 'name', found {sae['name']!r:.40}")
    if kind_of(sae) not in KINDS:
        raise BadFileError(f"{where}: expected a 'kind' of {', '.join(KINDS)}, found {sae['kind']!r:.40}")
    sae = {
        **sae,
        "name": name_of(sae),
        "kind": kind_of(sae),
        **{column.key: checked_number(where, column.key, sae.get(column.key)) for column in COLUMNS},
    }
    for key in required:
        if sae[key] is None:
            raise BadFileError(f"{where}: expected a number {key!r}, found none")
    return sae


def checked_number(where: str, key: str, value: Any) -> float | None:
    """``value`` as a float, or None; raises BadFileError for what is no finite number."""
    if value is None:
        return None
    if not is_figure(value):
        raise BadFileError(f"{where}: expected a number {key!r}, found {value!r:.40}")
    return float(value)


def read_log(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of ``run_dir``/train_log.jsonl, as `log.read_rows` gives them; `log.sae_of` says whose they are."""
    return read_rows(as_path("run_dir", run_dir) / TRAIN_LOG)


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

    frequencies = {key: tensor.numpy() for key, tensor in read_npz(path, check, max_arrays=MAX_SAES).items()}
    for key, values in frequencies.items():
        if not ((values >= 0) & (values <= 1)).all():
            raise BadFileError(f"{name}: {printable(key)}: expected frequencies from 0 to 1, found others")
    return frequencies


def read_studies(folder: str | os.PathLike) -> list[tuple[Path, dict[str, Any]]]:
    """Paths and contents of the JSON of each study in ``folder``, by name; a file that is none, or cannot be read, is
    left out."""
    found = []
    for path in sorted(as_path("folder", folder).glob("*.json"))[:MOST_STUDIES]:
        with suppress(BadFileError):
            study = read_json(path, MOST_STUDY_BYTES)
            if isinstance(study, dict) and all(isinstance(study.get(key), kind) for key, kind in _OF_STUDY.items()):
                found.append((path, study))
    return found


def write_frequencies(run_dir: str | os.PathLike, frequencies: Mapping[str, torch.Tensor]) -> Path:
    """Write the firing frequencies {SAE name: [width]} as ``run_dir``/frequencies.npz, atomically; its path."""
    path = as_path("run_dir", run_dir) / FREQUENCIES
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in frequencies.items():  # as `numpy.savez`, which takes no array of the name "file"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values.float().cpu().numpy(), allow_pickle=False)
    return path


def site_of(sae: Mapping[str, Any]) -> str:
    """The site of a row of results, as logs name it."""
    return f"layer_{sae['layer']}/{sae['site']}"


def name_of(sae: Mapping[str, Any]) -> str:
    """The name of the SAE of a row of results; that of its site where it has none."""
    return sae.get("name") or site_of(sae)


def kind_of(sae: Mapping[str, Any]) -> str:
    """The kind of the SAE of a row of results; that of Gemma Scope where it says none."""
    return sae.get("kind", "jumprelu")


def kinds_of(saes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those of ``saes``, in the order of `KINDS`, where they are worth a word: unless all are JumpReLU SAEs."""
    present = {kind_of(sae) for sae in saes}
    return [] if present <= {"jumprelu"} else [kind for kind in KINDS if kind in present]


def columns_of(saes: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of a table of ``saes``: those that are not optional, or of which one of them has a figure. A recipe
    that is the same for all is left out, and so is the L0 coefficient where all SAEs that have one aim at an L0."""
    present = {column.key for column in COLUMNS if any(sae.get(column.key) is not None for sae in saes)}
    shown = [column for column in COLUMNS if not column.optional or column.key in present]
    same = {key for key in ("seed", "l0_coefficient") if len({sae.get(key) for sae in saes}) == 1}
    by_coefficient = any(sae.get("target_l0") is None and sae.get("l0_coefficient") is not None for sae in saes)
    hidden = same | (set() if by_coefficient else {"l0_coefficient"})
    return [column for column in shown if column.key not in hidden]


def beats_pca(sae: Mapping[str, Any]) -> bool:
    """False where one of the two is not known."""
    fvu, pca_fvu = sae["fvu"], sae["pca_fvu"]
    return fvu is not None and pca_fvu is not None and fvu < pca_fvu


def summary(saes: Sequence[Mapping[str, Any]]) -> str:
    text = f"{sum(map(beats_pca, saes))} of {len(saes)} SAEs beat PCA of the same rank"
    compared = [sae for sae in saes if sae.get("random_fvu") is not None]
    if compared:
        better = sum(sae["fvu"] < sae["random_fvu"] for sae in compared)
        text += f", {better} of {len(compared)} a random dictionary of the same L0"
    return text


def furthest_from_target(saes: Sequence[Mapping[str, Any]]) -> str:
    """The SAE that misses its target L0 by most, as a sentence; empty where none has one."""
    aimed = [sae for sae in saes if sae.get("target_l0")]
    if not aimed:
        return ""
    worst = max(aimed, key=lambda sae: abs(sae["l0"] / sae["target_l0"] - 1))
    miss = worst["l0"] / worst["target_l0"] - 1
    return (
        f"Farthest from its target L0 is {name_of(worst)}: {worst['l0']:.1f} for {worst['target_l0']:g} ({miss:+.0%})"
    )


def judged_on(model: Mapping[str, Any]) -> str:
    """Which rows all figures of a run are of, as far as its results say."""
    which = model.get("held_out")
    return "All figures are of held-out text" + (f": {which}" if isinstance(which, str) else "")


def source_of(results: Mapping[str, Any]) -> str:
    """Which rows, seed and version the figures of results are of: those of a run, an evaluation, a study, RAVEL,
    probes or dashboards, as far as they say."""
    settings = [results.get(key) for key in ("evaluation", "ravel", "probing", "text", "model")]
    tables = [results, *(each for each in settings if isinstance(each, Mapping))]
    model, environment = results.get("model"), results.get("environment")
    held_out = model.get("held_out") if isinstance(model, Mapping) else None
    of_text = next((each for each in tables if isinstance(each.get("sequences"), int)), None)
    parts = []
    if isinstance(held_out, str):
        parts.append(held_out)
    elif of_text is not None:
        what, context = of_text.get("text"), of_text.get("context")
        parts.append(f"{of_text['sequences']:,} rows")
        parts[0] += f" of {context:,} tokens" if isinstance(context, int) else ""
        parts[0] += f" of {what}" if isinstance(what, str) else ""
    seed = next((each["seed"] for each in tables if isinstance(each.get("seed"), int)), None)
    if seed is not None:
        parts.append(f"seed {seed}")
    versions = [results.get("version"), environment.get("gemmascope") if isinstance(environment, Mapping) else None]
    version = next((each for each in versions if isinstance(each, str)), None)
    if version is not None:
        parts.append(f"gemmascope {version}")
    return "; ".join(parts)


def title_of(results: Mapping[str, Any]) -> str:
    """The heading of a run: its own title, else by the name of the model."""
    name = results["model"].get("name")
    return results.get("title") or f"Sparse autoencoders on {name if isinstance(name, str) else 'a language model'}"


def formatted(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
