"""The HTML page of a run."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .html import document, figure, section
from .related import as_html, related
from .results import (
    PLOTS,
    Column,
    beats_pca,
    columns_of,
    formatted,
    furthest_from_target,
    judged_on,
    kind_of,
    kinds_of,
    name_of,
    source_of,
    summary,
    title_of,
)

STYLE = """
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal; }
th.name, td.name { text-align: left; }
tr.first td { border-top: 2px solid var(--soft); }
.saes { width: 100%; }
.wide { overflow-x: auto; }
.saes td { white-space: nowrap; }
.facts td { text-align: left; }
.facts th { text-align: left; font-weight: 400; vertical-align: top; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.key { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem 1.2rem;
  padding: 0; margin: 1.2rem 0; }
.key b { display: block; font-size: 1.5rem; line-height: 1.2; }
.key span { color: var(--soft); font-size: .875rem; }
dt { font-weight: 600; margin-top: .7rem; }
dd { margin: 0; max-width: 46rem; }
@media screen and (max-width: 62rem) { /* a sheet of paper is narrower, and keeps the table */
  .saes thead { display: none; }
  .saes, .saes tbody { display: block; }
  .saes tr { display: grid; grid-template-columns: 1fr 1fr; column-gap: 1.2rem; border-top: 2px solid var(--soft);
    padding: .4rem 0; }
  .saes td { display: flex; justify-content: space-between; gap: .5rem; border: 0; padding: .1rem 0;
    overflow-wrap: normal; }
  .saes td::before { content: attr(data-name); color: var(--soft); text-align: left; white-space: normal; }
  .saes tr.first td { border: 0; }
}
@media print {
  dt { break-after: avoid; }
  .key b { font-size: 1.1rem; }
  .key { grid-template-columns: repeat(5, 1fr); margin: .6rem 0; }
  .saes, .facts { font-size: 7.5pt; }
  th, td { padding: .12rem .25rem; }
  tr, dt, dd { break-inside: avoid; }
}
"""

MOST_WARNINGS = 50

METRICS = {
    "Kind": "Which latents fire. jumprelu: those above a threshold each, learnt through a penalty on L0; relu: those "
    "above 0, under an L1 penalty; gated: as relu, with magnitudes of their own; topk: the k largest of each token; "
    "batchtopk: as many on average over a batch, by a threshold afterwards; matryoshka: the same, where the first "
    "latents must also do alone.",
    "k": "Active latents a token that the SAE was given: of each (topk), or on average (batchtopk, matryoshka).",
    "Target L0": "The L0 that the training of the SAE aimed at.",
    "L0 coefficient": "λ, the weight of the sparsity penalty.",
    "Seed": "Of the weights that the SAE started from.",
    "Site": "Where in a layer the SAE reads. att: the attention heads' outputs before they are mixed; mlp: what the "
    "feed-forward block adds; resid: the residual stream after the layer.",
    "Width": "How many latents the SAE has. Each is one direction it can use to explain an activation.",
    "L0": "How many latents are active on a token, on average. Fewer is sparser and easier to read.",
    "FVU": "Fraction of variance unexplained: the squared error of the reconstruction, divided by that of always "
    "answering with the mean. 0 is perfect, 1 is no better than the mean.",
    "FVU of PCA": "The same for principal components, as many as the SAE has active latents. Where "
    "the SAE is not below it (✓), a plain linear projection does as well with the same number of values.",
    "FVU of a linear map": "Of a transcoder: the same for the affine map from what it reads to its target that fits "
    "the training tokens best. One that is not below it has learnt nothing that is not linear.",
    "FVU of a random dictionary": "The same for as many random directions as the SAE has latents, of which each token "
    "takes the L0 that fit it best, with the best coefficients. An SAE that is not below it has learnt no better "
    "directions than chance gives.",
    "FVU of token pairs": "The same for a lookup table that knows only the current and the previous token. Where it "
    "comes close to the SAE, the site holds little beyond the last two tokens.",
    "FVU, median token": "The squared error of a token's reconstruction divided by its squared distance from the mean, "
    "for the token in the middle. Where a few tokens of huge norm hold most of the variance, FVU speaks of them alone, "
    "and this of the others.",
    "PCA, median token": "The same for principal components, as many as the SAE has active latents.",
    "Error in top .1 %": "Share of the squared error in the thousandth of the tokens where it is largest.",
    "Variance in top .1 %": "Share of the variance in the thousandth of the tokens that lie farthest from the mean. "
    "Where it is large, FVU and FVU of PCA say little of ordinary tokens.",
    "γ": "Length of the mean activation over the standard deviation. Where it is large, the mean outweighs all that an "
    "SAE has to explain.",
    "Outliers": "Held-out tokens whose activation is many times as long as that of the median token. Where the run "
    "leaves them out, every figure is of the other tokens, and those of all tokens stand beside them.",
    "all tokens": "The figure with the outliers among the tokens; for ΔLM loss and loss recovered, with their "
    "activations replaced too.",
    "ΔLM loss": "How much the language model's loss rises, in nats a token, when the reconstruction takes the place "
    "of the true activation. 0 means that nothing the model needs was lost.",
    "ΔLM loss, mean ablation": "The same when the activation is replaced by its mean: what the site is worth to the "
    "model.",
    "Loss recovered": "1 − ΔLM loss / ΔLM loss of mean ablation. 1 is perfect, 0 is no better than the mean. It "
    "means nothing (–) where removing the site does not hurt.",
    "Dead": "Share of latents that fired on no held-out token. Wasted width; rare latents count too.",
    "Fire on > 10 %": "Share of latents that fire on more than a tenth of the tokens.",
    "Bigram baseline": "Loss of predicting each byte from the one before, counted on the same text. A language model "
    "that is not below it knows no more than pairs of bytes.",
}

MODEL_LABELS = {
    "name": "Name",
    "layers": "Layers",
    "d_model": "Width (d_model)",
    "parameters": "Parameters",
    "text": "Text",
    "text_bytes": "Text, bytes",
    "held_out": "Held-out rows are",
    "held_out_rows": "Held-out rows",
    "loss_rows": "Of them, rows that the model read",
    "held_out_tokens": "Held-out tokens",
    "seed": "Seed",
    "context": "Tokens of a row",
    "tokens": "Tokens that the SAEs trained on",
    "loss": "Held-out loss, nats a token",
    "bigram_loss": "Bigram baseline, nats a token",
    "steps": "Its own training steps",
    "seconds": "Its own training time, s",
}


def shown(value: Any) -> str:
    """A JSON value as escaped text."""
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "–"}[value]
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False)
    return escape(text)


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    body = "\n".join(f"<tr><th scope=row>{escape(name)}</th><td>{shown(value)}</td></tr>" for name, value in rows)
    return f"<table class=facts>\n{body}\n</table>"


def figure_of(sae: Mapping[str, Any], column: Column) -> str:
    return formatted(sae.get(column.key), column.form)


def sae_table(
    saes: Sequence[Mapping[str, Any]],
    columns: Sequence[Column] | None = None,
    text_of: Callable[[Mapping[str, Any], Column], str] = figure_of,
) -> str:
    """A row for each SAE. columns: by default those of a run; text_of: of a cell."""
    columns = columns_of(saes) if columns is None else columns
    head = "".join(f"<th scope=col>{escape(column.heading)}</th>" for column in columns)
    several = bool(kinds_of(saes))
    rows, previous = [], None
    for sae in saes:
        wins = beats_pca(sae)
        cells = [f"<td class=name data-name=Site>{escape(sae['site'])}</td>"]
        cells.append(f"<td data-name=Layer>{sae['layer']}</td>")
        if several:
            cells.append(f"<td class=name data-name=Kind>{escape(kind_of(sae))}</td>")
        cells.append(f"<td data-name=Width>{sae['width']}</td>")
        for column in columns:
            text, kind = text_of(sae, column), ""
            if column.key == "fvu":
                text, kind = f"{text} {'✓' if wins else '✗'}", f" class={'good' if wins else 'bad'}"
            cells.append(f'<td{kind} data-name="{escape(column.heading)}">{escape(text)}</td>')
        rows.append(f"<tr{' class=first' if sae['layer'] != previous else ''}>{''.join(cells)}</tr>")
        previous = sae["layer"]
    kind_head = "<th scope=col class=name>Kind</th>" if several else ""
    return (
        f"<table class=saes>\n<thead><tr><th scope=col class=name>Site</th><th scope=col>Layer</th>"
        f"{kind_head}<th scope=col>Width</th>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    )


def key_figures(results: Mapping[str, Any]) -> str:
    model: Mapping[str, Any] = results["model"]
    saes = results["saes"]
    loss, bigram = (model.get(key) for key in ("loss", "bigram_loss"))
    figures = [(f"{sum(map(beats_pca, saes))} of {len(saes)}", "SAEs beat PCA of the same rank")]
    if isinstance(loss, (int, float)) and isinstance(bigram, (int, float)):
        side = "below" if loss < bigram else "above"
        figures.insert(0, (f"{abs(bigram - loss):.2f} nats", f"language model {side} the bigram baseline"))
    for key, form, label in (("l0", ".1f", "median L0"), ("fvu", ".3f", "median FVU")):
        figures.append((format(statistics.median(sae[key] for sae in saes), form), label))
    recovered = [value for sae in saes if (value := sae.get("loss_recovered")) is not None]
    if recovered:
        figures.append((f"{statistics.median(recovered):.3f}", "median loss recovered"))
    items = "\n".join(f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>" for value, label in figures)
    return f"<ul class=key>\n{items}\n</ul>"


def reload_code(run_dir: Path, saes: list[Mapping[str, Any]]) -> str:
    best = min(saes, key=lambda sae: sae["fvu"] / max(sae["pca_fvu"], 1e-12))
    path = str(best.get("path", ""))
    inside = run_dir / path
    if best.get("site_out") is not None:
        return (
            "from gemmascope import Transcoder\n\n"
            f"transcoder = Transcoder.load({str(inside if os.path.exists(inside) else Path(path))!r})\n"
            "f = transcoder.encode(x)   # x: activations where it reads, [..., d_in]; f: [..., d_sae], mostly zeros\n"
            "y_hat = transcoder(x)      # what it makes of them, [..., d_out]"
        )
    load, what = ("load_sae", "load_sae") if kinds_of(saes) else ("JumpReLUSAE", "JumpReLUSAE.load")
    return (
        f"from gemmascope import {load}\n\n"
        f"sae = {what}({str(inside if os.path.exists(inside) else Path(path))!r})\n"
        "f = sae.encode(x)       # x: activations of the site, [..., d_model]; f: [..., d_sae], mostly zeros\n"
        "x_hat = sae.decode(f)   # the reconstruction, [..., d_model]"
    )


def glossary(saes: list[Mapping[str, Any]], model: Mapping[str, Any]) -> str:
    """What the figures shown mean."""
    headings = {"Site", "Width", *(column.heading for column in columns_of(saes))}
    if kinds_of(saes):
        headings.add("Kind")
    if any(heading.endswith(", all tokens") for heading in headings):
        headings.add("all tokens")
    if model.get("bigram_loss") is not None:
        headings.add("Bigram baseline")
    terms = ((name, text) for name, text in METRICS.items() if name in headings)
    return "<dl>\n" + "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in terms) + "\n</dl>"


def messages(results: Mapping[str, Any]) -> str:
    """What the run warned of, and the SAEs that trained no more; empty without any."""
    warned, parked = results.get("warnings") or [], results.get("parked") or {}
    parts = []
    if parked:
        which = "1 SAE was parked: it" if len(parked) == 1 else f"{len(parked)} SAEs were parked: they"
        parts.append(f"<p>{which} trained no more, and the figures below are without.</p>")
        parts.append(facts(parked.items()))
    if warned:
        items = "\n".join(f"<li>{escape(text)}</li>" for text in warned[:MOST_WARNINGS])
        if len(warned) > MOST_WARNINGS:
            items += f"\n<li>… and {len(warned) - MOST_WARNINGS} more, in results.json</li>"
        parts.append(f"<ul>\n{items}\n</ul>")
    return "\n".join(parts)


def render(run_dir: Path, results: Mapping[str, Any], images: Mapping[str, Path]) -> str:
    """The page. images: a PNG for each of `report.PLOTS`."""
    model: Mapping[str, Any] = results["model"]
    saes = results["saes"]
    model_rows = [(MODEL_LABELS.get(key, key), value) for key, value in model.items()]
    environment, seconds = (results.get(key) or {} for key in ("environment", "seconds"))
    source = source_of(results)
    figures = "\n".join(figure(path.read_bytes(), PLOTS[name], True, source) for name, path in images.items())
    files = [(name_of(sae), str(sae.get("path", "–"))) for sae in saes]
    title, warned = title_of(results), messages(results)
    sentences = (f"{summary(saes)} (✓)", furthest_from_target(saes), judged_on(model))
    says = escape(" ".join(f"{sentence}." for sentence in sentences if sentence))
    sections = [
        *([("Warnings of the run", warned)] if warned else []),
        ("Language model", facts(model_rows)),
        ("Sparse autoencoders", f"<p>{says}</p>\n<div class=wide>{sae_table(saes)}</div>"),
        *([("More of this run", as_html(more))] if (more := related(run_dir)) else []),
        ("Plots", figures),
        ("What the figures mean", glossary(saes, model)),
        (
            "Use an SAE in Python",
            f"<pre><code>{escape(reload_code(run_dir, saes))}</code></pre>\n{facts(files)}",
        ),
        ("Environment", facts(environment.items())),
    ]
    if seconds:
        sections.append(("Time, in seconds", facts((name.replace("_", " "), value) for name, value in seconds.items())))
    content = "\n".join(section(*titled) for titled in sections)
    what = "Sparse autoencoders" if kinds_of(saes) else "JumpReLU sparse autoencoders"
    body = f"""<h1>{escape(title)}</h1>
<p>{what} (SAEs) rewrite each activation of a language model as a few active
<em>latents</em>. This page shows how sparse and how faithful those of this run are, and what the model loses by
them.</p>
{key_figures(results)}
{content}"""
    return document(f"gemmascope: {run_dir.name}", body, STYLE)
