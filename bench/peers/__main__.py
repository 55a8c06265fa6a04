"""python -m bench.peers: one step with each package of others, and their versions; the check of `make bench-peers`."""

import contextlib
import sys

import torch

from bench.cases import CONTENDERS, make
from bench.contenders import UnavailableError
from bench.timing.gate import agreement, exact_outputs
from bench.timing.inputs import construct


def check_packages() -> int:
    """Gate and one call of every part of each package's contender, tiny; a line for each. 1 when one failed."""
    inputs = construct(16, 64, 32, 4, torch.device("cpu"))
    exact, failed = exact_outputs(inputs), False
    for name in CONTENDERS:
        try:
            contender = make(name)
            if not contender.requires:
                continue
            contender.check_available(inputs.x.device)
            with contextlib.redirect_stdout(sys.stderr):
                errors = agreement(contender, inputs, exact)
                for part in contender.parts:
                    contender.before(part)
                    getattr(contender, part)()
        except UnavailableError as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        else:
            versions = ", ".join(f"{package} {version}" for package, version in contender.versions().items())
            print(f"{name:20s} {versions}; agrees with fp64 within {max(errors.values()):.1g}", flush=True)
            continue
        failed = True
        print(f"{name:20s} cannot be used: {reason}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(check_packages())
