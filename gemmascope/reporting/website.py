"""The site of dashboards: every SAE of a run, a list of its latents, and a page of each, as files that need no server.

    index.html         the SAEs
    saes/NAME/         of an SAE: index.html, and data/ with what it loads
    vocabulary.js, text-0.js, …   the strings of tokens and the rows of text, of all SAEs
    site.js, site.css  what every page is made of

Pages load the files of the SAE looked at and, of its latents, those looked at; from nowhere else, which their policy
forbids.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check_type
from ..dashboards.naming import plain_names
from ..dashboards.overview import Overview, TableOf
from ..errors import EnvironmentProblemError
from ..formats.files import as_path, shown
from .latents import CHUNK, Tokens, call, facts_script, latent_scripts, list_scripts, text_scripts
from .results import formatted

INDEX, SCRIPT, STYLE, SAES, DATA = "index.html", "site.js", "site.css", "saes", "data"
POLICY = "default-src 'none'; script-src 'self' file:; style-src 'self' file:"

LIST = """<form id=form role=search>
<label class=grow>Search tokens, or the number of a latent
<input type=search id=search autocomplete=off autocapitalize=off spellcheck=false aria-keyshortcuts="/"></label>
<label>Look in
<select id=in><option value=both>both<option value=firing>tokens it fires on
<option value=raised>tokens it raises</select></label>
<label>Fires
<select id=fires><option value=all>any<option value=alive>at all<option value=dead>never
<option value=rare>≤ 0.1 %<option value=often>> 10 %</select></label>
<label class=narrow>Order
<select id=sort><option value=index>by number<option value="index down">by number, last first
<option value="frequency down">most frequent first<option value=frequency>rarest first
<option value="max down">largest activation first<option value=max>smallest activation first</select></label>
</form>
<p id=count role=status></p>
<div class=head>
<button type=button data-sort=index data-name=Latent></button><span>Fires most on</span><span>Raises most</span>
<span class=right><button type=button data-sort=frequency data-name=Frequency></button></span>
<span class=right><button type=button data-sort=max data-name=Max></button></span><span>Activations</span>
</div>"""

KEYS = """<p>Keys: <kbd>/</kbd> search, <kbd>j</kbd> <kbd>k</kbd> or arrows next and previous, <kbd>Enter</kbd> open,
<kbd>u</kbd> or <kbd>Esc</kbd> back to the list, <kbd>←</kbd> <kbd>→</kbd> in an example: its active tokens.</p>"""

NOTES = """<p>Signs in tokens: ␣ space, ⏎ new line, ⇥ tab, ∅ an empty token, ‹200B› the number of a character that
cannot be seen. Single spaces within an example are left as they are. An example is the largest activation of a passage;
its token is underlined. Logits are for an activation of 1, up to the scale of the final norm.</p>"""


def write_website(
    overview: Overview,
    folder: str | os.PathLike,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    check: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Write the site of ``overview`` into ``folder``; an earlier site there is replaced. index.html comes last.

    results: rows of results whose figures the first page shows beside, of the SAEs of their ``name``. check: called
    with the latents done, of all SAEs. Returns the files, the index first.

    Raises ValueError for a folder with other files in it, BadFileError as `Overview.table`, EnvironmentProblemError
    when a file cannot be written.
    """
    check_type("overview", overview, Overview)
    folder = as_path("folder", folder)
    check_type("results", results, Sequence)
    _clear(folder)
    tokens, names = Tokens(overview), plain_names([of.name for of in overview.saes])
    written = [_write(folder / name, _asset(name)) for name in (SCRIPT, STYLE)]
    written.append(_write(folder / "vocabulary.js", call("vocabulary", tokens.strings)))
    for number, script in enumerate(text_scripts(overview, tokens)):
        written.append(_write(folder / f"text-{number}.js", script))
    rows: list[_Row] = []
    done = 0
    for of, name in zip(overview.saes, names, strict=True):
        table, inside = overview.table(of.name), folder / SAES / name
        written.append(_write(inside / DATA / "facts.js", facts_script(overview, of, table)))
        for number, script in enumerate(list_scripts(overview, table, tokens)):
            written.append(_write(inside / DATA / f"list-{number}.js", script))
        for number, script in enumerate(latent_scripts(table, tokens)):
            written.append(_write(inside / DATA / f"latents-{number}.js", script))
            check(done + min((number + 1) * CHUNK, of.d_sae))
        written.append(_write(inside / INDEX, sae_page(overview, of)))
        l0, dead = float(table.fired.sum()) / max(overview.n_tokens, 1), float((table.fired == 0).double().mean())
        known = next((row for row in results if row.get("name") == of.name), {})
        rows.append(_Row(of, f"{SAES}/{name}/{INDEX}", l0, dead, known))
        done += of.d_sae
    return [_write(folder / INDEX, suite_page(overview, rows)), *written]


def _clear(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / SCRIPT).is_file()):
        raise ValueError(f"folder: expected a new one or that of an earlier site, found {shown(folder)}")
    (folder / INDEX).unlink(missing_ok=True)
    shutil.rmtree(folder / SAES, ignore_errors=True)
    for text in folder.glob("text-*.js"):
        text.unlink()


def _write(path: Path, content: str) -> Path:
    """Not as one: a site is whole when its index is there, which is written last."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(path)}: cannot be written: {error.strerror or error}") from error
    return path


def _asset(name: str) -> str:
    return (files("gemmascope.reporting") / "web" / name).read_text(encoding="utf-8")


# ---- pages


def _page(title: str, body: str, base: str, script: bool) -> str:
    """base: the way to the folder of the site. body: HTML."""
    tag = f'<script src="{base}{SCRIPT}" defer></script>\n' if script else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="stylesheet" href="{base}{STYLE}">
{tag}</head>
<body>
{body}
</body>
</html>
"""


def provenance(overview: Overview) -> str:
    """Which text and model all figures are of, as HTML."""
    rows, context = overview.text.tokens.shape
    return (
        f"<p>All figures are of {overview.n_tokens:,} tokens in {rows:,} rows of {context:,} of "
        f"{escape(overview.what)}, read by {escape(overview.model)}; special tokens are not counted. "
        f"Seed {overview.seed}. gemmascope {escape(overview.version)}.</p>"
    )


def _about(of: TableOf) -> str:
    place = str(of.reads) if of.reads == of.writes else f"{of.reads} → {of.writes}"
    return f"{of.kind}, {of.d_sae:,} latents, {place}"


def sae_page(overview: Overview, of: TableOf) -> str:
    """The page of an SAE; its list and its latents are drawn by the script."""
    together = f"Latents that fire together are counted on a sample of {of.n_sampled:,} tokens."
    body = f"""<a class=skip href="#rows" id=skip>Skip to the latents</a>
<header>
<nav><a href="../../{INDEX}">All SAEs</a></nav>
<h1>{escape(of.name)}</h1>
<p class=soft>{escape(_about(of))}</p>
</header>
<noscript><p>The latents are drawn by a script of this folder: it needs JavaScript, and no network.</p></noscript>
<div id=problem></div>
<main>
<section id=list aria-label="Latents" hidden>
<div class=tools id=tools>
{LIST}
</div>
<div id=rows role=list aria-label="Latents"></div>
<p id=none class=soft hidden>No latent is like that.</p>
</section>
<section id=latent aria-label="Latent" hidden></section>
</main>
<footer>
{KEYS}
{NOTES}
{provenance(overview)}
<p>{together}</p>
</footer>"""
    return _page(of.name, body, "../../", True)


class _Row(NamedTuple):
    """A line of the first page. known: its row of results, if there is one."""

    of: TableOf
    link: str
    l0: float
    dead: float
    known: Mapping[str, Any]


def suite_page(overview: Overview, rows: Sequence[_Row]) -> str:
    """The first page: an SAE a line."""
    measured = {"fvu": ("FVU", ".3f"), "delta_loss": ("ΔLM loss", "+.3f")}
    there = {key: of for key, of in measured.items() if any(row.known.get(key) is not None for row in rows)}
    several = len({row.of.kind for row in rows}) > 1
    heads = [
        "Site",
        "Layer",
        *(["Kind"] if several else []),
        "Width",
        "L0",
        *(head for head, _ in there.values()),
        "Dead",
    ]
    lines, previous = [], None
    for row in rows:
        of = row.of
        kinds = of.reads.kind if of.reads == of.writes else f"{of.reads.kind} → {of.writes.kind}"
        cells = [kinds, str(of.reads.layer), *([of.kind] if several else []), f"{of.d_sae:,}", f"{row.l0:.1f}"]
        cells += [formatted(row.known.get(key), form) for key, (_, form) in there.items()]
        cells.append(f"{row.dead:.1%}")
        line = "".join(
            f'<td data-name="{escape(head)}">{escape(text)}</td>' for head, text in zip(heads, cells, strict=True)
        )
        first = "" if of.reads.layer == previous else " class=first"
        name = f'<td class="name link"><a href="{escape(row.link)}">{escape(of.name)}</a></td>'
        lines.append(f"<tr{first}>{name}{line}</tr>")
        previous = of.reads.layer
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    latents = sum(row.of.d_sae for row in rows)
    said = "FVU and ΔLM loss are those of the results of the run, on its own held-out rows. " if there else ""
    body = f"""<header>
<h1>Latents of {escape(overview.model)}</h1>
<p>{len(rows):,} {"SAE" if len(rows) == 1 else "SAEs"}, {latents:,} latents: what each fires on, and what it does to the
model's next token.</p>
</header>
<main>
<table>
<thead><tr><th scope=col class=name>SAE</th>{head}</tr></thead>
<tbody>
{chr(10).join(lines)}
</tbody>
</table>
</main>
<footer>
<p>L0: latents that fire on a token, on average. Dead: share of latents that fired on none of these tokens. {said}</p>
{provenance(overview)}
</footer>"""
    return _page(f"Latents of {overview.model}", body, "", False)
