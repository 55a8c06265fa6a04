"""The recipe, its loss and gradients, one training step by each route, and the training of many SAEs at once."""

from .config import Loss, TrainConfig
from .losses import LossAndGradients, loss_and_gradients
from .sparse_loss import sparse_loss
from .trainer import SAETrainer, train

__all__ = ["Loss", "LossAndGradients", "SAETrainer", "TrainConfig", "loss_and_gradients", "sparse_loss", "train"]
