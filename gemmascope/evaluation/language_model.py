"""What an SAE costs inside the language model, in nats a token (arXiv 2408.05147 §3.4).

    delta LM loss = rise of the cross-entropy when x̂ takes the place of x inside the model
    loss recovered = 1 − delta / delta of mean ablation

Loss recovered saturates where ablation costs much: hence the rise itself, and the `baselines`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations.moments import CHUNK_ELEMENTS
from ..checks import check_floating, check_int, check_number, check_tensor
from ..sites import Site, attach, evaluating, site_width
from ..sites.attach import Reconstruct
from ..sites.decoder import eagerly, input_device
from ..sites.site import as_site
from ..sites.tokens import TokenInput, forward_arguments, skipped_ids, vocabulary_size

# Logits that one thread of a CPU works on at a time, so that its caches hold them: five times as fast as 16 times as
# many.
_CACHED_ELEMENTS = 2**20
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
    model: nn.Module,
    tokens: Tensor,
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
    attention_mask: Tensor | None = None,
) -> float:
    """Mean cross-entropy of the next token, in nats.

    A prediction counts when neither the token it is made at nor the token it predicts is in ``skip_token_ids``, by
    default BOS, EOS and PAD of the model's config. tokens: ids [rows, context] with context ≥ 2. attention_mask: 1 at
    tokens, 0 at padding, which the model does not read and which is not scored; without it, padding must come after
    the text. batch_size: rows of one forward, by default as many as keep the logits bounded. The model runs eagerly, in
    evaluation mode, without cache, and is left in its mode.

    Raises TypeError or ValueError: no model with logits, not a matrix of ids of the vocabulary, rows too short, nothing
    to score, padding before text without a mask, a mask that does not fit.
    """
    return _loss(model, tokens, skip_token_ids, batch_size, attention_mask, lambda batch: nullcontext())


def _loss(
    model: nn.Module,
    tokens: Tensor,
    skip_token_ids: Iterable[int] | None,
    batch_size: int | None,
    attention_mask: Tensor | None,
    during: Callable[[slice], AbstractContextManager[Any]],
) -> float:
    """`language_model_loss`, each forward within what ``during`` gives for its rows."""
    given = TokenInput(model, skipped_ids(model, skip_token_ids))
    given.check("tokens", tokens, attention_mask)
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected shape [rows ≥ 1, context ≥ 2], got {list(tokens.shape)}")
    scored = _scored(given, tokens, attention_mask)
    count = int(scored.sum())
    if count == 0:
        raise ValueError("tokens: expected at least one next token to score, got special tokens only")
    if batch_size is None:
        batch_size = rows_of_a_forward(model, tokens.shape[1])
    check_int("batch_size", batch_size, 1)

    device = input_device(model)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    with evaluating(model), eagerly(model):
        for start in range(0, len(tokens), batch_size):
            batch = slice(start, start + batch_size)
            mask = None if attention_mask is None else attention_mask[batch]
            with during(batch):
                logits = logits_of(model, tokens[batch], mask, device)
            losses = next_token_losses(logits, scored[batch], tokens[batch, 1:][scored[batch]])
            total += losses.sum(dtype=torch.float64).cpu()
    return (total / count).item()


def rows_of_a_forward(model: nn.Module, context: int) -> int:
    """Rows of ``context`` tokens that keep logits and attention bounded, at least one."""
    return max(1, min(_BATCH_TOKENS, CHUNK_ELEMENTS // vocabulary_size(model)) // context)


def logits_of(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """[rows, context, vocabulary], of a forward without cache. Raises TypeError for a model without logits."""
    logits = getattr(model(**forward_arguments(tokens, attention_mask, device)), "logits", None)
    if logits is None:
        raise TypeError(f"model: expected one whose forward returns logits, got {type(model).__name__}")
    return logits


def next_token_losses(logits: Tensor, scored: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each of ``targets`` [n], nats: fp32 [n], of fp64 logits fp64.

    logits [rows, context, vocabulary]; scored: bool [rows, context − 1], true at the n tokens after which a target
    comes, in their order.
    """
    found = logits.new_empty(len(targets), dtype=torch.promote_types(logits.dtype, torch.float32))
    for part, log_q in _log_probabilities(logits, scored):
        found[part] = cross_entropy(log_q, targets[part])
    return found


def log_probabilities(logits: Tensor, scored: Tensor) -> Tensor:
    """The log softmax of the logits at the ``scored`` tokens [n, vocabulary]: fp32, of fp64 fp64; else as above."""
    rows = int(scored.sum())
    found = logits.new_empty(rows, logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32))
    for part, log_q in _log_probabilities(logits, scored):
        found[part] = log_q
    return found


def losses_and_divergences(log_p: Tensor, logits: Tensor, scored: Tensor, targets: Tensor) -> Tensor:
    """`next_token_losses` and KL(p ‖ q) of each, nats, where q is the softmax of ``logits``: fp64 [n, 2].

    log_p [n, vocabulary]: `log_probabilities` of other logits. Formed in their dtype, summed in fp64.
    """
    found = torch.empty(len(targets), 2, dtype=torch.float64, device=logits.device)
    for part, log_q in _log_probabilities(logits, scored):
        found[part, 0] = cross_entropy(log_q, targets[part])
        expected = log_p[part].to(log_q.device)
        found[part, 1] = (expected.exp() * (expected - log_q)).sum(-1, dtype=torch.float64)
    return found


def cross_entropy(log_q: Tensor, targets: Tensor) -> Tensor:
    """Of each of ``targets`` [n] under log q [n, vocabulary], nats, in its dtype."""
    return F.nll_loss(log_q, targets.long().to(log_q.device), reduction="none")


def _log_probabilities(logits: Tensor, scored: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of the scored tokens a few at a time: which, and the log softmax of their logits."""
    context, vocabulary = logits.shape[1:]
    rows, columns = torch.nonzero(scored.to(logits.device), as_tuple=True)
    index, flat = rows * context + columns, logits.reshape(-1, vocabulary)
    wide = torch.promote_types(logits.dtype, torch.float32)
    elements = _CACHED_ELEMENTS * torch.get_num_threads() if logits.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, elements // max(1, vocabulary))
    for start in range(0, len(index), step):
        part = slice(start, start + step)
        yield part, torch.log_softmax(flat[index[part]].to(wide), -1)


def n_predictions(
    model: nn.Module,
    tokens: Tensor,
    skip_token_ids: Iterable[int] | None = None,
    attention_mask: Tensor | None = None,
) -> int:
    """Next tokens that `language_model_loss` is the mean of."""
    given = TokenInput(model, skipped_ids(model, skip_token_ids))
    return int(_scored(given, tokens, attention_mask).sum())


def _scored(given: TokenInput, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where a next token counts: bool [rows, context − 1]."""
    counted = given.counted(tokens, attention_mask)
    return counted[:, :-1] & counted[:, 1:]


def delta_loss(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[Site, Reconstruct] | Mapping[str, Reconstruct] | Mapping[Site | str, Reconstruct],
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
    clean_loss: float | None = None,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> float:
    """Rise of `language_model_loss` when every site of ``saes`` holds its reconstruction.

    Tokens in ``skip_token_ids`` are neither scored nor spliced. clean_loss: the loss without splice if known already,
    from the same tokens, ``skip_token_ids``, ``batch_size`` and ``attention_mask``. positions: bool of the shape of
    ``tokens``, elsewhere the activations are kept. Raises as `language_model_loss` and `attach` do.
    """
    skipped = skipped_ids(model, skip_token_ids)
    clean_loss = _clean_loss(clean_loss, model, tokens, skipped, batch_size, attention_mask)
    return _spliced_loss(model, tokens, saes, skipped, batch_size, attention_mask, positions) - clean_loss


def _spliced_loss(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[Any, Any],
    skipped: Iterable[int],
    batch_size: int | None,
    attention_mask: Tensor | None,
    positions: Tensor | None,
) -> float:
    """`language_model_loss` with SAEs in the model, at ``positions`` alone where there are any."""
    given = (model, tokens, skipped, batch_size, attention_mask)
    if positions is None:
        with attach(model, saes, skipped):
            return language_model_loss(*given)
    check_tensor("positions", positions, tuple(tokens.shape), (torch.bool,))
    return _loss(*given, lambda batch: attach(model, saes, skipped, positions=positions[batch]))


def _clean_loss(clean_loss: float | None, *arguments: Any) -> float:
    if clean_loss is None:
        return language_model_loss(*arguments)
    check_number("clean_loss", clean_loss)
    return clean_loss


class _Constant(nn.Module):
    """Reconstructs everything as one vector."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value.to(x).expand(x.shape)


class SparingOutliers(nn.Module):
    """``reconstruct``, but for tokens whose activation has a norm above ``max_norm``, which keep it.

    To splice an SAE in where it was trained without such tokens. max_norm: a number > 0, else ValueError or TypeError.
    """

    def __init__(self, reconstruct: Reconstruct, max_norm: float):
        super().__init__()
        check_number("max_norm", max_norm, 0, open_low=True)
        self.reconstruct, self.max_norm = reconstruct, float(max_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width], in its shape and dtype."""
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.where(norms > self.max_norm, x, self.reconstruct(x).to(x.dtype))


def mean_ablation_loss(
    model: nn.Module,
    tokens: Tensor,
    site: Site | str,
    mean: Tensor,
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
    attention_mask: Tensor | None = None,
    max_norm: float | None = None,
    positions: Tensor | None = None,
) -> float:
    """`language_model_loss` (not its rise) with every activation of ``site`` replaced by ``mean`` [width].

    Tokens in ``skip_token_ids`` keep their activation, as do those whose norm is above ``max_norm`` and those outside
    ``positions``, bool of the shape of ``tokens``. Raises TypeError or ValueError for a ``mean`` that is no finite
    float vector of that width; else as `language_model_loss`, `attach` and `SparingOutliers` do.
    """
    _check_mean(model, site, mean)
    skipped, ablated = skipped_ids(model, skip_token_ids), _Constant(mean)
    saes = {as_site(site): ablated if max_norm is None else SparingOutliers(ablated, max_norm)}
    return _spliced_loss(model, tokens, saes, skipped, batch_size, attention_mask, positions)


def _check_mean(model: nn.Module, site: Site | str, mean: Tensor) -> None:
    width = site_width(model, site)
    check_floating("mean", mean)
    if mean.shape != (width,):
        raise ValueError(f"mean: expected shape [{width}], the width of {site}, got {list(mean.shape)}")
    if not mean.isfinite().all():
        raise ValueError("mean: expected finite values, got NaN or Inf")


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
    site: Site | str,
    sae: Reconstruct,
    mean: Tensor,
    skip_token_ids: Iterable[int] | None = None,
    batch_size: int | None = None,
    clean_loss: float | None = None,
    attention_mask: Tensor | None = None,
) -> SpliceMetrics:
    """`delta_loss`, `mean_ablation_loss` and `loss_recovered` of one SAE; arguments and errors as there."""
    site, skipped = as_site(site), skipped_ids(model, skip_token_ids)
    _check_mean(model, site, mean)
    clean_loss = _clean_loss(clean_loss, model, tokens, skipped, batch_size, attention_mask)
    delta = delta_loss(model, tokens, {site: sae}, skipped, batch_size, clean_loss, attention_mask)
    ablation = mean_ablation_loss(model, tokens, site, mean, skipped, batch_size, attention_mask) - clean_loss
    predictions = n_predictions(model, tokens, skipped, attention_mask)
    return SpliceMetrics(clean_loss, delta, ablation, loss_recovered(delta, ablation), len(tokens), predictions)
