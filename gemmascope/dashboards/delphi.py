"""All that fires as delphi's cache of latents (EleutherAI/delphi), which explains and scores any SAE from it.

``latents/SAE/{start}_{end}.safetensors``, the end inclusive, holds of the latents in that range ``locations``
uint16 or uint32 [n, 3] (row, position, latent − start), ``activations`` float16 [n] and ``tokens`` int64 [rows,
context]; config.json beside them what they were made from.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EnvironmentProblemError
from ..formats.files import atomic_write, write_json
from .codes import Piece
from .overview import Overview

LATENTS = "latents"
SPLITS = 5
# What delphi takes for zero, and where float16 ends.
SMALLEST, LARGEST = 1e-5, 65504.0
_ENTRY = {torch.uint16: "U16", torch.uint32: "U32"}


def write(
    folder: Path, d_sae: int, overview: Overview, pieces: Callable[[], Iterable[Piece]], splits: int = SPLITS
) -> list[Path]:
    """Write the cache of one SAE; the files. pieces: the codes of all rows in order, gone through twice, one piece in
    memory at a time.

    Raises EnvironmentProblemError for activations that float16 cannot hold.
    """
    rows, context = overview.text.tokens.shape
    ends = torch.tensor([d_sae * (split + 1) // splits for split in range(splits)], dtype=torch.int64)
    counts = torch.zeros(splits, dtype=torch.int64)
    for piece in pieces():
        _, _, split = _kept(piece, ends)
        counts += torch.bincount(split, minlength=splits)
    written, files = [], []
    with ExitStack() as stack:
        start = 0
        for end, n in zip(ends.tolist(), counts.tolist(), strict=True):
            if end == start:  # fewer latents than splits
                files.append(None)
                continue
            path = folder / f"{start}_{end - 1}.safetensors"
            temporary = stack.enter_context(atomic_write(path))
            files.append(stack.enter_context(_File(temporary, start, end, n, overview.text.tokens)))
            written.append(path)
            start = end
        for piece in pieces():
            latent, value, split = _kept(piece, ends)
            token = piece.token[piece.value > SMALLEST]
            for number, file in enumerate(files):
                if file is not None:
                    own = split == number
                    file.add(token[own] // context, token[own] % context, latent[own], value[own])
    config = {
        "dataset_repo": overview.what,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": 1,
        "cache_ctx_len": context,
        "ctx_len": context,
        "n_tokens": rows * context,
        "n_splits": len(written),
        "model_name": overview.model,
    }
    write_json(folder / "config.json", config)
    return [*written, folder / "config.json"]


def _kept(piece: Piece, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, values and splits of the entries that delphi does not take for zero."""
    kept = piece.value > SMALLEST
    latent, value = piece.latent[kept].long(), piece.value[kept]
    if len(value) and float(value.max()) > LARGEST:
        raise EnvironmentProblemError(
            f"delphi: expected activations of at most {LARGEST:g}, which float16 holds, found {float(value.max()):.6g}"
        )
    return latent, value, torch.searchsorted(ends, latent, right=True)


class _File:
    """A safetensors file whose sizes are known before its content: locations and activations grow side by side."""

    def __init__(self, path: Path, start: int, end: int, n: int, tokens: Tensor):
        self.path, self.start = path, start
        rows, context = tokens.shape
        small = max(rows, context, end - start) <= 1 << 16
        self.dtype = torch.uint16 if small else torch.uint32
        sizes = {"tokens": 8 * rows * context, "locations": 3 * self.dtype.itemsize * n, "activations": 2 * n}
        dtypes = {"tokens": "I64", "locations": _ENTRY[self.dtype], "activations": "F16"}
        shapes: dict[str, list[int]] = {"tokens": [rows, context], "locations": [n, 3], "activations": [n]}
        entries: dict[str, Any] = {}
        at = 0
        for name, size in sizes.items():
            entries[name] = {"dtype": dtypes[name], "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        base = len(self._head)
        self._at = {name: base + entries[name]["data_offsets"][0] for name in sizes}
        self._tokens = tokens

    def __enter__(self) -> "_File":
        self._stream = open(self.path, "r+b")
        self._stream.write(self._head)
        self._put("tokens", self._tokens.long())
        return self

    def __exit__(self, *exception) -> None:
        self._stream.close()

    def add(self, row: Tensor, position: Tensor, latent: Tensor, value: Tensor) -> None:
        """Entries, [n] each, behind those before."""
        self._put("locations", torch.stack([row, position, latent - self.start], 1).to(self.dtype))
        self._put("activations", value.half())

    def _put(self, name: str, tensor: Tensor) -> None:
        data = tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""
        self._stream.seek(self._at[name], os.SEEK_SET)
        self._stream.write(data)
        self._at[name] += tensor.nbytes
