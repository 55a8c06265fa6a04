"""`BatchTopKSAE`: trained with a fixed number of latents on average over a batch, run by a threshold."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..checks import check_int
from ..errors import BadFileError
from ..formats.manifest import SAEConfig
from ..kernels import SparseCode
from .jumprelu import JumpReLUSAE
from .topk import OfK, code_of


class BatchTopKSAE(OfK, JumpReLUSAE):
    r"""BatchTopK sparse autoencoder (arXiv 2412.06410).

        z = (x/C − b_dec)·W_enc + b_enc;   x̂ = C·(f·W_dec + b_dec)
        training:   f = the k·N largest of relu(z) over a batch of N tokens, the rest 0      `encode_batch`
        inference:  f = z·1[z > θ], one θ for all latents                                    `encode`

    So that what fires on a token does not depend on the others, inference is by a threshold: `JumpReLUSAE` with all of
    ``threshold`` [d_sae] equal, which training keeps near the smallest z that fires, and `training.calibrate_threshold`
    puts where the mean L0 is k.

    k: 1 to d_sae, latents that fire on average. threshold_init: ≥ 0. The others as of `JumpReLUSAE`. Raises ValueError
    or TypeError on bad values. A file holds it as the JumpReLU it is, with ``kind`` and ``k`` in its metadata.
    """

    KIND: ClassVar[str] = "batchtopk"
    SCALARS: ClassVar[Mapping[str, torch.dtype]] = {**JumpReLUSAE.SCALARS, "k": torch.int64}

    def __init__(self, d_model: int, d_sae: int, k: int, *, threshold_init: float = 0.0, **options: Any):
        super().__init__(d_model, d_sae, threshold_init=threshold_init, **options)
        check_int("k", k, 1, d_sae)
        self.k = k

    @without_autocast
    def encode_batch(self, x: Tensor) -> SparseCode:
        """What fires in training: the k·N largest of relu(z) of x [..., d_model], flattened to N rows, ties and NaN as
        of `gemmascope.kernels.encode_topk`. Not differentiable."""
        with torch.no_grad():
            rows = self._encoder_input(x)
            entries = kernels.encode_topk(rows, self.W_enc, self.b_enc, self.k, of="batch", impl=self.impl)
            return code_of(entries, self.d_sae)

    @without_autocast
    def preactivations(self, x: Tensor) -> Tensor:
        """z [N, d_sae] of x [..., d_model], flattened to N rows: fp32, or fp64 with fp64."""
        return kernels.preactivations(self._encoder_input(x), self.W_enc, self.b_enc, impl=self.impl)

    def _facts(self) -> dict[str, Any]:
        """What metadata say of it beside what the user does."""
        return {"kind": self.KIND, "k": self.k}

    def _config(self) -> SAEConfig:
        return super()._config()._replace(metadata={**self.metadata, **self._facts()})

    def released(self) -> JumpReLUSAE:
        """The same function by its threshold, folded: a `JumpReLUSAE`, with ``kind`` and ``k`` in its metadata."""
        return as_jumprelu(self.fold())

    @classmethod
    def _of_config(cls, config: SAEConfig, **options: Any) -> "BatchTopKSAE":
        facts = config.metadata or {}
        if facts.get("kind") != cls.KIND:
            raise BadFileError(
                f"metadata: expected the kind {cls.KIND!r}, found {facts.get('kind')!r}: gemmascope.load_sae opens it"
            )
        return cls._of_facts(facts, **options)

    @classmethod
    def _of_facts(cls, facts: Mapping[str, Any], **options: Any) -> "BatchTopKSAE":
        sae = cls(1, 1, 1, **options)
        sae.k = k_of(facts)
        return sae


def k_of(facts: Mapping[str, Any]) -> int:
    """k of a file's metadata."""
    k = facts.get("k")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise BadFileError(f"metadata.k: expected an int of at least 1, found {k!r}")
    return k


def as_jumprelu(sae: BatchTopKSAE) -> JumpReLUSAE:
    """The same function by its threshold, in the memory of ``sae``."""
    tensors, config = sae.stored()
    plain = JumpReLUSAE(
        1,
        1,
        pre_encoder_bias=config.pre_encoder_bias,
        input_scale=config.input_scale,
        impl=sae.impl,
        metadata=copy.deepcopy(config.metadata),
    )
    for name, tensor in tensors.items():
        setattr(plain, name, torch.nn.Parameter(tensor))
    return plain
