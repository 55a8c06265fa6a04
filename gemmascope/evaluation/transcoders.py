"""How well transcoders do: every metric of those of a suite, as read back from their files, beside its controls.

A transcoder is judged on what it is for, its target y: FVU is that of y, and Δloss that of the model with what is
written there replaced by what the transcoder makes of x, the activation that it reads, in the same forward. PCA and the
table of token pairs reconstruct y itself; ``linear_fvu`` is that of the affine map from x to y that fits the training
tokens best, of which a skip connection is one.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import harvest
from ..activations.moments import check_activations, chunks, mean_row
from ..checks import check_type
from ..kernels import density
from ..saes import Transcoder
from ..sites import Site
from ..sites.decoder import input_device
from ..sites.reading import check_reads
from .baselines import fit_pca, pair_table_fvu
from .fidelity import HIGH_FREQUENCY, SAEMetrics
from .language_model import delta_loss, language_model_loss, loss_recovered, mean_ablation_loss, n_predictions
from .suite import FORWARD_TOKENS, defined, recipe_of, token_pairs
from .variance import fidelity

# Of the mean of the eigenvalues of x's second moments: what is added to each, for those that do not vary.
RIDGE = 1e-6

ByName = Mapping[str, tuple[Site, Site, str | os.PathLike]]


@torch.no_grad()
def evaluate_transcoder(transcoder: Transcoder, inputs: Tensor, targets: Tensor) -> SAEMetrics:
    """Sparsity, fidelity and firing on held-out activations: inputs x [n, d_in] and targets y [n, d_out], row i of both
    the same token, floats of any precision on any device. ``fvu`` and what stands beside it are of y.

    Raises TypeError or ValueError for what is no transcoder, no float matrix, another width, no rows, NaN and Inf.
    """
    check_type("transcoder", transcoder, Transcoder)
    check_activations("inputs", inputs, transcoder.d_in)
    check_activations("targets", targets, transcoder.d_out)
    if len(inputs) != len(targets):
        raise ValueError(f"targets: expected the {len(inputs)} tokens of inputs, got {len(targets)}")
    weights, n = transcoder.W_dec, len(inputs)
    fired = torch.zeros(transcoder.d_sae, dtype=torch.int64, device=weights.device)

    def transcode(y: Tensor, start: int) -> Tensor:
        x = inputs[start : start + len(y)].to(weights)
        code = transcoder.encode_sparse(x)
        fired.add_(code.firing_count())
        return transcoder.decode(code if density.is_sparse(code) else code.to_dense(), x)

    found = fidelity("targets", targets, transcode, max(transcoder.d_sae, transcoder.d_in))
    frequency = fired.double() / n
    return SAEMetrics(
        tokens=n,
        l0=fired.sum().item() / n,
        fvu=found.fvu,
        median_fvu=found.median_fvu,
        pca_fvu=None,
        pca_median_fvu=None,
        top_error_share=found.top_error_share,
        top_variance_share=found.top_variance_share,
        reconstruction_bias=found.bias,
        dead_fraction=(fired == 0).double().mean().item(),
        high_freq_fraction=(frequency > HIGH_FREQUENCY).double().mean().item(),
        firing_frequency=frequency.float().cpu(),
    )


@torch.no_grad()
def linear_fvu(train_inputs: Tensor, train_targets: Tensor, inputs: Tensor, targets: Tensor) -> float:
    """FVU of the affine map from x to y that fits the training tokens best, by least squares with a ridge of `RIDGE`.

    train_inputs, inputs: [m, d_in] and [n, d_in]; train_targets, targets: [m, d_out] and [n, d_out]. Sums are fp64.
    Raises as `evaluate_transcoder`.
    """
    pairs = (("train_inputs", train_inputs, train_targets), ("inputs", inputs, targets))
    for name, x, y in pairs:
        check_activations(name, x, train_inputs.shape[1])
        check_activations(name.replace("inputs", "targets"), y, train_targets.shape[1])
        if len(x) != len(y):
            raise ValueError(f"{name}: expected the {len(y)} tokens of its targets, got {len(x)}")
    mean_x, mean_y = mean_row("train_inputs", train_inputs), mean_row("train_targets", train_targets)
    d_in, d_out = len(mean_x), len(mean_y)
    gram, products = mean_x.new_zeros(d_in, d_in), mean_x.new_zeros(d_in, d_out)
    start = 0
    for x in chunks(train_inputs, max(d_in, d_out)):
        centred = x.double() - mean_x
        gram += centred.T @ centred
        products += centred.T @ (train_targets[start : start + len(x)].to(centred) - mean_y)
        start += len(x)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.lstsq(gram, products).solution if d_in else products

    def mapped(y: Tensor, start: int) -> Tensor:
        return (inputs[start : start + len(y)].double() - mean_x) @ weight + mean_y

    return fidelity("targets", targets, mapped, max(d_in, d_out)).fvu


def judge_transcoders(
    model: nn.Module,
    transcoders: ByName,
    train_tokens: Tensor,
    held_out: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    loss_tokens: Tensor | None = None,
    clean_loss: float | None = None,
    on_done: Callable[[int, str], Any] = lambda done, name: None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Judge every transcoder of ``transcoders`` {name: (where it reads, where it writes, file or folder)}, as
    `judge_suite` does SAEs, on all tokens of the text but BOS, EOS and PAD.

    Activations are harvested for one pair of sites at a time. Returns a row of results for each, in order, whose
    ``site`` and ``site_out`` are the kinds of the two sites, and the firing frequencies {name: float32 [d_sae]}. There
    is no random dictionary, which would be of y alone. Raises as `judge_suite`, and ValueError for a transcoder that
    says it reads another kind of site.
    """
    check_type("transcoders", transcoders, Mapping)
    pairs: dict[tuple[Site, Site], list[str]] = {}
    for name, entry in transcoders.items():
        check_type("transcoders: key", name, str)
        if not isinstance(entry, tuple) or len(entry) != 3 or not all(isinstance(each, Site) for each in entry[:2]):
            raise TypeError(f"transcoders[{name!r}]: expected (Site, Site, path), got {entry!r:.60}")
        pairs.setdefault(entry[:2], []).append(name)
    check_type("dtype", dtype, torch.dtype)
    texts = (("train_tokens", train_tokens), ("held_out", held_out))
    of_tokens = [token_pairs(model, tokens, name) for name, tokens in texts]
    loss_tokens = held_out if loss_tokens is None else loss_tokens
    clean_loss = language_model_loss(model, loss_tokens) if clean_loss is None else clean_loss
    predictions = n_predictions(model, loss_tokens)
    judged: dict[str, dict[str, Any]] = {}
    frequencies: dict[str, Tensor] = {}
    for (site, target), names in pairs.items():
        train, rows = (_harvested(model, tokens, (site, target), dtype) for tokens in (train_tokens, held_out))
        pca = fit_pca(train[target])
        shared = {
            "pair_table_fvu": pair_table_fvu(train[target], of_tokens[0], rows[target], of_tokens[1]),
            "linear_fvu": linear_fvu(train[site], train[target], rows[site], rows[target]),
        }
        mean = mean_row("held_out", rows[target])
        ablation = mean_ablation_loss(model, loss_tokens, target, mean) - clean_loss
        for name in names:
            transcoder = Transcoder.load(transcoders[name][2])
            check_reads(site, transcoder)
            transcoder = transcoder.to(input_device(model))
            transcoder.impl = impl
            metrics = evaluate_transcoder(transcoder, rows[site], rows[target])
            of_pca = pca.fidelity(rows[target], round(metrics.l0))
            delta = delta_loss(model, loss_tokens, {target: transcoder}, clean_loss=clean_loss)
            row = {
                **{"name": name, "site": site.kind, "site_out": target.kind, "layer": site.layer},
                **{"width": transcoder.d_sae, "skip": transcoder.W_skip is not None, **recipe_of(transcoder)},
                **{"tokens": metrics.tokens, "predictions": predictions, "l0": metrics.l0, "fvu": metrics.fvu},
                **{"pca_fvu": of_pca.fvu, "random_fvu": None, **shared},
                **{"median_fvu": metrics.median_fvu, "pca_median_fvu": of_pca.median_fvu},
                "top_error_share": metrics.top_error_share,
                "top_variance_share": metrics.top_variance_share,
                "reconstruction_bias": metrics.reconstruction_bias,
                "delta_loss": delta,
                "ablation_delta_loss": ablation,
                "loss_recovered": loss_recovered(delta, ablation),
                "dead_fraction": metrics.dead_fraction,
                "high_freq_fraction": metrics.high_freq_fraction,
            }
            judged[name] = {key: defined(value) for key, value in row.items()}
            frequencies[name] = metrics.firing_frequency
            on_done(len(judged), name)
    return [judged[name] for name in transcoders], {name: frequencies[name] for name in transcoders}


def _harvested(model: nn.Module, tokens: Tensor, sites: tuple[Site, ...], dtype: torch.dtype) -> Mapping[Site, Tensor]:
    batch_size = max(1, FORWARD_TOKENS // max(1, tokens.shape[1]))
    found = harvest(model, tokens, sites, dtype=dtype, batch_size=batch_size)
    return {site: x.to(input_device(model)) for site, x in found.items()}
