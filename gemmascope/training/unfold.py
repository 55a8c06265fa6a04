"""An SAE from elsewhere as the start of a training: the same function in the units of another run."""

import os

import torch
from torch import Tensor

from ..checks import check_type
from ..saes import JumpReLUSAE

# Norms of decoder rows nearer to 1 than this are those of fp32 rows that were normalised.
UNIT = 1e-6
_LATENTS = 4096  # whose encoder rows are held in fp64 at a time


def load(init_from: str) -> JumpReLUSAE:
    """The SAE of ``SAESpec.init_from``: a file or folder, or ``REPOSITORY:PATH`` on the hub. Raises as
    `JumpReLUSAE.load` and `JumpReLUSAE.from_pretrained`."""
    repository, colon, path = init_from.partition(":")
    if colon and not os.path.lexists(init_from):
        return JumpReLUSAE.from_pretrained(repository, path)
    return JumpReLUSAE.load(init_from)


def check_fits(name: str, sae: JumpReLUSAE, d_model: int, d_sae: int) -> None:
    """Raise TypeError or ValueError unless it is an SAE of these sizes."""
    check_type(name, sae, JumpReLUSAE)
    if (sae.d_model, sae.d_sae) != (d_model, d_sae):
        raise ValueError(
            f"{name}: expected an SAE of d_model {d_model} and d_sae {d_sae}, got one of d_model {sae.d_model} and "
            f"d_sae {sae.d_sae}"
        )


@torch.no_grad()
def unfolded(sae: JumpReLUSAE, scale: float) -> dict[str, Tensor]:
    """The parameters with which input scale C = ``scale`` and a pre-encoder bias give the function of ``sae``.

    With C_s its own scale, p = 1 where it has a pre-encoder bias and else 0, and r_j the norm of its decoder rows:

        W_dec' = W_dec/r;  W_enc' = r·W_enc;  b_dec' = (C_s/C)·b_dec;  θ' = r·(C_s/C)·θ
        b_enc' = r·(C_s/C)·(b_enc + (1 − p)·b_dec·W_enc)

    A latent's activation is r_j·C_s/C times what it was, in these units, and fires on the same tokens. A decoder row of
    zeros stays one. The weights in their dtype, at least fp32, the others fp64.
    """
    norm = torch.linalg.vector_norm(sae.W_dec, dim=1, dtype=torch.float64)
    norm = torch.where((norm == 0) | ((norm - 1).abs() <= UNIT), 1.0, norm)
    ratio = sae.input_scale / scale
    b_dec, b_enc = sae.b_dec.double(), sae.b_enc.double()
    if not sae.pre_encoder_bias:
        b_enc = b_enc + torch.cat([b_dec @ columns.double() for columns in sae.W_enc.split(_LATENTS, dim=1)])
    of_weights = norm.to(torch.promote_types(sae.W_dec.dtype, torch.float32))
    return {
        "W_enc": sae.W_enc * of_weights,
        "W_dec": sae.W_dec / of_weights[:, None],
        "b_enc": b_enc * norm * ratio,
        "b_dec": b_dec * ratio,
        "threshold": sae.threshold.double().clamp(min=0) * norm * ratio,
    }
