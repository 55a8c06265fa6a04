"""What modules with a JumpReLU gate share: the threshold's dtype, the checks of rows, who computes densely."""

import torch
from torch import Tensor, nn

from ..checks import check_floating


class JumpReLUModule(nn.Module):
    """A module with ``W_enc`` [d_in, d_sae] and ``threshold`` [d_sae].

    The threshold stays fp32 (fp64) whatever dtype the module is moved to: in bf16 it would stop learning, and the gate
    would move.
    """

    W_enc: nn.Parameter
    threshold: nn.Parameter

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
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters()))
