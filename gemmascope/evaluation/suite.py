"""Every metric of the SAEs of many sites, as read back from their files."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import harvest
from ..saes import JumpReLUSAE
from ..sites import Site, special_token_ids
from ..sites.decoder import embedding_weight
from .baselines import pair_table_fvu
from .fidelity import evaluate_sae
from .language_model import evaluate_splice, language_model_loss


def judge_suite(
    model: nn.Module,
    train_tokens: Tensor,
    held_out: Tensor,
    activations: Mapping[Site, Tensor],
    paths: Mapping[Site, str | os.PathLike],
    *,
    impl: str = "auto",
    clean_loss: float | None = None,
    on_done: Callable[[int, Site], None] = lambda done, site: None,
) -> tuple[list[dict[str, Any]], dict[Site, Tensor]]:
    """Judge the SAE in each of ``paths`` {site: file} on the text ``held_out``.

    train_tokens, held_out: ids [rows, context] as `harvest` takes them. activations: what it gave on ``train_tokens``,
    {site: [n, width]}, where the baselines are fitted. clean_loss: `language_model_loss` of ``held_out`` if known
    already. ``on_done(n, site)`` is called after the n-th SAE.

    Returns a row of results for each SAE, in order, and the firing frequencies {site: float32 [d_sae]}. Raises what the
    metrics and `JumpReLUSAE.load` do.
    """
    if clean_loss is None:
        clean_loss = language_model_loss(model, held_out)
    device = next(model.parameters()).device
    held_out_activations = harvest(model, held_out, paths)
    train_pairs, held_out_pairs = token_pairs(model, train_tokens), token_pairs(model, held_out)
    results: list[dict[str, Any]] = []
    frequencies: dict[Site, Tensor] = {}
    for site, path in paths.items():
        sae = JumpReLUSAE.load(path).to(device)
        sae.impl = impl
        train_rows, rows = activations[site], held_out_activations[site]
        metrics = evaluate_sae(sae, rows, train_rows)
        splice = evaluate_splice(model, held_out, site, sae, rows.mean(0), clean_loss=clean_loss)
        frequencies[site] = metrics.firing_frequency
        results.append(
            {
                "site": site.kind,
                "layer": site.layer,
                "width": sae.d_sae,
                "l0": metrics.l0,
                "fvu": metrics.fvu,
                "pca_fvu": metrics.pca_fvu,
                "pair_table_fvu": pair_table_fvu(train_rows, train_pairs, rows, held_out_pairs),
                "delta_loss": splice.delta_loss,
                "ablation_delta_loss": splice.ablation_delta_loss,
                "loss_recovered": splice.loss_recovered,
                "dead_fraction": metrics.dead_fraction,
                "high_freq_fraction": metrics.high_freq_fraction,
            }
        )
        on_done(len(results), site)
    return results, frequencies


def token_pairs(model: nn.Module, tokens: Tensor) -> Tensor:
    """The (previous, current) ids [n, 2] of every token of ``tokens`` [rows, context] that `harvest` keeps, in order.

    The previous id of a row's first token is the size of the vocabulary, which is no token.
    """
    none = embedding_weight(model).shape[0]
    previous = torch.cat([torch.full_like(tokens[:, :1], none), tokens[:, :-1]], 1)
    special = torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device)
    return torch.stack([previous, tokens], -1)[~torch.isin(tokens, special)]
