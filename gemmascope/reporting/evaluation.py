"""What a person sees of an evaluation: the table, the figures and the page, from the files that it left."""

import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFileError
from ..formats.files import as_path, atomic_write, shown
from .html import document, figure, section
from .log import is_figure
from .page import METRICS, MODEL_LABELS, MOST_WARNINGS, STYLE, facts, sae_table
from .results import (
    PLOTS,
    RESULTS,
    Column,
    beats_pca,
    checked_number,
    formatted,
    kind_of,
    kinds_of,
    name_of,
    read_frequencies,
    read_results,
    source_of,
)

if TYPE_CHECKING:
    import rich.table

PAGE = "report.html"
# Of figures in whose place an interval may stand as well.
WITH_INTERVAL = ("l0", "fvu", "delta_loss")
SETS = {"": "text", "_inliers": "no outliers", "_every": "special tokens too"}

# In the terminal, and first on the page.
MAIN = (
    Column("l0", "L0", "L0", ".1f"),
    Column("fvu", "FVU", "FVU", ".3f"),
    Column("pca_fvu", "PCA", "FVU of PCA", ".3f"),
    Column("linear_fvu", "linear", "FVU of a linear map", ".3f", optional=True),
    Column("random_fvu", "random", "FVU of a random dictionary", ".3f", optional=True),
    Column("pair_table_fvu", "pairs", "FVU of token pairs", ".3f"),
    Column("delta_loss", "ΔLM", "ΔLM loss", "+.3f"),
    Column("ablation_delta_loss", "mean", "ΔLM loss, mean ablation", "+.2f"),
    Column("loss_recovered", "recov", "Loss recovered", ".3f"),
    Column("dead_fraction", "dead", "Dead", ".0%"),
    Column("reconstruction_bias", "γ", "Reconstruction bias γ", ".2f"),
)
# What a terminal of 100 columns does without, in this order.
LEAVES_OUT = ("ablation_delta_loss", "pair_table_fvu", "random_fvu", "linear_fvu")
MORE = (
    Column("explained_variance", None, "Explained variance, of sums", ".3f"),
    Column("explained_variance_of_tokens", None, "Explained variance, mean of tokens", ".3f"),
    Column("fvu_zero", None, "FVU about zero", ".3f"),
    Column("cosine", None, "Cosine", ".3f"),
    Column("norm_ratio", None, "Norm ratio", ".3f"),
    Column("kl", None, "KL", ".4f"),
    Column("zero_ablation_delta_loss", None, "ΔLM loss, zero ablation", "+.3f"),
    Column("loss_recovered_from_zero", None, "Loss recovered, zero ablation", ".3f"),
    Column("high_freq_fraction", None, "Fire on > 10 %", ".1%"),
    Column("outliers", None, "Outliers", ".0f"),
    Column("outlier_share", None, "Outliers, share of tokens", ".2%"),
    Column("outlier_error_share", None, "Outliers, share of the error", ".1%"),
    Column("outlier_square_share", None, "Outliers, share of ‖x‖²", ".1%"),
    Column("gamma", None, "‖mean‖/‖std‖", ".2f"),
)
# Of each set of tokens.
OF_SETS = ("tokens", "l0", "fvu", "delta_loss", "kl", "loss_recovered")

DESCRIBED = {
    **{name: METRICS[name] for name in ("Kind", "Site", "Width", "L0", "FVU", "FVU of PCA")},
    **{name: METRICS[name] for name in ("FVU of a linear map", "FVU of a random dictionary", "FVU of token pairs")},
    "ΔLM loss": METRICS["ΔLM loss"],
    "ΔLM loss, mean ablation": METRICS["ΔLM loss, mean ablation"],
    "ΔLM loss, zero ablation": "The same when the activation is replaced by zero.",
    "Loss recovered": METRICS["Loss recovered"],
    "Dead": "Share of latents that fired on no token of this text. Rare latents count too.",
    "Reconstruction bias γ": "Σ‖x̂‖² / Σ⟨x̂, x⟩: 1 where the reconstruction is of the right size, below it where it is "
    "too small, as an L1 penalty makes it.",
    "Explained variance, of sums": "1 − FVU.",
    "Explained variance, mean of tokens": "The mean over tokens of 1 − the token's squared error over its squared "
    "distance from the mean. Tokens near the mean count as much as those far from it.",
    "FVU about zero": "The squared error over the sum of squares of the activations, which a large mean makes small.",
    "Cosine": "Between the activation and its reconstruction, on average.",
    "Norm ratio": "Of the norms of reconstruction and activation, on average.",
    "KL": "Of the next token's distribution with the reconstruction in place from that without, in nats.",
    "Outliers": "Tokens whose norm is many times the median norm of the site.",
    "‖mean‖/‖std‖": METRICS["γ"],
    "In brackets": "An interval from drawing the documents anew. Two SAEs were judged on the same draws.",
    "Text": "Tokens that are neither BOS nor EOS nor PAD: what all figures are of unless it says otherwise. The "
    "reconstruction takes the place of the activation there alone.",
    "No outliers": "The same without the outliers, which keep their activation.",
    "Special tokens too": "BOS and EOS count among the activations, and the reconstruction takes their place as well. "
    "Predictions from them and of them never count.",
}
FIGURES = {
    "l0_delta_loss": "Sparsity against what the language model loses, with intervals. Below and to the left is better.",
    **{name: PLOTS[name] for name in ("l0_fvu", "firing_frequency", "delta_loss")},
}


def is_evaluation(folder: str | os.PathLike) -> bool:
    """Whether the results in ``folder`` are those of an evaluation. Raises as `read_evaluation`."""
    return isinstance(read_results(folder, ()).get("evaluation"), dict)


def read_evaluation(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked contents of the results.json of an evaluation; measures that are missing become None.

    Raises BadFileError when the file is missing or is not what a finished evaluation writes.
    """
    results = read_results(folder, ())
    name = shown(Path(folder) / RESULTS)
    if not isinstance(results.get("evaluation"), dict):
        raise BadFileError(f"{name}: expected the results of an evaluation, found those of a run")
    keys = {column.key for column in (*MAIN, *MORE)} | {f"{key}{suffix}" for key in OF_SETS for suffix in SETS}
    saes = []
    for position, sae in enumerate(results["saes"]):
        where = f"{name}: saes[{position}]"
        found: dict[str, Any] = {key: checked_number(where, key, sae.get(key)) for key in keys}
        for key in (f"{each}_interval{suffix}" for each in WITH_INTERVAL for suffix in SETS):
            found[key] = _interval(where, key, sae.get(key))
        saes.append({**sae, **found})
    return {**results, "saes": saes}


def _interval(where: str, key: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_figure, value)):
        raise BadFileError(f"{where}: expected two numbers {key!r}, found {value!r:.40}")
    return [float(each) for each in value]


def _columns(saes: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[Column]:
    return [each for each in columns if not each.optional or any(sae.get(each.key) is not None for sae in saes)]


def _summary(saes: Sequence[Mapping[str, Any]]) -> str:
    text = f"{sum(map(beats_pca, saes))} of {len(saes)} beat PCA of the same rank"
    compared = [sae for sae in saes if sae.get("random_fvu") is not None and sae["fvu"] is not None]
    if compared:
        better = sum(sae["fvu"] < sae["random_fvu"] for sae in compared)
        text += f", {better} of {len(compared)} a random dictionary of the same L0"
    return text


def _judged_on(results: Mapping[str, Any]) -> str:
    which, evaluation = results["model"].get("held_out"), results["evaluation"]
    text = f"Judged on {which}" if isinstance(which, str) else "Judged on held-out text"
    level, draws = evaluation.get("level"), evaluation.get("draws")
    if isinstance(level, float) and isinstance(draws, int):
        text += f"; ±: half of the {level:.0%} interval over documents, {draws:,} draws"
    return text


# ---- terminal

WIDTH, GAP = 100, 2
SHOWN_WITH_INTERVAL = ("fvu", "delta_loss")
LEAST_SHOWN = 0.0005


def _short(number: str) -> str:
    """Without the 0 before the point: many columns have to fit."""
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


def evaluation_table(results: Mapping[str, Any]) -> "rich.table.Table":
    """The SAEs of an evaluation as a `rich.table.Table` of at most 100 columns; ✓ where one beats PCA of its rank.

    results: as `read_evaluation` returns them.
    """
    import rich.box
    import rich.table
    import rich.text

    saes = results["saes"]
    several = bool(kinds_of(saes))
    fixed = ["site", "layer", *(["kind"] if several else []), "width"]
    columns, left_out = _columns(saes, MAIN), []

    def cells(sae: Mapping[str, Any], column: Column) -> list[str]:
        text = _short(formatted(sae.get(column.key), column.form))
        ends = sae.get(f"{column.key}_interval") if column.key in SHOWN_WITH_INTERVAL else None
        if ends is not None:
            half = (ends[1] - ends[0]) / 2
            text += f"±{_short(format(half, '.3f' if half >= LEAST_SHOWN else '.4f'))}"
        return [text, "✓" if beats_pca(sae) else "✗"] if column.key == "pca_fvu" else [text]

    def heads(column: Column) -> list[str]:
        return [column.short or "", *(["✓"] if column.key == "pca_fvu" else [])]

    def names(sae: Mapping[str, Any]) -> list[str]:
        site = sae["site"] if not isinstance(sae.get("site_out"), str) else f"{sae['site']}→{sae['site_out']}"
        return [site, str(sae["layer"]), *([kind_of(sae)] if several else []), str(sae["width"])]

    def rows_of(columns: Sequence[Column]) -> list[list[str]]:
        head = [*fixed, *(text for column in columns for text in heads(column))]
        body = [[*names(sae), *(text for column in columns for text in cells(sae, column))] for sae in saes]
        return [head, *body]

    def width(columns: Sequence[Column]) -> int:
        return GAP + sum(GAP + max(map(len, texts)) for texts in zip(*rows_of(columns), strict=True))

    for key in LEAVES_OUT:
        if width(columns) <= WIDTH:
            break
        left_out += [column.heading for column in columns if column.key == key]
        columns = [column for column in columns if column.key != key]
    sentences = [_summary(saes), _judged_on(results)]
    sentences += [f"In the report alone: {'; '.join(left_out)}"] if left_out else []
    table = rich.table.Table(
        title=rich.text.Text(f"Language model: loss {formatted(results['model'].get('loss'), '.3f')} nats a token"),
        caption=rich.text.Text(" ".join(f"{sentence}." for sentence in sentences)),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    head, *body = rows_of(columns)
    for text in head:
        table.add_column(text, justify="left" if text in ("site", "kind", "✓") else "right", no_wrap=True)
    for index, (sae, row) in enumerate(zip(saes, body, strict=True)):
        ends = index + 1 < len(saes) and saes[index + 1]["layer"] != sae["layer"]
        table.add_row(*map(rich.text.Text, row), end_section=ends)
    return table


# ---- page


def write_evaluation(folder: str | os.PathLike) -> Path:
    """Draw the figures of an evaluation into ``folder``/plots, write ``folder``/report.html, one self-contained page,
    and return its path. Needs matplotlib."""
    from . import evaluation_plots, plots

    folder = as_path("folder", folder)
    results = read_evaluation(folder)
    saes = results["saes"]
    drawn = {
        "l0_delta_loss": evaluation_plots.l0_against_delta_loss(saes),
        "l0_fvu": plots.l0_against_fvu(saes),
        "firing_frequency": plots.firing_frequencies(saes, read_frequencies(folder)),
        "delta_loss": plots.loss_increases(saes),
    }
    images = {name: folder / "plots" / f"{name}.png" for name in FIGURES}
    for name, image in images.items():
        with atomic_write(image) as temporary:
            drawn[name].savefig(temporary, format="png", facecolor="white")
    page = folder / PAGE
    with atomic_write(page) as temporary:
        temporary.write_text(render(folder, results, images), encoding="utf-8")
    return page


def _text_of(sae: Mapping[str, Any], column: Column) -> str:
    text = formatted(sae.get(column.key), column.form)
    base = next((each for each in WITH_INTERVAL if column.key == each or column.key.startswith(f"{each}_")), None)
    if base is None or column.key not in {f"{base}{suffix}" for suffix in SETS}:
        return text
    ends = sae.get(f"{base}_interval{column.key.removeprefix(base)}")
    return text if ends is None else f"{text} ({ends[0]:{column.form}} to {ends[1]:{column.form}})"


def _of_sets() -> list[Column]:
    forms = {column.key: (column.heading, column.form) for column in (*MAIN, *MORE)} | {"tokens": ("Tokens", ".0f")}
    return [
        Column(f"{key}{suffix}", None, f"{forms[key][0]}, {name}", forms[key][1])
        for suffix, name in SETS.items()
        for key in OF_SETS
    ]


def render(folder: Path, results: Mapping[str, Any], images: Mapping[str, Path]) -> str:
    """The page. images: a PNG for each of `FIGURES`."""
    saes, model = results["saes"], results["model"]
    labels = MODEL_LABELS | {"sequences": "Rows of text", "sequences_there": "Rows that there are"}
    labels |= {"documents": "Documents", "control_sequences": "Rows that controls are fitted on"}
    labels |= {"predictions": "Predictions that losses are of"}
    warned = results["warnings"][:MOST_WARNINGS]
    several = ("Kind",) if kinds_of(saes) else ()
    main, more = _columns(saes, MAIN), _columns(saes, MORE)
    headings = {"Site", "Width", *several, *(column.heading for column in (*main, *more))}
    always = ("In brackets", "Text", "No outliers", "Special tokens too")
    terms = [(name, text) for name, text in DESCRIBED.items() if name in headings or name in always]
    glossary = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in terms)
    says = escape(f"{_summary(saes)} (✓). {_judged_on(results)}.")
    source = source_of(results)
    figures = "\n".join(figure(path.read_bytes(), FIGURES[name], True, source) for name, path in images.items())
    wide = "<div class=wide>{}</div>"
    sections = [
        *([("Warnings", f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in warned)}</ul>")] if warned else []),
        ("Sparse autoencoders", f"<p>{says}</p>\n{wide.format(sae_table(saes, main, _text_of))}"),
        ("More measures", wide.format(sae_table(saes, more, _text_of))),
        ("By tokens", wide.format(sae_table(saes, _of_sets(), _text_of))),
        ("Plots", figures),
        ("What the figures mean", f"<dl>\n{glossary}\n</dl>"),
        ("Language model and text", facts((labels.get(str(key), str(key)), value) for key, value in model.items())),
        ("Where they are", facts((name_of(sae), str(sae.get("path", "–"))) for sae in saes)),
        ("Settings", facts(results["evaluation"].items())),
        ("Environment", facts((results.get("environment") or {}).items())),
    ]
    content = "\n".join(section(*titled) for titled in sections)
    title = results.get("title") or "Evaluation"
    body = f"""<h1>{escape(title)}</h1>
<p>How sparse and how faithful sparse autoencoders (SAEs) are on held-out text, and what the language model loses by
them, each beside controls that have learnt nothing or little.</p>
{content}"""
    return document(f"gemmascope: {folder.name}", body, STYLE)
