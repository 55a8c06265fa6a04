"""Training of TopK, BatchTopK and Matryoshka SAEs: gradients, routes, what is withheld, the threshold."""

import pytest
import torch

from gemmascope.kernels import Rule
from gemmascope.kernels.dispatch import triton_problem
from gemmascope.training.config import TrainConfig
from gemmascope.training.kinds import new_sae
from gemmascope.training.state import TrainState
from gemmascope.training.topk import topk_loss_and_gradients, topk_step

D, F, N, K = 7, 30, 11, 4
PREFIXES = (5, 12, F)
KINDS = ("topk", "batchtopk", "matryoshka")
kinds = pytest.mark.parametrize("kind", KINDS)
needs_triton = pytest.mark.skipif(triton_problem() is not None, reason="needs triton")


def config_of(kind, **changes):
    prefixes = {"prefixes": PREFIXES} if kind == "matryoshka" else {}
    given = {"d_sae": F, "k": K, "batch_size": N, "steps": 100, "aux_k": 3, "aux_coefficient": 0.5} | prefixes | changes
    return TrainConfig.short(kind=kind, **given)


def sae_of(config, dtype=torch.float64, impl="reference", d=D, **options):
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(config, d, generator=generator, impl=impl, **options)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec"):
            parameter = getattr(sae, name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.b_enc[::5] = -0.4  # seldom among the largest
    sae = sae.to(dtype)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def batch(seed=0, n=N, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / d**0.5


def seldom():
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::5] = True
    dead[7] = True
    return dead


def loss_by_autograd(sae, x, config, dead):
    """The loss as it is written in the papers, by what autograd differentiates."""
    z = (x - sae.b_dec if sae.pre_encoder_bias else x) @ sae.W_enc + sae.b_enc
    positive = torch.relu(z)
    if config.kind == "topk":
        top = positive.topk(config.k, dim=1)
        f = torch.zeros_like(positive).scatter(1, top.indices, top.values)
    else:
        top = positive.flatten().topk(config.k * len(x))
        f = torch.zeros_like(positive.flatten()).scatter(0, top.indices, top.values).view_as(positive)
    loss = 0.0
    for m in config.prefixes or (config.d_sae,):
        x_hat = f[:, :m] @ sae.W_dec[:m] + sae.b_dec
        loss = loss + (x - x_hat).square().sum(1).mean()
    if dead is not None and dead.any():
        e = (x - x_hat).detach()
        top = torch.where(dead, positive, 0).topk(min(config.aux_k, int(dead.sum())), dim=1)
        e_hat = torch.zeros_like(positive).scatter(1, top.indices, top.values) @ sae.W_dec
        spread = (e - e.mean(0)).square().sum()
        loss = loss + config.aux_coefficient * (e - e_hat).square().sum() / spread
    return loss


@kinds
@pytest.mark.parametrize("pre_encoder_bias", [False, True])
@pytest.mark.parametrize("with_aux", [False, True])
def test_gradients_are_those_of_autograd(kind, pre_encoder_bias, with_aux):
    config = config_of(kind)
    sae, x, dead = sae_of(config, pre_encoder_bias=pre_encoder_bias), batch(), seldom() if with_aux else None
    loss = loss_by_autograd(sae, x, config, dead)
    loss.backward()
    out = topk_loss_and_gradients(sae, x, config, dead)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-13, atol=0)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        ours, theirs = getattr(out.gradients, name), getattr(sae, name).grad
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        if name != "b_dec":
            assert out.bound >= ours.abs().max()


def take(route, state, config, batches, dead, figures=None):
    rule = Rule(2e-3, 0.99, 1e-8, True)
    config = config.changed(route=route)
    for x in batches:
        made = topk_step(state, x.to(state.sae.W_dec), config, rule, dead)
        if figures is not None:
            figures.append(made.packed)


def relative(found, exact):
    return {
        name: ((t.double() - exact[name].double()).norm() / exact[name].double().norm().clamp(min=1e-300)).item()
        for name, t in found.tensors().items()
        if t.is_floating_point() and not name.endswith("_low")
    }


@kinds
@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_fifty_sparse_steps_are_those_of_the_reference(kind, with_aux, impl):
    config, dead = config_of(kind), seldom() if with_aux else None
    batches = [batch(seed) for seed in range(50)]
    states = [TrainState.start(sae_of(config, impl=impl)) for _ in range(2)]
    figures = [], []
    for state, route, kept in zip(states, ("reference", "sparse"), figures, strict=True):
        take(route, state, config, batches, dead, kept)
        state.settle(0.99)
    errors = relative(states[1], states[0].tensors())
    assert max(errors.values()) < 1e-11, errors
    assert torch.equal(states[0].tokens_since_fired, states[1].tokens_since_fired)
    torch.testing.assert_close(torch.stack(figures[0]), torch.stack(figures[1]), rtol=1e-10, atol=1e-13)
    assert states[1].updates == 50
