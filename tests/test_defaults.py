"""What ``--default-dtype`` and ``--default-device`` change: what the package asks of PyTorch, and nothing else."""

import torch

from tests import defaults


def asked_by(module: str, expression: str):
    """The value of an expression in a module of that name."""
    return eval(expression, {"__name__": module, "torch": torch})


def test_who_asks_decides(monkeypatch):
    monkeypatch.setattr(torch, "ones", defaults._for_the_package_alone(torch.ones, defaults._depth() + 1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            ours, theirs = (asked_by(name, "torch.ones(2)") for name in ("gemmascope.kernels.api", "transformers"))
            with torch.device("cpu"), torch.device("meta"):
                chosen = asked_by("transformers", "torch.ones(2)")
            mine, given = torch.ones(2), asked_by("gemmascope", "torch.ones(2, dtype=torch.float64, device='cpu')")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert (ours.dtype, ours.device.type) == (torch.bfloat16, "meta")
    assert (theirs.dtype, theirs.device.type) == (mine.dtype, mine.device.type) == (torch.float32, "cpu")
    assert (given.dtype, given.device.type) == (torch.float64, "cpu")
    assert (chosen.dtype, chosen.device.type) == (torch.bfloat16, "meta")


def test_the_factories_are_pytorchs():
    assert {"empty", "tensor", "zeros", "full", "arange", "sparse_csr_tensor"} <= {
        f.__name__ for f in defaults.FACTORIES
    }
