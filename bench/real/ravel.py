"""RAVEL on Gemma 3 270M, offline: python -m bench.real.ravel [--out FOLDER] [-- OPTIONS of gemmascope ravel]

Makes model and English text once, as `python -m bench.real` does, trains SAEs of six kinds at three depths by

    gemmascope train examples/gemma3-ravel.toml

and asks by `gemmascope ravel` which of them move the country of a city and leave its continent, and the other way
round. Its trainings are short (`SIZES`); options behind -- take their place. Run again, it goes on where it was left.
The exit status is that of the command that failed, else 0.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.real.__main__ import default_cache, quoted, train
from bench.real.model import make_model
from bench.real.text import make_text
from gemmascope.errors import BadFileError, EnvironmentProblemError

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "gemma3-ravel.toml"
ATTRIBUTES = ("country", "continent")
# Trainings of 128 steps: 66 of them took 80 minutes of one core, in all.
SIZES = {
    "--templates": 2,
    "--pairs": 512,
    "--test-pairs": 64,
    "--batch-size": 8,
    "--epochs": 1,
    "--rotation-epochs": 1,
    "--lr": 0.02,
}


def commands(model: Path, text: Path, out: Path, options: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a user would type: the training, and RAVEL on its run."""
    sets = ["--set", f"model.name={quoted(model)}", "--set", f"text.files=[{quoted(text)}]"]
    program = [sys.executable, "-m", "gemmascope"]
    sizes = [str(part) for pair in SIZES.items() for part in pair]
    attributes = [part for name in ATTRIBUTES for part in ("--attribute", name)]
    return (
        [*program, "train", str(CONFIG), "--out", str(out), *sets],
        [*program, "ravel", str(out), *attributes, *sizes, *options],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.real.ravel", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gemma3-ravel"), help="folder of the run")
    parser.add_argument("--cache", type=Path, default=None, help="of model and text")
    parser.add_argument("options", nargs="*", help="of gemmascope ravel, behind --")
    given = parser.parse_args(arguments)
    cache = (given.cache or default_cache()).absolute()
    try:
        model = make_model(cache / "gemma-3-270m", cache / "downloads")
        text = make_text(cache / "english.jsonl", cache / "packages")
    except BadFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except EnvironmentProblemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    for command in commands(model, text, given.out, given.options):
        if status := train(command):
            return status if status > 0 else 128 - status
    return 0


if __name__ == "__main__":
    sys.exit(main())
