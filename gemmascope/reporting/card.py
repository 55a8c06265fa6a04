"""The README.md beside exported SAEs: what they are, how they are opened, and their figures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..version import __version__
from .results import columns_of, formatted, judged_on, kind_of, kinds_of

# How each format is opened: a block of Python, in which FOLDER stands for the folder of an SAE.
OPENED_BY = {
    "gemma-scope": "from gemmascope import KIND\n\nsae = KIND.load(FOLDER)",
    "gemma-scope-2": "from gemmascope import KIND\n\nsae = KIND.load(FOLDER)",
    "safetensors": "from gemmascope import KIND\n\nsae = KIND.load(FOLDER)",
    "saelens": "from sae_lens import SAE\n\nsae = SAE.load_from_disk(FOLDER)",
    "circuit-tracer": "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub\n\n"
    'transcoders, config = load_transcoder_from_hub("OWNER/NAME")  # once this folder is a repository of that name',
}
LIBRARIES = {"saelens": "saelens", "circuit-tracer": "circuit-tracer"}
FACTS = ("tokens", "text", "context", "loss", "held_out_tokens")


class Entry(NamedTuple):
    """An exported SAE. folder: inside that of the card, "" for that itself. row: its row of results, or None."""

    folder: str
    kind: str
    site: str | None
    hook_name: str | None
    d_in: int
    d_sae: int
    changes: Sequence[str]
    row: Mapping[str, Any] | None


def card(format: str, entries: Sequence[Entry], model: str | None, results: Mapping[str, Any] | None) -> str:
    """The text of README.md for ``entries`` in ``format``. results: as `read_results` returns them, of the run that
    trained them; None leaves the figures out. What comes from files is shown as text, never as markup."""
    front = {
        "library_name": LIBRARIES.get(format, "gemmascope"),
        "tags": ["sparse-autoencoder", "mechanistic-interpretability"],
    }
    if model and model.count("/") == 1:
        front["base_model"] = model
    what = "Transcoders" if any(entry.kind == "Transcoder" for entry in entries) else "Sparse autoencoders"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {what}{f' on {plain(model)}' if model else ''}", ""]
    lines += [f"In the format {format}, written by gemmascope {__version__}.", ""]
    opened = OPENED_BY[format].replace("FOLDER", json.dumps(entries[0].folder or "."))
    lines += ["```python", opened.replace("KIND", entries[0].kind), "```", "", *_what_they_are(entries)]
    changed = dict.fromkeys(change for entry in entries for change in entry.changes)
    if changed:
        lines += ["", "Changed on the way:", "", *(f"* {plain(change)}" for change in changed)]
    if results is not None:
        lines += ["", *_figures(entries, results)]
    return "\n".join(lines) + "\n"


def _what_they_are(entries: Sequence[Entry]) -> list[str]:
    cells = [
        [
            code(entry.folder or "."),
            entry.kind,
            code(entry.site or "–"),
            code(entry.hook_name or "–"),
            str(entry.d_in),
            str(entry.d_sae),
        ]
        for entry in entries
    ]
    return table(["Folder", "Kind", "Site", "Hook of TransformerLens", "d_in", "d_sae"], cells)


def _figures(entries: Sequence[Entry], results: Mapping[str, Any]) -> list[str]:
    rows = [(entry.folder, entry.row) for entry in entries if entry.row is not None]
    columns, several = columns_of([row for _, row in rows]), bool(kinds_of(row for _, row in rows))
    cells = [
        [
            code(folder or "."),
            *([kind_of(row)] if several else []),
            *(formatted(row.get(column.key), column.form) for column in columns),
        ]
        for folder, row in rows
    ]
    facts = {key: results["model"].get(key) for key in FACTS}
    said = [f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None]
    sentences = [judged_on(results["model"]) + ".", f"The run: {', '.join(said)}." if said else ""]
    return [
        "## Figures",
        "",
        plain(" ".join(sentence for sentence in sentences if sentence)),
        "",
        *table(["Folder", *(["Trained as"] if several else []), *(column.heading for column in columns)], cells),
    ]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of Markdown; the cells are Markdown already."""
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def plain(text: str) -> str:
    """``text`` in one line, in which Markdown and HTML mean nothing."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#~&$" else character for character in line)


def code(text: str) -> str:
    """``text`` as code in a cell of a table."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return f"`{line.replace('`', chr(39)).replace('|', '/')}`"
