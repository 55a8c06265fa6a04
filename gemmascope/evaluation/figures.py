"""From the sums of `protocol` to the figures of an SAE.

With Σ over the tokens of a set, and Δ over the predictions, which are of the text whatever the set:

    L0                      Σ‖f‖₀ / n
    FVU                     Σ‖x − x̂‖² / Σ‖x − x̄‖²                 x̄ the mean of the set
    explained variance      1 − FVU, "of sums"; and the mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²
    FVU about zero          Σ‖x − x̂‖² / Σ‖x‖²
    cosine, norm ratio      the means over tokens of ⟨x̂, x⟩ / ‖x̂‖‖x‖ and of ‖x̂‖ / ‖x‖
    reconstruction bias γ   Σ‖x̂‖² / Σ⟨x̂, x⟩                       arXiv 2404.16014
    ΔLM loss                mean of the loss with x̂ in the place of x, less that without
    KL                      mean of KL(p ‖ q) of the next token, p of the model as it is
    loss recovered          1 − ΔLM loss / ΔLM loss of an ablation, by the mean or by zero
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..sites import Site
from .bootstrap import Bootstrap
from .fidelity import HIGH_FREQUENCY
from .language_model import loss_recovered
from .protocol import ABLATIONS, LOSSES, TERMS, Sums
from .token_sets import SETS

# Behind the names of figures of other sets than the text.
SUFFIXES = {"text": "", "inliers": "_inliers", "every": "_every"}
# Bins of log₁₀ of the firing frequency, two a decade; what is rarer counts in the first.
LOWEST_EXPONENT, BINS_OF_A_DECADE = -8, 2


def added(blocks: Iterable[Sums], documents: Tensor) -> Sums:
    """The sums of all blocks, one after the other, by document.

    documents: the numbers of all documents in any of the blocks; others, and −1, may be among them.
    """
    numbers = documents[documents >= 0].unique()
    total: Sums = {"documents": numbers.double()}
    for block in blocks:
        place = torch.searchsorted(numbers.double(), block["documents"])
        for name, values in block.items():
            if name == "documents":
                continue
            values = values.double()
            if name.endswith("/fired"):
                total[name] = total[name] + values if name in total else values
                continue
            if name not in total:
                total[name] = values.new_zeros(len(numbers), *values.shape[1:])
            total[name].index_add_(0, place, values)
    return total


class Figures:
    """The figures of the sums of a whole text. Those of a set other than the text have its name behind theirs."""

    def __init__(self, sums: Sums, bootstrap: Bootstrap):
        self._sums, self._bootstrap = sums, bootstrap
        self.predictions, self.clean_loss = int(sums["clean"][:, 0].sum()), _ratio(*sums["clean"].sum(0).flip(0))

    def of(self, name: str, site: Site) -> dict[str, Any]:
        """Those of the SAE ``name``, which writes at ``site``; what is undefined is NaN or None. ``…_interval`` is a
        pair, or None."""
        found: dict[str, Any] = {"documents": len(self._sums["documents"]), "predictions": self.predictions}
        for index, each in enumerate(SETS):
            of_set = self._of_tokens(self._sums[f"{name}/tokens"][:, index]) | self._of_losses(name, site, index)
            found |= {f"{key}{SUFFIXES[each]}": value for key, value in of_set.items()}
        return found | self._of_outliers(name) | self._of_latents(name)

    def frequency(self, name: str) -> Tensor:
        """The share of the text's tokens that each latent fires on: fp64 [d_sae]: a tenth is not above .1."""
        tokens = self._sums[f"{name}/tokens"][:, 0, TERMS.index("tokens")].sum()
        return self._sums[f"{name}/fired"].double() / tokens.double()

    def ablation(self, site: Site, kind: str, index: int = 0) -> float:
        """The rise of the loss when the site is replaced by zero or its mean, at the tokens of the set."""
        return self._rise(f"{site}/{kind}", index)

    def gamma(self, name: str, means: Mapping[str, Tensor]) -> dict[str, float]:
        """‖mean‖/‖std‖ of the activations that the SAE ``name`` was judged on, by set."""
        found = {}
        for index, each in enumerate(SETS):
            terms = self._sums[f"{name}/tokens"][:, index].sum(0)
            variance = _ratio(terms[TERMS.index("spread")], terms[TERMS.index("tokens")])
            norm = torch.linalg.vector_norm(means[each]).item()
            found[f"gamma{SUFFIXES[each]}"] = norm / math.sqrt(variance) if variance > 0 else math.nan
        return found

    def _of_tokens(self, by_document: Tensor) -> dict[str, Any]:
        terms = dict(zip(TERMS, by_document.T, strict=True))
        total = {name: values.sum() for name, values in terms.items()}
        n = total["tokens"]
        fvu = _ratio(total["error"], total["spread"])
        return {
            "tokens": int(n),
            "l0": _ratio(total["l0"], n),
            "l0_interval": self._bootstrap.ratio(terms["l0"], terms["tokens"]),
            "fvu": fvu,
            "fvu_interval": self._bootstrap.ratio(terms["error"], terms["spread"]),
            "explained_variance": 1 - fvu,
            "explained_variance_of_tokens": _ratio(total["explained"], n),
            "fvu_zero": _ratio(total["error"], total["about_zero"]),
            "cosine": _ratio(total["cosine"], n),
            "norm_ratio": _ratio(total["norm_ratio"], n),
            "reconstruction_bias": _ratio(total["square"], total["product"]),
        }

    def _of_losses(self, name: str, site: Site, index: int) -> dict[str, Any]:
        losses, clean = self._sums[f"{name}/losses"][:, index], self._sums["clean"]
        delta = self._rise(f"{name}/losses", index)
        ablated = {kind: self.ablation(site, kind, index) for kind in ABLATIONS}
        return {
            "delta_loss": delta,
            "delta_loss_interval": self._bootstrap.ratio(losses[:, 0] - clean[:, 1], clean[:, 0]),
            "kl": _ratio(losses[:, LOSSES.index("divergence")].sum(), clean[:, 0].sum()),
            "ablation_delta_loss": ablated["mean"],
            "zero_ablation_delta_loss": ablated["zero"],
            "loss_recovered": loss_recovered(delta, ablated["mean"]),
            "loss_recovered_from_zero": loss_recovered(delta, ablated["zero"]),
        }

    def _rise(self, name: str, index: int) -> float:
        clean = self._sums["clean"]
        changed = self._sums[name][:, index, LOSSES.index("loss")]
        return _ratio((changed - clean[:, 1]).sum(), clean[:, 0].sum())

    def _of_outliers(self, name: str) -> dict[str, Any]:
        """How many tokens of the text are outliers, and which share of Σ‖x − x̂‖² and Σ‖x‖² they hold."""
        text, inliers = (self._sums[f"{name}/tokens"][:, SETS.index(each)].sum(0) for each in ("text", "inliers"))
        share = {term: 1 - _ratio(inliers[TERMS.index(term)], text[TERMS.index(term)]) for term in TERMS}
        return {
            "outliers": int(text[0] - inliers[0]),
            "outlier_share": share["tokens"],
            "outlier_error_share": share["error"],
            "outlier_square_share": share["about_zero"],
        }

    def _of_latents(self, name: str) -> dict[str, Any]:
        frequency = self.frequency(name)
        fires = frequency > 0
        exponents = frequency[fires].log10().mul(BINS_OF_A_DECADE).floor().long() - LOWEST_EXPONENT * BINS_OF_A_DECADE
        bins = -LOWEST_EXPONENT * BINS_OF_A_DECADE
        counts = torch.bincount(exponents.clamp(0, bins - 1), minlength=bins)
        return {
            "dead_fraction": (~fires).double().mean().item(),
            "high_freq_fraction": (frequency > HIGH_FREQUENCY).double().mean().item(),
            "frequency_histogram": {
                "log10_edges": [LOWEST_EXPONENT + edge / BINS_OF_A_DECADE for edge in range(bins + 1)],
                "latents": counts.tolist(),
                "never": int((~fires).sum()),
            },
        }


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """NaN where the denominator is 0."""
    return (numerator / denominator).item() if denominator != 0 else math.nan


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same as values of JSON: None for a float that is not finite, a list for an interval."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, tuple):
            value = list(value)
        found[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return found
