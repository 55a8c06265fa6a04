"""`ScaledCLT`: a cross-layer transcoder in the units in which it is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import affine, without_autocast
from ..checks import check_number, check_type
from ..kernels import SparseCode
from .clt import CrossLayerTranscoder
from .scaled_transcoder import ScaledTranscoder
from .transcoder import Transcoder


class ScaledCLTSource(ScaledTranscoder):
    """The latents of one layer, as `CLTSource` has them: ``W_dec`` [d_sae, Σ d_out] holds what they add to each output,
    side by side, in units of the scales of those; ``b_dec`` [d_out] is the bias of the layer's own output alone.

    d_outs: the widths of its own output and of those after it. The rest as of `ScaledTranscoder`; rows of W_enc and of
    W_dec, over all outputs together, begin with unit norm.
    """

    def __init__(self, d_in: int, d_outs: Sequence[int], d_sae: int, **options: Any):
        super().__init__(d_in, sum(d_outs), d_sae, **options)
        self.b_dec = nn.Parameter(self.W_dec.new_zeros(d_outs[0]))

    def decode(self, f: Tensor | SparseCode, x: Tensor | None = None) -> Tensor:
        """f·W_dec [..., Σ d_out] of dense activations [..., d_sae]: what they add to each output, without biases."""
        if not isinstance(f, Tensor):
            raise TypeError(f"f: expected a torch.Tensor, got {type(f).__name__}")
        self._check_rows("f", f, self.d_sae)
        return affine(f.to(self.W_dec.dtype), self.W_dec, self.W_dec.new_zeros(self.d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def released(self) -> Transcoder:
        raise TypeError("released: expected a whole CLT, got one layer of it: ScaledCLT.released has all")


class ScaledCLT(nn.Module):
    r"""A `CrossLayerTranscoder` with scales C_l of its inputs and D_l of its outputs, which are not in the weights yet:

        z_l = (x_l/C_l)·W_enc^l + b_enc^l;   ŷ_l' = D_l'·(Σ_{l ≤ l'} f_l·W_dec^{l→l'} + b_dec^l')

    d_ins, d_outs: the widths of the inputs and outputs of the layers, ascending. d_sae: latents of each layer.
    input_scales, output_scales: C_l and D_l. options: as of `ScaledTranscoder`. Raises ValueError or TypeError on bad
    values.
    """

    def __init__(
        self,
        d_ins: Sequence[int],
        d_outs: Sequence[int],
        d_sae: int,
        *,
        input_scales: Sequence[float],
        output_scales: Sequence[float],
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__()
        if metadata is not None:
            check_type("metadata", metadata, dict)
        for name, values in (("d_outs", d_outs), ("input_scales", input_scales), ("output_scales", output_scales)):
            if len(values) != len(d_ins) or not len(d_ins):
                raise ValueError(f"{name}: expected one for each of {len(d_ins)} layers, got {len(values)}")
        for number, scale in enumerate(output_scales):
            check_number(f"output_scales[{number}]", scale, 0, open_low=True)
        self.metadata = dict(metadata or {})
        self.output_scales = [float(scale) for scale in output_scales]
        self.sources: Sequence[ScaledCLTSource] = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            ScaledCLTSource(d_in, d_outs[number:], d_sae, input_scale=scale, **options)
            for number, (d_in, scale) in enumerate(zip(d_ins, input_scales, strict=True))
        )

    @property
    def input_scales(self) -> list[float]:
        return [source.input_scale for source in self.sources]

    @property
    def d_outs(self) -> list[int]:
        return [len(source.b_dec) for source in self.sources]

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """ŷ [N, d_out] of each layer, of xs: [N, d_in] for each layer. Differentiable."""
        outputs = [source.b_dec.expand(len(xs[0]), -1) for source in self.sources]
        for number, (source, x) in enumerate(zip(self.sources, xs, strict=True)):
            for target, written in enumerate(source(x).split(self.d_outs[number:], dim=1), number):
                outputs[target] = outputs[target] + written
        return [y * scale for y, scale in zip(outputs, self.output_scales, strict=True)]

    @torch.no_grad()
    @without_autocast
    def released(self) -> CrossLayerTranscoder:
        """The same function without scales, up to rounding, as a copy:

            W_enc' = (D_l/C_l)·W_enc;  b_enc' = D_l·b_enc;  θ' = D_l·max(θ, 0);  b_dec' = D_l·b_dec
            W_dec^{l→l'}' = (D_l'/D_l)·W_dec^{l→l'}

        so that activations of a layer are in the units of its own output.
        """
        layers = []
        for number, (source, own) in enumerate(zip(self.sources, self.output_scales, strict=True)):
            targets = zip(source.W_dec.split(self.d_outs[number:], 1), self.output_scales[number:], strict=True)
            tensors = {
                "W_enc": source.W_enc * (own / source.input_scale),
                "b_enc": source.b_enc * own,
                "threshold": source.threshold.clamp(min=0) * own,
                "W_dec": torch.cat([part * (scale / own) for part, scale in targets], 1),
                "b_dec": source.b_dec * own,
            }
            layers.append({key: tensor.detach() for key, tensor in tensors.items()})
        return CrossLayerTranscoder(layers, impl=self.sources[0].impl, metadata=self.metadata)
