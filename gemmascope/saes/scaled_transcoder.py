"""`TrainedTranscoder`: a transcoder in the units in which it is trained; `ScaledTranscoder`: that of JumpReLU."""

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..autocast import affine, without_autocast
from ..checks import check_int, check_number
from ..formats.export import SKIP
from ..kernels import SparseCode
from .base import BaseSAE
from .jumprelu import JumpReLUSAE
from .transcoder import Transcoder


class TrainedTranscoder(BaseSAE):
    r"""What transcoders in training share, whatever selects the latents that fire: a scale for the input and one for
    the output (Gemma Scope, arXiv 2408.05147, appendix B), neither of which is in the weights yet.

        z = (x/C)·W_enc + b_enc;   ŷ = C_out·(f·W_dec + b_dec)

    C = ``input_scale``, C_out = ``output_scale``. There is no pre-encoder bias. A subclass names the class of SAE whose
    f it has behind this one. `released` gives the `Transcoder` that computes the same, to which evaluation, splicing
    and files belong.

    ``W_enc`` [d_in, d_sae] and ``W_dec`` [d_sae, d_out] are drawn apart from each other, both He-uniform with
    latents of unit norm: x and y are not of one space, so W_enc is not W_decᵀ. d_in, d_out, d_sae: positive ints; the
    rest as of `JumpReLUSAE`, and ``of_class`` those of the other class.
    """

    SCALARS: ClassVar[Mapping[str, torch.dtype]] = {**BaseSAE.SCALARS, "output_scale": torch.float64}

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        *,
        input_scale: float = 1.0,
        output_scale: float = 1.0,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **of_class: Any,
    ):
        check_int("d_in", d_in, 1)
        check_int("d_out", d_out, 1)
        check_number("output_scale", output_scale, 0, open_low=True)
        options: dict[str, Any] = {"impl": impl, "metadata": metadata, "generator": generator}
        options |= {"device": device, "dtype": dtype, **of_class}
        super().__init__(d_out, d_sae, pre_encoder_bias=False, input_scale=input_scale, **options)
        self.output_scale = float(output_scale)
        rows = torch.empty(d_sae, d_in, dtype=torch.float32, device="meta" if self.W_dec.is_meta else "cpu")
        rows.uniform_(-math.sqrt(6 / d_in), math.sqrt(6 / d_in), generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(rows.to(device=self.W_dec.device, dtype=dtype).T)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def is_folded(self) -> bool:
        return False

    def extra_repr(self) -> str:
        scales = f"input_scale={self.input_scale:.6g}, output_scale={self.output_scale:.6g}"
        return f"d_in={self.d_in}, d_sae={self.d_sae}, d_out={self.d_out}, {scales}, impl={self.impl!r}"

    def skipped(self, x: Tensor) -> Tensor | None:
        """What x [N, d_in], divided by C, adds to ŷ beside the latents, in units of C_out; None for nothing."""
        return None

    def decode(self, f: Tensor | SparseCode, x: Tensor | None = None) -> Tensor:
        """ŷ [..., d_out] of dense activations [..., d_sae], or [N, d_out] of a `SparseCode`.

        x [..., d_in], the input that f is of, adds what a skip connection carries; without it that is left out.
        """
        y = self._decoded(f)
        skipped = None if x is None else self.skipped(self._encoder_input(x))
        if skipped is not None:
            if skipped.numel() != y.numel():
                raise ValueError(f"x: expected the input of f, got shape {list(x.shape) if x is not None else None}")
            y = y + skipped.reshape(y.shape)
        return y * self.output_scale

    def forward(self, x: Tensor) -> Tensor:
        """ŷ [..., d_out] of x [..., d_in], in the dtype of x. Differentiable."""
        f = self._activations(x)
        y = self.decode(f, x)
        return (y.reshape(*x.shape[:-1], self.d_out) if isinstance(f, SparseCode) else y).to(x.dtype)

    def fold(self) -> Self:
        raise TypeError("fold: expected an SAE, got a transcoder in training: released() gives it without scales")

    def save(self, path: str | os.PathLike) -> None:
        raise TypeError("save: expected an SAE, got a transcoder in training: save what released() gives")

    @torch.no_grad()
    @without_autocast
    def released(self) -> Transcoder:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same function without scales, up to rounding, as a copy (`Transcoder`):

        W_enc' = (C_out/C)·W_enc;  b_enc' = C_out·b_enc;  θ' = C_out·max(θ, 0);  b_dec' = C_out·b_dec
        W_skip' = (C_out/C)·W_skip

        so that rows of W_dec keep their unit norm, and activations are in the units of y. W_enc, b_enc and θ are those
        of the JumpReLU SAE that files hold (`stored`).
        """
        ratio, stored = self.output_scale / self.input_scale, self.stored().tensors
        tensors = {name: stored[name] * self.output_scale for name in ("b_enc", "b_dec", "threshold")}
        tensors |= {"W_enc": stored["W_enc"] * ratio, "W_dec": stored["W_dec"].clone()}
        if SKIP in self.OTHERS:
            tensors[SKIP] = getattr(self, SKIP).detach() * ratio
        return Transcoder(tensors, impl=self.impl, metadata=self.metadata)


class ScaledTranscoder(TrainedTranscoder, JumpReLUSAE):
    r"""JumpReLU transcoder in training: f = z·1[z > θ]. The arguments are those of `TrainedTranscoder` and
    `JumpReLUSAE`."""


class Skip(TrainedTranscoder):
    r"""A linear map beside the latents (arXiv 2501.18823; "affine" in Gemma Scope 2) of whichever transcoder a subclass
    names behind this one:

        ŷ = C_out·(f·W_dec + b_dec + (x/C)·W_skipᵀ)

    ``W_skip`` [d_out, d_in] is 0 at the start. The subclass adds it to ``PARAMETERS`` and ``OTHERS``.
    """

    def __init__(self, d_in: int, d_out: int, d_sae: int, **options: Any):
        super().__init__(d_in, d_out, d_sae, **options)
        self.W_skip = nn.Parameter(self.W_dec.new_zeros(d_out, d_in))

    def skipped(self, x: Tensor) -> Tensor:
        return affine(x, self.W_skip.T, x.new_zeros(self.d_out))


class ScaledSkipTranscoder(Skip, ScaledTranscoder):
    """`ScaledTranscoder` with a linear map beside the latents."""

    PARAMETERS = (*ScaledTranscoder.PARAMETERS, SKIP)
    OTHERS = (SKIP,)
