"""The sparse exchange against the formula as it is written, in fp64, and what a pair touches."""

import pytest
import torch
from torch import nn

from gemmascope.ravel import DenseLatents, Directions, Latents, features_of
from gemmascope.ravel.features import neurons, orthonormal, principal, random_directions
from gemmascope.saes import JumpReLUSAE, TopKSAE

N, WIDTH, LATENTS = 9, 6, 40
BASE, SOURCE = torch.tensor([0, 3, 3, 5]), torch.tensor([1, 2, 3, 8])


def activations(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(size: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jumprelu(scale: float = 1.0) -> JumpReLUSAE:
    sae = JumpReLUSAE(
        WIDTH, LATENTS, input_scale=scale, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    with torch.no_grad():
        sae.threshold.fill_(0.3)
        sae.b_dec.copy_(torch.linspace(-1, 1, WIDTH))
    return sae


def topk() -> TopKSAE:
    return TopKSAE(WIDTH, LATENTS, k=4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Foreign(nn.Module):
    """An SAE of nobody known."""

    def __init__(self, power: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.W_dec = nn.Parameter(torch.randn(LATENTS, WIDTH, generator=generator, dtype=torch.float64))
        self.power, self.d_sae, self.d_model = power, LATENTS, WIDTH

    def encode(self, x):
        return torch.relu(x @ self.W_dec.T - 3)

    def decode(self, f):
        return (f @ self.W_dec + 0.25) ** self.power


SAES = {"jumprelu": jumprelu, "scaled": lambda: jumprelu(1.7), "topk": topk, "foreign": Foreign}


@pytest.mark.parametrize("drop_error", [False, True])
@pytest.mark.parametrize("name", SAES)
def test_sparse_is_dense(name, drop_error):
    x, sae = activations(), SAES[name]()
    sparse, dense = Latents(x, sae, drop_error), DenseLatents(x, sae, drop_error)
    weights = torch.randn(len(BASE), WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    for features in (sparse, dense):
        m = mask(LATENTS).requires_grad_()
        out = features.exchanged(BASE, SOURCE, m)
        (out * weights).sum().backward()
        assert m.grad is not None
        found.append((out.detach(), m.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6 if name == "foreign" else 1e-12, atol=1e-6)
    # The gradient is zero where neither code has an entry.
    f = sae.encode(x)
    union = ((f[BASE] != 0) | (f[SOURCE] != 0)).any(0)
    assert not union.all()
    assert (found[0][1][~union] == 0).all()
    assert (found[0][1][union] != 0).any()


@pytest.mark.parametrize("name", SAES)
def test_masks_of_nothing_and_of_everything(name):
    x, sae = activations(), SAES[name]()
    x_hat = sae.decode(sae.encode(x)).detach()
    nothing, everything = torch.zeros(LATENTS), torch.ones(LATENTS)
    kept, dropped = Latents(x, sae, False), Latents(x, sae, True)
    assert torch.equal(kept.exchanged(BASE, SOURCE, nothing), x[BASE])
    for features, mask_, expected in (
        (kept, everything, x[BASE] + x_hat[SOURCE] - x_hat[BASE]),
        (dropped, nothing, x_hat[BASE]),
        (dropped, everything, x_hat[SOURCE]),
    ):
        torch.testing.assert_close(features.exchanged(BASE, SOURCE, mask_), expected, rtol=1e-5, atol=1e-6)


def test_by_hand():
    x = torch.tensor([[2.0, 3.0], [5.0, -1.0]])
    sae = JumpReLUSAE(2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        sae.threshold.fill_(0.0)
    # f_b = (2, 3), f_s = (5, 0): half of the first, all of the second.
    out = Latents(x, sae, True).exchanged(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5, 1.0]))
    assert out.tolist() == [[3.5, 0.0]]
    out = Latents(x, sae, False).exchanged(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5, 1.0]))
    assert out.tolist() == [[3.5, -3.0]]


def test_directions():
    x = activations()
    half = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    expected = torch.where(half.bool(), x[SOURCE], x[BASE])
    torch.testing.assert_close(neurons(x).exchanged(BASE, SOURCE, half), expected, rtol=1e-14, atol=1e-14)
    for features in (principal(x, torch.arange(6)), random_directions(x, 0), random_directions(x, 1)):
        torch.testing.assert_close(features.rows @ features.rows.T, torch.eye(WIDTH, dtype=torch.float64))
        for mask_, rows in ((torch.zeros(WIDTH), BASE), (torch.ones(WIDTH), SOURCE)):
            torch.testing.assert_close(features.exchanged(BASE, SOURCE, mask_.double()), x[rows])
    assert not torch.equal(random_directions(x, 0).rows, random_directions(x, 1).rows)
    assert torch.equal(random_directions(x, 0).rows, random_directions(x, 0).rows)
    # The last principal direction is that of the largest variance, of the rows that are named alone.
    few = x[[1, 4, 6, 7, 8]]
    exact = torch.linalg.svd(few - few.mean(0)).Vh[0]
    found = principal(x, torch.tensor([1, 4, 6, 7, 8])).rows[-1]
    assert (found @ exact).abs().item() == pytest.approx(1, abs=1e-5)
    tall = x * torch.tensor([1.0, 9, 1, 1, 1, 1], dtype=torch.float64)
    assert principal(tall, torch.arange(N)).rows[-1].abs().argmax() == 1
    partial = Directions(x, orthonormal(torch.randn(WIDTH, 2, dtype=torch.float64)).T)
    assert partial.size == 2


def test_orthonormal_leaves_what_is():
    Q = orthonormal(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    torch.testing.assert_close(Q.T @ Q, torch.eye(3, dtype=torch.float64))
    for signs in ([1.0, 1, 1], [-1.0, 1, -1]):  # of any sign: a column that turns round is another one to Adam
        turned = Q * torch.tensor(signs, dtype=torch.float64)
        torch.testing.assert_close(orthonormal(turned), turned)


def test_a_decoder_that_is_not_affine_is_whole():
    x = activations()
    assert isinstance(features_of(x, Foreign(1), True), Latents)
    curved = features_of(x, Foreign(2), True)
    assert isinstance(curved, DenseLatents)
    sae = Foreign(2)
    expected = sae.decode(0.5 * sae.encode(x[BASE]) + 0.5 * sae.encode(x[SOURCE]))
    torch.testing.assert_close(curved.exchanged(BASE, SOURCE, torch.full((LATENTS,), 0.5)), expected)


def test_bad_input():
    x = activations()
    with pytest.raises(ValueError, match="sae: expected d_model 6, the width of the site, got 5"):
        features_of(x, JumpReLUSAE(5, LATENTS), True)
    x[2, 1] = float("nan")
    for kind in (Latents, DenseLatents):
        with pytest.raises(ValueError, match="sae: expected finite codes"):
            kind(x, jumprelu(), True)
