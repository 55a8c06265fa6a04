"""What the tests of the native CPU backend share."""

from contextlib import contextmanager

import pytest
import torch

from gemmascope.kernels import _native

needs_native = pytest.mark.skipif(_native.problem() is not None, reason=str(_native.problem()))
ISAS = torch.ops.gemmascope_cpu.isas().split() if _native.problem() is None else ["none"]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[-1.0, 1.0, 0.0], ids=["in fp32", "screened", "screened in vain"])
def screening(request):
    """How encoding finds what is above a threshold: all of z in fp32; by integers; by integers until they give up."""
    torch.ops.gemmascope_cpu.use_screening(request.param)
    yield request.param
    torch.ops.gemmascope_cpu.use_screening(None)
