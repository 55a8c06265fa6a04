"""Where the thresholds of a JumpReLU SAE begin, so that the first reconstruction is not many times its input."""

import math

from torch import Tensor

from .config import TrainConfig

# Standard deviations above which no latent of any width fires.
_LARGEST = 40.0


def first_threshold(config: TrainConfig, mean: Tensor, variance: float, scale: float) -> float:
    """θ at which training begins: ``threshold_init``, or what ``overshoot`` asks for where that is more.

    mean, variance: [d_model] and E‖x − mean‖² of the activations as harvested; scale: C, by which they are divided.
    """
    if config.overshoot is None:
        return config.threshold_init
    mean_square = variance + (0.0 if config.b_dec_init == "mean" else float(mean.square().sum()))
    deviation = math.sqrt(mean_square / len(mean)) / scale
    least = deviation * _deviations_of(config.overshoot * len(mean) / config.d_sae)
    return max(config.threshold_init, least)


def _deviations_of(share: float) -> float:
    """The t ≥ 0 with E[u²; u > t] = share for a standard normal u; 0 for a share of ½, which is all, or more.

    Rows of W_enc = W_decᵀ begin as random unit vectors, so that z of an input x is normal over latents, with a variance
    of ‖x‖²/d_model, whatever x is. The component of the first reconstruction along x is Σ_j z_j²/‖x‖² over those that
    fire: d_sae/d_model times that expectation.
    """
    low, high = 0.0, _LARGEST
    if share >= 0.5:
        return 0.0
    for _ in range(64):
        middle = (low + high) / 2
        density = math.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi)
        if middle * density + math.erfc(middle / math.sqrt(2)) / 2 > share:
            low = middle
        else:
            high = middle
    return high
