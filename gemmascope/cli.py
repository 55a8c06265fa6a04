"""Every command by its name; `__main__` handles failures."""

from collections.abc import Sequence

import typer

# In the order of `--help`.
# isort: off
from .commands import train, judge, latents, files, report, info  # noqa: F401
from .commands.app import app

# isort: on


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; failures are raised."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("gemmascope", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0
