"""The controls of a site beside its SAEs: each has only what an SAE has, and has learnt nothing or little."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import harvest
from ..activations.outliers import norms_of
from ..sites import Site
from ..sites.decoder import input_device
from .baselines import fit_pca, pair_table_fvu, random_dictionary_fvu
from .figures import SUFFIXES
from .site_moments import FORWARD_TOKENS, SiteMoments
from .suite import token_pairs
from .transcoders import linear_fvu


class ControlTokens:
    """Activations of some sites on two texts: one that controls are fitted on, and some of the one they are judged on.

    train_tokens, held_out: ids [rows, context]. Activations are held in fp32, of every token that is not special.
    """

    def __init__(self, model: nn.Module, train_tokens: Tensor, held_out: Tensor, sites: Sequence[Site]):
        texts = (train_tokens, held_out)
        self.pairs = [token_pairs(model, tokens).to(input_device(model)) for tokens in texts]
        self.activations: list[dict[Site, Tensor]] = []
        for tokens in texts:
            found = harvest(model, tokens, sites, batch_size=max(1, FORWARD_TOKENS // tokens.shape[1]))
            self.activations.append({site: x.to(input_device(model)) for site, x in found.items()})

    def where(self, site: Site, max_norm: float) -> tuple[Tensor, Tensor]:
        """Which tokens of either text are no outliers of ``site``."""
        train, rows = (~(norms_of(each[site]) > max_norm) for each in self.activations)
        return train, rows


@torch.no_grad()
def controls(
    tokens: ControlTokens, reads: Site, writes: Site, saes: Mapping[str, tuple[float, int]], moments: SiteMoments
) -> dict[str, dict[str, Any]]:
    """FVU of the controls of the SAEs {name: (L0, d_sae)} that read at one site and write at another or the same:

        pca_fvu          PCA with round(L0) components
        random_fvu       d_sae random directions, of which each token takes the round(L0) best (none of transcoders)
        pair_table_fvu   the mean of each pair of tokens
        linear_fvu       of transcoders: the affine map from what they read to what they write

    on all control tokens and, with ``_inliers`` behind the name, fitted and judged without the outliers.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in saes}
    inlying = tokens.where(writes, moments.max_norm)
    everyone = tuple(torch.ones_like(each) for each in inlying)
    before: dict[str, dict[str, Any]] = {}
    for each, kept in (("text", everyone), ("inliers", inlying)):
        if each == "inliers" and all(mask.all() for mask in kept):
            on_kept = before
        else:
            on_kept = before = _on(tokens, reads, writes, saes, kept)
        for name, figures in on_kept.items():
            found[name] |= {f"{key}{SUFFIXES[each]}": value for key, value in figures.items()}
    return found


def _on(
    tokens: ControlTokens, reads: Site, writes: Site, saes: Mapping[str, tuple[float, int]], kept: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    train, rows = (each[writes][mask] for each, mask in zip(tokens.activations, kept, strict=True))
    train_pairs, pairs = (each[mask] for each, mask in zip(tokens.pairs, kept, strict=True))
    shared = {"pair_table_fvu": pair_table_fvu(train, train_pairs, rows, pairs), "control_tokens": len(rows)}
    if reads != writes:
        given = (each[reads][mask] for each, mask in zip(tokens.activations, kept, strict=True))
        train_inputs, inputs = given
        shared["linear_fvu"] = linear_fvu(train_inputs, train, inputs, rows)
    pca = fit_pca(train)
    found = {}
    for name, (l0, d_sae) in saes.items():
        random = random_dictionary_fvu(train, rows, round(l0), d_sae) if reads == writes else None
        found[name] = {"pca_fvu": pca.fidelity(rows, round(l0)).fvu, "random_fvu": random, **shared}
    return found
