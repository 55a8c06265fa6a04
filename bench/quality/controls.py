"""What needs no training, at the L0 of the SAEs: PCA, a random dictionary with a threshold, the token pairs."""

from typing import Any

import torch
from torch import Tensor

from gemmascope.evaluation import evaluate_sae, pair_table_fvu, pca_fvu
from gemmascope.saes import JumpReLUSAE

FITTED_TOKENS = 8192


@torch.no_grad()
def random_dictionary(train: Tensor, d_sae: int, l0: float, seed: int) -> JumpReLUSAE:
    """``d_sae`` random unit directions as encoder and decoder, about the mean of ``train`` [n, d_model].

    One threshold lets ``l0`` of them fire on a token of `FITTED_TOKENS` of ``train`` on average, and one factor for all
    activations is that of least squares. `evaluation.random_dictionary_fvu` solves for each token and is harder to
    beat."""
    x = train[:: -(-len(train) // FITTED_TOKENS)].float()
    generator = torch.Generator("cpu").manual_seed(seed)
    sae = JumpReLUSAE(x.shape[1], d_sae, pre_encoder_bias=False, generator=generator)
    directions, mean = sae.W_dec.detach().clone(), x.mean(0)
    z = (x - mean) @ directions.T
    kept = max(1, min(round(l0 * len(x)), z.numel() - 1))
    theta = z.flatten().kthvalue(z.numel() - kept).values.clamp(min=0)
    f = torch.where(z > theta, z, 0)
    plain = f @ directions
    centred = plain - plain.mean(0)
    factor = (centred * (x - mean)).sum() / centred.square().sum().clamp(min=1e-30)
    sae.W_enc.copy_(directions.T)
    sae.b_enc.copy_(-mean @ directions.T)
    sae.threshold.fill_(theta.item())
    sae.W_dec.copy_(factor * directions)
    sae.b_dec.copy_(mean - factor * plain.mean(0))
    return sae


def control_rows(
    train: Tensor, held_out: Tensor, kept: Tensor, d_sae: int, l0s: list[float], pairs: tuple[Tensor, Tensor] | None
) -> list[dict[str, Any]]:
    """A row for each control at each L0: FVU of all held-out tokens, and of those ``kept`` (bool [n])."""
    rows: list[dict[str, Any]] = []
    for l0 in l0s:
        rank = round(l0)
        found = {"fvu": pca_fvu(train, held_out, rank), "fvu_kept": pca_fvu(train, held_out[kept], rank)}
        rows.append({"kind": "control", "contender": "pca", "at_l0": l0, "l0": float(rank), **found})
        sae = random_dictionary(train, d_sae, l0, seed=0)
        every, few = evaluate_sae(sae, held_out), evaluate_sae(sae, held_out, keep=kept)
        figures = {"l0": every.l0, "fvu": every.fvu, "fvu_kept": few.fvu}
        rows.append({"kind": "control", "contender": "random dictionary", "at_l0": l0, **figures})
    if pairs is not None:
        fvu = pair_table_fvu(train, pairs[0], held_out, pairs[1])
        fvu_kept = pair_table_fvu(train, pairs[0], held_out[kept], pairs[1][kept.to(pairs[1].device)])
        rows.append({"kind": "control", "contender": "token pairs", "at_l0": None, "l0": None, "fvu": fvu})
        rows[-1]["fvu_kept"] = fvu_kept
    return rows
