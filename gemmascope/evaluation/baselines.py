"""What an SAE must beat, fitted on training activations: PCA of the same rank, and a table of means by token pair."""

import torch
from torch import Tensor

from ..checks import found, is_integer
from .variance import check_activations, chunks, fvu_of, mean_row


@torch.no_grad()
def pca_fvu(train_activations: Tensor, heldout_activations: Tensor, rank: int) -> float:
    """FVU on held-out x̂ = μ + (x − μ)·V·Vᵀ, V the ``rank`` leading principal directions and μ the mean of the training
    activations. Rank is clipped to [0, d_model]; rank 0 predicts μ.

    train_activations [m, d_model], heldout_activations [n, d_model]: any float dtype; computed in fp64.
    """
    check_activations("train_activations", train_activations)
    d_model = train_activations.shape[1]
    check_activations("heldout_activations", heldout_activations, d_model)
    mean = mean_row("train_activations", train_activations)
    covariance = torch.zeros(d_model, d_model, dtype=torch.float64, device=mean.device)
    for x in chunks(train_activations, d_model):
        centred = x.double() - mean
        covariance += centred.T @ centred
    _, directions = torch.linalg.eigh(covariance)  # ascending
    rank = min(max(rank, 0), d_model)
    V = directions[:, d_model - rank :].to(heldout_activations.device)
    mean = mean.to(heldout_activations.device)
    return fvu_of(
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
    check_activations("train_activations", train_activations)
    check_activations("heldout_activations", heldout_activations, train_activations.shape[1])
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
    mean = mean_row("train_activations", train_activations).to(device)
    base = int(torch.maximum(train_pairs.max(), heldout_pairs.max())) + 1
    train_keys, heldout_keys = (pairs[:, 0] * base + pairs[:, 1] for pairs in (train_pairs, heldout_pairs))
    by_pair = _MeanTable(train_keys, train_activations)
    by_token = _MeanTable(train_pairs[:, 1], train_activations)

    def predict(x: Tensor, start: int) -> Tensor:
        rows = slice(start, start + x.shape[0])
        predicted = by_token.lookup(heldout_pairs[rows, 1], mean.expand(x.shape))
        return by_pair.lookup(heldout_keys[rows], predicted)

    return fvu_of("heldout_activations", heldout_activations, predict, heldout_activations.shape[1])


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
