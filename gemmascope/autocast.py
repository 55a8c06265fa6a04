"""Autocast ends where the package begins: what it computes has the same bits inside `torch.autocast` as without."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = ("cpu", "cuda")


def autocast_is_on() -> bool:
    return any(torch.is_autocast_enabled(device) for device in DEVICES)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which neither sees nor changes the autocast of its caller.

    What autograd does of it later runs in the context of ``backward()`` all the same.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not autocast_is_on():
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapped


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weight + bias for x [..., n], weight [n, m] and bias [m] of one dtype, differentiable."""
    return _Affine.apply(x, weight, bias) if autocast_is_on() else x @ weight + bias


class _Affine(torch.autograd.Function):
    """The product of `affine` with a backward that heeds no autocast either."""

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight + bias

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, weight.shape[1])
        return (
            grad @ weight.T if need_x else None,
            x.reshape(-1, weight.shape[0]).T @ rows if need_weight else None,
            rows.sum(0) if need_bias else None,
        )
