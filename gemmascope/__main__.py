"""`gemmascope` and `python -m gemmascope`: run a command; turn any failure into one line and an exit code.

Exit codes: 0 done, 1 a defect of ours, 2 usage, 3 bad file, 4 environment, 5 training gave up, 6 an SAE does not fit
(`check`), 130 interrupted, 141 the reader of our output went away.
"""

import sys
import traceback
from collections.abc import Sequence

from .errors import BadFileError, EnvironmentProblemError, TrainingFailedError
from .process import INTERRUPTED, divert, ending_when_interrupted, interruption, open_missing

TRAIN_PACKAGES = ("transformers", "huggingface_hub", "typer", "rich", "matplotlib")

# The first match decides: a BadFileError is a ValueError too.
EXIT_CODES = (
    (BadFileError, 3),
    (TrainingFailedError, 5),
    ((EnvironmentProblemError, OSError, MemoryError), 4),
    ((ValueError, TypeError), 2),
)


def describe(error: Exception) -> tuple[int, str]:
    """Exit code and one-line message of a failure."""
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in TRAIN_PACKAGES:
        return 4, f"the package {package} is missing: pip install 'gemmascope[train]'"
    format_message = getattr(error, "format_message", None)  # wrong options and arguments, as typer reports them
    if format_message is not None:
        return 2, format_message()
    if isinstance(error, OSError) and error.strerror:
        return 4, ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    for kinds, code in EXIT_CODES:
        if isinstance(error, kinds):
            return code, str(error) or type(error).__name__
    return 1, f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    message = trace = ""
    try:
        code = run(arguments)
    except BrokenPipeError:
        code = 141
    except KeyboardInterrupt:
        code, message = INTERRUPTED, interruption(arguments)
    except Exception as error:
        code, message = describe(error)
        trace = traceback.format_exc() if "--debug" in arguments else ""
    # A stream that cannot be written hides no exit code, and nothing stays in it for Python to fail on when it exits.
    line = f"{trace}gemmascope: error: {printable(message)}\n" if message else ""
    for stream, text in ((sys.stdout, ""), (sys.stderr, line)):
        if stream is not None:
            try:
                stream.write(text)
                stream.flush()
            except (OSError, ValueError):
                divert(stream)
    return code


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; failures are raised."""
    open_missing()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without Δ shows a question mark, not a failure
    with ending_when_interrupted(arguments):
        from .cli import run_command  # the first to import PyTorch

    code = run_command(arguments)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def printable(message: str) -> str:
    """``message`` as one line, without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))


if __name__ == "__main__":
    sys.exit(main())
