"""A ring's memory is allocated once, refuses what does not fit and what is not finite, and says which token that is."""

import math

import pytest
import torch

from gemmascope.activations import Ring, ring_bytes
from gemmascope.activations.outliers import norms_of
from gemmascope.errors import EnvironmentProblemError
from gemmascope.sites import Site
from tests.activations.superblocks import FakeSource


def ring_for(source, dtype=torch.float32):
    return Ring(source.widths, source.capacity, dtype=dtype, device="cpu")


class Broken(FakeSource):
    """One value of token 5 at the second site is another."""

    def __init__(self, value, n_bad=1):
        super().__init__()
        self.value, self.n_bad = value, n_bad

    def x(self, block, site):
        x = super().x(block, site)
        if site == self.sites[1]:
            x[5 : 5 + self.n_bad, 1] = self.value
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filled_again_and_again_in_the_same_memory(dtype):
    source = FakeSource()
    ring = ring_for(source, dtype)
    addresses = {site: x.data_ptr() for site, x in ring.activations.items()}
    for block in (0, 1, 0):
        ring.fill(source, block)
        assert ring.n == source.n
        for site in source.sites:
            expected = source.x(block, site).to(dtype)
            assert torch.equal(ring.activations[site][: ring.n], expected)
            assert torch.equal(ring.norms[site][: ring.n], norms_of(expected))
        assert torch.equal(ring.row[: ring.n], torch.arange(source.n) + block * source.n)
    assert {site: x.data_ptr() for site, x in ring.activations.items()} == addresses
    held = sum(tensor.nbytes for tensor in (*ring.activations.values(), *ring.norms.values()))
    assert ring_bytes(source.widths, source.capacity, dtype) == held


def test_full():
    ring = Ring({Site(0, "resid"): 2}, 5, dtype=torch.float32, device="cpu")
    three = torch.arange(3)
    assert ring.add(three, three) == slice(0, 3)
    with pytest.raises(ValueError, match="ring: expected at most 5 tokens, got 6"):
        ring.add(three, three)
    assert ring.n == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value):
    ring = ring_for(FakeSource())
    with pytest.raises(EnvironmentProblemError) as error:
        ring.fill(Broken(value), 2)
    assert str(error.value).startswith(
        "site layer_1/mlp: expected finite activations, found NaN or Inf in 1 of the 40 tokens of superblock 2: "
        "row 85 position 5; "
    )
    assert ring.n == 0
    with pytest.raises(EnvironmentProblemError, match=r"in 4 of .*: row 5 position 5, row 6 position 6, row 7 .*, …; "):
        ring.fill(Broken(value, 4), 0)


def test_a_norm_beyond_fp32_is_not_a_value_beyond_it():
    source = Broken(2e19)
    ring = ring_for(source)
    ring.fill(source, 0)
    assert ring.norms[source.sites[1]][5] == math.inf
    assert ring.n == 40


def test_empty_after_a_source_failed():
    class Failing(FakeSource):
        def fill(self, block, ring):
            super().fill(block, ring)
            raise KeyboardInterrupt

    ring = ring_for(FakeSource())
    with pytest.raises(KeyboardInterrupt):
        ring.fill(Failing(), 0)
    assert ring.n == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_other_dtypes(dtype):
    with pytest.raises(ValueError, match=r"dtype: expected torch\.bfloat16 or torch\.float32, got"):
        ring_for(FakeSource(), dtype)


def test_other_devices():
    with pytest.raises(ValueError, match="device: expected the CPU or a GPU, got meta"):
        Ring({Site(0, "resid"): 2}, 5, dtype=torch.float32, device="meta")


def test_no_room():
    with pytest.raises(EnvironmentProblemError, match=r"ring: expected room for \d+ bytes on cpu .*, found too little"):
        Ring({Site(0, "resid"): 2**20}, 2**30, dtype=torch.float32, device="cpu")


@pytest.mark.gpu
def test_pinned_memory_is_released():
    source = FakeSource()
    ring = Ring(source.widths, source.capacity, dtype=torch.float32, device="cpu", pinned=True)
    x = ring.activations[source.sites[0]]
    assert x.is_pinned()
    del ring
    assert not x.is_pinned()
