"""What a suite leaves: each SAE folded and saved by its L0 on held-out text."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import harvest, stream
from ..evaluation.transcoders import kept_at
from ..formats.release import SAFETENSORS, gemma_scope_path
from ..saes import BatchTopKSAE, TopKSAE
from ..saes.base import BaseSAE
from ..saes.codec import Codec
from ..saes.topk_transcoder import TopKTranscoder
from ..sites import Site
from ..training.calibrate import calibrate_threshold
from ..training.spec import SAESpec


@torch.no_grad()
def calibrated(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[str, tuple[Site, BaseSAE]],
    *,
    targets: Mapping[str, Site] = MappingProxyType({}),
    max_norm_ratio: float | None = None,
    median_norms: Mapping[Site, float],
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> dict[str, tuple[BaseSAE, dict[str, Any]]]:
    """Those of ``saes`` {name: (site, in training)} that were trained by what fires in a batch, as copies whose
    threshold lets k latents fire on a token of ``tokens`` [rows, context] on average; with facts that say so.

    Which tokens count is as of `held_out_l0`, with its ``targets``. The activations of a site are held in ``dtype``,
    one site at a time.
    """
    by_site: dict[tuple[Site, ...], dict[str, BatchTopKSAE | TopKTranscoder]] = {}
    for name, (site, sae) in saes.items():
        if isinstance(sae, BatchTopKSAE | TopKTranscoder):
            by_site.setdefault(_sites(site, targets.get(name)), {})[name] = copy.deepcopy(sae)
    found: dict[str, tuple[BaseSAE, dict[str, Any]]] = {}
    for sites, of_site in by_site.items():
        harvested = harvest(model, tokens, sites, dtype=dtype, batch_size=batch_size)
        x = harvested[sites[0]]
        if max_norm_ratio is not None:
            x = x[kept_at(harvested, median_norms, max_norm_ratio)]
        for name, sae in of_site.items():
            calibration = calibrate_threshold(sae, lambda x=x: [x.float()])
            scale = sae.output_scale if isinstance(sae, TopKTranscoder) else sae.input_scale
            found[name] = (
                sae,
                {
                    "calibration": {
                        "threshold": calibration.threshold * scale,
                        "l0_before": calibration.l0_before,
                        "l0_after": calibration.l0_after,
                        "tokens": calibration.n_tokens,
                        "of": "training rows, those on which the controls are fitted",
                    }
                },
            )
    return found


@torch.no_grad()
def held_out_l0(
    model: nn.Module,
    held_out: Tensor,
    saes: Mapping[str, tuple[Site, Codec]],
    *,
    targets: Mapping[str, Site] = MappingProxyType({}),
    max_norm_ratio: float | None = None,
    median_norms: Mapping[Site, float],
    batch_size: int = 8,
) -> dict[str, tuple[float, int]]:
    """Mean L0 of each SAE {name: (site, folded)} on the tokens of ``held_out`` [rows, context] that are kept at its
    site, and how many those are: the figures of `evaluation.judge_suite`. One forward of the model for all of them.
    targets: the sites that transcoders {name: site} write, where a token is to be kept too.

    Raises ValueError when none is kept at a site.
    """
    sites_of = {name: _sites(site, targets.get(name)) for name, (site, _) in saes.items()}
    active, tokens = dict.fromkeys(saes, 0), dict.fromkeys(sites_of.values(), 0)
    for batch in stream(model, held_out, sorted({*chain(*sites_of.values())}), batch_size=batch_size):
        rows = {sites: batch[sites[0]] for sites in tokens}
        if max_norm_ratio is not None:
            for sites in tokens:
                kept = kept_at({site: batch[site] for site in sites}, median_norms, max_norm_ratio)
                rows[sites] = rows[sites][kept]
        for name, (_, sae) in saes.items():
            active[name] += len(sae.encode_sparse(rows[sites_of[name]].to(sae.W_dec)).indices)
        for sites in tokens:
            tokens[sites] += len(rows[sites])
    for (site, *_), n in tokens.items():
        if not n:
            raise ValueError(f"drop_norm: expected some held-out tokens to be left at {site}, found none; raise it")
    return {name: (active[name] / tokens[sites], tokens[sites]) for name, sites in sites_of.items()}


def _sites(site: Site, target: Site | None) -> tuple[Site, ...]:
    """Those at which a token must not be an outlier."""
    return (site,) if target is None else (site, target)


def save_suite(
    folder: Path,
    specs: Sequence[SAESpec],
    folded: Mapping[str, Codec],
    l0: Mapping[str, tuple[float, int]],
    facts: Mapping[str, Any],
    of_each: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Path]:
    """Save the folded SAEs {name: SAE}, in the place of all that was in ``folder``.

    JumpReLU SAEs in Gemma Scope 1's layout, ``SITE/layer_L/width_W/average_l0_L0/params.npz``, those that were trained
    as another kind in a folder of that name, ``width_W/gated/average_l0_L0/params.npz``; TopK SAEs, for which that
    layout has no word, as ``width_W/topk/k_K/params.safetensors``; transcoders, whose SITE is ``mlp_in_to_mlp`` for
    one, in Gemma Scope 2's, ``params.safetensors``. Where two would have one name, the second is
    ``average_l0_L0_2`` and so on, in the order of ``specs``. ``facts`` go into the metadata of each, with what it was
    trained for, its ``l0`` {name: (mean, tokens)} and those of ``of_each`` {name: facts}. Returns {name: file}.
    """
    if folder.exists():
        shutil.rmtree(folder)
    paths: dict[str, Path] = {}
    for spec in specs:
        if spec.name not in folded:
            continue
        sae, (average_l0, tokens) = folded[spec.name], l0[spec.name]
        sae.metadata |= dict(facts) | recipe_facts(spec) | dict(of_each.get(spec.name, {}))
        sae.metadata |= {
            "average_l0": average_l0,
            "average_l0_of": "held-out rows",
            "average_l0_tokens": tokens,
        }
        if spec.target is not None:
            sae.metadata["site_out"] = spec.target.name
        kind = spec.site.kind if spec.target is None else f"{spec.site.kind}_to_{spec.target.kind}"
        path = _free(folder / kind / _path(spec, sae, average_l0), set(paths.values()))
        sae.save(path if path.suffix == ".npz" else path.parent)
        paths[spec.name] = path
    return paths


def recipe_facts(spec: SAESpec) -> dict[str, Any]:
    """What an SAE was trained for, as its metadata say it; what its kind does not have is None or left out."""
    config, loss = spec.config, spec.config.loss
    found = {
        "name": spec.name,
        "site": spec.site.name,
        "layer": spec.site.layer,
        "kind": config.kind,
        "l0_coefficient": None if loss.sparsity == "none" else loss.l0_coefficient,
        "target_l0": loss.target_l0,
        "seed": config.seed,
    }
    if config.k is not None:
        found["k"] = config.k
    if config.prefixes:
        found["prefixes"] = list(config.prefixes)
    return found


def _path(spec: SAESpec, sae: Codec, average_l0: float) -> Path:
    """Of the weights, below the folder of the kind of site."""
    path = Path(gemma_scope_path(spec.site.layer, sae.d_sae, average_l0))
    if spec.target is not None:
        path = path.with_name(SAFETENSORS)
    if spec.config.kind == "jumprelu":
        return path
    of_width = path.parents[1] / spec.config.kind
    if isinstance(sae, TopKSAE):
        return of_width / f"k_{spec.config.k}" / SAFETENSORS
    return of_width / path.parent.name / path.name


def _free(path: Path, taken: set[Path]) -> Path:
    """``path``, or the first of those numbered after it that is not ``taken``."""
    named, number = path, 2
    while named in taken:
        named = path.parent.with_name(f"{path.parent.name}_{number}") / path.name
        number += 1
    return named
