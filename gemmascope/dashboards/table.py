"""`LatentTable`: what a pass over text found of every latent of one SAE, in memory and as a file."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..checks import check_int, check_type, dtype_name
from ..errors import BadFileError
from ..formats.arrays import STORED_DTYPES, Header, read_safetensors
from ..formats.files import atomic_write, open_file, sha256_of, shown

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Sizes:
    """How much a table holds of each latent.

    top: examples with the largest activations. strata, of_stratum: intervals of activation, and examples of each.
    window: tokens shown of an example, at most the context. bins: of the histogram, a power of 2. logits: tokens each
    way. related: nearest latents, and latents that fire together. Raises TypeError and ValueError naming the size that
    is wrong.
    """

    top: int = 20
    strata: int = 5
    of_stratum: int = 4
    window: int = 32
    bins: int = 64
    logits: int = 10
    related: int = 10

    def __post_init__(self):
        for size in fields(self):
            check_int(size.name, getattr(self, size.name), 1, _LARGEST)
        if self.bins & (self.bins - 1):
            raise ValueError(f"bins: expected a power of 2, got {self.bins}")
        if self.strata > self.bins.bit_length():
            raise ValueError(
                f"strata: expected at most {self.bins.bit_length()} for {self.bins} bins, got {self.strata}"
            )

    @property
    def before(self) -> int:
        """Tokens of a window before the one that it is of, where the row has as many."""
        return self.window * 5 // 8


_LARGEST = 4096


class Examples(NamedTuple):
    """Tokens of the text on which latents fired, with what stands around each; …: the latents, and the slots of each.

    A row of text is cut into cells of ``window`` tokens from its start. A latent has at most one example of a cell, the
    token of its largest activation there (the first of equals), so that no two examples are one passage. A slot without
    an example has row and position −1, and 0 for the rest.
    """

    row: Tensor
    """int32 […], of the overview's tokens."""
    position: Tensor
    """int32 […], in the row, from 0."""
    value: Tensor
    """fp32 […], the activation, > 0."""
    window: Tensor
    """fp32 […, window]: the latent's activation on each token of the window, which begins at `window_start`; 0 where it
    does not fire, and at special tokens, which are not counted."""

    def of(self, latents: range) -> "Examples":
        """Those of some latents."""
        return Examples(*(part[latents.start : latents.stop] for part in self))

    @property
    def there(self) -> Tensor:
        """bool […]: which slots have an example; in the last dimension these come first."""
        return self.row >= 0


def window_start(position: Tensor, context: int, sizes: Sizes) -> Tensor:
    """Where the windows around ``position`` begin in their rows: ``sizes.before`` tokens before it, but so that the
    window is inside the row."""
    return (position - sizes.before).clamp(min=0).clamp(max=context - sizes.window)


@dataclass(frozen=True, eq=False)
class LatentTable:
    """Every latent of one SAE on one text. F: ``d_sae``; other sizes: `Sizes`. All tensors are on the CPU.

    Counted are the tokens of text; special tokens and padding are not. A latent fires where its activation is > 0.
    Slots that have nothing in them hold −1 for what numbers rows, positions, tokens and latents, and 0 for the rest.
    """

    fired: Tensor
    """int64 [F]: tokens on which the latent fired."""
    total: Tensor
    """fp64 [F]: the sum of its activations."""
    largest: Tensor
    """fp32 [F]: the largest; 0 of one that never fired."""
    histogram: Tensor
    """int64 [F, bins]: activations by size, in bins of equal width from 0 to ``histogram_end``; bin b has b·width ≤
    activation < (b + 1)·width."""
    histogram_end: Tensor
    """fp32 [F]: the power of 2 with end/2 ≤ largest < end; 0 of a latent that never fired."""
    top: Examples
    """[F, top]: the largest activations first; of equals the smaller row, then the smaller position."""
    strata: Examples
    """[F, strata, of_stratum]: a sample of each stratum, the same tokens for the same seed, whatever the order of the
    work. Stratum s has the activations in [end/2^(s+1), end/2^s), end being ``histogram_end``, the last all below."""
    stratum_cells: Tensor
    """int64 [F, strata]: cells of text whose largest activation is in the stratum: what it is a sample of."""
    promoted: Tensor
    """int32 [F, logits]: tokens whose logits the latent raises most, the largest first, see `logits.LogitLens`."""
    promoted_logit: Tensor
    """fp32 [F, logits]: their logits for an activation of 1, up to the scale of the final norm."""
    suppressed: Tensor
    """int32 [F, logits]: those that it lowers most, the smallest first."""
    suppressed_logit: Tensor
    """fp32 [F, logits]."""
    near: Tensor
    """int32 [F, related]: other latents with the largest cosine of decoder rows, the largest first."""
    near_cosine: Tensor
    """fp32 [F, related]."""
    together: Tensor
    """int32 [F, related]: other latents that fire on the same tokens, by the share of tokens on which either fires on
    which both do, the largest first. Counted on a sample of tokens, exactly."""
    together_tokens: Tensor
    """int64 [F, related]: tokens of the sample on which both fire."""
    sampled: Tensor
    """int64 [F]: tokens of the sample on which the latent fires."""
    decoder_norm: Tensor
    """fp32 [F]."""
    encoder_norm: Tensor
    """fp32 [F]."""
    encoder_bias: Tensor
    """fp32 [F]."""
    alignment: Tensor
    """fp32 [F]: cosine of encoder and decoder; NaN where they are of different spaces, as in a transcoder."""
    threshold: Tensor
    """fp32 [F]; NaN of a kind without thresholds."""
    n_tokens: int
    """Tokens counted."""
    n_sampled: int
    """Tokens of the sample for latents that fire together."""

    @property
    def d_sae(self) -> int:
        return len(self.fired)

    @property
    def frequency(self) -> Tensor:
        """fp64 [F]: the share of tokens on which the latent fires."""
        return self.fired.double() / max(self.n_tokens, 1)

    @property
    def mean(self) -> Tensor:
        """fp64 [F]: of the activations where it fires; 0 of a latent that never fired."""
        return self.total / self.fired.clamp(min=1)

    def stratum_bounds(self) -> Tensor:
        """fp32 [F, strata, 2]: from, to which activations are in a stratum."""
        strata = self.stratum_cells.shape[1]
        upper = self.histogram_end[:, None] * 0.5 ** torch.arange(strata, dtype=torch.float32, device="cpu")
        lower = upper * 0.5
        lower[:, -1] = 0
        return torch.stack([lower, upper], -1)

    def stratum_share(self) -> Tensor:
        """fp64 [F, strata]: the share of the firing tokens, all of them, whose activation is in a stratum."""
        bins, strata = self.histogram.shape[1], self.stratum_cells.shape[1]
        ends = [0, *(bins >> stratum for stratum in range(strata - 1, -1, -1))]
        counts = [self.histogram[:, low:high].sum(1) for low, high in itertools.pairwise(ends)]
        return torch.stack(counts[::-1], 1) / self.fired.clamp(min=1).double()[:, None]

    def bars(self, latent: int) -> tuple[list[int], list[float]]:
        """The histogram of a latent up to its last bin that is not empty: counts, and the middles of the bins."""
        counts = self.histogram[latent]
        used = int(counts.nonzero().max()) + 1 if bool((counts > 0).any()) else 0
        width = float(self.histogram_end[latent]) / len(counts)
        return counts[:used].tolist(), [(number + 0.5) * width for number in range(used)]

    def percentiles(self, latent: int) -> list[float]:
        """The 100 percentiles of a latent's activations where it fires, the last of them the largest. They are those of
        its histogram, whose bins count as evenly filled. Empty of a latent that never fired."""
        counts, fired = self.histogram[latent].double(), int(self.fired[latent])
        if not fired:
            return []
        wanted = torch.arange(1, 101, dtype=torch.float64, device="cpu") * fired / 100
        up_to = counts.cumsum(0)
        bin_of = torch.searchsorted(up_to, wanted)
        inside = 1 - (up_to[bin_of] - wanted) / counts[bin_of]
        values = (bin_of + inside) * (float(self.histogram_end[latent]) / len(counts))
        values[-1] = float(self.largest[latent])
        return values.clamp(max=float(self.largest[latent])).tolist()

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, those of examples as ``top/row`` and so on."""
        found: dict[str, Tensor] = {}
        for name, value in _attributes(self):
            if isinstance(value, Examples):
                found |= {f"{name}/{part}": tensor for part, tensor in value._asdict().items()}
            elif isinstance(value, Tensor):
                found[name] = value
        return found

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def save(self, path: Path) -> dict[str, Any]:
        """Write the file atomically. Returns what a manifest has of it: ``file``, ``bytes``, ``sha256``."""
        return save(path, self.tensors())


def _attributes(table: LatentTable) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(table, field.name)) for field in fields(table))


def layout(d_sae: int, sizes: Sizes) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a table, by the names of `LatentTable.tensors`."""
    check_int("d_sae", d_sae, 1)
    check_type("sizes", sizes, Sizes)
    latents, logits, related = (d_sae,), (d_sae, sizes.logits), (d_sae, sizes.related)
    counts, sums, numbers, ids = torch.int64, torch.float64, torch.float32, torch.int32

    def examples(name: str, *slots: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        shape = (d_sae, *slots)
        return {
            f"{name}/row": (ids, shape),
            f"{name}/position": (ids, shape),
            f"{name}/value": (numbers, shape),
            f"{name}/window": (numbers, (*shape, sizes.window)),
        }

    return {
        "fired": (counts, latents),
        "total": (sums, latents),
        "largest": (numbers, latents),
        "histogram": (counts, (d_sae, sizes.bins)),
        "histogram_end": (numbers, latents),
        **examples("top", sizes.top),
        **examples("strata", sizes.strata, sizes.of_stratum),
        "stratum_cells": (counts, (d_sae, sizes.strata)),
        "promoted": (ids, logits),
        "promoted_logit": (numbers, logits),
        "suppressed": (ids, logits),
        "suppressed_logit": (numbers, logits),
        "near": (ids, related),
        "near_cosine": (numbers, related),
        "together": (ids, related),
        "together_tokens": (counts, related),
        "sampled": (counts, latents),
        "decoder_norm": (numbers, latents),
        "encoder_norm": (numbers, latents),
        "encoder_bias": (numbers, latents),
        "alignment": (numbers, latents),
        "threshold": (numbers, latents),
    }


# What may be NaN: see there.
_MAY_BE_NAN = frozenset({"alignment", "threshold"})


class Bounds(NamedTuple):
    """What the numbers in a table must be below."""

    rows: int
    context: int
    vocabulary: int
    n_tokens: int
    n_sampled: int


def table_of(tensors: Mapping[str, Tensor], n_tokens: int, n_sampled: int) -> LatentTable:
    """The table of tensors as `LatentTable.tensors` names them."""
    found = dict[str, Any]((name, tensor) for name, tensor in tensors.items() if "/" not in name)
    for name in ("top", "strata"):
        found[name] = Examples(*(tensors[f"{name}/{part}"] for part in Examples._fields))
    return LatentTable(**found, n_tokens=n_tokens, n_sampled=n_sampled)


def load(path: Path, entry: Mapping[str, Any], d_sae: int, sizes: Sizes, bounds: Bounds) -> LatentTable:
    """Read what `LatentTable.save` wrote and returned as ``entry``. Raises BadFileError for another file, and for one
    that holds numbers that no table has."""
    expected = layout(d_sae, sizes)
    tensors = read(path, entry, expected)
    for name, problem in problems(tensors, d_sae, bounds):
        raise BadFileError(f"{shown(path)}: {name}: {problem}")
    return table_of(tensors, bounds.n_tokens, bounds.n_sampled)


def problems(tensors: Mapping[str, Tensor], d_sae: int, bounds: Bounds) -> Iterator[tuple[str, str]]:
    """Names of tensors that no table has, and why: numbers out of bounds, and what is not finite."""
    below = {"row": bounds.rows, "position": bounds.context}
    below |= {"promoted": bounds.vocabulary, "suppressed": bounds.vocabulary, "near": d_sae, "together": d_sae}
    counts = {"sampled": bounds.n_sampled, "together_tokens": bounds.n_sampled}
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor)
        last = name.rpartition("/")[2]
        if tensor.dtype in _INTEGERS:
            least, most = (-1, below[last] - 1) if last in below else (0, counts.get(name, bounds.n_tokens))
            if int(low) < least or int(high) > most:
                yield name, f"expected numbers from {least} to {most}, found {int(low)} to {int(high)}"
        elif name not in _MAY_BE_NAN and not bool((low.isfinite() & high.isfinite()).item()):
            yield name, "expected finite values, found NaN or Inf"


# ---- files


def save(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors as a safetensors file, atomically; what a manifest has of it."""
    with atomic_write(path) as temporary:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(found, temporary, metadata={"format": "pt"})
    with open_file(path) as file:
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(file)}


def read(
    path: Path, entry: Mapping[str, Any], expected: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
) -> dict[str, Tensor]:
    """The tensors of a file of `save`, by its ``entry``, which must be those ``expected``: dtype and shape, None for
    any size. Raises BadFileError for another file."""
    with open_file(path) as file:
        if sha256_of(file) != entry["sha256"]:
            raise BadFileError(f"{shown(path)}: expected the file as it was written, found another checksum")
        return read_safetensors(path, _check(path, expected), file, dtypes=STORED_DTYPES)


def _check(
    path: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
) -> Callable[[dict[str, Header]], None]:
    def check(headers: dict[str, Header]) -> None:
        if headers.keys() != expected.keys():
            differing = sorted(headers.keys() ^ expected.keys())
            raise BadFileError(
                f"{shown(path)}: expected {len(expected)} tensors, found other ones: {differing[0]!r:.60}"
            )
        for name, (dtype, shape) in expected.items():
            header = headers[name]
            fits = len(header.shape) == len(shape) and all(
                size in (None, found) for size, found in zip(shape, header.shape, strict=True)
            )
            if header.dtype != dtype or not fits:
                raise BadFileError(
                    f"{shown(path)}: {name}: expected {dtype_name(dtype)} {list(shape)}, found "
                    f"{dtype_name(header.dtype)} {list(header.shape)}"
                )

    return check
