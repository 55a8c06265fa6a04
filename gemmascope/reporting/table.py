"""The table of a run for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .results import (
    Column,
    beats_pca,
    columns_of,
    formatted,
    furthest_from_target,
    judged_on,
    kind_of,
    kinds_of,
    summary,
)

if TYPE_CHECKING:
    import rich.table


WIDTH, GAP = 100, 2
# What a table that is wider does without, in this order.
LEAVES_OUT = ("high_freq_fraction", "pca_median_fvu", "median_fvu", "pair_table_fvu", "ablation_delta_loss", "outliers")


# By what an SAE is as sparse as it is: key of a row of results, and how the table calls it.
AIMS = {"target_l0": "target", "k": "k", "l0_coefficient": "λ"}


def aims_of(saes: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]] | None:
    """The heading and the cells of the column that says what makes each SAE as sparse as it is: "20", or "k 20" where
    they differ in that. None where no SAE says it, or λ alone does and is the same for all."""
    found = [next((key for key in AIMS if sae.get(key) is not None), None) for sae in saes]
    keys = {key for key in found if key is not None}
    values = [None if key is None else float(sae[key]) for sae, key in zip(saes, found, strict=True)]
    if not keys or (keys == {"l0_coefficient"} and len(set(values)) == 1):
        return None
    if len(keys) == 1:
        return AIMS[keys.pop()], [formatted(value, "g") for value in values]
    cells = [
        formatted(None, "") if key is None else f"{AIMS[key]} {value:g}"
        for key, value in zip(found, values, strict=True)
    ]
    return "sparse by", cells


def columns_that_fit(saes: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[str]]:
    """The columns that `WIDTH` has room for, but those of `aims_of`, and the headings of the others on the page."""
    columns = [column for column in columns_of(saes) if column.short is not None and column.key not in AIMS]
    aims = aims_of(saes)

    def width(column: Column) -> int:
        return GAP + max(len(column.short or ""), *(len(formatted(sae.get(column.key), column.form)) for sae in saes))

    keys = ("site", "layer", *(["kind"] if kinds_of(saes) else []), "width")
    fixed = {key: max(len(key), *(len(str(sae.get(key, ""))) for sae in saes)) for key in keys}
    names = sum(GAP + size for size in fixed.values()) + GAP + 1  # with that of the ✓
    if aims is not None:
        names += GAP + max(map(len, (aims[0], *aims[1])))
    left_out = []
    for key in LEAVES_OUT:
        if names + sum(map(width, columns)) <= WIDTH:
            break
        left_out += [column.heading for column in columns if column.key == key]
        columns = [column for column in columns if column.key != key]
    return columns, left_out


def final_table(results: Mapping[str, Any]) -> "rich.table.Table":
    """The SAEs of a run as a `rich.table.Table` of at most 100 columns; ✓ where an SAE beats PCA of the same rank.

    results: as `read_results` returns them, else TypeError.
    """
    import rich.box
    import rich.table
    import rich.text

    if not isinstance(results, Mapping) or not {"model", "saes"} <= results.keys():
        raise TypeError(f"results: expected what read_results returns, got {type(results).__name__}")
    model, saes = results["model"], results["saes"]
    title = [f"Language model: loss {formatted(model.get('loss'), '.3f')} nats a token"]
    if model.get("bigram_loss") is not None:
        title.append(f"bigram baseline {model['bigram_loss']:.3f}")
    columns, left_out = columns_that_fit(saes)
    sentences = [summary(saes), furthest_from_target(saes), judged_on(model)]
    sentences += [f"In the report alone: {'; '.join(left_out)}"] if left_out else []
    sentences += [f"Parked: {', '.join(results['parked'])}"] if results.get("parked") else []
    table = rich.table.Table(
        title=rich.text.Text(", ".join(title)),
        caption=rich.text.Text(" ".join(f"{sentence}." for sentence in sentences if sentence)),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("site", no_wrap=True)
    table.add_column("layer", justify="right", no_wrap=True)
    if several := bool(kinds_of(saes)):
        table.add_column("kind", no_wrap=True)
    table.add_column("width", justify="right", no_wrap=True)
    if (aims := aims_of(saes)) is not None:
        table.add_column(aims[0], justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.short or "", justify="right", no_wrap=True)
        if column.key == "pca_fvu":
            table.add_column("✓", no_wrap=True)
    for index, sae in enumerate(saes):
        wins = beats_pca(sae)
        cells = []
        for column in columns:
            cells.append(rich.text.Text(formatted(sae.get(column.key), column.form)))
            if column.key == "fvu":
                cells[-1].stylize("bold green" if wins else "bold red")
            elif column.key == "pca_fvu":
                cells.append(rich.text.Text("✓" if wins else "✗", style="green" if wins else "red"))
        ends_layer = index + 1 < len(saes) and saes[index + 1]["layer"] != sae["layer"]
        name, kind = rich.text.Text(sae["site"]), [kind_of(sae)] if several else []
        aim = [] if aims is None else [aims[1][index]]
        table.add_row(name, str(sae["layer"]), *kind, str(sae["width"]), *aim, *cells, end_section=ends_layer)
    return table
