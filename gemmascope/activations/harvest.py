"""Activations of a language model at many sites, from one forward per batch."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..sites import Capture, Site, evaluating, probe, site_width, special_token_ids


@torch.no_grad()
def harvest(
    model: nn.Module,
    tokens: Tensor,
    sites: Iterable[Site],
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    progress: Any = None,
) -> dict[Site, Tensor]:
    """What flows through each of ``sites`` on ``tokens`` [rows, context]: {site: [n, width]} on the CPU, rows in order.

    BOS, EOS and PAD positions are left out, as in Gemma Scope (arXiv 2408.05147 §3.1), at every site alike, so row i of
    all sites is the same token. The text model alone runs: no logits are formed. The model is probed first.

    progress: called with the number of rows done. Raises ValueError for tokens that are not [rows, context] integers or
    hold nothing but special tokens; EnvironmentProblemError as `sites.probe` and `sites.Capture` do.
    """
    sites = list(sites)
    if tokens.ndim != 2 or tokens.dtype.is_floating_point:
        raise ValueError(f"tokens: expected integers [rows, context], got {tokens.dtype} {list(tokens.shape)}")
    keep = ~torch.isin(tokens, torch.tensor(special_token_ids(model), dtype=tokens.dtype))
    if not keep.any():
        raise ValueError("tokens: expected some that are not BOS, EOS or PAD, found none")
    probe(model)
    n_kept = int(keep.sum())
    harvested = {site: torch.empty(n_kept, site_width(model, site), dtype=dtype) for site in sites}
    device = next(model.parameters()).device
    done = 0
    with evaluating(model), Capture(model, sites) as capture:
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            cast(nn.Module, model.base_model)(batch.to(device), use_cache=False)
            kept = keep[start : start + batch_size]
            n = int(kept.sum())
            for site, rows in harvested.items():
                rows[done : done + n] = capture[site][kept.to(device)].to(device="cpu", dtype=dtype)
            done += n
            if progress is not None:
                progress(min(start + batch_size, len(tokens)))
    return harvested
