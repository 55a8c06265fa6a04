"""The recipe, its loss and gradients, one training step by each route, and the training of many SAEs at once."""

from .calibrate import Calibration, calibrate_threshold
from .clt_losses import CLTLossAndGradients, clt_loss_and_gradients
from .clt_trainer import CLTTrainer
from .config import Loss, TrainConfig
from .gated import GatedLossAndGradients, gated_loss_and_gradients
from .losses import LossAndGradients, loss_and_gradients
from .sparse_loss import sparse_loss
from .spec import SAESpec
from .suite import Suite, train
from .trainer import SAETrainer

__all__ = [
    "CLTLossAndGradients",
    "CLTTrainer",
    "Calibration",
    "GatedLossAndGradients",
    "Loss",
    "LossAndGradients",
    "SAESpec",
    "SAETrainer",
    "Suite",
    "TrainConfig",
    "calibrate_threshold",
    "clt_loss_and_gradients",
    "gated_loss_and_gradients",
    "loss_and_gradients",
    "sparse_loss",
    "train",
]
