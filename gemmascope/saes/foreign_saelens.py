"""SAELens on our kernels: its SAEs for inference and its transcoders.

Casts, hook_z, normalisation and the bias at the input stay with `process_sae_in`, and every hook point is passed. One
at the pre-activations, which the kernels do not store, leaves the call to SAELens, as does what asks for a
gradient.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import foreign
from .foreign import Accelerated, Family, Shapes, rows_of


class SAELens(Accelerated):
    """Encoder and decoder of an SAE whose code is that of `_code`: here a ReLU, as in `StandardSAE`."""

    SHAPES: ClassVar[Shapes] = {
        "W_dec": ("d_sae", "d_in"),
        "W_enc": ("d_in", "d_sae"),
        "b_enc": ("d_sae",),
        "b_dec": ("d_in",),
    }

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if getattr(getattr(module, "cfg", None), "finetuning_scaling_factor", False):
            return "cfg.finetuning_scaling_factor: expected none, which newer versions of SAELens do not have either"
        return None if cls._is_known(module) else f"activation_fn: expected a ReLU, got {module.activation_fn!r}"

    @staticmethod
    def _is_known(module: Any) -> bool:
        """Whether the activation is the one that `_code` computes."""
        return type(module.activation_fn) is nn.ReLU and not foreign.has_hooks(module.activation_fn)

    def _runs_here(self, x: Any) -> bool:
        return (
            foreign.runs_here(self, x)
            and self._is_known(self)
            and not foreign.has_hooks(self.hook_sae_acts_pre)
            # A hook could ask for the gradient of what it gives back.
            and not (torch.is_grad_enabled() and foreign.has_hooks(self.hook_sae_input))
        )

    def _code(self, x: Tensor) -> foreign.SparseCode:
        """The active latents of x [N, d_in], as `process_sae_in` gives it."""
        return foreign.rectified(x, rows_of(self, "W_enc"), self.b_enc, self._accelerated.impl)

    def _encoded(self, x: Tensor) -> tuple[foreign.SparseCode, torch.Size]:
        x = self.process_sae_in(x)
        return self._code(x.reshape(-1, x.shape[-1])), x.shape[:-1]

    def _before_decoding(self, code: foreign.SparseCode) -> foreign.SparseCode:
        return code

    def _decoded(self, code: foreign.SparseCode, lead: torch.Size) -> Tensor:
        """What `decode` returns for the code of tokens of shape ``lead``."""
        code, rows = self._before_decoding(code), rows_of(self, "W_dec")
        x_hat = self.hook_sae_recons(foreign.decoded(code, lead, rows, self.b_dec, self._accelerated.impl))
        return self._after_decoding(x_hat)

    def _after_decoding(self, x_hat: Tensor) -> Tensor:
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    def encode(self, x: Tensor) -> Tensor:
        if not self._runs_here(x):
            return super().encode(x)
        code, lead = self._encoded(x)
        return self.hook_sae_acts_post(foreign.dense(code, lead, self.W_enc.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        code = None
        if foreign.runs_here(self, feature_acts):
            code = foreign.entries_of(feature_acts, rows_of(self, "W_dec"))
        return super().decode(feature_acts) if code is None else self._decoded(code, feature_acts.shape[:-1])

    def _stays_sparse(self, x: Any) -> bool:
        """Whether nobody looks at the dense activations between encoder and decoder."""
        return self._runs_here(x) and not foreign.has_hooks(self.hook_sae_acts_post)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_error_term or not self._stays_sparse(x):
            return super().forward(x)
        return self.hook_sae_output(self._decoded(*self._encoded(x)))

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """As contiguous tensors, without which safetensors does not write."""
        super().process_state_dict_for_saving(state_dict)
        state_dict.update({name: tensor.contiguous() for name, tensor in state_dict.items()})


class JumpReLU(SAELens):
    SHAPES: ClassVar[Shapes] = SAELens.SHAPES | {"threshold": ("d_sae",)}

    def _code(self, x: Tensor) -> foreign.SparseCode:
        return foreign.positive(x, rows_of(self, "W_enc"), self.b_enc, self.threshold, self._accelerated.impl)


class Gated(SAELens):
    SHAPES: ClassVar[Shapes] = {
        **{name: shape for name, shape in SAELens.SHAPES.items() if name != "b_enc"},
        **dict.fromkeys(("b_gate", "r_mag", "b_mag"), ("d_sae",)),
    }

    def _code(self, x: Tensor) -> foreign.SparseCode:
        gate = (self.b_gate, self.r_mag, self.b_mag)
        return foreign.gated(x, rows_of(self, "W_enc"), *gate, self._accelerated.impl)


class TopK(SAELens):
    @staticmethod
    def _is_known(module: Any) -> bool:
        activation = module.activation_fn
        return (
            type(activation).__name__ == "TopK"
            and not getattr(activation, "use_sparse_activations", False)
            and not foreign.has_hooks(activation)
        )

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        problem = super().why_not(module)
        return problem.replace("a ReLU", "a TopK that gives dense activations") if problem else None

    def _norms(self) -> Tensor | None:
        """Of the decoder's rows, where they scale what is compared."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        rows = rows_of(self, "W_dec")
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))

    def _code(self, x: Tensor) -> foreign.SparseCode:
        k, impl = self.activation_fn.k, self._accelerated.impl
        return foreign.largest(x, rows_of(self, "W_enc"), self.b_enc, k, impl, scale=self._norms())

    def _before_decoding(self, code: foreign.SparseCode) -> foreign.SparseCode:
        norms = self._norms()
        return code if norms is None else code._replace(values=code.values * (1 / norms)[code.indices.long()])


class Transcoder(SAELens):
    """Neither the bias at the input nor what normalises and reshapes the output."""

    SHAPES: ClassVar[Shapes] = SAELens.SHAPES | {"W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}

    def _after_decoding(self, x_hat: Tensor) -> Tensor:
        return x_hat

    def forward(self, x: Tensor) -> Tensor:
        return self._decoded(*self._encoded(x)) if self._stays_sparse(x) else super().forward(x)


class SkipTranscoder(Transcoder):
    SHAPES: ClassVar[Shapes] = Transcoder.SHAPES | {"W_skip": ("d_out", "d_in")}

    def forward(self, x: Tensor) -> Tensor:
        if not self._stays_sparse(x):
            return super().forward(x)
        return self._decoded(*self._encoded(x)) + x @ self.W_skip.T.to(x.device)


class JumpReLUTranscoder(JumpReLU, Transcoder):
    SHAPES: ClassVar[Shapes] = Transcoder.SHAPES | {"threshold": ("d_sae",)}


class JumpReLUSkipTranscoder(JumpReLUTranscoder, SkipTranscoder):
    SHAPES: ClassVar[Shapes] = SkipTranscoder.SHAPES | {"threshold": ("d_sae",)}


FAMILY = Family(
    "SAELens",
    {
        "StandardSAE": SAELens,
        "JumpReLUSAE": JumpReLU,
        "TopKSAE": TopK,
        "GatedSAE": Gated,
        "Transcoder": Transcoder,
        "SkipTranscoder": SkipTranscoder,
        "JumpReLUTranscoder": JumpReLUTranscoder,
        "JumpReLUSkipTranscoder": JumpReLUSkipTranscoder,
    },
    way_out=" (save_inference_model of an SAE in training writes one of them)",
)
