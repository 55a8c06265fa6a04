"""The table of a run for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .results import COLUMNS, beats_pca, formatted, judged_on, summary

if TYPE_CHECKING:
    import rich.table


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
    title = "Language model: loss {} nats a token, bigram baseline {}".format(
        formatted(model.get("loss"), ".3f"), formatted(model.get("bigram_loss"), ".3f")
    )
    table = rich.table.Table(
        title=title,
        caption=rich.text.Text(f"{summary(saes)}. {judged_on(model)}."),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("site", no_wrap=True)
    columns = [(key, heading, form) for key, heading, _, form in COLUMNS if heading is not None]
    for heading in ("layer", "width", *(heading for _, heading, _ in columns[:3])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("✓", no_wrap=True)
    for _, heading, _ in columns[3:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, sae in enumerate(saes):
        wins = beats_pca(sae)
        cells = [rich.text.Text(formatted(sae[key], form)) for key, _, form in columns]
        cells[1].stylize("bold green" if wins else "bold red")
        mark = rich.text.Text("✓" if wins else "✗", style="green" if wins else "red")
        ends_layer = index + 1 < len(saes) and saes[index + 1]["layer"] != sae["layer"]
        name = rich.text.Text(sae["site"])
        table.add_row(name, str(sae["layer"]), str(sae["width"]), *cells[:3], mark, *cells[3:], end_section=ends_layer)
    return table
