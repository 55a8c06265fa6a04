"""How good an SAE is: on held-out activations, against baselines, and inside the language model.

Measures of Gemma Scope (arXiv 2408.05147 §3.4) over x [n, d_model], all sums in fp64:

    L0   = mean of ‖f(x)‖₀
    FVU  = Σ‖x − x̂‖² / Σ‖x − x̄‖²,  x̄ the mean of the same x: 0 is exact, 1 no better than predicting the mean
    delta LM loss = rise of the cross-entropy, in nats, when x̂ takes the place of x inside the model
    loss recovered = 1 − delta / delta of mean ablation

Loss recovered saturates: an SAE that loses to PCA of the same rank can still read 0.98. Hence the two baselines here,
both fitted on training activations: PCA whose rank is the SAE's L0, and a table of mean activations by pair of tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_floating, dtype_name, found, is_integer
from .kernels.density import is_sparse
from .sae import JumpReLUSAE
from .sites import Site, attach, evaluating, site_width, special_token_ids

HIGH_FREQUENCY = 0.1
# Elements of the largest temporary: latents of a chunk of tokens, or logits of a batch of rows.
_CHUNK_ELEMENTS = 2**24
# Narrow activations are worked on in pieces that a CPU's caches hold: three times as fast at d_model 128.
_CHUNK_ROWS = 4096
# Eager attention holds several [batch, heads, context, context] tensors, which small vocabularies do not bound.
_BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class SAEMetrics:
    """What `evaluate_sae` found on the held-out activations."""

    tokens: int
    """Activations that were counted."""
    l0: float
    """Mean number of active latents."""
    fvu: float
    """Fraction of variance unexplained; NaN when the activations do not vary."""
    pca_fvu: float | None
    """FVU of PCA of rank round(l0); None when no training activations were given."""
    dead_fraction: float
    """Share of the latents that never fired here."""
    high_freq_fraction: float
    """Share of the latents that fired on more than 10 % of the activations."""
    firing_frequency: Tensor
    """Share of the activations that each latent fired on, float32 [d_sae] on the CPU."""


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


def _check_activations(name: str, activations: Tensor, d_model: int | None = None) -> None:
    check_floating(name, activations)
    if activations.ndim != 2 or (d_model is not None and activations.shape[1] != d_model):
        width = "d_model" if d_model is None else d_model
        raise ValueError(f"{name}: expected shape [n, {width}], got {list(activations.shape)}")
    if activations.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one row, got none")


def _chunks(activations: Tensor, width: int) -> Iterator[Tensor]:
    """Rows of ``activations`` in pieces, so that [rows, width] stays bounded."""
    return iter(activations.split(max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // width))))


def _mean(name: str, activations: Tensor) -> Tensor:
    """The fp64 mean row; ValueError when it is not finite."""
    total = torch.zeros(activations.shape[1], dtype=torch.float64, device=activations.device)
    for x in _chunks(activations, activations.shape[1]):
        total += x.sum(0, dtype=torch.float64)
    if not total.isfinite().all():
        raise ValueError(f"{name}: expected finite values, found NaN or Inf")
    return total / activations.shape[0]


def _fvu(name: str, activations: Tensor, reconstruct: Callable[[Tensor, int], Tensor], width: int) -> float:
    """FVU of ``reconstruct(x, start)`` for chunks x of ``activations``, whose first row is ``start``."""
    mean = _mean(name, activations)
    error = torch.zeros((), dtype=torch.float64, device=activations.device)
    variance, start = error.clone(), 0
    for x in _chunks(activations, width):
        x_hat, x64 = reconstruct(x, start), x.double()
        error += (x64 - x_hat.to(x64)).square().sum()
        variance += (x64 - mean).square().sum()
        start += x.shape[0]
    return (error / variance).item() if variance > 0 else math.nan


@torch.no_grad()
def evaluate_sae(
    sae: JumpReLUSAE,
    activations: Tensor,
    train_activations: Tensor | None = None,
    keep: Tensor | None = None,
) -> SAEMetrics:
    """Sparsity, fidelity and firing of ``sae`` on held-out activations.

    activations [n, d_model], any float dtype and device. train_activations [m, d_model]: where the PCA baseline is
    fitted; without them it is left out. keep: bool [n], False for positions to leave out (BOS, EOS, PAD); by default
    all count. Memory stays bounded in n and d_sae beyond the arguments themselves.

    Raises TypeError or ValueError: not a float matrix, a width other than ``sae.d_model``, no rows, none kept, NaN or
    Inf.
    """
    _check_activations("activations", activations, sae.d_model)
    if train_activations is not None:
        _check_activations("train_activations", train_activations, sae.d_model)
    if keep is not None:
        activations = activations[_checked_keep(keep, activations)]

    device = sae.W_dec.device
    n, fired = activations.shape[0], torch.zeros(sae.d_sae, dtype=torch.int64, device=device)

    def reconstruct(x: Tensor, start: int) -> Tensor:
        # The weights' precision, not that of the stored activations: rounding x̂ to bf16 would count as SAE error.
        code = sae.encode_sparse(x.to(device=device, dtype=sae.W_dec.dtype))
        fired.add_(code.firing_count())
        return sae.decode(code if is_sparse(code) else code.to_dense())

    fvu = _fvu("activations", activations, reconstruct, max(sae.d_sae, sae.d_model))
    l0 = fired.sum().item() / n
    frequency = fired.double() / n
    return SAEMetrics(
        tokens=n,
        l0=l0,
        fvu=fvu,
        pca_fvu=None if train_activations is None else pca_fvu(train_activations, activations, round(l0)),
        dead_fraction=(fired == 0).double().mean().item(),
        high_freq_fraction=(frequency > HIGH_FREQUENCY).double().mean().item(),
        firing_frequency=frequency.float().cpu(),
    )


def _checked_keep(keep: Tensor, activations: Tensor) -> Tensor:
    if not isinstance(keep, Tensor):
        raise TypeError(f"keep: expected a torch.Tensor, got {type(keep).__name__}")
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected dtype bool, got {dtype_name(keep.dtype)}")
    if keep.shape != activations.shape[:1]:
        raise ValueError(f"keep: expected shape [{activations.shape[0]}], got {list(keep.shape)}")
    if not keep.any():
        raise ValueError(f"keep: expected at least one position to count, got none of {keep.shape[0]}")
    return keep.to(activations.device)


@torch.no_grad()
def pca_fvu(train_activations: Tensor, heldout_activations: Tensor, rank: int) -> float:
    """FVU on held-out x̂ = μ + (x − μ)·V·Vᵀ, V the ``rank`` leading principal directions and μ the mean of the training
    activations. Rank is clipped to [0, d_model]; rank 0 predicts μ.

    train_activations [m, d_model], heldout_activations [n, d_model]: any float dtype; computed in fp64.
    """
    _check_activations("train_activations", train_activations)
    d_model = train_activations.shape[1]
    _check_activations("heldout_activations", heldout_activations, d_model)
    mean = _mean("train_activations", train_activations)
    covariance = torch.zeros(d_model, d_model, dtype=torch.float64, device=mean.device)
    for x in _chunks(train_activations, d_model):
        centred = x.double() - mean
        covariance += centred.T @ centred
    _, directions = torch.linalg.eigh(covariance)  # ascending
    rank = min(max(rank, 0), d_model)
    V = directions[:, d_model - rank :].to(heldout_activations.device)
    mean = mean.to(heldout_activations.device)
    return _fvu(
        "heldout_activations", heldout_activations, lambda x, start: mean + (x.double() - mean) @ V @ V.T, d_model
    )


@torch.no_grad()
def pair_table_fvu(
    train_activations: Tensor, train_pairs: Tensor, heldout_activations: Tensor, heldout_pairs: Tensor
) -> float:
    """FVU on held-out of predicting each activation by the training mean of its (previous, current) token pair.

    An SAE that does not beat this table may have learnt nothing but bigrams. A pair not seen in training falls back to
    the mean of its current token, and a token not seen to the mean of all.

    activations [n, d_model] of any float dtype; pairs: ids ≥ 0, an integer [n, 2] each.
    """
    _check_activations("train_activations", train_activations)
    _check_activations("heldout_activations", heldout_activations, train_activations.shape[1])
    for name, pairs, activations in (
        ("train_pairs", train_pairs, train_activations),
        ("heldout_pairs", heldout_pairs, heldout_activations),
    ):
        if not is_integer(pairs):
            raise TypeError(f"{name}: expected an integer torch.Tensor, got {found(pairs)}")
        if pairs.shape != (activations.shape[0], 2):
            raise ValueError(f"{name}: expected shape [{activations.shape[0]}, 2], got {list(pairs.shape)}")
        if pairs.min() < 0:
            raise ValueError(f"{name}: expected ids of at least 0, got {pairs.min().item()}")

    device = heldout_activations.device
    train_pairs, heldout_pairs = train_pairs.to(device).long(), heldout_pairs.to(device).long()
    mean = _mean("train_activations", train_activations).to(device)
    base = int(torch.maximum(train_pairs.max(), heldout_pairs.max())) + 1
    train_keys, heldout_keys = (pairs[:, 0] * base + pairs[:, 1] for pairs in (train_pairs, heldout_pairs))
    by_pair = _MeanTable(train_keys, train_activations)
    by_token = _MeanTable(train_pairs[:, 1], train_activations)

    def predict(x: Tensor, start: int) -> Tensor:
        rows = slice(start, start + x.shape[0])
        predicted = by_token.lookup(heldout_pairs[rows, 1], mean.expand(x.shape))
        return by_pair.lookup(heldout_keys[rows], predicted)

    return _fvu("heldout_activations", heldout_activations, predict, heldout_activations.shape[1])


class _MeanTable:
    """The mean activation of each key."""

    def __init__(self, keys: Tensor, activations: Tensor):
        self.keys, index, counts = keys.unique(return_inverse=True, return_counts=True)
        self.means = torch.zeros(len(counts), activations.shape[1], dtype=torch.float64, device=keys.device)
        start = 0
        for x in _chunks(activations, activations.shape[1]):
            self.means.index_add_(0, index[start : start + x.shape[0]], x.to(self.means))
            start += x.shape[0]
        self.means /= counts[:, None]

    def lookup(self, keys: Tensor, default: Tensor) -> Tensor:
        """The means [n, d_model] of ``keys`` [n]; rows of ``default`` where a key is not in the table."""
        slot = torch.searchsorted(self.keys, keys.contiguous()).clamp_(max=len(self.keys) - 1)
        return torch.where((self.keys[slot] == keys)[:, None], self.means[slot], default)


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
    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    scored = ~torch.isin(tokens, torch.tensor(skipped, dtype=tokens.dtype, device=tokens.device))
    scored = scored[:, :-1] & scored[:, 1:]
    count = int(scored.sum())
    if count == 0:
        raise ValueError("tokens: expected at least one next token to score, got special tokens only")
    if batch_size is None:
        batch_size = max(1, min(_BATCH_TOKENS, _CHUNK_ELEMENTS // _vocabulary(model)) // tokens.shape[1])
    elif batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")

    device = model.get_input_embeddings().weight.device
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for rows, mask in zip(tokens.split(batch_size), scored.split(batch_size), strict=True):
            logits = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
            mask = mask.to(logits.device)
            targets = rows[:, 1:].to(logits.device)[mask].long()
            losses = F.cross_entropy(logits[mask].float(), targets, reduction="none")
            total += losses.sum(dtype=torch.float64).cpu()
    return (total / count).item()


def _vocabulary(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[0]


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
    if not isinstance(mean, Tensor):
        raise TypeError(f"mean: expected a torch.Tensor, got {type(mean).__name__}")
    if mean.shape != (width,):
        raise ValueError(f"mean: expected shape [{width}], the width of {site}, got {list(mean.shape)}")
    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    with attach(model, {site: _Constant(mean)}, skipped):
        return language_model_loss(model, tokens, skipped, batch_size)


def loss_recovered(delta: float, ablation_delta: float) -> float | None:
    """1 − delta / ablation_delta: 1 is a perfect splice, 0 no better than the mean.

    None where that says nothing: ablating does not raise the loss, or a loss is not finite.
    """
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
    return SpliceMetrics(clean_loss, delta, ablation, loss_recovered(delta, ablation))
