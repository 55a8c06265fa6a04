"""What SAEs and transcoders have in common: from rows to the code and back, and a threshold that stays wide."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..autocast import affine, without_autocast
from ..checks import check_floating
from ..kernels import JumpReLUOutput, SparseCode, density


class Codec(nn.Module):
    """Weights W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out] and b_dec [d_out], and which latents fire.

    A subclass has `encode_sparse` and `_encode_densely`, and names in ``PARAMETERS`` all that is differentiated.
    """

    PARAMETERS: ClassVar[Sequence[str]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    impl: str
    metadata: dict[str, Any]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def save(self, path: str | os.PathLike) -> None:
        """Write it as the files of its class."""
        raise NotImplementedError

    def _check_rows(self, name: str, rows: Tensor, width: int) -> None:
        check_floating(name, rows)
        if rows.ndim == 0 or rows.shape[-1] != width:
            raise ValueError(f"{name}: expected shape [..., {width}], got {list(rows.shape)}")
        if rows.device != self.W_enc.device:
            raise ValueError(f"{name}: expected device {self.W_enc.device}, got {rows.device}")

    def _goes_densely(self, x: Tensor) -> bool:
        """Whether every latent of every token is needed: for a gradient, or for a graph whose shapes are known."""
        if torch.compiler.is_compiling():
            return True
        tensors = (x, *(getattr(self, name) for name in self.PARAMETERS))
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def _encoder_input(self, x: Tensor) -> Tensor:
        """x [..., width] as the [N, width] that W_enc multiplies."""
        width = self.W_enc.shape[0]
        self._check_rows("x", x, width)
        return x.reshape(-1, width).to(self.W_enc.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations [..., d_sae] of x [..., width], in the dtype of the weights.

        Differentiable; where no gradient is asked for, filled from the entries of `encode_sparse`. Either way the same
        latents fire.
        """
        if not isinstance(x, Tensor) or self._goes_densely(x):
            f = self._encode_densely(x)
        else:
            f = self.encode_sparse(x).to_dense().to(self.W_enc.dtype)
        return f.reshape(*x.shape[:-1], self.d_sae)

    def _encode_densely(self, x: Tensor) -> Tensor:
        """f [N, d_sae] of x [..., width] in the dtype of the weights, differentiable."""
        raise NotImplementedError

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Active latents of the tokens of x [..., width], flattened to N rows. Not differentiable."""
        raise NotImplementedError

    def _activations(self, x: Tensor) -> Tensor | SparseCode:
        """f of x [..., width] in the form that is decoded faster: its entries, where no gradient is asked for and they
        are few enough (`gemmascope.kernels.density`)."""
        if not isinstance(x, Tensor) or self._goes_densely(x):
            return self.encode(x)
        code = self.encode_sparse(x)
        return code if density.is_sparse(code) else code.to_dense().reshape(*x.shape[:-1], self.d_sae)

    def _decoded(self, f: Tensor | SparseCode) -> Tensor:
        """f·W_dec + b_dec: [..., d_out] of dense activations [..., d_sae], [N, d_out] of a `SparseCode`."""
        if isinstance(f, SparseCode):
            return self._decode_entries(f)
        if not isinstance(f, Tensor):
            raise TypeError(f"f: expected a torch.Tensor or a SparseCode, got {type(f).__name__}")
        self._check_rows("f", f, self.d_sae)
        return affine(f.to(self.W_dec.dtype), self.W_dec, self.b_dec)

    @without_autocast
    def _decode_entries(self, code: SparseCode) -> Tensor:
        return kernels.decode(code, self.W_dec, self.b_dec, impl=self.impl)


class WideThreshold(Codec):
    """A JumpReLU codec: f = z·1[z > θ] with θ = max(``threshold``, 0), for an optimiser may take it below 0.

    ``threshold`` [d_sae] stays in fp32 whatever dtype the module is moved to, or in fp64 with fp64 weights: in bf16 it
    would stop learning, and the gate would move.
    """

    threshold: nn.Parameter

    @without_autocast
    def jumprelu(self, x: Tensor, bandwidth: float = 1e-3) -> JumpReLUOutput:
        """f [N, d_sae], l0 [N] and firing counts [d_sae] of x [..., width]; differentiable.

        The gate is decided on the fp32 (fp64) pre-activations, the same bits as in `encode_sparse`. The gradient of a
        threshold below 0 arrives all the same.
        """
        z = kernels.preactivations(self._encoder_input(x), self.W_enc, self.b_enc, impl=self.impl)
        threshold = torch.where(self.threshold < 0, self.threshold - self.threshold.detach(), self.threshold)
        out = kernels.jumprelu(z, z.new_zeros(self.d_sae), threshold, bandwidth, impl=self.impl)
        return out._replace(f=out.f.to(self.W_enc.dtype))

    def _encode_densely(self, x: Tensor) -> Tensor:
        return self.jumprelu(x).f

    @without_autocast
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Active latents of the tokens of x [..., width], flattened to N rows. Not differentiable."""
        with torch.no_grad():
            threshold = self.threshold.clamp(min=0)
            return kernels.encode(self._encoder_input(x), self.W_enc, self.b_enc, threshold, impl=self.impl)

    def _apply(self, fn, recurse=True):
        threshold, grad = self.threshold.detach(), self.threshold.grad
        grad = None if grad is None else grad.detach()
        super()._apply(fn, recurse)
        moved = self.threshold
        if moved.dtype != torch.float32 and moved.dtype != torch.float64:
            moved.data = threshold.to(device=moved.device, dtype=torch.float32)
            if grad is not None:
                moved.grad = grad.to(device=moved.device, dtype=torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Also with ``assign=True`` the threshold keeps its dtype."""
        super()._load_from_state_dict(*args)
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        if self.threshold.dtype != dtype:
            self.threshold = nn.Parameter(self.threshold.detach().to(dtype), self.threshold.requires_grad)
