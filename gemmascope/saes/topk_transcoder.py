"""`TopKTranscoder`: a transcoder of which a fixed number of latents fires in training."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..autocast import without_autocast
from ..checks import check_int
from .scaled_transcoder import ScaledSkipTranscoder, ScaledTranscoder, Skip
from .topk import OfK


class TopKTranscoder(OfK, ScaledTranscoder):
    r"""A transcoder in training whose latents are chosen as a TopK, BatchTopK or Matryoshka SAE chooses them.

        z = (x/C)·W_enc + b_enc;   ŷ = C_out·(f·W_dec + b_dec)
        training:   f = the k largest of relu(z) of each token, or the k·N largest of a batch, the rest 0
        inference:  f = z·1[z > θ], one θ for all latents

    As of a BatchTopK SAE (arXiv 2412.06410), inference and files have a threshold, which training keeps near the
    smallest z that fires, that of the mean token where each has k, and `training.calibrate_threshold` puts where the
    mean L0 is k. So `released` gives a JumpReLU `Transcoder`, whichever it was trained as.

    k: 1 to d_sae. The others as of `ScaledTranscoder`. Raises ValueError or TypeError on bad values.
    """

    SCALARS: ClassVar[Mapping[str, torch.dtype]] = {**ScaledTranscoder.SCALARS, "k": torch.int64}

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, k: int, threshold_init: float = 0.0, **options: Any):
        super().__init__(d_in, d_out, d_sae, threshold_init=threshold_init, **options)
        check_int("k", k, 1, d_sae)
        self.k = k

    @without_autocast
    def preactivations(self, x: Tensor) -> Tensor:
        """z [N, d_sae] of x [..., d_in], flattened to N rows: fp32, or fp64 with fp64."""
        return kernels.preactivations(self._encoder_input(x), self.W_enc, self.b_enc, impl=self.impl)


class SkipTopKTranscoder(Skip, TopKTranscoder):
    """The same with a linear map beside the latents, as of `Skip`."""

    PARAMETERS = ScaledSkipTranscoder.PARAMETERS
    OTHERS: ClassVar[Sequence[str]] = ScaledSkipTranscoder.OTHERS
