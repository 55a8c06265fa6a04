"""`JumpReLUSAE`: the sparse autoencoder as a torch module."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..autocast import without_autocast
from ..checks import check_number
from ..formats.manifest import SAEConfig
from ..kernels import JumpReLUOutput, SparseCode
from .base import BaseSAE
from .codec import WideThreshold


class JumpReLUSAE(WideThreshold, BaseSAE):
    r"""JumpReLU sparse autoencoder (Gemma Scope, arXiv 2408.05147, equations 1-4).

        z = (x/C − b_dec)·W_enc + b_enc;   f = z·1[z > θ];   x̂ = C·(f·W_dec + b_dec)

    C = ``input_scale`` makes the inputs' mean squared norm 1 during training; ``pre_encoder_bias`` says whether b_dec
    is subtracted first. `fold` returns the same function with C = 1 and no pre-encoder bias, the form Gemma Scope
    releases.

    A latent whose θ is below 0 has θ = 0, as in f = relu(z)·1[z > θ] by which Gemma Scope's files are read: one's own
    optimiser may take θ there, its gradient arrives all the same, and what is saved is 0. See `project_`.

    Parameters: ``W_enc`` [d_model, d_sae] (stored latent-major: the transposed view of a contiguous [d_sae, d_model]),
    ``W_dec`` [d_sae, d_model], ``b_enc`` [d_sae], ``b_dec`` [d_model], ``threshold`` [d_sae], which stays fp32 whatever
    dtype the module is moved to (in bf16 it would stop learning, and the gate would move), or fp64 with fp64. Products
    are formed in the dtype of the weights, inside torch.autocast too: the same bits as without.

    ``torch.func.functional_call`` takes other weights for a call; the transforms of torch.func (vmap, grad, jvp) are
    refused with a TypeError, by their name. `fully_shard` (FSDP2) refuses W_enc, which is not contiguous.

    Initialised as in Gemma Scope: W_dec He-uniform with unit-norm rows, W_enc its transpose, biases 0. The weights are
    drawn on the CPU, so that a seed means the same ones on every device.

    d_model, d_sae: positive ints. threshold_init: ≥ 0. impl: who computes, see `gemmascope.kernels`. metadata: free
    JSON-able facts that travel with the weights (``model``, ``site``, …). generator: of the CPU. device: None is the
    CPU, whatever PyTorch's default is. dtype: fp32, bf16, fp16 or fp64. Raises ValueError or TypeError on bad values.
    """

    PARAMETERS = (*BaseSAE.PARAMETERS, "threshold")
    ARCHITECTURE = "jump_relu"

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        pre_encoder_bias: bool = True,
        input_scale: float = 1.0,
        threshold_init: float = 1e-3,
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
        check_number("threshold_init", threshold_init, 0)
        options = {"device": self.W_dec.device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.threshold = nn.Parameter(torch.full((d_sae,), threshold_init, **options))

    @without_autocast
    def jumprelu(self, x: Tensor, bandwidth: float = 1e-3) -> JumpReLUOutput:
        """f [N, d_sae], l0 [N] and firing counts [d_sae] of x [..., d_model]; differentiable.

        The gate is decided on the fp32 (fp64) pre-activations, the same bits as in `encode_sparse`.
        """
        z = kernels.preactivations(self._encoder_input(x), self.W_enc, self.b_enc, impl=self.impl)
        threshold = torch.where(self.threshold < 0, self.threshold - self.threshold.detach(), self.threshold)
        out = kernels.jumprelu(z, z.new_zeros(self.d_sae), threshold, bandwidth, impl=self.impl)
        return out._replace(f=out.f.to(self.W_enc.dtype))

    def _encode_densely(self, x: Tensor) -> Tensor:
        return self.jumprelu(x).f

    @without_autocast
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Active latents of the tokens of x [..., d_model], flattened to N rows. Not differentiable."""
        with torch.no_grad():
            threshold = self.threshold.clamp(min=0)
            return kernels.encode(self._encoder_input(x), self.W_enc, self.b_enc, threshold, impl=self.impl)

    @torch.no_grad()
    def project_(self) -> "JumpReLUSAE":
        """Back, in place, to where the recipe keeps an SAE after each update: rows of W_dec of unit norm (arXiv
        2408.05147 §3.2; those of zeros stay so) and thresholds of at least 0. Returns the SAE.

            optimiser.step()
            sae.project_()
        """
        norm = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norm > 0, norm, 1))
        self.threshold.clamp_(min=0)
        return self

    @torch.no_grad()
    @without_autocast
    def fold(self) -> "JumpReLUSAE":
        """The same function with input_scale 1 and no pre-encoder bias (arXiv 2408.05147, appendix A), as a copy.

        b_enc' = C·b_enc − C·b_dec·W_enc;  b_dec' = C·b_dec;  θ' = C·θ;  W_enc and W_dec unchanged.
        """
        folded = self._folded()
        folded.threshold.clamp_(min=0).mul_(self.input_scale)
        return folded

    @classmethod
    def _of_config(cls, config: SAEConfig, **options: Any) -> "JumpReLUSAE":
        return cls(1, 1, **options)
