"""A gated SAE as the JumpReLU SAE that it is."""

from typing import NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """The encoder of a JumpReLU SAE: W_enc [d_model, d_sae], b_enc and threshold [d_sae]."""

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor


def as_jumprelu(W_gate: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Gate:
    r"""The JumpReLU encoder with the function of a gated one (arXiv 2404.16014, §3.2 and appendix on JumpReLU).

        f = 1[π > 0]·relu(m),   π = x·W_gate + b_gate,   m = e^r·(x·W_gate) + b_mag

    W_gate [d_model, d_sae], b_gate, r_mag (r) and b_mag [d_sae], of one float dtype and device. As e^r > 0, π > 0 is
    m > b_mag − e^r·b_gate; so f = m·1[m > θ] with θ = max(0, b_mag − e^r·b_gate). Exact but for the rounding of e^r·W
    and θ, so that a π within an ulp or so of 0 may be gated otherwise.
    """
    scale = r_mag.exp()
    return Gate(W_gate * scale, b_mag, torch.clamp(b_mag - scale * b_gate, min=0))
