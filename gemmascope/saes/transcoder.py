"""`Transcoder`: from the input of an MLP to its output, through sparse latents."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import affine
from ..checks import check_type
from ..formats import export, transcoders
from ..formats.export import SKIP, TRANSCODER
from ..formats.manifest import SAEConfig
from ..formats.stored import KEYS, StoredSAE
from ..kernels import SparseCode
from .base import check_placement, placed
from .codec import WideThreshold


class Folded(WideThreshold):
    """What transcoders and the layers of cross-layer transcoders have alike once their scales are in the weights."""

    PARAMETERS = (*WideThreshold.PARAMETERS, "threshold", SKIP)

    W_skip: nn.Parameter | None

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Make them the parameters, without a copy where latents lie one after the other already."""
        self.W_enc = nn.Parameter(tensors["W_enc"].detach().T.contiguous().T)
        self.b_enc = nn.Parameter(tensors["b_enc"].detach())
        self.W_dec = nn.Parameter(tensors["W_dec"].detach().contiguous())
        self.b_dec = nn.Parameter(tensors["b_dec"].detach())
        threshold = tensors["threshold"].detach()
        self.threshold = nn.Parameter(threshold.to(torch.promote_types(self.W_dec.dtype, torch.float32)))
        skip = tensors.get(SKIP)
        self.W_skip = None if skip is None else nn.Parameter(skip.detach().contiguous())

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]


class Transcoder(Folded):
    r"""JumpReLU transcoder, with or without a skip connection (arXiv 2406.11944, 2501.18823; Gemma Scope 1 and 2).

        z = x·W_enc + b_enc;   f = z·1[z > θ];   ŷ = f·W_dec + b_dec (+ x·W_skipᵀ)

    x is what the MLP reads, ŷ what it adds to the residual stream. ``metadata["site"]`` says where x is taken and
    ``metadata["site_out"]`` where ŷ belongs. Gemma Scope 1's read the normalised residual without the gain of the
    norm, Gemma Scope 2's with it: another site (`formats.hook_names`).

    Parameters: ``W_enc`` [d_in, d_sae] (stored latent-major), ``W_dec`` [d_sae, d_out], ``b_enc`` [d_sae], ``b_dec``
    [d_out], ``threshold`` [d_sae], which stays fp32 (fp64 with fp64 weights), and ``W_skip`` [d_out, d_in] or None.
    Products are formed in the dtype of the weights, inside torch.autocast too.

    tensors: those parameters, by name, of one float dtype; they become the parameters, without a copy where they lie
    as above. impl: who computes, see `gemmascope.kernels`. metadata: JSON-able facts. Raises ValueError or TypeError on
    tensors that are not those of a transcoder.
    """

    def __init__(self, tensors: dict[str, Tensor], *, impl: str = "auto", metadata: dict[str, Any] | None = None):
        super().__init__()
        check_type("tensors", tensors, dict)
        check_type("impl", impl, str)
        if metadata is not None:
            check_type("metadata", metadata, dict)
        problem = export.problem_in(tensors, export.KINDS[TRANSCODER], SAEConfig())
        if problem:
            raise ValueError(f"tensors: {problem}")
        self.impl, self.metadata = impl, dict(metadata or {})
        self._hold(tensors)

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    def extra_repr(self) -> str:
        skip = "no skip" if self.W_skip is None else "skip"
        return f"d_in={self.d_in}, d_sae={self.d_sae}, d_out={self.d_out}, {skip}, impl={self.impl!r}"

    def decode(self, f: Tensor | SparseCode, x: Tensor | None = None) -> Tensor:
        """ŷ [..., d_out] of dense activations [..., d_sae], or [N, d_out] of a `SparseCode`.

        x [..., d_in], the input that f is of, adds what the skip connection carries; without it that is left out.
        """
        y = self._decoded(f)
        if x is None or self.W_skip is None:
            return y
        rows = self._encoder_input(x)
        if len(rows) * self.d_out != y.numel():
            raise ValueError(f"x: expected the input of f, got shape {list(x.shape)}")
        return y + affine(rows, self.W_skip.T, rows.new_zeros(self.d_out)).reshape(y.shape)

    def forward(self, x: Tensor) -> Tensor:
        """ŷ [..., d_out] of x [..., d_in], in the dtype of x, with the skip connection where there is one.

        Differentiable. Where no gradient is asked for it is made from the active entries alone, unless they are so many
        that whole matrices are faster (`gemmascope.kernels.density`).
        """
        f = self._activations(x)
        y = self.decode(f, x)
        return (y.reshape(*x.shape[:-1], self.d_out) if isinstance(f, SparseCode) else y).to(x.dtype)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, detached, the threshold at least 0, as `formats.export.write` takes them."""
        found = {key: getattr(self, key).detach() for key in KEYS}
        found["threshold"] = found["threshold"].clamp(min=0)
        return found if self.W_skip is None else found | {SKIP: self.W_skip.detach()}

    def stored(self) -> StoredSAE:
        """`tensors` and what goes with them, as `formats.export.write` takes them."""
        return StoredSAE(self.tensors, SAEConfig(metadata=self.metadata, architecture=TRANSCODER))

    def save(self, path: str | os.PathLike) -> None:
        """Write a folder as Gemma Scope 2 has it, ``params.safetensors`` and ``config.json``, which `load` reads to the
        same bits; of the metadata it holds ``model``, ``site``, ``site_out`` and ``l0``. See `formats.export.write`."""
        export.write("gemma-scope-2", *self.stored(), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Transcoder":
        """Read a transcoder of Gemma Scope 1 or 2 or of circuit-tracer. See `formats.transcoders.read`.

        device: None is the CPU. dtype: fp32, bf16, fp16 or fp64; None keeps that of the file. Raises BadFileError for
        what is not exactly one of those files, ValueError for a dtype in which a weight is Inf, ValueError or TypeError
        for bad arguments.
        """
        device, dtype = check_placement(device, dtype)
        stored = transcoders.read(path)
        tensors = stored.tensors
        return cls(placed(tensors, device, dtype or tensors["W_dec"].dtype), metadata=stored.config.metadata)
