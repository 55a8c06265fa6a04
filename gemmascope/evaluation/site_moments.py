"""What must be known of a site before SAEs can be judged there in one pass: the mean activation of each set of tokens,
and from which norm on a token is an outlier."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import stream
from ..activations.outliers import norms_of
from ..sites import Site
from ..sites.decoder import input_device
from .token_sets import SETS, MarkedText

FORWARD_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class SiteMoments:
    """means: fp64 [width] by set. tokens: how many each is of. median_norm: of the tokens that controls are fitted on;
    max_norm: the largest norm of a token that is no outlier."""

    means: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    median_norm: float
    max_norm: float

    def to_tensors(self) -> dict[str, Tensor]:
        facts = [self.median_norm, self.max_norm, *(float(self.tokens[name]) for name in SETS)]
        means = torch.stack([self.means[name].cpu() for name in SETS])
        return {"means": means, "facts": torch.tensor(facts, dtype=torch.float64, device="cpu")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SiteMoments":
        median_norm, max_norm, *tokens = tensors["facts"].tolist()
        return cls(
            dict(zip(SETS, tensors["means"], strict=True)),
            dict(zip(SETS, map(int, tokens), strict=True)),
            median_norm,
            max_norm,
        )


@torch.no_grad()
def site_moments(
    model: nn.Module,
    train_tokens: Tensor,
    text: MarkedText,
    sites: Sequence[Site],
    outlier_ratio: float,
    on_rows: Callable[[int], Any] = lambda rows: None,
) -> dict[Site, SiteMoments]:
    """The moments of ``text`` at ``sites``, from one pass of the model for all of them.

    train_tokens: ids [rows, context] of other text; a token is an outlier of a site whose norm is above
    ``outlier_ratio`` times the median of theirs there. No activation outlives its batch. on_rows: called with the rows
    of both texts that are done. Raises as `activations.stream`, and ValueError for activations that are not finite and
    a site at which no token is kept.
    """
    batch, device = max(1, FORWARD_TOKENS // text.tokens.shape[1]), input_device(model)
    norms: dict[Site, list[Tensor]] = {site: [] for site in sites}
    done = 0
    for activations in stream(model, train_tokens, sites, batch_size=batch, device=device):
        for site, x in activations.items():
            norms[site].append(norms_of(x).double())
        done = min(len(train_tokens), done + batch)
        on_rows(done)
    if not all(norms.values()):
        raise ValueError("train_tokens: expected some that are not BOS, EOS or PAD, found none")
    medians = {site: torch.cat(each).median().item() for site, each in norms.items()}
    shifts: dict[Site, Tensor] = {}
    sums: dict[Site, Tensor] = {}
    counts: dict[Site, dict[str, int]] = {site: {name: 0 for name in SETS} for site in sites}
    start = 0
    everything = stream(model, text.tokens, sites, batch_size=batch, skip_token_ids=(), device=device)
    for activations in everything:
        part = text.rows(slice(start, start + batch))
        for site, x in activations.items():
            x = x.view(*part.tokens.shape, -1)
            masks = part.masks(x, outlier_ratio * medians[site])
            wide = x.double()
            if site not in shifts:  # about a token of theirs sums lose less
                shifts[site] = wide[0, -1].clone()
                sums[site] = wide.new_zeros(len(SETS), x.shape[-1])
            for index, name in enumerate(SETS):
                kept = wide[masks[name]]
                sums[site][index] += (kept - shifts[site]).sum(0)
                counts[site][name] += len(kept)
        start += len(part.tokens)
        on_rows(len(train_tokens) + start)
    return {
        site: _moments(site, shifts[site], sums[site], counts[site], medians[site], outlier_ratio) for site in sites
    }


def _moments(
    site: Site, shift: Tensor, sums: Tensor, counts: Mapping[str, int], median: float, ratio: float
) -> SiteMoments:
    for name in SETS:
        if not counts[name]:
            raise ValueError(f"text: expected some tokens to be left at {site}, found none of the set {name!r}")
    means = {name: shift + sums[index] / counts[name] for index, name in enumerate(SETS)}
    for name, mean in means.items():
        if not mean.isfinite().all():
            raise ValueError(f"text: expected finite activations at {site}, found NaN or Inf among {name!r}")
    return SiteMoments(means, dict(counts), median, ratio * median)
