"""circuit-tracer on our kernels: its transcoders of one layer, their dense and their sparse encoding."""

import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import foreign
from .foreign import Accelerated, Family, Shapes, SparseCode, rows_of


class SingleLayerTranscoder(Accelerated):
    """Weights that it reads from its file at every call are read so here too."""

    SHAPES: ClassVar[Shapes] = {
        "W_enc": ("d_sae", "d_model"),
        "W_dec": ("d_sae", "d_model"),
        "b_enc": ("d_sae",),
        "b_dec": ("d_model",),
    }
    METHODS = ("encode", "decode", "encode_sparse")
    OWN_WEIGHTS = False

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if cls._kind(module):
            return None
        return f"activation_function: expected a ReLU, JumpReLU or TopK, got {module.activation_function!r}"

    @staticmethod
    def _kind(module: Any) -> str | None:
        """Which of the three its activation is, or None."""
        activation = module.activation_function
        if activation in (F.relu, torch.relu) or type(activation) is nn.ReLU:
            kind = "ReLU"
        else:
            kind = type(activation).__name__
        hooked = isinstance(activation, nn.Module) and foreign.has_hooks(activation)
        return kind if kind in ("ReLU", "JumpReLU", "TopK") and not hooked else None

    def _code(self, x: Tensor, W_enc: Tensor) -> SparseCode:
        """The active latents of x [N, d_model]. JumpReLU and TopK keep negative values here, as circuit-tracer does."""
        kind, impl = self._kind(self), self._accelerated.impl
        if kind == "TopK":
            return foreign.largest(x, W_enc, self.b_enc, self.activation_function.k, impl, relu=False)
        if kind == "JumpReLU":
            threshold = self.activation_function.threshold.reshape(-1)
            return foreign.without_zeros(foreign.above(x, W_enc, self.b_enc, threshold, impl))
        return foreign.rectified(x, W_enc, self.b_enc, impl)

    def encode(self, input_acts: Tensor, *given: Any, **options: Any) -> Tensor:
        if given or options or not foreign.runs_here(self, input_acts) or self._kind(self) is None:
            return super().encode(input_acts, *given, **options)
        W_enc = rows_of(self, "W_enc")
        x = input_acts.to(W_enc.dtype)
        return foreign.dense(self._code(x.reshape(-1, x.shape[-1]), W_enc), x.shape[:-1], x.dtype)

    def decode(self, acts: Tensor, *given: Any, **options: Any) -> Tensor:
        """Its versions with a skip connection in here are given the inputs too."""
        inputs = inspect.signature(super().decode).bind(acts, *given, **options).args[1:]
        inputs, code, W_dec = () if self.W_skip is None else inputs, None, None
        if foreign.runs_here(self, acts, *inputs) and (self.W_skip is None or inputs):
            W_dec = rows_of(self, "W_dec")
            code = foreign.entries_of(acts, W_dec)
        if code is None or W_dec is None:
            return super().decode(acts, *given, **options)
        x_hat = foreign.decoded(code, acts.shape[:-1], W_dec, self.b_dec, self._accelerated.impl)
        return x_hat if self.W_skip is None else x_hat + self.compute_skip(*inputs)

    def encode_sparse(self, input_acts: Tensor, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Activations as a coalesced COO tensor, but for the positions that are to be zero, and the encoder's rows."""
        if not foreign.runs_here(self, input_acts) or input_acts.ndim != 2 or self._kind(self) is None:
            return super().encode_sparse(input_acts, *given, **options)
        bound = inspect.signature(super().encode_sparse).bind(input_acts, *given, **options)
        bound.apply_defaults()
        zeroed = bound.args[1]  # positions, or in older versions whether it is the first
        if isinstance(zeroed, bool):
            zeroed = slice(0, int(zeroed))
        W_enc = rows_of(self, "W_enc")
        code = self._code(input_acts.to(W_enc.dtype), W_enc)
        silent = torch.zeros(code.n_tokens, dtype=torch.bool, device=input_acts.device)
        silent[zeroed] = True
        tokens, latents, values = code.token_indices(), code.indices.long(), code.values.to(W_enc.dtype)
        keep = ~silent[tokens]
        tokens, latents, values = tokens[keep], latents[keep], values[keep]
        places, size = torch.stack([tokens, latents]), (code.n_tokens, code.d_sae)
        sparse = torch.sparse_coo_tensor(places, values, size, is_coalesced=True, check_invariants=False)
        return sparse, W_enc[latents]


FAMILY = Family(
    "circuit-tracer",
    {"SingleLayerTranscoder": SingleLayerTranscoder},
)
