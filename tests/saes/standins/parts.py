"""How a stand-in says where it comes from, and weights."""

import torch
from torch import nn


def of(module: str):
    def mark(kind: type) -> type:
        kind.__module__ = module
        return kind

    return mark


def drawn(*shape: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(*shape))
