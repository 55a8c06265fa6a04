"""What all commands share: the application, `--version`, the console."""

import os
from typing import Annotated

import rich.console
import torch
import typer

from ..version import __version__

app = typer.Typer(add_completion=False, help="Sparse autoencoders on every layer of Gemma.")


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DOES_NOT_FIT = 6  # exit code of `check`


WIDTH_OF_FILES = 100  # columns when the output is not a terminal


class Console(rich.console.Console):
    """Standard output; a closed pipe is left to `__main__`."""

    def __init__(self):
        super().__init__(highlight=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = WIDTH_OF_FILES

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"gemmascope {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
