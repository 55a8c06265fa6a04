"""What an SAE must beat, fitted on training activations: PCA of the same rank, and a table of means by token pair."""

import torch
from torch import Tensor

from ..activations.moments import check_activations, check_dense, chunks, mean_row
from ..checks import check_int, found, is_integer
from .variance import Fidelity, fidelity


def pca_fvu(train_activations: Tensor, heldout_activations: Tensor, rank: int) -> float:
    """FVU on held-out x̂ = μ + (x − μ)·V·Vᵀ, V the ``rank`` leading principal directions and μ the mean of the training
    activations. A rank above d_model counts as d_model; rank 0 predicts μ.

    train_activations [m, d_model], heldout_activations [n, d_model]: float16, bfloat16, float32 or float64; computed in
    fp64. NaN when the held-out ones do not vary. Raises TypeError or ValueError for other activations, none, values
    that are not finite, and a rank that is no int of at least 0.
    """
    return pca_fidelity(train_activations, heldout_activations, rank).fvu


@torch.no_grad()
def pca_fidelity(train_activations: Tensor, heldout_activations: Tensor, rank: int) -> Fidelity:
    """All that `pca_fvu` is one figure of."""
    check_int("rank", rank, 0)
    check_activations("train_activations", train_activations)
    d_model = train_activations.shape[1]
    check_activations("heldout_activations", heldout_activations, d_model)
    mean = mean_row("train_activations", train_activations)
    covariance = torch.zeros(d_model, d_model, dtype=torch.float64, device=mean.device)
    for x in chunks(train_activations, d_model):
        centred = x.double() - mean
        covariance += centred.T @ centred
    _, directions = torch.linalg.eigh(covariance)  # ascending
    V = directions[:, d_model - min(rank, d_model) :].to(heldout_activations.device)
    mean = mean.to(heldout_activations.device)
    return fidelity("heldout_activations", heldout_activations, lambda x, start: mean + (x.double() - mean) @ V @ V.T)


@torch.no_grad()
def pair_table_fvu(
    train_activations: Tensor, train_pairs: Tensor, heldout_activations: Tensor, heldout_pairs: Tensor
) -> float:
    """FVU on held-out of predicting each activation by the training mean of its (previous, current) token pair.

    An SAE that does not beat this table may have learnt nothing but bigrams. A pair not seen in training falls back to
    the mean of its current token, and a token not seen to the mean of all.

    activations [m, d_model] and [n, d_model]: float16, bfloat16, float32 or float64; pairs [m, 2] and [n, 2]: any ids
    ≥ 0 of an integer dtype. NaN when the held-out activations do not vary. Raises TypeError or ValueError for others,
    none, and values that are not finite.
    """
    check_activations("train_activations", train_activations)
    check_activations("heldout_activations", heldout_activations, train_activations.shape[1])
    pairs = torch.cat(
        [
            _checked_pairs("train_pairs", train_pairs, train_activations).to(heldout_activations.device),
            _checked_pairs("heldout_pairs", heldout_pairs, heldout_activations).to(heldout_activations.device),
        ]
    )
    ids, pairs = pairs.unique(return_inverse=True)  # numbered anew: the product of two ids may be beyond int64
    m = len(train_activations)
    keys, current = pairs[:, 0] * len(ids) + pairs[:, 1], pairs[:, 1]
    mean = mean_row("train_activations", train_activations).to(pairs.device)
    by_pair = _MeanTable(keys[:m], train_activations)
    by_token = _MeanTable(current[:m], train_activations)

    def predict(x: Tensor, start: int) -> Tensor:
        rows = slice(m + start, m + start + len(x))
        predicted = by_token.lookup(current[rows], mean.expand(x.shape))
        return by_pair.lookup(keys[rows], predicted)

    return fidelity("heldout_activations", heldout_activations, predict).fvu


def _checked_pairs(name: str, pairs: Tensor, activations: Tensor) -> Tensor:
    """``pairs`` as int64."""
    if not is_integer(pairs):
        raise TypeError(f"{name}: expected an integer torch.Tensor, got {found(pairs)}")
    check_dense(name, pairs)
    if pairs.shape != (activations.shape[0], 2):
        raise ValueError(f"{name}: expected shape [{activations.shape[0]}, 2], got {list(pairs.shape)}")
    pairs = pairs.long()
    if pairs.min() < 0:
        raise ValueError(f"{name}: expected ids of at least 0, got {pairs.min().item()}")
    return pairs


class _MeanTable:
    """The mean activation of each key."""

    def __init__(self, keys: Tensor, activations: Tensor):
        self.keys, index, counts = keys.unique(return_inverse=True, return_counts=True)
        self.means = torch.zeros(len(counts), activations.shape[1], dtype=torch.float64, device=keys.device)
        start = 0
        for x in chunks(activations, activations.shape[1]):
            self.means.index_add_(0, index[start : start + x.shape[0]], x.to(self.means))
            start += x.shape[0]
        self.means /= counts[:, None]

    def lookup(self, keys: Tensor, default: Tensor) -> Tensor:
        """The means [n, d_model] of ``keys`` [n]; rows of ``default`` where a key is not in the table."""
        slot = torch.searchsorted(self.keys, keys.contiguous()).clamp_(max=len(self.keys) - 1)
        return torch.where((self.keys[slot] == keys)[:, None], self.means[slot], default)
