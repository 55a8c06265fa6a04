"""`MatryoshkaSAE`: a BatchTopK SAE whose first latents are SAEs of their own."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_int
from ..errors import BadFileError
from ..kernels import SparseCode
from .batchtopk import BatchTopKSAE, as_jumprelu, k_of
from .jumprelu import JumpReLUSAE


class MatryoshkaSAE(BatchTopKSAE):
    r"""Matryoshka BatchTopK sparse autoencoder (arXiv 2503.17547).

        x̂_m = C·(f[:m]·W_dec[:m] + b_dec)   for each m of ``prefixes``

    f is that of a `BatchTopKSAE`, of which all latents compete. In training each prefix reconstructs x by itself, so
    that general features come first and are not split up by the later ones.

    prefixes: numbers of latents, ascending, the last d_sae. The others as of `BatchTopKSAE`. Raises ValueError or
    TypeError on bad values. A state dict does not hold the prefixes, which no activation depends on; a file's metadata
    do.
    """

    KIND: ClassVar[str] = "matryoshka"

    def __init__(self, d_model: int, d_sae: int, k: int, prefixes: Sequence[int], **options: Any):
        super().__init__(d_model, d_sae, k, **options)
        if not isinstance(prefixes, tuple | list):
            raise TypeError(f"prefixes: expected a tuple or a list, got {type(prefixes).__name__}")
        for index, prefix in enumerate(prefixes):
            check_int(f"prefixes[{index}]", prefix, 1)
        if problem_in(prefixes, d_sae):
            raise ValueError(f"prefixes: expected numbers that ascend to d_sae = {d_sae}, got {list(prefixes)}")
        self.prefixes = tuple(prefixes)

    def extra_repr(self) -> str:
        return f"prefixes={self.prefixes}, {super().extra_repr()}"

    def prefix(self, m: int) -> JumpReLUSAE:
        """The SAE of the first m latents, one of ``prefixes``, by the threshold: a copy that goes its own way, with
        ``prefix`` in its metadata."""
        check_choice("m", m, self.prefixes)
        sae = as_jumprelu(self)
        first = {name: getattr(sae, name).detach()[:m].clone() for name in ("b_enc", "W_dec", "threshold")}
        first |= {"W_enc": sae.W_enc.detach().T[:m].clone().T, "b_dec": sae.b_dec.detach().clone()}
        for name, tensor in first.items():
            setattr(sae, name, torch.nn.Parameter(tensor))
        sae.metadata |= {"prefix": m}
        return sae

    def decode(self, f: Tensor | SparseCode, prefix: int | None = None) -> Tensor:
        """x̂ as of `JumpReLUSAE`. prefix: one of ``prefixes``: of the first so many latents alone."""
        if prefix is None:
            return super().decode(f)
        check_choice("prefix", prefix, self.prefixes)
        if isinstance(f, SparseCode):
            return super().decode(f._replace(values=torch.where(f.indices < prefix, f.values, 0)))
        if isinstance(f, Tensor):
            self._check_rows("f", f, self.d_sae)
            first = torch.arange(self.d_sae, device=f.device) < prefix
            f = torch.where(first, f, 0)
        return super().decode(f)

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "prefixes": list(self.prefixes)}

    @classmethod
    def _of_facts(cls, facts: Mapping[str, Any], **options: Any) -> "MatryoshkaSAE":
        prefixes = facts.get("prefixes")
        is_list = isinstance(prefixes, list) and all(type(prefix) is int and prefix >= 1 for prefix in prefixes)
        if not isinstance(prefixes, list) or not is_list or problem_in(prefixes, prefixes[-1] if prefixes else 0):
            raise BadFileError(f"metadata.prefixes: expected numbers that ascend, found {prefixes!r}")
        sae = cls(1, 1, 1, [1], **options)
        sae.k, sae.prefixes = k_of(facts), tuple(prefixes)
        return sae


def problem_in(prefixes: Sequence[int], d_sae: int) -> bool:
    """Whether they do not ascend to d_sae."""
    return not prefixes or prefixes[-1] != d_sae or any(a >= b for a, b in pairwise(prefixes))
