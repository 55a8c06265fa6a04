"""`GatedTranscoder`: a transcoder in training whose gate and magnitudes are two affine maps of the same products."""

from typing import NoReturn

from ..formats.export import SKIP
from .gated import GatedSAE
from .scaled_transcoder import Skip, TrainedTranscoder


class GatedTranscoder(TrainedTranscoder, GatedSAE):
    r"""A transcoder whose latents fire as those of a gated SAE (arXiv 2404.16014), the form in which it is trained.

        y = (x/C)·W_enc;   π = y + b_enc;   m = e^r ⊙ y + b_mag;   f = 1[π > 0]·relu(m);   ŷ = C_out·(f·W_dec + b_dec)

    As e^r > 0 this is a JumpReLU transcoder, with the encoder e^r ⊙ W_enc, the bias b_mag and θ = max(0, b_mag −
    e^r·b_enc) (`formats.gated.as_jumprelu`): `released` gives it, without scales. The arguments are those of
    `TrainedTranscoder`, r and the biases 0 at the start.
    """

    def to_jumprelu(self) -> NoReturn:
        raise TypeError("to_jumprelu: expected an SAE, got a transcoder in training: released() gives one of JumpReLU")


class SkipGatedTranscoder(Skip, GatedTranscoder):
    """The same with a linear map beside the latents, as of `Skip`."""

    PARAMETERS = (*GatedTranscoder.PARAMETERS, SKIP)
    OTHERS = (*GatedTranscoder.OTHERS, SKIP)
