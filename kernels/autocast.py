"""Calls inside torch.autocast: what the operators compute is in the dtypes that they say, wherever they are called."""

import contextlib

import torch


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Nothing on this device is cast while it lasts."""
    if device.type == "meta":  # which has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
