"""`report`: tables, plots and pages again, from the files of what is finished."""

from pathlib import Path
from typing import Annotated

import typer

from .. import reporting
from ..reporting.results import RESULTS
from .app import Debug, app
from .present import present, present_evaluation, present_probing, present_ravel, present_study


@app.command(name="report")
def remake_report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run, evaluation or of studies.")],
    debug: Debug = False,
) -> None:
    """Make the table, the plots and the HTML report of a run again, of an evaluation or of studies."""
    if not (run / RESULTS).exists() and (studies := reporting.read_studies(run)):
        for path, study in studies:
            present_study(path, study)
        reporting.link_from_run(run)
    elif reporting.is_ravel(run):
        present_ravel(run)
    elif reporting.is_evaluation(run):
        present_evaluation(run)
    elif reporting.is_probing(run):
        present_probing(run)
    else:
        present(run, reporting.read_results(run))
