"""How well transcoders do: every metric of those of a suite, as read back from their files, beside its controls.

A transcoder is judged on what it is for, its target y: FVU is that of y, and Δloss that of the model with what is
written there replaced by what the transcoder makes of x, the activation that it reads, in the same forward. PCA and the
table of token pairs reconstruct y itself; ``linear_fvu`` is that of the affine map from x to y that fits the training
tokens best, of which a skip connection is one.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import OUTLIER_RATIO, harvest
from ..activations.moments import check_activations, chunks, mean_row
from ..activations.outliers import are_outliers, norms_of
from ..checks import check_type
from ..kernels import density
from ..saes import Transcoder
from ..sites import Site, special_token_ids
from ..sites.decoder import input_device
from ..sites.reading import check_reads
from .baselines import fit_pca, pair_table_fvu
from .fidelity import HIGH_FREQUENCY, SAEMetrics
from .language_model import delta_loss, language_model_loss, mean_ablation_loss, n_predictions
from .suite import FORWARD_TOKENS, check_outliers, common_figures, defined, recipe_of, token_pairs
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
    max_norm_ratio: float | None = None,
    median_norms: Mapping[Site, float] | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    loss_tokens: Tensor | None = None,
    clean_loss: float | None = None,
    on_done: Callable[[int, str], Any] = lambda done, name: None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Judge every transcoder of ``transcoders`` {name: (where it reads, where it writes, file or folder)}, as
    `judge_suite` does SAEs, on all tokens of the text but BOS, EOS and PAD.

    Activations are harvested for one pair of sites at a time. Outliers are tokens whose norm is above
    ``max_norm_ratio`` times the median norm at one of the two sites or at both; with it they are left out as
    `judge_suite` leaves them out, and figures of all tokens stand beside the others with ``_all`` behind their names.

    Returns a row of results for each, in order, whose ``site`` and ``site_out`` are the kinds of the two sites, and the
    firing frequencies {name: float32 [d_sae]}. There is no random dictionary, which would be of y alone. Raises as
    `judge_suite`, and ValueError for a transcoder that says it reads another kind of site.
    """
    check_type("transcoders", transcoders, Mapping)
    pairs: dict[tuple[Site, Site], list[str]] = {}
    for name, entry in transcoders.items():
        check_type("transcoders: key", name, str)
        if not isinstance(entry, tuple) or len(entry) != 3 or not all(isinstance(each, Site) for each in entry[:2]):
            raise TypeError(f"transcoders[{name!r}]: expected (Site, Site, path), got {entry!r:.60}")
        pairs.setdefault(entry[:2], []).append(name)
    check_type("dtype", dtype, torch.dtype)
    check_outliers(max_norm_ratio, median_norms, {site for sites in pairs for site in sites})
    texts = (("train_tokens", train_tokens), ("held_out", held_out))
    of_tokens = [token_pairs(model, tokens, name) for name, tokens in texts]
    loss_tokens = held_out if loss_tokens is None else loss_tokens
    clean_loss = language_model_loss(model, loss_tokens) if clean_loss is None else clean_loss
    text = _Text(model, loss_tokens, clean_loss, n_predictions(model, loss_tokens), dtype)
    judged: dict[str, dict[str, Any]] = {}
    frequencies: dict[str, Tensor] = {}
    for sites, names in pairs.items():
        train, rows = (_harvested(model, tokens, sites, dtype) for tokens in (train_tokens, held_out))
        tokens = _Tokens(train, of_tokens[0], rows, of_tokens[1])
        between = _Between(text, sites, tokens, max_norm_ratio, median_norms)
        for name in names:
            transcoder = Transcoder.load(transcoders[name][2])
            check_reads(sites[0], transcoder)
            transcoder = transcoder.to(input_device(model))
            transcoder.impl = impl
            figures, frequencies[name] = between.judge(transcoder)
            row = {
                **{"name": name, "site": sites[0].kind, "site_out": sites[1].kind, "layer": sites[0].layer},
                **{"width": transcoder.d_sae, "skip": transcoder.W_skip is not None, **recipe_of(transcoder)},
                **figures,
            }
            judged[name] = {key: defined(value) for key, value in row.items()}
            on_done(len(judged), name)
    return [judged[name] for name in transcoders], {name: frequencies[name] for name in transcoders}


class _Text(NamedTuple):
    """The model on held-out text."""

    model: nn.Module
    tokens: Tensor
    clean_loss: float
    predictions: int
    dtype: torch.dtype


class _Tokens(NamedTuple):
    """Activations by site, and the pairs of ids that the tokens are of."""

    train: Mapping[Site, Tensor]
    train_pairs: Tensor
    rows: Mapping[Site, Tensor]
    """Of the held-out text."""
    pairs: Tensor


class _OnTokens:
    """The controls between two sites on some of the tokens, and how a transcoder does there.

    positions: of the text that the model reads, those to splice at; None for all.
    """

    def __init__(self, text: _Text, sites: tuple[Site, Site], tokens: _Tokens, positions: Tensor | None):
        (self.site, self.target), self.text, self.positions = sites, text, positions
        self.inputs, self.targets = tokens.rows[self.site], tokens.rows[self.target]
        train = tokens.train[self.target]
        self.pca = fit_pca(train)
        self.shared = {
            "pair_table_fvu": pair_table_fvu(train, tokens.train_pairs, self.targets, tokens.pairs),
            "linear_fvu": linear_fvu(tokens.train[self.site], train, self.inputs, self.targets),
        }
        mean = mean_row("held_out", self.targets)
        spliced = mean_ablation_loss(text.model, text.tokens, self.target, mean, positions=positions)
        self.ablation = spliced - text.clean_loss

    def judge(self, transcoder: Transcoder) -> tuple[dict[str, Any], Tensor]:
        metrics = evaluate_transcoder(transcoder, self.inputs, self.targets)
        of_pca = self.pca.fidelity(self.targets, round(metrics.l0))
        given = {"clean_loss": self.text.clean_loss, "positions": self.positions}
        delta = delta_loss(self.text.model, self.text.tokens, {self.target: transcoder}, **given)
        figures = {
            **{"tokens": metrics.tokens, "predictions": self.text.predictions, "l0": metrics.l0, "fvu": metrics.fvu},
            **{"pca_fvu": of_pca.fvu, "random_fvu": None, **self.shared},
            **{"median_fvu": metrics.median_fvu, "pca_median_fvu": of_pca.median_fvu},
        } | common_figures(metrics, delta, self.ablation)
        return figures, metrics.firing_frequency


class _Between:
    """What the transcoders between two sites have in common."""

    def __init__(
        self,
        text: _Text,
        sites: tuple[Site, Site],
        tokens: _Tokens,
        max_norm_ratio: float | None,
        median_norms: Mapping[Site, float] | None,
    ):
        ratio = OUTLIER_RATIO if max_norm_ratio is None else float(max_norm_ratio)
        medians = {
            site: norms_of(tokens.train[site]).median().item() if median_norms is None else median_norms[site]
            for site in sites
        }
        kept_in_train, kept = (kept_at(found, medians, ratio) for found in (tokens.train, tokens.rows))
        self.facts = {"outliers": int((~kept).sum()), "outlier_ratio": ratio}
        self.filters = max_norm_ratio is not None
        self.on_all = self.on_kept = _OnTokens(text, sites, tokens, None)
        if self.filters and not (kept.all() and kept_in_train.all()):
            for name, each in (("held_out", kept), ("train_tokens", kept_in_train)):
                if not each.any():
                    raise ValueError(f"median_norms: expected those of {sites[0]}, got some that leave none of {name}")
            some = _Tokens(
                {site: x[kept_in_train] for site, x in tokens.train.items()},
                tokens.train_pairs[kept_in_train.to(tokens.train_pairs.device)],
                {site: x[kept] for site, x in tokens.rows.items()},
                tokens.pairs[kept.to(tokens.pairs.device)],
            )
            self.on_kept = _OnTokens(text, sites, some, _positions(text, sites, medians, ratio))

    def judge(self, transcoder: Transcoder) -> tuple[dict[str, Any], Tensor]:
        figures, frequency = self.on_kept.judge(transcoder)
        beside = {}
        if self.filters:
            on_all = figures if self.on_all is self.on_kept else self.on_all.judge(transcoder)[0]
            beside = {f"{name}_all": value for name, value in on_all.items() if name != "predictions"}
        return figures | self.facts | beside, frequency


def kept_at(activations: Mapping[Site, Tensor], medians: Mapping[Site, float], ratio: float) -> Tensor:
    """Which tokens {site: [n, width]} are an outlier at no site: bool [n]."""
    found = [~are_outliers(norms_of(x), medians[site], ratio) for site, x in activations.items()]
    return torch.stack(found).all(0)


def _positions(text: _Text, sites: tuple[Site, Site], medians: Mapping[Site, float], ratio: float) -> Tensor:
    """Where the text holds a token that is kept: bool of the shape of its ids, False at special tokens."""
    kept = kept_at(_harvested(text.model, text.tokens, sites, text.dtype), medians, ratio).cpu()
    special = torch.tensor(special_token_ids(text.model), dtype=text.tokens.dtype, device=text.tokens.device)
    found = (~torch.isin(text.tokens, special)).cpu()
    found[found.clone()] = kept
    return found


def _harvested(model: nn.Module, tokens: Tensor, sites: tuple[Site, ...], dtype: torch.dtype) -> Mapping[Site, Tensor]:
    batch_size = max(1, FORWARD_TOKENS // max(1, tokens.shape[1]))
    found = harvest(model, tokens, sites, dtype=dtype, batch_size=batch_size)
    return {site: x.to(input_device(model)) for site, x in found.items()}
