"""One layer of a cross-layer transcoder: its latents, and its part in a model."""

import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..autocast import affine, without_autocast
from ..checks import check_floating
from ..errors import EnvironmentProblemError
from ..formats import clts
from ..formats.export import SKIP
from ..kernels import SparseCode
from .transcoder import Folded

# By thread: the layer that is next, and what those before it wrote to its output and to later ones.
Written = dict[int, tuple[int, list[Tensor]]]


class CLTSource(Folded):
    """The latents of one layer: they read that layer's input and write to its output and those of all later layers.

    Parameters: ``W_enc`` [d_in, d_sae] (stored latent-major), ``b_enc`` and ``threshold`` [d_sae], ``W_dec`` [d_sae, Σ
    d_out of this layer and those after it], side by side in their order, ``b_dec`` [d_out], the bias of this layer's
    output, and ``W_skip`` [d_out, d_in] or None, from this layer's input to its output.
    """

    def __init__(self, tensors: Mapping[str, Tensor], impl: str):
        super().__init__()
        self.impl, self.metadata = impl, {}
        self._hold(tensors)

    @property
    def d_out(self) -> int:
        return len(self.b_dec)

    def written(self, f: Tensor | SparseCode) -> Tensor:
        """f·W_dec [N, Σ d_out] of dense activations [N, d_sae] or of a `SparseCode`: what is added to each output."""
        if isinstance(f, SparseCode):
            return self._written_by_entries(f)
        self._check_rows("f", f, self.d_sae)
        return affine(f.to(self.W_dec.dtype), self.W_dec, self.W_dec.new_zeros(self.W_dec.shape[1]))

    @without_autocast
    def _written_by_entries(self, code: SparseCode) -> Tensor:
        return kernels.decode(code, self.W_dec, self.W_dec.new_zeros(self.W_dec.shape[1]), impl=self.impl)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, detached, the threshold at least 0."""
        found = {key: getattr(self, key).detach() for key in clts.KEYS}
        found["threshold"] = found["threshold"].clamp(min=0)
        return found if self.W_skip is None else found | {SKIP: self.W_skip.detach()}


class CLTPart(nn.Module):
    """Layer ``number`` of a CLT, as a transcoder that `sites.attach` puts where it writes: from x, its input, it makes
    ŷ, the layer's output, of what it and the layers before it wrote in the same forward.

    The parts of a CLT share what was written so far, by thread. All of them must be attached, and fire in order: one
    that finds the part before it missing, or of other tokens, raises EnvironmentProblemError.
    """

    def __init__(self, source: CLTSource, number: int, d_outs: list[int], written: Written):
        super().__init__()
        self.source, self.number, self.d_outs, self.metadata = source, number, d_outs, {}
        self._written = written

    @property
    def d_in(self) -> int:
        return self.source.d_in

    @property
    def d_out(self) -> int:
        return self.source.d_out

    def forward(self, x: Tensor) -> Tensor:
        """ŷ [..., d_out] of x [..., d_in], in the dtype of x."""
        rows, thread = self.source._encoder_input(x), threading.get_ident()
        before, so_far = self._written.pop(thread, (0, [])) if self.number else (0, [])
        if before != self.number or (so_far and len(so_far[0]) != len(rows)):
            raise EnvironmentProblemError(
                f"layer {self.number} of the CLT: expected the part before it to have fired on the same tokens in this"
                " forward, found it did not; attach all parts of a CLT"
            )
        outputs = list(self.source.written(self.source._activations(rows)).split(self.d_outs[self.number :], dim=1))
        if so_far:
            outputs = [one.to(other) + other for one, other in zip(so_far, outputs, strict=True)]
        y, *later = outputs
        if later:
            self._written[thread] = (self.number + 1, later)
        y = y + self.source.b_dec
        if self.source.W_skip is not None:
            y = y + affine(rows, self.source.W_skip.T, rows.new_zeros(self.d_out))
        return y.reshape(*x.shape[:-1], self.d_out).to(x.dtype)


def check_layers(name: str, rows: Any, widths: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless ``rows`` has floats [..., N, width] for each of ``widths``, of one shape but
    for them."""
    if isinstance(rows, Tensor) or not isinstance(rows, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, one for each layer, got {type(rows).__name__}")
    if len(rows) != len(widths):
        raise ValueError(f"{name}: expected activations of {len(widths)} layers, got {len(rows)}")
    for number, (x, width) in enumerate(zip(rows, widths, strict=True)):
        check_floating(f"{name}[{number}]", x)
        if x.ndim < 2 or x.shape[-1] != width:
            raise ValueError(f"{name}[{number}]: expected shape [..., N, {width}], got {list(x.shape)}")
        if x.shape[:-1] != rows[0].shape[:-1]:
            tokens, got = list(rows[0].shape[:-1]), list(x.shape[:-1])
            raise ValueError(f"{name}[{number}]: expected the tokens of layer 0, {tokens}, got {got}")


def places(widths: Sequence[int]) -> list[slice]:
    """Where each output lies among all of them side by side."""
    ends = list(accumulate(widths, initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]
