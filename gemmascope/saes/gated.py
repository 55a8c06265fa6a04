"""`GatedSAE`: an SAE whose gate and magnitudes are two affine maps of the same products."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import kernels
from ..autocast import without_autocast
from ..formats.gated import as_jumprelu
from ..formats.manifest import SAEConfig
from ..formats.stored import StoredSAE
from ..kernels import SparseCode
from .base import BaseSAE
from .jumprelu import JumpReLUSAE


class GatedSAE(BaseSAE):
    r"""Gated sparse autoencoder (arXiv 2404.16014, equations 5 to 7), the form in which it is trained.

        y = (x/C − b_dec)·W_enc;   π = y + b_enc;   m = e^r ⊙ y + b_mag
        f = 1[π > 0]·relu(m);   x̂ = C·(f·W_dec + b_dec)

    ``W_enc`` is W_gate and ``b_enc`` is b_gate; r = ``r_mag``. As e^r > 0 this is a JumpReLU SAE, `to_jumprelu`, and
    files hold it as that one: `save` writes it, and `JumpReLUSAE.load` opens what was written. `load` and
    `from_pretrained` therefore raise a TypeError here.

    The step 1[π > 0] has no gradient, so that what `encode` gives passes none to ``b_enc``: only the loss of a training
    does (`training.gated`).

    Parameters: ``W_enc`` [d_model, d_sae] (stored latent-major, as in `JumpReLUSAE`), ``W_dec`` [d_sae, d_model],
    ``b_enc``, ``r_mag`` and ``b_mag`` [d_sae], ``b_dec`` [d_model]. π and m are fp32 whatever the dtype of the weights,
    or fp64 with fp64. NaN or −Inf in π gives NaN.

    Initialised as in the paper: W_dec He-uniform with unit-norm rows, W_enc its transpose, r and the biases 0. The
    arguments are those of `JumpReLUSAE`, and so is what is raised.
    """

    PARAMETERS = (*BaseSAE.PARAMETERS, "r_mag", "b_mag")
    OTHERS = ("b_mag", "r_mag")
    ARCHITECTURE = "jump_relu"
    KIND = "gated"

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        pre_encoder_bias: bool = True,
        input_scale: float = 1.0,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            d_model,
            d_sae,
            pre_encoder_bias=pre_encoder_bias,
            input_scale=input_scale,
            impl=impl,
            metadata=metadata,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        options = {"device": self.W_dec.device, "dtype": dtype}
        self.b_mag = nn.Parameter(torch.zeros(d_sae, **options))
        self.r_mag = nn.Parameter(torch.zeros(d_sae, **options))

    @property
    def b_gate(self) -> nn.Parameter:
        """``b_enc`` by the paper's name."""
        return self.b_enc

    @without_autocast
    def _encode_densely(self, x: Tensor) -> Tensor:
        # π without a gradient to b_gate, which the step takes away.
        pi = kernels.preactivations(self._encoder_input(x), self.W_enc, self.b_enc.detach(), impl=self.impl)
        pi = torch.where(pi == -torch.inf, torch.nan, pi)
        m = magnitude(pi, self.b_enc.detach(), self.r_mag, self.b_mag)
        return torch.where(pi <= 0, 0, torch.relu(m)).to(self.W_enc.dtype)

    @without_autocast
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Active latents of the tokens of x [..., d_model], flattened to N rows: the gate's entries, less those whose
        magnitude is not positive. Not differentiable."""
        with torch.no_grad():
            rows = self._encoder_input(x)
            zeros = torch.zeros(self.d_sae, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
            code = kernels.encode(rows, self.W_enc, self.b_enc, zeros, impl=self.impl)
            latents = code.indices.long()
            m = magnitude(code.values, *(t[latents] for t in (self.b_enc, self.r_mag, self.b_mag)))
            fires = ~(m <= 0)
            kept = torch.zeros(code.nnz + 1, dtype=torch.int64, device=m.device)
            kept[1:] = fires.cumsum(0)
            return SparseCode(m[fires], code.indices[fires], kept[code.offsets], self.d_sae)

    @torch.no_grad()
    @without_autocast
    def to_jumprelu(self) -> JumpReLUSAE:
        """The same function as a JumpReLU SAE, a copy: encoder e^r ⊙ W_gate, bias b_mag, θ = max(0, b_mag − e^r·b_gate)
        (`formats.gated.as_jumprelu`), with ``kind: gated`` in its metadata.

        Exact but for the rounding of e^r ⊙ W_gate and θ: a π within an ulp or so of 0 may be gated otherwise.
        """
        tensors, config = self.stored()
        own = StoredSAE({name: tensor.clone() for name, tensor in tensors.items()}, config)
        sae = JumpReLUSAE._from_stored(own, "gated", self.W_dec.device, self.W_dec.dtype)
        sae.impl = self.impl
        return sae

    def released(self) -> JumpReLUSAE:
        """What a training leaves: `to_jumprelu`, folded."""
        return self.to_jumprelu().fold()

    @torch.no_grad()
    @without_autocast
    def fold(self) -> Self:
        """The same function with input_scale 1 and no pre-encoder bias, as a copy (cf. `formats.folding.fold`):

        b_gate' = C·(b_gate − b_dec·W_gate);  b_mag' = C·(b_mag − e^r·(b_dec·W_gate));  b_dec' = C·b_dec
        """
        folded = copy.deepcopy(self)
        if self.pre_encoder_bias:
            shift = self.b_dec @ self.W_enc
            folded.b_enc.sub_(shift)
            folded.b_mag.sub_(self.r_mag.exp() * shift)
        for bias in (folded.b_enc, folded.b_mag, folded.b_dec):
            bias.mul_(self.input_scale)
        folded.input_scale, folded.pre_encoder_bias = 1.0, False
        return folded

    # ---- files

    def _config(self) -> SAEConfig:
        return super()._config()._replace(metadata={**self.metadata, "kind": "gated"})

    def stored(self) -> StoredSAE:
        """The tensors of `to_jumprelu` and what goes with them, as `formats` writes them."""
        dtype, wide = self.W_dec.dtype, torch.promote_types(self.W_dec.dtype, torch.float32)
        gate = as_jumprelu(*(t.detach().to(wide) for t in (self.W_enc, self.b_enc, self.r_mag, self.b_mag)))
        tensors = {
            "W_enc": gate.W_enc.to(dtype),
            "b_enc": gate.b_enc.to(dtype),
            "W_dec": self.W_dec.detach(),
            "b_dec": self.b_dec.detach(),
            "threshold": gate.threshold,
        }
        return StoredSAE(tensors, self._config())

    @classmethod
    def _from_stored(cls, stored: StoredSAE, name: str, device: torch.device, dtype: torch.dtype | None) -> Self:
        raise TypeError("GatedSAE: files hold the JumpReLU SAE that it is: open them with JumpReLUSAE")


def magnitude(pi: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """m = e^r·(π − b_gate) + b_mag of pairs that broadcast, in the dtype of π: wherever a latent's magnitude is asked
    for it is these bits."""
    b_gate, r_mag, b_mag = (t.to(pi.dtype) for t in (b_gate, r_mag, b_mag))
    return r_mag.exp() * (pi - b_gate) + b_mag
