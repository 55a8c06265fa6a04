"""Which latents fire is decided once: inference, the differentiable path and training agree to the bit."""

import pytest
import torch

from gemmascope import JumpReLUSAE, kernels
from gemmascope.kernels.dispatch import triton_problem
from gemmascope.kernels.implementations import operator
from gemmascope.training.config import TrainConfig
from gemmascope.training.trainer import SAETrainer
from tests.helpers import normal
from tests.kernels.native import needs_native

needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=triton_problem() or "")
LOW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    pytest.param(impl, dtype, marks=marks, id=f"{impl}-{name}")
    for impl, marks in (("reference", ()), ("pytorch", ()), ("cpu", needs_native), ("triton", needs_triton))
    for name, dtype in LOW.items()
    if (impl, name) != ("cpu", "fp16")
]
BANDWIDTH = 0.2


def sae_on_the_edge(impl: str, dtype: torch.dtype, N: int, d: int, F: int, device) -> tuple[JumpReLUSAE, torch.Tensor]:
    """An SAE and x, each threshold being the pre-activation of one token or the float just below it: an error of one
    unit in the last place changes who fires."""
    x = normal(N, d, dtype=dtype, device=device)
    sae = JumpReLUSAE(d, F, input_scale=1.5, impl=impl, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * normal(d, seed=2))
        sae.b_enc.copy_(0.1 * normal(F, seed=3))
        z = kernels.preactivations(sae._encoder_input(x), sae.W_enc, sae.b_enc, impl=impl)
        picked = z[torch.arange(F, device=device) % N, torch.arange(F, device=device)]
        below = torch.nextafter(picked, torch.full_like(picked, -torch.inf))
        sae.threshold.copy_(torch.where(torch.arange(F, device=device) % 2 == 0, picked, below).clamp(min=0))
    return sae, x


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize(("N", "d", "F"), [(7, 33, 70), (24, 300, 70)])
def test_every_path_fires_the_same_latents(impl, dtype, N, d, F, device):
    device = device if impl == "triton" else torch.device("cpu")
    sae, x = sae_on_the_edge(impl, dtype, N, d, F, device)
    inside = sae._encoder_input(x).detach()
    with torch.no_grad():
        z = kernels.preactivations(inside, sae.W_enc, sae.b_enc, impl=impl)
        fires = z > sae.threshold
        code = sae.encode_sparse(x)
        filled = sae.encode(x)
    assert 0 < fires.sum() < fires.numel()
    assert torch.equal(code.to_dense(), torch.where(fires, z, 0))
    assert torch.equal(filled, torch.where(fires, z, 0).to(dtype))

    out = sae.jumprelu(x, BANDWIDTH)
    assert out.f.requires_grad
    assert torch.equal(out.f, filled)
    assert torch.equal(out.l0, fires.sum(1).to(out.l0.dtype))
    assert torch.equal(out.firing_count.long(), fires.sum(0))
    assert torch.equal(sae.encode(x), filled)

    arguments = (inside, sae.W_enc.detach(), sae.b_enc.detach(), sae.threshold.detach(), BANDWIDTH)
    entries = kernels.encode_entries(*arguments, impl=impl)
    stored = slice(0, int(entries.offsets[-1]))
    latents, tokens = entries.latents[stored], entries.tokens[stored].long()
    active = latents >= kernels.ACTIVE
    found = torch.zeros_like(fires)
    found[tokens[active], (latents[active] & kernels.LATENT).long()] = True
    assert torch.equal(found, fires)
    assert torch.equal(entries.z[stored], z[tokens, (latents & kernels.LATENT).long()])

    dense = kernels.dense_encode(*arguments, impl=impl)
    assert torch.equal(dense.l0.long(), fires.sum(1))
    assert torch.equal(dense.firing_count.long(), fires.sum(0))
    assert torch.equal(dense.f, filled)
    assert int(dense.n_entries) == int(entries.offsets[-1])


@pytest.mark.parametrize("impl", ["pytorch", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("route", ["dense", "sparse"])
def test_the_trainer_fires_the_latents_that_inference_fires(impl, route):
    x = normal(48, 24)
    trainer = SAETrainer(TrainConfig.short(d_sae=64, route=route, threshold_init=0.3), x, impl=impl)
    expected = trainer.sae.encode_sparse(x).nnz
    trainer.update(x)
    assert trainer.report()["l0"] == pytest.approx(expected / len(x), abs=1e-6)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_preactivations_match_reference(impl, dtype, device):
    device = device if impl == "triton" else torch.device("cpu")
    x, W, b = (
        normal(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate([(33, 70), (90, 70), (90,)])
    )
    exact = operator("preactivations", "reference")(x.double(), W.T.double(), b.double())
    ours = kernels.preactivations(x, W.T, b, impl=impl)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)])
def test_preactivations_are_differentiable(needs):
    leaves = [
        normal(*shape, dtype=torch.float64, seed=i).requires_grad_(need)
        for i, (shape, need) in enumerate(zip([(5, 4), (4, 7), (7,)], needs, strict=True))
    ]
    assert torch.autograd.gradcheck(lambda *tensors: kernels.preactivations(*tensors, impl="pytorch"), leaves)


@pytest.mark.parametrize("impl", ["reference", "pytorch", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("density", ["sparse", "dense", "none"])
def test_forward_without_gradient_is_the_differentiable_one(impl, density):
    sae = JumpReLUSAE(20, 60, input_scale=2.0, impl=impl, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.threshold.fill_({"sparse": 0.5, "dense": 0.0, "none": 99.0}[density])
    x = normal(3, 11, 20)
    with_gradient = sae(x)
    with torch.no_grad():
        without = sae(x)
    assert with_gradient.requires_grad
    assert not without.requires_grad
    assert without.shape == x.shape
    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["no_grad", "requires_grad_"])
def test_forward_runs_on_the_entries(monkeypatch, frozen):
    sae, x = JumpReLUSAE(20, 60, threshold_init=0.9), normal(11, 20)

    def refuse(*arguments, **named):
        raise AssertionError("every latent of every token was computed")

    monkeypatch.setattr(kernels, "jumprelu", refuse)
    if frozen == "no_grad":
        with torch.no_grad():
            assert sae(x).shape == (11, 20)
            assert sae.encode(x).shape == (11, 60)
    else:
        sae.requires_grad_(False)
        assert sae(x).shape == (11, 20)
    with pytest.raises(AssertionError, match="every latent"):
        sae(x.requires_grad_())


def test_an_empty_batch():
    sae = JumpReLUSAE(6, 9)
    with torch.no_grad():
        assert sae(torch.zeros(0, 6)).shape == (0, 6)
        assert sae(torch.zeros(2, 0, 6)).shape == (2, 0, 6)
        assert sae.encode(torch.zeros(2, 0, 6)).shape == (2, 0, 9)
