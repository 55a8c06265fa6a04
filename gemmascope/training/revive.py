"""Dead latents of JumpReLU SAEs brought back, by a θ that falls until they fire."""

import math

import torch
from torch import Tensor

from ..autocast import without_autocast
from .state import TrainState


@torch.no_grad()
@without_autocast
def revive(state: TrainState, dead_after_tokens: int, fall: float, log_threshold: bool, made: Tensor) -> None:
    """Let θ of each latent that has not fired for so many tokens fall by ``fall``, down to 0, or log θ by it. Nothing
    changes where the update was not ``made`` [] (0 or 1). Does not wait for the device.

    With the learning rate as ``fall`` it is the step that Adam without a first moment comes to by the pre-activation
    loss λ_P·mean_n Σ_j (θ_j − z_nj)₊ of dead latents (`training.config.Loss`), which alone has a gradient for their θ:
    that is λ_P at every update, and g/√v is 1 whatever λ_P is.
    """
    theta = state.threshold
    lower = theta * math.exp(-fall) if log_threshold else (theta - fall).clamp(min=0)
    falls = (state.tokens_since_fired >= dead_after_tokens) & (made > 0)
    theta.copy_(torch.where(falls, lower, theta))
