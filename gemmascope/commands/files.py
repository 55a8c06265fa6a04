"""`export` and `import`: formats of others."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checks import dtype_name
from ..process import ending_when_interrupted
from .app import DTYPES, Console, Debug, app

Weights = Annotated[
    str | None, typer.Option("--dtype", help="Cast to float32, bfloat16, float16 or float64. [default: as they are]")
]


@app.command()
def export(
    saes: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...", help="Files or folders of SAEs, OWNER/NAME/PATH on the hub, or the folder of a run."
        ),
    ],
    format: Annotated[
        str,
        typer.Option(help="gemma-scope, gemma-scope-2, saelens, circuit-tracer or safetensors.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    dtype: Weights = None,
    debug: Debug = False,
) -> None:
    """Write SAEs and transcoders in the format of others, with a model card."""
    with ending_when_interrupted(["export"]):
        from ..suite import export_saes

    exported = export_saes(saes, format, out, dtype=dtype_named(dtype))
    console = Console()
    for entry in exported.entries:
        lines = [
            f"{exported.folder / entry.folder}: {entry.kind}, {entry.site or 'site unknown'}, {entry.d_sae} latents"
        ]
        console.print(*lines, *(f"  {change}" for change in entry.changes), sep="\n", markup=False, soft_wrap=True)
    console.print(f"{len(exported.entries)} in {exported.folder}, with README.md", markup=False, soft_wrap=True)


@app.command(name="import")
def import_foreign(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="File or folder of an SAE or a transcoder, or OWNER/NAME/PATH of an SAE on the hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    dtype: Weights = None,
    debug: Debug = False,
) -> None:
    """Read an SAE or a transcoder of any format known here and save it as a folder of ours."""
    with ending_when_interrupted(["import"]):
        from ..suite import import_sae

    Console().print(f"{import_sae(source, out, dtype=dtype_named(dtype))} in {out}", markup=False, soft_wrap=True)


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of an option; None where it was not given."""
    if name is None:
        return None
    names = {dtype_name(dtype): dtype for dtype in DTYPES}
    if name not in names:
        raise ValueError(f"dtype: expected {' or '.join(names)}, got {name!r}")
    return names[name]
