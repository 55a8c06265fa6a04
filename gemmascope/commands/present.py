"""What a command shows when it is done: its table, its warnings, where its files are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
import rich.text

from .. import reporting
from .app import Console


def show(table: rich.table.Table, warnings: Sequence[str], where: str) -> None:
    """A table, what is to be known of it, and where the rest is."""
    console = Console()
    console.print(table)
    for line in (*(f"Note: {warning}" for warning in warnings), where):
        console.print(line, markup=False, soft_wrap=True)


def present(run: Path, results: dict) -> None:
    """Write the plots and the HTML report of a run, and show its table."""
    plots = reporting.write_plots(run)
    page = reporting.write_html(run)
    console = Console()
    console.print(reporting.final_table(results))
    console.print(f"Report: {page}", f"Plots: {', '.join(map(str, plots))}", sep="\n", markup=False, soft_wrap=True)
    index = run / "dashboards" / "site" / "index.html"
    if index.is_file():
        console.print(f"Dashboards: {index}", markup=False, soft_wrap=True)


def present_evaluation(folder: Path) -> None:
    """Write the plots and the HTML report of an evaluation, and show its table and its warnings."""
    page = reporting.write_evaluation(folder)
    reporting.link_from_run(folder)
    results = reporting.read_evaluation(folder)
    show(reporting.evaluation_table(results), results["warnings"], f"Report: {page}")


def present_probing(folder: Path) -> None:
    """Draw the figure of probes, and show their table and what they warn of."""
    figure = reporting.write_probing(folder)
    reporting.link_from_run(folder)
    results = reporting.read_probing(folder)
    show(reporting.probing_table(results), results["warnings"], f"Plot: {figure}")


def present_study(path: Path, study: Mapping[str, Any]) -> None:
    """Draw the study whose JSON is ``path``, and show its conclusion."""
    images = reporting.write_study(path)
    files = (path.with_suffix(".csv"), path, *images)
    console = Console()
    console.print(f"{study['study']}: {study['conclusion']}", markup=False, soft_wrap=True)
    console.print(f"  {', '.join(str(each) for each in files if each.is_file())}", markup=False, soft_wrap=True)


def present_dashboards(folder: Path, results: dict) -> None:
    """Show the table of dashboards, and their warnings."""
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("SAE", overflow="fold")
    for heading in ("Latents", "L0", "Dead", "Fire on > 10 %", "Largest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["rows"]:
        figures = (f"{row['width']:,}", f"{row['l0']:.1f}", f"{row['dead']:.1%}", f"{row['high_freq']:.1%}")
        table.add_row(rich.text.Text(row["name"]), *figures, f"{row['largest']:.4g}")
    reporting.link_from_run(folder)
    index = folder / "site" / "index.html"
    show(table, results["warnings"], f"Dashboards: {index if index.is_file() else folder}")


def present_ravel(folder: Path) -> None:
    """Draw the figure of a RAVEL evaluation, and show its table and its warnings."""
    plot = reporting.write_ravel(folder)
    reporting.link_from_run(folder)
    results = reporting.read_ravel_results(folder)
    show(reporting.ravel_table(results), results["warnings"], f"Plot: {plot}")
