"""What an SAE costs inside the language model, in nats a token (arXiv 2408.05147 §3.4).

    delta LM loss = rise of the cross-entropy when x̂ takes the place of x inside the model
    loss recovered = 1 − delta / delta of mean ablation

Loss recovered saturates where ablation costs much: hence the rise itself, and the `baselines`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations.moments import CHUNK_ELEMENTS
from ..checks import check_floating, check_number, found
from ..sites import Site, attach, evaluating, site_width, special_token_ids
from ..sites.decoder import embedding_weight

# Eager attention holds several [batch, heads, context, context] tensors, which small vocabularies do not bound.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class SpliceMetrics:
    """What `evaluate_splice` found: language-model losses in nats per token."""

    clean_loss: float
    """Cross-entropy of the untouched model."""
    delta_loss: float
    """Its rise with the reconstruction in the place of the activation."""
    ablation_delta_loss: float
    """Its rise with the mean activation in the place of the activation."""
    loss_recovered: float | None
    """1 − delta_loss / ablation_delta_loss; None when ablating does not raise the loss."""
    rows: int
    """Rows of tokens the model ran on."""
    predictions: int
    """Next tokens that every loss is the mean of."""


@torch.no_grad()
def language_model_loss(
    model: nn.Module, tokens: Tensor, skip_token_ids: Iterable[int] | None = None, batch_size: int | None = None
) -> float:
    """Mean cross-entropy of the next token, in nats.

    A prediction counts when neither the token it is made at nor the token it predicts is in ``skip_token_ids``, by
    default BOS, EOS and PAD of the model's config. tokens: ids [rows, context] with context ≥ 2, packed or padded on
    the right (no attention mask is passed). batch_size: rows of one forward, by default as many as keep the logits
    bounded. The model runs in evaluation mode without cache and is left in its mode.

    Raises TypeError or ValueError: not a matrix of ids of the vocabulary, rows too short, nothing to score.
    """
    _check_tokens(model, tokens)
    scored = scored_tokens(model, tokens, skip_token_ids)
    count = int(scored.sum())
    if count == 0:
        raise ValueError("tokens: expected at least one next token to score, got special tokens only")
    if batch_size is None:
        batch_size = max(1, min(_BATCH_TOKENS, CHUNK_ELEMENTS // _vocabulary(model)) // tokens.shape[1])
    elif batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")

    device = embedding_weight(model).device
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    with evaluating(model):
        for rows, mask in zip(tokens.split(batch_size), scored.split(batch_size), strict=True):
            logits = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
            mask = mask.to(logits.device)
            targets = rows[:, 1:].to(logits.device)[mask].long()
            losses = F.cross_entropy(logits[mask].float(), targets, reduction="none")
            total += losses.sum(dtype=torch.float64).cpu()
    return (total / count).item()


def scored_tokens(model: nn.Module, tokens: Tensor, skip_token_ids: Iterable[int] | None = None) -> Tensor:
    """The next tokens that `language_model_loss` counts: bool [rows, context − 1]."""
    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    kept = ~torch.isin(tokens, torch.tensor(skipped, dtype=tokens.dtype, device=tokens.device))
    return kept[:, :-1] & kept[:, 1:]


def _vocabulary(model: nn.Module) -> int:
    return embedding_weight(model).shape[0]


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens: expected a torch.Tensor of int64 or int32, got {found(tokens)}")
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected shape [rows ≥ 1, context ≥ 2], got {list(tokens.shape)}")
    low, high, size = tokens.min().item(), tokens.max().item(), _vocabulary(model)
    if low < 0 or high >= size:
        raise ValueError(f"tokens: expected ids from 0 to {size - 1}, got {low if low < 0 else high}")


def delta_loss(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[Site, nn.Module],
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
    clean_loss: float | None = None,
) -> float:
    """Rise of `language_model_loss` when every site of ``saes`` holds its reconstruction.

    Tokens in ``skip_token_ids`` are neither scored nor spliced. clean_loss: the loss without splice if known already,
    from the same tokens, ``skip_token_ids`` and ``batch_size``.
    """
    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    if clean_loss is None:
        clean_loss = language_model_loss(model, tokens, skipped, batch_size)
    check_number("clean_loss", clean_loss)
    with attach(model, saes, skipped):
        return language_model_loss(model, tokens, skipped, batch_size) - clean_loss


class _Constant(nn.Module):
    """Reconstructs everything as one vector."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value.to(x).expand(x.shape)


def mean_ablation_loss(
    model: nn.Module,
    tokens: Tensor,
    site: Site,
    mean: Tensor,
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
) -> float:
    """`language_model_loss` (not its rise) with every activation of ``site`` replaced by ``mean`` [width].

    Tokens in ``skip_token_ids`` keep their activation.
    """
    width = site_width(model, site)
    check_floating("mean", mean)
    if mean.shape != (width,):
        raise ValueError(f"mean: expected shape [{width}], the width of {site}, got {list(mean.shape)}")
    if not mean.isfinite().all():
        raise ValueError("mean: expected finite values, got NaN or Inf")
    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    with attach(model, {site: _Constant(mean)}, skipped):
        return language_model_loss(model, tokens, skipped, batch_size)


def loss_recovered(delta: float, ablation_delta: float) -> float | None:
    """1 − delta / ablation_delta: 1 is a perfect splice, 0 no better than the mean.

    None where that says nothing: ablating does not raise the loss, or a loss is not finite.
    """
    for name, value in (("delta", delta), ("ablation_delta", ablation_delta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(delta) and math.isfinite(ablation_delta)) or ablation_delta <= 0:
        return None
    return 1 - delta / ablation_delta


def evaluate_splice(
    model: nn.Module,
    tokens: Tensor,
    site: Site,
    sae: nn.Module,
    mean: Tensor,
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
    clean_loss: float | None = None,
) -> SpliceMetrics:
    """`delta_loss`, `mean_ablation_loss` and `loss_recovered` of one SAE; arguments as there."""
    if clean_loss is None:
        clean_loss = language_model_loss(model, tokens, skip_token_ids, batch_size)
    delta = delta_loss(model, tokens, {site: sae}, skip_token_ids, batch_size, clean_loss)
    ablation = mean_ablation_loss(model, tokens, site, mean, skip_token_ids, batch_size) - clean_loss
    predictions = int(scored_tokens(model, tokens, skip_token_ids).sum())
    return SpliceMetrics(clean_loss, delta, ablation, loss_recovered(delta, ablation), len(tokens), predictions)
