"""`CrossLayerTranscoder`: what the MLPs of several layers compute, through latents that write to all later ones."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import affine
from ..checks import check_int, check_type
from ..formats import clts
from ..formats.clts import LayerTensors, StoredCLT
from ..kernels import SparseCode
from .base import check_placement, placed
from .clt_source import CLTPart, CLTSource, Written, check_layers

# One tensor for each layer, in ascending order, row i of all of them the same token.
ByLayer = Sequence[Tensor]


class CrossLayerTranscoder(nn.Module):
    r"""Cross-layer transcoder (CLT) with JumpReLU latents, as circuit tracing uses it ("Circuit Tracing",
    transformer-circuits.pub 2025; Gemma Scope 2). For layers l = 0, 1, … with inputs x_l, as a rule what MLPs read:

        z_l = x_l·W_enc^l + b_enc^l;   f_l = z_l·1[z_l > θ_l]
        ŷ_l' = Σ_{l ≤ l'} f_l·W_dec^{l→l'} + b_dec^l' (+ x_l'·W_skip^l'ᵀ)

    The layers are ``sources``, in ascending order. They need not be all layers of a model, nor of one width: the
    latents of a source write to its own output and those of the sources after it.

    layers: the tensors of each, see `CLTSource`, of one float dtype (the threshold may be float32). impl: who computes,
    see `gemmascope.kernels`. metadata: JSON-able facts; files hold ``model``, ``sites`` and ``sites_out``, the names of
    where each layer reads and writes. Raises ValueError or TypeError on tensors that are not those of a CLT.
    """

    def __init__(
        self, layers: Sequence[Mapping[str, Tensor]], *, impl: str = "auto", metadata: dict[str, Any] | None = None
    ):
        super().__init__()
        check_type("layers", layers, Sequence)
        check_type("impl", impl, str)
        if metadata is not None:
            check_type("metadata", metadata, dict)
        problem = clts.problem_in(layers)
        if problem:
            raise ValueError(problem)
        self.metadata = dict(metadata or {})
        self.sources: Sequence[CLTSource] = nn.ModuleList(CLTSource(tensors, impl) for tensors in layers)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def n_layers(self) -> int:
        return len(self.sources)

    @property
    def d_out(self) -> list[int]:
        """The width of each output."""
        return [source.d_out for source in self.sources]

    @property
    def d_sae(self) -> int:
        """Latents of all layers together."""
        return sum(source.d_sae for source in self.sources)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{source.d_in}→{source.d_sae}" for source in self.sources)
        return f"n_layers={self.n_layers}, {sizes}, d_out={self.d_out}"

    def decoder(self, source: int, target: int) -> Tensor:
        """W_dec^{source→target}, a view [d_sae, d_out] of what latents of one layer add to the output of another.

        Raises ValueError for a target before the source, to which they do not write."""
        check_int("source", source, 0, self.n_layers - 1)
        check_int("target", target, source, self.n_layers - 1)
        return self.sources[source].W_dec.split(self.d_out[source:], dim=1)[target - source]

    def _rows(self, xs: ByLayer) -> list[Tensor]:
        """xs as matrices [N, d_in] of the same tokens, in the dtype of the weights."""
        check_layers("xs", xs, [source.d_in for source in self.sources])
        return [source._encoder_input(x) for source, x in zip(self.sources, xs, strict=True)]

    def encode(self, xs: ByLayer) -> list[Tensor]:
        """Dense activations [..., d_sae] of each layer, of xs: [..., d_in] for each layer. Differentiable."""
        self._rows(xs)
        return [source.encode(x) for source, x in zip(self.sources, xs, strict=True)]

    def encode_sparse(self, xs: ByLayer) -> list[SparseCode]:
        """Active latents of each layer, of the tokens of xs flattened to N rows. Not differentiable."""
        return [source.encode_sparse(x) for source, x in zip(self.sources, self._rows(xs), strict=True)]

    def decode(self, fs: Sequence[Tensor | SparseCode], xs: ByLayer | None = None) -> list[Tensor]:
        """ŷ [N, d_out] of each layer, of activations [N, d_sae] or a `SparseCode` for each.

        xs, the inputs that they are of, add what skip connections carry; without them that is left out.
        """
        check_type("fs", fs, Sequence)
        if len(fs) != self.n_layers:
            raise ValueError(f"fs: expected activations of {self.n_layers} layers, got {len(fs)}")
        flat = [f if isinstance(f, SparseCode) else f.reshape(-1, f.shape[-1]) for f in fs]
        numbers = {f.n_tokens if isinstance(f, SparseCode) else len(f) for f in flat}
        if len(numbers) != 1:
            raise ValueError(f"fs: expected the same tokens in every layer, got {sorted(numbers)} of them")
        outputs = [source.b_dec.expand(*numbers, -1) for source in self.sources]
        for number, (source, f) in enumerate(zip(self.sources, flat, strict=True)):
            for target, written in enumerate(source.written(f).split(self.d_out[number:], dim=1), number):
                outputs[target] = outputs[target] + written
        if xs is None:
            return outputs
        rows = self._rows(xs)
        return [
            y if source.W_skip is None else y + affine(x, source.W_skip.T, x.new_zeros(source.d_out))
            for source, x, y in zip(self.sources, rows, outputs, strict=True)
        ]

    def forward(self, xs: ByLayer) -> list[Tensor]:
        """ŷ [..., d_out] of each layer, of xs: [..., d_in] for each layer, in their dtypes. Differentiable; where no
        gradient is asked for, made from the active entries alone where they are few."""
        rows = self._rows(xs)
        outputs = self.decode([source._activations(x) for source, x in zip(self.sources, rows, strict=True)], rows)
        return [y.reshape(*x.shape[:-1], y.shape[1]).to(x.dtype) for x, y in zip(xs, outputs, strict=True)]

    def parts(self) -> dict[str, CLTPart]:
        """{where it writes: its part} of each layer, by the names in the metadata, for `sites.attach`:

            with attach(model, clt.parts()):
                logits = model(input_ids).logits

        Raises ValueError where the metadata do not have ``sites`` and ``sites_out``, a name for each layer.
        """
        for key in ("sites", "sites_out"):
            sites = self.metadata.get(key)
            if not isinstance(sites, (list, tuple)) or len(sites) != self.n_layers:
                raise ValueError(f"metadata[{key!r}]: expected the names of {self.n_layers} sites, got {sites!r:.80}")
        written: Written = {}
        found: dict[str, CLTPart] = {}
        for number, source in enumerate(self.sources):
            part = CLTPart(source, number, self.d_out, written)
            site, site_out = (self.metadata[key][number] for key in ("sites", "sites_out"))
            part.metadata = {"site": site, "site_out": site_out}
            found[site_out] = part
        return found

    @property
    def tensors(self) -> list[LayerTensors]:
        """The parameters of each layer by name, detached, thresholds at least 0, as `formats.clts.write` takes them."""
        return [source.tensors for source in self.sources]

    def stored(self) -> StoredCLT:
        return StoredCLT(self.tensors, self.metadata)

    def save(self, path: str | os.PathLike) -> None:
        """Write a folder as circuit-tracer has it, which `load` reads to the same bits. See `formats.clts.write`."""
        clts.write(self.tensors, self.metadata, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "CrossLayerTranscoder":
        """Read a CLT of circuit-tracer or of Gemma Scope 2, a folder. See `formats.clts.read`.

        device: None is the CPU. dtype: fp32, bf16, fp16 or fp64; None keeps that of the files. Raises BadFileError for
        what is not exactly one of those, ValueError for a dtype in which a weight is Inf, ValueError or TypeError for
        bad arguments.
        """
        device, dtype = check_placement(device, dtype)
        layers, metadata = clts.read(path)
        found = [placed(tensors, device, dtype or tensors["W_dec"].dtype) for tensors in layers]
        return cls(found, metadata=metadata)
