"""Activations as `bench.quality.activations` wrote them, and which of them are held out."""

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemmascope.sites import Site

# Share of the rows, where the file does not say how many.
HELD_OUT = 0.1


def load(path: Path, sites: Sequence[str]) -> dict[Site, tuple[Tensor, Tensor]]:
    """Training and held-out activations [n, width] of each site. Raises ValueError for what is not there."""
    if not path.exists():
        raise ValueError(f"activations: found no {path}; `python -m bench.quality.activations RUN` makes it of a demo")
    try:
        with safe_open(path, framework="pt") as file:
            names, found = set(file.keys()), {}
            for name in sites:
                if name not in names:
                    raise ValueError(f"sites: expected some of {', '.join(sorted(names))}, found {name!r}")
                rows = file.get_tensor(name)
                stated = (file.metadata() or {}).get("held_out")
                held_out = math.ceil(HELD_OUT * len(rows)) if stated is None else int(stated)
                # The last rows: neighbouring tokens are alike, so held-out ones must not be drawn from among the rest.
                found[Site.parse(name)] = rows[:-held_out], rows[-held_out:]
            return found
    except SafetensorError as error:
        raise ValueError(f"activations: {path} is not a safetensors file ({error})") from None
