"""The table of an SAE's latents as scripts that a page loads piece by piece: a list of all, and each in full.

A page opened from a disk may load scripts and nothing else, so data are calls of functions of web/site.js, text alone
and in ASCII. Arrays are [type, base64 of their bytes, little-endian], in the smallest type that holds them. Whatever
may be missing (a token, a row, a latent) is numbered from 1, and 0 is none.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dashboards.overview import Overview, TableOf
from ..dashboards.table import LatentTable, Sizes

# Latents to a file: in the list, and in full.
LIST_CHUNK, CHUNK = 4096, 256
TEXT_CHUNK = 1 << 16  # tokens to a file
BARS = 16  # of a histogram in the list
# Tokens of a latent in the list, which its search looks through: that it fires on, and that it raises.
FIRING_HEADS, RAISED_HEADS = 5, 5
# Figures of a latent's own weights, where an SAE has them.
OWN = {
    "threshold": "threshold",
    "decoder_norm": "norm of decoder",
    "encoder_norm": "norm of encoder",
    "encoder_bias": "bias of encoder",
    "alignment": "cosine of the two",
}


def call(function: str, *arguments: Any) -> str:
    """A script that calls ``gemmascope.function`` with values of JSON."""
    values = (json.dumps(value, allow_nan=False, separators=(",", ":")) for value in arguments)
    return f"gemmascope.{function}({','.join(values)});\n".replace("<", "\\u003c")


def packed(array: np.ndarray) -> list[str]:
    """[type, data]: counts as the smallest unsigned integers that hold them, or doubles, other numbers as they are."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind in "iu":
        least, most = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if least < 0:
            raise ValueError(f"array: expected counts, got {least}")
        code = next((code for code in ("u1", "u2", "u4") if most <= np.iinfo(code).max), "f8")
    else:
        code = array.dtype.str[1:]
        if code not in ("f4", "f8"):
            raise TypeError(f"array: expected integers, float32 or float64, got {array.dtype}")
    return [code, base64.b64encode(array.astype(f"<{code}").tobytes()).decode()]


class Tokens:
    """The numbers, from 1, of the tokens in a vocabulary; 0 of −1, which is none."""

    def __init__(self, overview: Overview):
        self._ids = torch.tensor(list(overview.vocabulary), dtype=torch.int64, device="cpu")
        self.strings: list[str | None] = [None, *overview.vocabulary.values()]

    def numbered(self, ids: Tensor) -> np.ndarray:
        """int64, of the shape of ``ids``. Raises ValueError for one that the vocabulary does not have."""
        wanted = ids.long().contiguous()
        at = torch.searchsorted(self._ids, wanted.clamp(min=0)).clamp(max=len(self._ids) - 1)
        if not ((self._ids[at] == wanted) | (wanted < 0)).all():
            raise ValueError("vocabulary: expected every token of the text and the tables, found one missing")
        return (at + 1).where(wanted >= 0, 0).numpy()


def text_scripts(overview: Overview, tokens: Tokens) -> Iterator[str]:
    """The rows of text, as many to a script as `TEXT_CHUNK` holds, one at least."""
    rows = max(1, TEXT_CHUNK // overview.text.context)
    for number, part in enumerate(overview.text.tokens.split(rows)):
        yield call("text", number, packed(tokens.numbered(part.flatten())))


def facts_script(overview: Overview, of: TableOf, table: LatentTable) -> str:
    """What the page must know of an SAE before anything else."""
    sizes: Sizes = overview.sizes
    facts = {
        "name": of.name,
        "width": of.d_sae,
        "tokens": overview.n_tokens,
        "context": overview.text.context,
        "window": sizes.window,
        "before": sizes.before,
        **{key: getattr(sizes, key) for key in ("top", "strata", "of_stratum", "bins", "logits", "related")},
        "own": [label for name, label in OWN.items() if not getattr(table, name).isnan().all()],
        "list_chunk": LIST_CHUNK,
        "chunk": CHUNK,
        "text_chunk": TEXT_CHUNK,
        "firing_heads": FIRING_HEADS,
        "heads": FIRING_HEADS + RAISED_HEADS,
    }
    return call("sae", facts)


def list_scripts(overview: Overview, table: LatentTable, tokens: Tokens) -> Iterator[str]:
    """What the list shows and searches of every latent: some 50 bytes each."""
    raised = tokens.numbered(table.promoted[:, :RAISED_HEADS])
    raised = np.pad(raised, [(0, 0), (0, RAISED_HEADS - raised.shape[1])])
    for number, start in enumerate(range(0, table.d_sae, LIST_CHUNK)):
        some = slice(start, start + LIST_CHUNK)
        parts = {
            "fired": table.fired[some].numpy(),
            "largest": table.largest[some].numpy(),
            "shape": shapes(table.histogram[some]),
            "heads": np.concatenate([firing_tokens(overview, table, tokens, some), raised[some]], 1),
        }
        yield call("list", number, {name: packed(array.reshape(-1)) for name, array in parts.items()})


def shapes(histogram: Tensor) -> np.ndarray:
    """uint8 [n, BARS / 2]: the histograms [n, bins] drawn with bars of height 0 to 15, two to a byte, the former in the
    upper half. Heights are as log(1 + count), and a count that is not 0 has one of at least 1."""
    bins = histogram.shape[1]
    counts = histogram.double()
    if bins >= BARS:
        counts = counts.reshape(len(counts), BARS, -1).sum(2)
    else:
        counts = counts.repeat_interleave(BARS // bins, 1)
    heights = counts.log1p()
    heights = (15 * heights / heights.amax(1, keepdim=True).clamp(min=1e-30)).round().clamp(max=15)
    heights = torch.where(counts > 0, heights.clamp(min=1), 0).to(torch.uint8)
    return (heights[:, ::2] << 4 | heights[:, 1::2]).numpy()


def firing_tokens(overview: Overview, table: LatentTable, tokens: Tokens, some: slice) -> np.ndarray:
    """int64 [n, FIRING_HEADS]: the tokens with the largest activations, each once, of the latents ``some``."""
    top = table.top
    rows, positions, there = top.row[some].long(), top.position[some].long(), top.there[some]
    ids = overview.text.tokens[rows.clamp(min=0), positions.clamp(min=0)].where(there, -1)
    numbers = torch.from_numpy(tokens.numbered(ids))
    again = numbers == 0
    for slot in range(1, numbers.shape[1]):
        again[:, slot] |= (numbers[:, :slot] == numbers[:, slot, None]).any(1)
    first = again.to(torch.uint8).argsort(dim=1, stable=True)[:, :FIRING_HEADS]
    found = numbers.where(~again, 0).gather(1, first).numpy()
    return np.pad(found, [(0, 0), (0, FIRING_HEADS - found.shape[1])])


def latent_scripts(table: LatentTable, tokens: Tokens) -> Iterator[str]:
    """Latents in full, `CHUNK` to a script.

    The slots of a latent are its top examples, then those of each stratum. ``ends`` has, for every slot, how many
    pairs of ``offset`` in the window and ``activation`` there are up to its end, those that are not 0.
    """
    examples = {part: _slots(table, part) for part in ("row", "position")}
    windows = torch.cat([table.top.window, table.strata.window.flatten(1, 2)], 1)
    sampled = table.sampled.double()
    both = table.together_tokens.double()
    either = sampled[:, None] + sampled[table.together.long().clamp(min=0)] - both
    own = [getattr(table, name) for name in OWN if not getattr(table, name).isnan().all()]
    arrays: Mapping[str, Tensor | np.ndarray] = {
        "fired": table.fired,
        "mean": table.mean,
        "largest": table.largest,
        "histogram": table.histogram,
        "end": table.histogram_end,
        "cells": table.stratum_cells,
        "row": examples["row"] + 1,
        "position": examples["position"].clamp(min=0),
        "promoted": tokens.numbered(table.promoted),
        "promoted_logit": table.promoted_logit,
        "suppressed": tokens.numbered(table.suppressed),
        "suppressed_logit": table.suppressed_logit,
        "near": table.near + 1,
        "near_cosine": table.near_cosine,
        "together": table.together + 1,
        "together_share": (both / either.clamp(min=1)).float(),
        "own": torch.stack(own, 1),
    }
    for number, start in enumerate(range(0, table.d_sae, CHUNK)):
        some = slice(start, start + CHUNK)
        parts = {name: np.asarray(array[some]) for name, array in arrays.items()}
        window = windows[some].flatten(0, 1)
        parts |= {
            "ends": window.count_nonzero(1).cumsum(0).numpy(),
            "offset": window.nonzero()[:, 1].numpy(),
            "activation": window[window != 0].numpy(),
        }
        yield call("latents", number, {name: packed(array.reshape(-1)) for name, array in parts.items()})


def _slots(table: LatentTable, part: str) -> Tensor:
    return torch.cat([getattr(table.top, part), getattr(table.strata, part).flatten(1, 2)], 1)
