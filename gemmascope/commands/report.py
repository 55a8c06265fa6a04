"""`report`: tables, plots and pages again, from the files of what is finished."""

from pathlib import Path
from typing import Annotated

import typer

from .. import reporting
from .app import Debug, app
from .present import present, present_evaluation, present_probing, present_ravel


@app.command(name="report")
def remake_report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run or evaluation.")],
    debug: Debug = False,
) -> None:
    """Make the table, the plots and the HTML report of a run or an evaluation again."""
    if reporting.is_ravel(run):
        present_ravel(run)
    elif reporting.is_evaluation(run):
        present_evaluation(run)
    elif reporting.is_probing(run):
        present_probing(run)
    else:
        present(run, reporting.read_results(run))
