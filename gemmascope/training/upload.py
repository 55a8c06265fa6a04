"""Activations that come from the host to a GPU without the host, or the steps under way, waiting for one another.

A copy from ordinary, pageable memory waits until everything given to its stream before is done, so that no step could
run ahead of the host. So the batch is copied to pinned memory, which PyTorch keeps for the next, and from there on a
stream of its own, beside the steps; the stream of the steps waits for that copy and for nothing else.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream for a device's copies: one, whichever SAE they are for."""
    return torch.cuda.Stream(device)


def uploaded(x: Tensor, like: Tensor) -> Tensor:
    """x on the device of ``like``, new memory where that is a GPU and x on the host, else x itself.

    The caller may change x as soon as this returns, be it pinned or not.
    """
    if x.device.type != "cpu" or not like.is_cuda:
        return x
    device = like.device
    pinned = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x)
    stream, steps = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        there = pinned.to(device, non_blocking=True)
    steps.wait_stream(stream)
    there.record_stream(steps)  # until whose end its memory is not used again
    return there
