"""The threshold of a BatchTopK SAE after training: where held-out activations have the L0 that was asked for."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_floating, check_int, check_type
from ..saes import BatchTopKSAE
from ..saes.topk_transcoder import TopKTranscoder

# Pre-activations held at once.
_HELD = 1 << 26
# The bits of a positive fp32 number, which ascend with it, in two halves: the first pass counts by the upper one.
_LOWER = 15
_UPPER_SIZE, _LOWER_SIZE = 1 << 16, 1 << _LOWER


class Calibration(NamedTuple):
    threshold: float
    """θ in units of activations divided by the input scale, as in ``sae.threshold``."""
    l0_before: float
    """Mean L0 of the held-out tokens by the threshold that the SAE had."""
    l0_after: float
    """That by θ."""
    n_tokens: int


def calibrate_threshold(
    sae: BatchTopKSAE | TopKTranscoder, batches: Callable[[], Iterable[Tensor]], k: int | None = None
) -> Calibration:
    """Set ``sae.threshold``, in place, to the θ by which k latents fire on a held-out token on average.

    batches: called twice for the same batches of activations, [n, d_model] floats each, as harvested, of a transcoder
    those that it reads. k: by default ``sae.k``.

    θ is exact: the largest z, in fp32, that must not fire, so that the k·N larger ones do; it is 0 when fewer than
    k·N are positive, and L0 then is below k. Of equal z at the border none fires. The bits of z are counted in two
    passes, so that no z is kept but those of a block of tokens. Raises ValueError for no tokens and for z that are not
    finite.
    """
    if not isinstance(sae, TopKTranscoder):
        check_type("sae", sae, BatchTopKSAE)
    if not callable(batches):
        raise TypeError(f"batches: expected a function without arguments, got {type(batches).__name__}")
    k = sae.k if k is None else k
    check_int("k", k, 1, sae.d_sae)
    upper = torch.zeros(_UPPER_SIZE, dtype=torch.int64, device=sae.W_dec.device)
    before, n_tokens = 0, 0
    old = sae.threshold.detach().clamp(min=0)
    for z in _blocks(sae, batches):
        if not z.isfinite().all():
            raise ValueError("batches: expected activations whose latents are finite, found NaN or Inf")
        n_tokens += len(z)
        before += int((z > old).sum())
        upper += torch.bincount(_bits(z) >> _LOWER, minlength=_UPPER_SIZE)
    if not n_tokens:
        raise ValueError("batches: expected at least one token, got none")
    border, above = _place_of(upper, k * n_tokens)
    bits = 0
    if border is not None:
        lower = torch.zeros(_LOWER_SIZE, dtype=torch.int64, device=upper.device)
        for z in _blocks(sae, batches):
            found = _bits(z)
            lower += torch.bincount(found[found >> _LOWER == border] & (_LOWER_SIZE - 1), minlength=_LOWER_SIZE)
        if int(lower.sum()) != int(upper[border]):
            raise ValueError("batches: expected the same activations when called again, got others")
        place, within = _place_of(lower, k * n_tokens - above)
        assert place is not None  # there are more of them than are to fire
        bits, above = (border << _LOWER) | place, above + within
    theta = torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32).item()
    with torch.no_grad():
        sae.threshold.fill_(theta)
    return Calibration(theta, before / n_tokens, above / n_tokens, n_tokens)


def _blocks(sae: BatchTopKSAE | TopKTranscoder, batches: Callable[[], Iterable[Tensor]]) -> Iterable[Tensor]:
    """fp32 z of so many tokens at a time."""
    rows = max(1, _HELD // sae.d_sae)
    with torch.no_grad():
        for batch in batches():
            check_floating("batches", batch)
            if batch.ndim != 2 or batch.shape[1] != len(sae.W_enc):
                raise ValueError(f"batches: expected shape [n, {len(sae.W_enc)}] each, got {list(batch.shape)}")
            for x in batch.to(sae.W_dec.device).split(rows):
                yield sae.preactivations(x).float()


def _bits(z: Tensor) -> Tensor:
    """Those of the positive numbers."""
    return z[z > 0].view(torch.int32)


def _place_of(counts: Tensor, wanted: int) -> tuple[int | None, int]:
    """The place with the (wanted + 1)-th of what is counted, from the last place down, and how many lie above it;
    (None, all of them) when there are no more than wanted."""
    from_above = counts.flip(0).cumsum(0)
    total = int(from_above[-1])
    if total <= wanted:
        return None, total
    index = int(torch.searchsorted(from_above, wanted, right=True))
    above = int(from_above[index - 1]) if index else 0
    return len(counts) - 1 - index, above
