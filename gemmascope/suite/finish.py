"""What a suite leaves: each SAE folded and saved by its L0 on held-out text."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import stream
from ..activations.outliers import are_outliers, norms_of
from ..formats.release import SAFETENSORS, gemma_scope_path
from ..saes.codec import Codec
from ..sites import Site
from ..training.spec import SAESpec

SAES_FOLDER = "saes"


@torch.no_grad()
def held_out_l0(
    model: nn.Module,
    held_out: Tensor,
    saes: Mapping[str, tuple[Site, Codec]],
    *,
    max_norm_ratio: float | None = None,
    median_norms: Mapping[Site, float],
    batch_size: int = 8,
) -> dict[str, tuple[float, int]]:
    """Mean L0 of each SAE {name: (site, folded)} on the tokens of ``held_out`` [rows, context] that are kept at its
    site, and how many those are: the figures of `evaluation.judge_suite`. One forward of the model for all of them.

    Raises ValueError when none is kept at a site.
    """
    sites = sorted({site for site, _ in saes.values()})
    active, tokens = dict.fromkeys(saes, 0), dict.fromkeys(sites, 0)
    for batch in stream(model, held_out, sites, batch_size=batch_size):
        if max_norm_ratio is not None:
            for site, x in batch.items():
                batch[site] = x[~are_outliers(norms_of(x), median_norms[site], max_norm_ratio)]
        for name, (site, sae) in saes.items():
            active[name] += len(sae.encode_sparse(batch[site].to(sae.W_dec)).indices)
        for site in sites:
            tokens[site] += len(batch[site])
    for site, kept in tokens.items():
        if not kept:
            raise ValueError(f"drop_norm: expected some held-out tokens to be left at {site}, found none; raise it")
    return {name: (active[name] / tokens[site], tokens[site]) for name, (site, _) in saes.items()}


def save_suite(
    folder: Path,
    specs: Sequence[SAESpec],
    folded: Mapping[str, Codec],
    l0: Mapping[str, tuple[float, int]],
    facts: Mapping[str, Any],
) -> dict[str, Path]:
    """Save the folded SAEs {name: SAE} in Gemma Scope 1's layout, in the place of all that was in ``folder``.

    ``KIND/layer_L/width_W/average_l0_L0/params.npz``, and transcoders, whose KIND is ``mlp_in_to_mlp`` for one, in
    Gemma Scope 2's, ``params.safetensors`` in such folders; where two would have one name, the second is
    ``average_l0_L0_2`` and so on, in the order of ``specs``. ``facts`` go into the metadata of each, with what it was
    trained for and its ``l0`` {name: (mean, tokens)}. Returns {name: file}.
    """
    if folder.exists():
        shutil.rmtree(folder)
    paths: dict[str, Path] = {}
    for spec in specs:
        if spec.name not in folded:
            continue
        sae, (average_l0, tokens) = folded[spec.name], l0[spec.name]
        sae.metadata |= dict(facts) | {
            "name": spec.name,
            "site": spec.site.name,
            "layer": spec.site.layer,
            "l0_coefficient": spec.config.loss.l0_coefficient,
            "target_l0": spec.config.loss.target_l0,
            "seed": spec.config.seed,
            "average_l0": average_l0,
            "average_l0_of": "held-out rows",
            "average_l0_tokens": tokens,
        }
        if spec.target is not None:
            sae.metadata |= {"site_out": spec.target.name, "kind": spec.config.kind}
        kind = spec.site.kind if spec.target is None else f"{spec.site.kind}_to_{spec.target.kind}"
        named = folder / kind / gemma_scope_path(spec.site.layer, sae.d_sae, average_l0)
        path = _free(named if spec.target is None else named.with_name(SAFETENSORS), set(paths.values()))
        sae.save(path if spec.target is None else path.parent)
        paths[spec.name] = path
    return paths


def _free(path: Path, taken: set[Path]) -> Path:
    """``path``, or the first of those numbered after it that is not ``taken``."""
    named, number = path, 2
    while named in taken:
        named = path.parent.with_name(f"{path.parent.name}_{number}") / path.name
        number += 1
    return named
