"""What the tests of the native CPU backend share."""

from contextlib import contextmanager

import pytest
import torch

from gemmascope.kernels.cpu import build as native_build
from tests.helpers import normal

needs_native = pytest.mark.skipif(native_build.problem() is not None, reason=str(native_build.problem()))
ISAS = torch.ops.gemmascope_cpu.isas().split() if native_build.problem() is None else ["none"]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def operands_with_ties(N, d, dtype, bias=1.0):
    """x, W_enc, b_enc, threshold and z. Every θ is one of its latent's own z: any other rounding of it would decide
    otherwise. Half of them let few tokens pass; then what is left to fp32 is of many latents."""
    F = 150
    x, W_enc, b_enc = normal(N, d, dtype=dtype), normal(F, d, dtype=dtype, seed=1).T, bias * normal(F, seed=2)
    z = torch.ops.gemmascope_cpu.preactivations(x, W_enc.T, b_enc)
    rank = torch.randint(N, (F,), generator=torch.Generator().manual_seed(3))
    rank[::2] = rank[::2].clamp(max=2)
    return x, W_enc, b_enc, z.sort(0, descending=True).values[rank, torch.arange(F)], z


@pytest.fixture(params=[-1.0, 1.0, 0.0], ids=["in fp32", "screened", "screened in vain"])
def screening(request):
    """How encoding finds what is above a threshold: all of z in fp32; by integers; by integers until they give up."""
    torch.ops.gemmascope_cpu.use_screening(request.param)
    yield request.param
    torch.ops.gemmascope_cpu.use_screening(None)
