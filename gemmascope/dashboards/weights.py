"""What the weights of an SAE say of its latents, and the table of that and of what was found on text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..evaluation.protocol import Subject
from .collect import Found
from .logits import LogitLens
from .neighbours import nearest
from .table import LatentTable, Sizes


@torch.no_grad()
def complete(
    found: Found, subject: Subject, lens: LogitLens, sizes: Sizes, check: Callable[[int], None] = lambda done: None
) -> LatentTable:
    """The table of what was ``found`` on text and of what the weights say. check: called with steps done, of two for
    each latent."""
    sae: Any = subject.sae
    scale = float(getattr(sae, "input_scale", 1.0))
    decoder, encoder = sae.W_dec.detach().float() * scale, sae.W_enc.detach().float().T / scale
    n = len(decoder)
    logits = lens.extremes(subject.writes, decoder, sizes.logits, check)
    near, cosine = nearest(decoder, sizes.related, lambda done: check(n + done))
    found_by_name = found._asdict()
    together = found_by_name.pop("together")
    return LatentTable(
        **found_by_name,
        **together._asdict(),
        **logits._asdict(),
        near=near,
        near_cosine=cosine,
        decoder_norm=_norms(decoder),
        encoder_norm=_norms(encoder),
        encoder_bias=sae.b_enc.detach().float().cpu(),
        alignment=_alignment(encoder, decoder, subject.reads == subject.writes),
        threshold=_threshold(sae, n),
    )


def _norms(rows: Tensor) -> Tensor:
    return rows.double().norm(dim=1).float().cpu()


def _alignment(encoder: Tensor, decoder: Tensor, same: bool) -> Tensor:
    if not same:
        return torch.full((len(decoder),), torch.nan, dtype=torch.float32, device="cpu")
    products = (encoder.double() * decoder.double()).sum(1)
    norms = encoder.double().norm(dim=1) * decoder.double().norm(dim=1)
    return (products / norms.clamp(min=torch.finfo(torch.float64).tiny)).float().cpu()


def _threshold(sae: Any, n: int) -> Tensor:
    threshold = getattr(sae, "threshold", None)
    if threshold is None:
        return torch.full((n,), torch.nan, dtype=torch.float32, device="cpu")
    return threshold.detach().float().clamp(min=0).cpu()
