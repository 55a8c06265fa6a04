"""Every metric of the SAEs of many sites, as read back from their files."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import harvest
from ..activations.moments import check_activations, mean_row
from ..checks import check_type, found, is_integer
from ..saes import JumpReLUSAE
from ..sites import Site, special_token_ids
from ..sites.decoder import embedding_weight, input_device
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
    held_out_activations: Mapping[Site, Tensor] | None = None,
    on_done: Callable[[int, Site], None] = lambda done, site: None,
) -> tuple[list[dict[str, Any]], dict[Site, Tensor]]:
    """Judge the SAE in each of ``paths`` {site: file} on the text ``held_out``, all of it for every figure.

    train_tokens, held_out: ids [rows, context] as `harvest` takes them; `activations.hold_out` draws the latter.
    activations: what `harvest` gave on ``train_tokens``, {site: [n, width]}, where the baselines are fitted.
    clean_loss, held_out_activations: `language_model_loss` of ``held_out`` and what `harvest` gives on it, if known
    already. ``on_done(n, site)`` is called after the n-th SAE.

    Returns a row of results for each SAE, in order, and the firing frequencies {site: float32 [d_sae]}. A row says on
    how many ``tokens`` the SAE was judged and on how many ``predictions`` of the model; what is undefined is None.

    Raises what the metrics, `harvest` and `JumpReLUSAE.load` do, and TypeError or ValueError for no path, keys that are
    not a `Site`, and activations that are missing or not those of the tokens.
    """
    check_type("paths", paths, Mapping)
    if not paths:
        raise ValueError("paths: expected at least one site, got none")
    for site in paths:
        check_type("paths: key", site, Site)
    if not callable(on_done):
        raise TypeError(f"on_done: expected a function, got {type(on_done).__name__}")
    train_pairs, held_out_pairs = (
        token_pairs(model, tokens, name) for name, tokens in (("train_tokens", train_tokens), ("held_out", held_out))
    )
    if held_out_activations is None:
        held_out_activations = harvest(model, held_out, paths)
    for name, by_site, pairs in (
        ("activations", activations, train_pairs),
        ("held_out_activations", held_out_activations, held_out_pairs),
    ):
        _check_of_tokens(name, by_site, paths, len(pairs))
    if clean_loss is None:
        clean_loss = language_model_loss(model, held_out)
    device = input_device(model)
    results: list[dict[str, Any]] = []
    frequencies: dict[Site, Tensor] = {}
    for site, path in paths.items():
        sae = JumpReLUSAE.load(path).to(device)
        sae.impl = impl
        train_rows, rows = activations[site], held_out_activations[site]
        metrics = evaluate_sae(sae, rows, train_rows)
        mean = mean_row("held_out_activations", rows)
        splice = evaluate_splice(model, held_out, site, sae, mean, clean_loss=clean_loss)
        frequencies[site] = metrics.firing_frequency
        row = {
            "site": site.kind,
            "layer": site.layer,
            "width": sae.d_sae,
            "tokens": metrics.tokens,
            "predictions": splice.predictions,
            "l0": metrics.l0,
            "fvu": metrics.fvu,
            "pca_fvu": metrics.pca_fvu,
            "pair_table_fvu": pair_table_fvu(train_rows, train_pairs, rows, held_out_pairs),
            "median_fvu": metrics.median_fvu,
            "pca_median_fvu": metrics.pca_median_fvu,
            "top_error_share": metrics.top_error_share,
            "top_variance_share": metrics.top_variance_share,
            "delta_loss": splice.delta_loss,
            "ablation_delta_loss": splice.ablation_delta_loss,
            "loss_recovered": splice.loss_recovered,
            "dead_fraction": metrics.dead_fraction,
            "high_freq_fraction": metrics.high_freq_fraction,
        }
        results.append({name: _defined(value) for name, value in row.items()})
        on_done(len(results), site)
    return results, frequencies


def _check_of_tokens(name: str, by_site: Any, sites: Mapping[Site, Any], n: int) -> None:
    """Raise TypeError or ValueError unless ``by_site`` holds the activations of ``n`` tokens at each of ``sites``."""
    check_type(name, by_site, Mapping)
    for site in sites:
        if site not in by_site:
            raise ValueError(f"{name}: expected those of {site}, got none")
        check_activations(f"{name}[{site}]", by_site[site])
        if len(by_site[site]) != n:
            raise ValueError(f"{name}[{site}]: expected those of the {n} tokens, got {len(by_site[site])}")


def _defined(value: Any) -> Any:
    """None in the place of a float that is not finite, for which JSON has no word."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def token_pairs(model: nn.Module, tokens: Tensor, name: str = "tokens") -> Tensor:
    """The (previous, current) ids [n, 2] of every token of ``tokens`` [rows, context] that `harvest` keeps, in order.

    The previous id of a row's first token is the size of the vocabulary, which is no token. Raises TypeError or
    ValueError naming ``name`` for what are no integers [rows, context].
    """
    if not is_integer(tokens):
        raise TypeError(f"{name}: expected an integer torch.Tensor, got {found(tokens)}")
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected shape [rows, context], got {list(tokens.shape)}")
    tokens = tokens.long()
    none = embedding_weight(model).shape[0]
    previous = torch.cat([torch.full_like(tokens[:, :1], none), tokens[:, :-1]], 1)
    special = torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device)
    return torch.stack([previous, tokens], -1)[~torch.isin(tokens, special)]
