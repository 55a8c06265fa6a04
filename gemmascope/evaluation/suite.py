"""Every metric and control of the SAEs of a suite, as read back from their files."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import OUTLIER_RATIO, harvest
from ..activations.moments import check_activations, moments
from ..activations.outliers import norms_of
from ..checks import check_int, check_number, check_type, found, is_integer
from ..saes import load_sae
from ..saes.base import BaseSAE
from ..saes.codec import Codec
from ..sites import Site, site_width, special_token_ids
from ..sites.decoder import embedding_weight, input_device
from .baselines import fit_pca, pair_table_fvu, random_dictionary_fvu
from .fidelity import SAEMetrics, evaluate_sae
from .language_model import (
    SparingOutliers,
    delta_loss,
    language_model_loss,
    loss_recovered,
    mean_ablation_loss,
    n_predictions,
)

# Activations that are held at once.
MAX_BYTES = 2 << 30
# Of one forward. Eager attention holds several [rows, heads, context, context] tensors.
FORWARD_TOKENS = 4096
# Where the metadata of an SAE may say how it was trained.
RECIPE = ("seed", "target_l0", "l0_coefficient", "k")

ByName = Mapping[str, tuple[Site, str | os.PathLike]]


def judge_suite(
    model: nn.Module,
    saes: ByName,
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
    max_bytes: int = MAX_BYTES,
    activations: Mapping[Site, Tensor] | None = None,
    held_out_activations: Mapping[Site, Tensor] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Judge every SAE of ``saes`` {name: (site, file)} on the text ``held_out``, all of it for every figure; with
    ``loss_tokens``, some rows of it, the losses of the model on those.

    A site may have any number of SAEs. What does not depend on the SAE, the mean ablation and the fit of the controls,
    is computed once a site. Everything runs on the model's device.

    train_tokens, held_out: ids [rows, context] as `harvest` takes them; the controls are fitted on the former. Their
    activations are harvested in ``dtype`` for as many sites at a time as ``max_bytes`` hold, at least one.
    activations, held_out_activations: what `harvest` gives on them, of every token, if known already. clean_loss:
    likewise `language_model_loss` of ``loss_tokens``. ``on_done(n, name)`` is called after the n-th SAE.

    Outliers of a site are the tokens whose norm there is above ``max_norm_ratio``, by default `OUTLIER_RATIO`, times
    the median norm, that of ``median_norms`` or of the training tokens. ``outliers`` of a row counts those held out.
    With ``max_norm_ratio`` they are left out: every figure is that of the other tokens, the controls are fitted without
    them and splicing leaves their activations alone, and every figure of *all* tokens, spliced everywhere, stands
    beside it with ``_all`` behind its name. Which tokens are outliers depends on no other site.

    Returns a row of results for each SAE, in the order of ``saes``, and the firing frequencies {name: float32 [d_sae]}
    on the tokens kept. A row says on how many ``tokens`` the SAE was judged and on how many ``predictions`` of the
    model; ``gamma`` is ‖mean‖/‖std‖ of the kept tokens held out; ``kind`` is the SAE's, ``seed``, ``target_l0``,
    ``l0_coefficient`` and ``k`` are those in its metadata. What is undefined or unknown is None.

    Raises what the metrics, `harvest` and `load_sae` do, and TypeError or ValueError for no SAE, entries that
    are not (Site, path), a site at which nothing is kept, and activations that are missing or not those of the tokens.
    """
    sites = _sites_of(saes)
    if not callable(on_done):
        raise TypeError(f"on_done: expected a function, got {type(on_done).__name__}")
    check_int("max_bytes", max_bytes, 1)
    check_type("dtype", dtype, torch.dtype)
    check_outliers(max_norm_ratio, median_norms, sites)
    pairs = [
        token_pairs(model, tokens, name) for name, tokens in (("train_tokens", train_tokens), ("held_out", held_out))
    ]
    given = (("activations", activations, train_tokens), ("held_out_activations", held_out_activations, held_out))
    for (name, by_site, _), of_tokens in zip(given, pairs, strict=True):
        if by_site is not None:
            _check_of_tokens(name, by_site, sites, len(of_tokens))
    if loss_tokens is None:
        loss_tokens = held_out
    else:
        token_pairs(model, loss_tokens, "loss_tokens")
    if clean_loss is None:
        clean_loss = language_model_loss(model, loss_tokens)
    else:
        check_number("clean_loss", clean_loss)
    text = _Text(model, loss_tokens, clean_loss)

    judged: dict[str, dict[str, Any]] = {}
    frequencies: dict[str, Tensor] = {}
    sizes = {site: sum(map(len, pairs)) * site_width(model, site) * dtype.itemsize for site in sites}
    for group in _groups(sizes, max_bytes):
        train_by_site, held_out_by_site = (
            {site: known[site] for site in group} if known is not None else _harvest(model, tokens, group, dtype)
            for _, known, tokens in given
        )
        for site in group:
            train_rows, rows = (by_site.pop(site).to(text.device) for by_site in (train_by_site, held_out_by_site))
            tokens = _Tokens(train_rows, pairs[0], rows, pairs[1])
            at_site = _AtSite(text, site, tokens, max_norm_ratio, median_norms[site] if median_norms else None)
            for name in sites[site]:
                sae = load_sae(saes[name][1]).to(text.device)
                sae.impl = impl
                figures, frequencies[name] = at_site.judge(sae)
                facts = {"name": name, "site": site.kind, "layer": site.layer, "width": sae.d_sae, "kind": sae.kind}
                facts |= recipe_of(sae)
                judged[name] = {key: defined(value) for key, value in (facts | figures).items()}
                on_done(len(judged), name)
    return [judged[name] for name in saes], {name: frequencies[name] for name in saes}


def check_outliers(
    max_norm_ratio: float | None, median_norms: Mapping[Site, float] | None, sites: Iterable[Site]
) -> None:
    """Raise TypeError or ValueError unless they say which tokens of ``sites`` are outliers."""
    if max_norm_ratio is not None:
        check_number("max_norm_ratio", max_norm_ratio, 1)
    if median_norms is not None:
        check_type("median_norms", median_norms, Mapping)
        for site in sites:
            if site not in median_norms:
                raise ValueError(f"median_norms: expected one for each site of saes, found none for {site}")
            check_number(f"median_norms[{site}]", median_norms[site], 0, open_low=True)


def _harvest(model: nn.Module, tokens: Tensor, sites: list[Site], dtype: torch.dtype) -> dict[Site, Tensor]:
    return harvest(model, tokens, sites, dtype=dtype, batch_size=max(1, FORWARD_TOKENS // max(1, tokens.shape[1])))


def _sites_of(saes: Any) -> dict[Site, list[str]]:
    """The names of the SAEs of each site."""
    check_type("saes", saes, Mapping)
    if not saes:
        raise ValueError("saes: expected at least one, got none")
    sites: dict[Site, list[str]] = {}
    for name, entry in saes.items():
        check_type("saes: key", name, str)
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], Site):
            raise TypeError(f"saes[{name!r}]: expected (Site, path), got {entry!r:.60}")
        sites.setdefault(entry[0], []).append(name)
    return sites


def _groups(sizes: Mapping[Site, int], max_bytes: int) -> Iterator[list[Site]]:
    """Sites in order, as many at a time as ``max_bytes`` hold and at least one."""
    group: list[Site] = []
    for site, size in sizes.items():
        if group and size + sum(sizes[other] for other in group) > max_bytes:
            yield group
            group = []
        group.append(site)
    yield group


class _Text:
    """The model on held-out text."""

    def __init__(self, model: nn.Module, tokens: Tensor, clean_loss: float):
        self.model, self.tokens, self.clean_loss = model, tokens, clean_loss
        self.device = input_device(model)
        self.predictions = n_predictions(model, tokens)

    def splice(self, site: Site, sae: BaseSAE, max_norm: float | None) -> float:
        spliced = sae if max_norm is None else SparingOutliers(sae, max_norm)
        return delta_loss(self.model, self.tokens, {site: spliced}, clean_loss=self.clean_loss)

    def ablate(self, site: Site, mean: Tensor, max_norm: float | None) -> float:
        return mean_ablation_loss(self.model, self.tokens, site, mean, max_norm=max_norm) - self.clean_loss


class _Tokens(NamedTuple):
    """Activations of a site, and the pairs of ids that the tokens are of."""

    train: Tensor
    train_pairs: Tensor
    rows: Tensor
    """Of the held-out text."""
    pairs: Tensor

    def where(self, kept_in_train: Tensor, kept: Tensor) -> "_Tokens":
        train_pairs = self.train_pairs[kept_in_train.to(self.train_pairs.device)]
        return _Tokens(self.train[kept_in_train], train_pairs, self.rows[kept], self.pairs[kept.to(self.pairs.device)])


class _OnTokens:
    """The controls of a site on some of its tokens, and how an SAE does there.

    max_norm: the largest norm among them, where others are left out.
    """

    def __init__(self, text: _Text, site: Site, tokens: _Tokens, max_norm: float | None):
        self.text, self.site, self.tokens, self.max_norm = text, site, tokens, max_norm
        mean, variance = moments("held_out_activations", tokens.rows)
        norm = torch.linalg.vector_norm(mean).item()
        self.gamma = norm / math.sqrt(variance) if variance > 0 else math.inf
        self.pca = fit_pca(tokens.train)
        self.pair_table_fvu = pair_table_fvu(*tokens)
        self.ablation = text.ablate(site, mean, max_norm)

    def judge(self, sae: BaseSAE) -> tuple[dict[str, Any], Tensor]:
        train, _, rows, _ = self.tokens
        metrics = evaluate_sae(sae, rows)
        rank = round(metrics.l0)
        pca = self.pca.fidelity(rows, rank)
        delta = self.text.splice(self.site, sae, self.max_norm)
        figures = {
            "tokens": metrics.tokens,
            "l0": metrics.l0,
            "fvu": metrics.fvu,
            "pca_fvu": pca.fvu,
            "random_fvu": random_dictionary_fvu(train, rows, rank, sae.d_sae),
            "pair_table_fvu": self.pair_table_fvu,
            "median_fvu": metrics.median_fvu,
            "pca_median_fvu": pca.median_fvu,
        } | common_figures(metrics, delta, self.ablation)
        return figures, metrics.firing_frequency


class _AtSite:
    """What the SAEs of one site have in common."""

    def __init__(
        self, text: _Text, site: Site, tokens: _Tokens, max_norm_ratio: float | None, median_norm: float | None
    ):
        ratio = OUTLIER_RATIO if max_norm_ratio is None else float(max_norm_ratio)
        norms, train_norms = norms_of(tokens.rows), norms_of(tokens.train)
        max_norm = ratio * (train_norms.median().item() if median_norm is None else median_norm)
        kept, kept_in_train = ~(norms > max_norm), ~(train_norms > max_norm)
        self.facts = {"outliers": int((~kept).sum()), "outlier_ratio": ratio, "predictions": text.predictions}
        self.filters = max_norm_ratio is not None
        self.on_all = self.on_kept = _OnTokens(text, site, tokens, None)
        if self.filters and not (kept.all() and kept_in_train.all()):
            for name, each in (("held_out", kept), ("train_tokens", kept_in_train)):
                if not each.any():
                    raise ValueError(f"median_norms: expected that of {site}, got one that leaves none of {name}")
            self.on_kept = _OnTokens(text, site, tokens.where(kept_in_train, kept), max_norm)

    def judge(self, sae: BaseSAE) -> tuple[dict[str, Any], Tensor]:
        figures, frequency = self.on_kept.judge(sae)
        beside = {}
        if self.filters:
            on_all = figures if self.on_all is self.on_kept else self.on_all.judge(sae)[0]
            beside = {f"{name}_all": value for name, value in on_all.items()}
        return figures | {"gamma": self.on_kept.gamma} | self.facts | beside, frequency


def recipe_of(sae: Codec) -> dict[str, float | None]:
    """Seed, L0 aimed at, λ and k, as far as the metadata of the SAE say: themselves, or a ``training`` among them, or
    the ``loss`` of that."""
    training = sae.metadata.get("training")
    training = training if isinstance(training, dict) else {}
    loss = training.get("loss")
    places: Sequence[dict[str, Any]] = (sae.metadata, training, loss if isinstance(loss, dict) else {})
    recipe: dict[str, float | None] = {}
    for name in RECIPE:
        values = (place.get(name) for place in places)
        recipe[name] = next((value for value in values if type(value) in (int, float)), None)
    return recipe


def _check_of_tokens(name: str, by_site: Any, sites: Mapping[Site, Any], n: int) -> None:
    """Raise TypeError or ValueError unless ``by_site`` holds the activations of ``n`` tokens at each of ``sites``."""
    check_type(name, by_site, Mapping)
    for site in sites:
        if site not in by_site:
            raise ValueError(f"{name}: expected those of {site}, got none")
        check_activations(f"{name}[{site}]", by_site[site])
        if len(by_site[site]) != n:
            raise ValueError(f"{name}[{site}]: expected those of the {n} tokens, got {len(by_site[site])}")


def common_figures(metrics: SAEMetrics, delta: float, ablation: float) -> dict[str, Any]:
    """Those that SAEs and transcoders have alike. delta, ablation: rises of the loss."""
    return {
        "top_error_share": metrics.top_error_share,
        "top_variance_share": metrics.top_variance_share,
        "reconstruction_bias": metrics.reconstruction_bias,
        "delta_loss": delta,
        "ablation_delta_loss": ablation,
        "loss_recovered": loss_recovered(delta, ablation),
        "dead_fraction": metrics.dead_fraction,
        "high_freq_fraction": metrics.high_freq_fraction,
    }


def defined(value: Any) -> Any:
    """None in the place of a float that is not finite, for which JSON has no word."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def token_pairs(model: nn.Module, tokens: Tensor, name: str = "tokens", kept: Tensor | None = None) -> Tensor:
    """The (previous, current) ids [n, 2] of every token of ``tokens`` [rows, context] that `harvest` keeps, in order.

    The previous id of a row's first token is the size of the vocabulary, which is no token. Raises TypeError or
    ValueError naming ``name`` for what are no integers [rows, context]. kept: bool [rows, context], other tokens in the
    place of those, as `harvest` says which it kept where outliers were left out.
    """
    if not is_integer(tokens):
        raise TypeError(f"{name}: expected an integer torch.Tensor, got {found(tokens)}")
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected shape [rows, context], got {list(tokens.shape)}")
    tokens = tokens.long()
    if kept is None:
        special = torch.tensor(special_token_ids(model), dtype=tokens.dtype, device=tokens.device)
        kept = ~torch.isin(tokens, special)
    return pairs_of(tokens, embedding_weight(model).shape[0])[kept]


def pairs_of(tokens: Tensor, none: int) -> Tensor:
    """(previous, current) of each of ``tokens`` [rows, context], [rows, context, 2]; ``none`` before the first."""
    return torch.stack([torch.cat([torch.full_like(tokens[:, :1], none), tokens[:, :-1]], 1), tokens], -1)
