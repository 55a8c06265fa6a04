"""Gated encoders as JumpReLU ones."""

import math

import pytest
import torch

from gemmascope.formats.gated import as_jumprelu


def gated(x, W_gate, b_gate, r_mag, b_mag):
    """The equations of the paper, as they stand."""
    paths = x @ W_gate
    return torch.where(paths + b_gate > 0, torch.relu(r_mag.exp() * paths + b_mag), 0)


def test_by_hand():
    """Two latents of one input: the first is gated above 3 − 2·1 = 1, the second by the ReLU alone."""
    gate = as_jumprelu(
        torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 5.0]), torch.tensor([math.log(2), 0.0]), torch.tensor([3.0, 2.0])
    )
    torch.testing.assert_close(gate.W_enc, torch.tensor([[2.0, 1.0]]))
    assert gate.b_enc.tolist() == [3, 2]
    torch.testing.assert_close(gate.threshold, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("seed", range(4))
def test_the_same_function(seed):
    draw = torch.Generator().manual_seed(seed)
    x, W_gate = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((200, 8), (8, 40)))
    b_gate, r_mag, b_mag = (torch.randn(40, generator=draw, dtype=torch.float64) for _ in range(3))
    W_enc, b_enc, threshold = as_jumprelu(W_gate, b_gate, r_mag, b_mag)
    z = x @ W_enc + b_enc
    expected = gated(x, W_gate, b_gate, r_mag, b_mag)
    torch.testing.assert_close(torch.where(z > threshold, z, 0), expected, rtol=1e-12, atol=1e-12)
    assert 0.1 < (expected > 0).double().mean() < 0.9
