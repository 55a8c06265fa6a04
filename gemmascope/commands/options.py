"""Options that commands which judge SAEs have alike."""

from typing import Annotated, Any

import typer

SaeArgument = typer.Argument(
    metavar="SAE...",
    help="Folder of a run, or a place among its SAEs; files or folders of SAEs or transcoders; "
    "OWNER/NAME/PATH on the hub.",
    show_default=False,
)
Saes = Annotated[list[str], SaeArgument]
Model = Annotated[
    str | None, typer.Option(help="The Gemma: a folder, or a name on the hub. [default: that of the run]")
]
Text = Annotated[
    list[str] | None, typer.Option(help="UTF-8 files or a glob; repeat for more. [default: what the run held out]")
]
SiteOfAll = Annotated[
    str | None, typer.Option(help="Where every SAE is judged: layer_12/resid, … [default: where each says]")
]
Sequences = Annotated[int, typer.Option(help="Rows of text, at most.")]
Context = Annotated[int | None, typer.Option(help="Tokens of a row. [default: 1024, of a run its own]")]
Outliers = Annotated[
    float | None, typer.Option(help="A token is one above so many times the median norm. [default: the run's, or 5]")
]
ControlTokens = Annotated[int, typer.Option(help="Tokens that controls are fitted on, and judged on.")]
Revision = Annotated[str | None, typer.Option(help="Of the model: branch, tag or commit.")]
ModelDtype = Annotated[str, typer.Option(help="Of a model that is named: float32, bfloat16 or auto.")]
Device = Annotated[str, typer.Option(help="Where all runs.")]
Impl = Annotated[str, typer.Option(help="Who computes the SAEs, see `info`.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print every figure as JSON instead.")]


def named_model(model: str | None, revision: str | None, dtype: str) -> Any:
    """The `ModelSection` that options name; None where they name none."""
    from ..suite.config import ModelSection

    if model is None and (revision is not None or dtype != "auto"):
        raise ValueError("model: expected --model beside --revision and --dtype, got none")
    return None if model is None else ModelSection(name=model, revision=revision, dtype=dtype)
