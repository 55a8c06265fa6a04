"""What an SAE must beat, fitted on training activations: PCA of the same rank, a random dictionary of as many active
directions, and a table of means by token pair."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.moments import check_activations, check_dense, chunks, mean_row
from ..checks import check_int, found, is_integer
from .variance import Fidelity, fidelity

# Held-out tokens that a random dictionary is judged on, at most: each of them solves its own least squares.
RANDOM_TOKENS = 8192
# Added to the squared norms, 1, of its directions, so that two that are almost parallel can be solved for in fp64.
RIDGE = 1e-12


def pca_fvu(train_activations: Tensor, heldout_activations: Tensor, rank: int) -> float:
    """FVU on held-out x̂ = μ + (x − μ)·V·Vᵀ, V the ``rank`` leading principal directions and μ the mean of the training
    activations. A rank above d_model counts as d_model; rank 0 predicts μ.

    train_activations [m, d_model], heldout_activations [n, d_model]: float16, bfloat16, float32 or float64; computed in
    fp64. NaN when the held-out ones do not vary. Raises TypeError or ValueError for other activations, none, values
    that are not finite, and a rank that is no int of at least 0.
    """
    return pca_fidelity(train_activations, heldout_activations, rank).fvu


class PCA(NamedTuple):
    """Principal components of training activations, from `fit_pca`."""

    mean: Tensor
    """fp64 [d_model]."""
    directions: Tensor
    """fp64 [d_model, d_model]: a column each, the one of the largest variance last."""

    @torch.no_grad()
    def fidelity(self, heldout_activations: Tensor, rank: int) -> Fidelity:
        """All that `pca_fvu` is one figure of; arguments and errors as there."""
        check_int("rank", rank, 0)
        d_model = len(self.mean)
        check_activations("heldout_activations", heldout_activations, d_model)
        V = self.directions[:, d_model - min(rank, d_model) :].to(heldout_activations.device)
        mean = self.mean.to(heldout_activations.device)

        def project(x: Tensor, start: int) -> Tensor:
            return mean + (x.double() - mean) @ V @ V.T

        return fidelity("heldout_activations", heldout_activations, project)


@torch.no_grad()
def fit_pca(train_activations: Tensor) -> PCA:
    """The principal components of activations [m, d_model], on their device. Raises as `pca_fvu`."""
    check_activations("train_activations", train_activations)
    d_model = train_activations.shape[1]
    mean = mean_row("train_activations", train_activations)
    covariance = torch.zeros(d_model, d_model, dtype=torch.float64, device=mean.device)
    for x in chunks(train_activations, d_model):
        centred = x.double() - mean
        covariance += centred.T @ centred
    _, directions = torch.linalg.eigh(covariance)  # ascending
    return PCA(mean, directions)


def pca_fidelity(train_activations: Tensor, heldout_activations: Tensor, rank: int) -> Fidelity:
    """All that `pca_fvu` is one figure of."""
    check_int("rank", rank, 0)
    check_activations("train_activations", train_activations)
    check_activations("heldout_activations", heldout_activations, train_activations.shape[1])
    return fit_pca(train_activations).fidelity(heldout_activations, rank)


@torch.no_grad()
def random_dictionary_fvu(
    train_activations: Tensor, heldout_activations: Tensor, k: int, d_sae: int, seed: int = 0
) -> float:
    """FVU on held-out of a dictionary that was never trained: ``d_sae`` random unit directions d_j, of which each token
    x takes the ``k`` with the largest |⟨x − μ, d_j⟩|, μ the mean of the training activations.

    x̂ = μ + Σ_j a_j·d_j over those k, with the coefficients a of least squares: the best that those k can do. An SAE of
    ``d_sae`` latents and L0 k that is not below it has learnt no better directions than chance gives. k above d_model
    or d_sae counts as the smaller of them; k = 0 predicts μ.

    Activations as for `pca_fvu`. Of the held-out ones at most `RANDOM_TOKENS` count, evenly spread over all. Directions
    are drawn on the CPU by ``seed`` and are chosen by products in fp32; the rest is fp64. Temporaries are bounded but
    for the directions. NaN when those held-out activations do not vary. Raises as `pca_fvu`, and TypeError or
    ValueError for a k that is no int of at least 0, a d_sae below 1 or beyond 2³¹ − 1 and a seed beyond 2⁶³ − 1.
    """
    check_int("k", k, 0)
    check_int("d_sae", d_sae, 1)
    check_int("seed", seed, 0)
    for name, value, largest in (("d_sae", d_sae, 2**31 - 1), ("seed", seed, 2**63 - 1)):
        if value > largest:
            raise ValueError(f"{name}: expected at most {largest}, got {value}")
    check_activations("train_activations", train_activations)
    d_model = train_activations.shape[1]
    check_activations("heldout_activations", heldout_activations, d_model)
    mean = mean_row("train_activations", train_activations).to(heldout_activations.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    directions = torch.randn(d_sae, d_model, generator=generator, dtype=torch.float32, device="cpu")
    directions = directions.div_(torch.linalg.vector_norm(directions, dim=1, keepdim=True)).to(mean.device)
    k = min(k, d_sae, d_model)

    def reconstruct(x: Tensor, start: int) -> Tensor:
        return mean + span_of_largest(x.double() - mean, directions, k)

    sample = heldout_activations[:: -(-len(heldout_activations) // RANDOM_TOKENS)]
    return fidelity("heldout_activations", sample, reconstruct, max(d_sae, k * d_model)).fvu


def span_of_largest(centred: Tensor, directions: Tensor, k: int) -> Tensor:
    """Each row of ``centred`` (fp64 [n, d_model]) projected on the span of the ``k`` ≤ d_model rows of ``directions``
    (fp32 [d_sae, d_model], of unit norm) whose product with it is the largest: fp64 [n, d_model]."""
    if k == 0:
        return torch.zeros_like(centred)
    largest = (centred.float() @ directions.T).abs_().topk(k, dim=1, sorted=False).indices
    chosen = directions[largest].double()  # [n, k, d_model]
    gram = chosen @ chosen.mT
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    factor = torch.linalg.cholesky_ex(gram).L
    coefficients = torch.cholesky_solve(chosen @ centred[:, :, None], factor)
    return (coefficients.mT @ chosen)[:, 0]


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
    by_pair = _MeanTable(keys[:m], train_activations, keys[m:])
    by_token = _MeanTable(current[:m], train_activations, current[m:])

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
    """The mean activation of each of ``keys`` [m] that is among ``wanted``: no more of them than are looked up."""

    def __init__(self, keys: Tensor, activations: Tensor, wanted: Tensor):
        is_wanted = torch.isin(keys, wanted)
        self.keys, index, counts = keys[is_wanted].unique(return_inverse=True, return_counts=True)
        self.means = torch.zeros(len(counts), activations.shape[1], dtype=torch.float64, device=keys.device)
        start = done = 0
        for x in chunks(activations, activations.shape[1]):
            rows = x.to(self.means)[is_wanted[start : start + len(x)]]
            self.means.index_add_(0, index[done : done + len(rows)], rows)
            start, done = start + len(x), done + len(rows)
        self.means /= counts[:, None]

    def lookup(self, keys: Tensor, default: Tensor) -> Tensor:
        """The means [n, d_model] of ``keys`` [n]; rows of ``default`` where a key is not in the table."""
        if not len(self.keys):
            return default
        slot = torch.searchsorted(self.keys, keys.contiguous()).clamp_(max=len(self.keys) - 1)
        return torch.where((self.keys[slot] == keys)[:, None], self.means[slot], default)
