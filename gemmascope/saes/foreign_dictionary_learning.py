"""dictionary_learning on our kernels: its dictionaries, with the options of their methods left to it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import foreign
from .foreign import Accelerated, Family, Shapes, SparseCode, rows_of


class Dictionary(Accelerated):
    """Encoder and decoder of a dictionary whose code is that of `_code`, as matrices that multiply from the right."""

    W_ENC: ClassVar[str] = "W_enc"
    W_DEC: ClassVar[str] = "W_dec"
    B_DEC: ClassVar[str] = "b_dec"
    SHAPES: ClassVar[Shapes] = {
        "W_dec": ("d_sae", "d_model"),
        "W_enc": ("d_model", "d_sae"),
        "b_enc": ("d_sae",),
        "b_dec": ("d_model",),
    }

    def _linears(self) -> tuple[Any, ...]:
        """Submodules that a call would go through."""
        return ()

    def _runs_here(self, x: Any) -> bool:
        linears = self._linears()
        return (
            foreign.runs_here(self, x)
            and x.dtype == foreign.attribute(self, self.W_ENC).dtype
            and all(type(linear) is nn.Linear for linear in linears)
            and not foreign.has_hooks(*linears)
        )

    def _centred(self, x: Tensor) -> Tensor:
        return x - foreign.attribute(self, self.B_DEC).detach()

    def _code(self, x: Tensor) -> SparseCode:
        """The active latents of x [N, d_model]."""
        raise NotImplementedError

    def _encoded(self, x: Tensor) -> SparseCode:
        return self._code(self._centred(x).reshape(-1, x.shape[-1]))

    def _decoded(self, code: SparseCode, lead: torch.Size) -> Tensor:
        rows, b_dec = rows_of(self, self.W_DEC), foreign.attribute(self, self.B_DEC)
        return foreign.decoded(code, lead, rows, b_dec, self._accelerated.impl)

    def encode(self, x: Tensor, *given: Any, **options: Any) -> Any:
        if given or options or not self._runs_here(x):
            return super().encode(x, *given, **options)
        return foreign.dense(self._encoded(x), x.shape[:-1], x.dtype)

    def decode(self, f: Tensor, *given: Any, **options: Any) -> Tensor:
        code = None
        if not (given or options) and self._runs_here(f):
            code = foreign.entries_of(f, rows_of(self, self.W_DEC))
        if code is None:
            return super().decode(f, *given, **options)
        return self._decoded(code, f.shape[:-1])

    def forward(self, x: Tensor, *given: Any, **options: Any) -> Any:
        if given or options or not self._runs_here(x):
            return super().forward(x, *given, **options)
        return self._decoded(self._encoded(x), x.shape[:-1])


class Linears(Dictionary):
    """The matrices are those of two nn.Linear."""

    W_ENC, W_DEC = "encoder.weight", "decoder.weight"
    SHAPES: ClassVar[Shapes] = {
        "encoder.weight": ("d_sae", "d_model"),
        "decoder.weight": ("d_model", "d_sae"),
        "encoder.bias": ("d_sae",),
    }

    def _linears(self) -> tuple[Any, ...]:
        return (self.encoder, self.decoder)

    def _code(self, x: Tensor) -> SparseCode:
        return foreign.rectified(x, rows_of(self, self.W_ENC), self.encoder.bias, self._accelerated.impl)


class AutoEncoder(Linears):
    B_DEC = "bias"
    SHAPES: ClassVar[Shapes] = Linears.SHAPES | {"bias": ("d_model",)}


class AutoEncoderNew(Linears):
    B_DEC = "decoder.bias"
    SHAPES: ClassVar[Shapes] = Linears.SHAPES | {"decoder.bias": ("d_model",)}

    def _centred(self, x: Tensor) -> Tensor:
        return x


class Gated(Linears):
    B_DEC = "decoder_bias"
    SHAPES: ClassVar[Shapes] = {
        **{name: shape for name, shape in Linears.SHAPES.items() if name != "encoder.bias"},
        **dict.fromkeys(("gate_bias", "r_mag", "mag_bias"), ("d_sae",)),
        "decoder_bias": ("d_model",),
    }

    def _code(self, x: Tensor) -> SparseCode:
        gate = (self.gate_bias, self.r_mag, self.mag_bias)
        return foreign.gated(x, rows_of(self, self.W_ENC), *gate, self._accelerated.impl)


class JumpReLU(Dictionary):
    SHAPES: ClassVar[Shapes] = Dictionary.SHAPES | {"threshold": ("d_sae",)}

    def _centred(self, x: Tensor) -> Tensor:
        return super()._centred(x) if self.apply_b_dec_to_input else x

    def _code(self, x: Tensor) -> SparseCode:
        return foreign.positive(x, rows_of(self, self.W_ENC), self.b_enc, self.threshold, self._accelerated.impl)


class TopK(Linears):
    """With ``use_threshold`` and other options it is dictionary_learning that encodes."""

    SHAPES: ClassVar[Shapes] = Linears.SHAPES | {"b_dec": ("d_model",)}

    def _code(self, x: Tensor) -> SparseCode:
        return foreign.largest(x, rows_of(self, self.W_ENC), self.encoder.bias, int(self.k), self._accelerated.impl)


class BatchTopK(Linears):
    """By its threshold, as it encodes unless told otherwise."""

    SHAPES: ClassVar[Shapes] = Linears.SHAPES | {"b_dec": ("d_model",), "threshold": ()}

    def _code(self, x: Tensor) -> SparseCode:
        rows, impl = rows_of(self, self.W_ENC), self._accelerated.impl
        return foreign.positive(x, rows, self.encoder.bias, self.threshold, impl)


class Matryoshka(Dictionary):
    """By its threshold, the latents of its active groups alone."""

    SHAPES: ClassVar[Shapes] = Dictionary.SHAPES | {"threshold": ()}

    def _runs_here(self, x: Any) -> bool:
        # Of more dimensions than 2 it silences the second one instead of the latents.
        return super()._runs_here(x) and (x.ndim == 2 or self.active_groups == len(self.group_indices) - 1)

    def _code(self, x: Tensor) -> SparseCode:
        rows, active = rows_of(self, self.W_ENC), int(self.group_indices[self.active_groups])
        code = foreign.positive(x, rows[:active], self.b_enc[:active], self.threshold, self._accelerated.impl)
        return code._replace(d_sae=len(rows))


FAMILY = Family(
    "dictionary_learning",
    {
        "AutoEncoder": AutoEncoder,
        "AutoEncoderNew": AutoEncoderNew,
        "GatedAutoEncoder": Gated,
        "JumpReluAutoEncoder": JumpReLU,
        "AutoEncoderTopK": TopK,
        "BatchTopKSAE": BatchTopK,
        "MatryoshkaBatchTopKSAE": Matryoshka,
    },
)
