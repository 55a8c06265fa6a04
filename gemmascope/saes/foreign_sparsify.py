"""sparsify on our kernels: the product of its encoder and the sums of its decoder; losses stay where they are."""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from . import foreign
from .foreign import Accelerated, Family, Shapes, rows_of


class SparseCoder(Accelerated):
    """Its `forward` is its own, by way of these two."""

    SHAPES: ClassVar[Shapes] = {
        "encoder.weight": ("d_sae", "d_in"),
        "W_dec": ("d_sae", "d_in"),
        "encoder.bias": ("d_sae",),
        "b_dec": ("d_in",),
    }

    def _runs_here(self, x: Any) -> bool:
        return (
            foreign.runs_here(self, x)
            and type(self.encoder) is nn.Linear
            and x.dtype == self.encoder.weight.dtype
            and self.cfg.activation in ("topk", "groupmax")
        )

    def encode(self, x: Tensor) -> Any:
        """The k largest of relu(z), and relu(z) itself, which others of its methods ask for."""
        if not self._runs_here(x):
            return super().encode(x)
        centred = x if self.cfg.transcode else x - self.b_dec
        rows, k, impl = rows_of(self, "encoder.weight"), self.cfg.k, self._accelerated.impl
        flat = centred.reshape(-1, x.shape[-1])
        z = torch.relu_(kernels.preactivations(flat, rows.T, self.encoder.bias.detach(), impl=impl))
        pre_acts = z.to(x.dtype).reshape(*x.shape[:-1], len(rows))
        if self.cfg.activation == "topk":
            top_acts, top_indices = pre_acts.topk(k, dim=-1, sorted=False)
        else:
            top_acts, within = pre_acts.unflatten(-1, (k, -1)).max(dim=-1)
            top_indices = within + torch.arange(0, len(rows), len(rows) // k, device=x.device)
        # The class of what it returns, from its own module.
        output = sys.modules[self._known.__module__].EncoderOutput
        return output(top_acts, top_indices, pre_acts)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        rows = rows_of(self, "W_dec")
        if not (
            foreign.runs_here(self, top_acts)
            and top_acts.ndim == 2
            and isinstance(top_indices, Tensor)
            and top_indices.shape == top_acts.shape
            and not top_indices.is_floating_point()
            and top_indices.device == top_acts.device == rows.device
        ):
            return super().decode(top_acts, top_indices)
        n, k = top_acts.shape
        values = top_acts.to(rows.dtype).to(torch.promote_types(rows.dtype, torch.float32)).reshape(-1)
        # What does not fit into 32 bits is out of range before it is cut off.
        latents = top_indices.clamp(-1, len(rows)).to(torch.int32).reshape(-1)
        offsets = k * torch.arange(n + 1, device=values.device)
        code = foreign.SparseCode(values, latents, offsets, len(rows))
        return kernels.decode(code, rows, self.b_dec.detach(), impl=self._accelerated.impl)


FAMILY = Family(
    "sparsify",
    {"SparseCoder": SparseCoder},
)
