"""The gated loss and its gradients, and the routes of its step, in fp64 and by error budget."""

import copy
import json
import math
import pickle

import pytest
import torch

from gemmascope.saes import GatedSAE, JumpReLUSAE
from gemmascope.training import SAETrainer, TrainConfig, memory
from gemmascope.training.config import Loss
from gemmascope.training.gated import gated_loss_and_gradients
from gemmascope.training.gated_step import gated_step as take
from gemmascope.training.state import ROOM, TrainState
from tests.training.test_step import DEVICE, EVERYWHERE, IMPLS, LARGE, SIZES, SMALL, data, distance, needs_triton, rule

L1 = Loss(0.15, sparsity="l1")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "b_mag", "r_mag")


def start(impl="reference", dtype=torch.float32, compute_dtype="fp32", pre_encoder_bias=True, sizes=None):
    generator, (_, d_model, d_sae) = torch.Generator().manual_seed(0), sizes or SIZES.get(impl, LARGE)
    sae = GatedSAE(d_model, d_sae, impl=impl, pre_encoder_bias=pre_encoder_bias, generator=generator)
    with torch.no_grad():
        for name, size in {"W_enc": 0.05, "b_enc": 0.1, "b_dec": 0.05, "b_mag": 0.1, "r_mag": 0.2}.items():
            parameter = getattr(sae, name)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        sae.b_enc[:3] = -3.0  # never fire, never move
        sae.b_mag[3] = -3.0  # the gate opens, but no magnitude is positive
    sae = sae.to(DEVICE if impl == "triton" else "cpu", dtype)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return TrainState.start(sae, compute_dtype)


def step(route, state, x, loss=L1, how=None, room=None):
    x = x.to(state.sae.W_dec)
    if route == "sparse" and state.impl == "triton":
        room = room or len(x) * state.sae.d_sae
    return take(state, x, loss, how or rule(True), route, room)


def everything(state):
    """Parameters and settled second moments, by name."""
    state = copy.deepcopy(state)
    state.settle(0.99)
    found = {name: getattr(state.sae, name).detach() for name in NAMES}
    moments = {"W_enc": state.W_enc_v.T, "b_enc": state.b_enc_v, "W_dec": state.W_dec_v, "b_dec": state.b_dec_v}
    return found | {f"v of {name}": v for name, v in (moments | state.others_v).items()}


def errors(found, exact):
    """By name; a row of one element passes through zero, so vectors count as one row."""
    rows = {name: value if value.ndim == 2 else value[:, None].T for name, value in found.items()}
    exact = {name: value if value.ndim == 2 else value[:, None].T for name, value in exact.items()}
    found = {}
    for name, value in rows.items():
        whole = name.endswith(("b_enc", "b_dec", "b_mag", "r_mag"))
        found |= {name: _relative(value, exact[name])} if whole else distance({name: value}, exact)
    return found


def _relative(ours, theirs):
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- the loss


def autograd_loss(sae, x, loss):
    """Equation 8 of arXiv 2404.16014, with ⊥ as `detach`."""
    centred = x - sae.b_dec if sae.pre_encoder_bias else x
    pi = centred @ sae.W_enc + sae.b_enc
    magnitude = torch.relu((centred @ sae.W_enc) * sae.r_mag.exp() + sae.b_mag)
    f = (pi > 0).to(x.dtype) * magnitude
    first = (x - (f @ sae.W_dec + sae.b_dec)).square().sum(1)
    frozen = (x - (torch.relu(pi) @ sae.W_dec.detach() + sae.b_dec.detach())).square().sum(1)
    return (first + loss.l0_coefficient * torch.relu(pi).sum(1) + frozen).mean()


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_gradients_equal_automatic_differentiation(pre_encoder_bias):
    sae, x = start(dtype=torch.float64, pre_encoder_bias=pre_encoder_bias).sae, next(data(1)).double()
    expected = autograd_loss(sae, x, L1)
    expected.backward()
    out = gated_loss_and_gradients(sae, x, L1)
    torch.testing.assert_close(out.loss, expected.detach())
    for name, gradient in out.gradients._asdict().items():
        exact = getattr(sae, name).grad
        torch.testing.assert_close(gradient, exact, msg=lambda text, name=name: f"{name}: {text}")
        assert exact.any(), name
    assert out.gradients.W_enc.stride() == sae.W_enc.stride()


def test_by_hand():
    """One token x = 3 of width 1 and two latents. y = 3·(1, −1) = (3, −3), b_gate = (−1, 1): π = (2, −2).

    e^r = 1/2, b_mag = 1: m = (2.5, −.5), so f = (2.5, 0), x̂ = 2.5, r = −½ and L₁ = ¼. relu(π) = (2, 0), of which
    ρ = 2 − 3 = −1, L₃ = 1, and with λ = ¼ L₂ = ½. u = 2·(−½) = −1 = dm, w = 2·(−1), dπ = −2 + ¼ = −1.75.
    """
    sae = GatedSAE(1, 2, pre_encoder_bias=True, dtype=torch.float64)
    values = {"W_enc": [[1, -1]], "b_enc": [-1, 1], "b_mag": [1, 1], "r_mag": [math.log(0.5)] * 2}
    with torch.no_grad():
        for name, value in (values | {"W_dec": [[1], [-1]], "b_dec": [0]}).items():
            getattr(sae, name).copy_(torch.tensor(value))
    out = gated_loss_and_gradients(sae, torch.tensor([[3.0]], dtype=torch.float64), Loss(0.25, sparsity="l1"))
    assert out.loss.item() == pytest.approx(0.25 + 0.5 + 1)
    assert (out.l0.item(), out.firing_count.tolist(), out.n_entries.item()) == (1, [1, 0], 1)
    gradients = {name: value.flatten().tolist() for name, value in out.gradients._asdict().items()}
    dy = 0.5 * -1 - 1.75
    exact = {
        "W_enc": [3 * dy, 0],
        "b_enc": [-1.75, 0],
        "W_dec": [2.5 * -1, 0],
        "b_dec": [-1 - dy],
        "b_mag": [-1, 0],
        "r_mag": [-1 * (2.5 - 1), 0],
    }
    for name, value in exact.items():
        assert gradients[name] == pytest.approx(value), name


def test_no_gradient_exceeds_the_bound():
    for seed in range(20):
        sae, x = start(dtype=torch.float64).sae, next(data(1, seed=seed)).double()
        generator = torch.Generator().manual_seed(seed)
        x = x * 10 ** (3 * torch.randn(len(x), 1, generator=generator, dtype=x.dtype))
        out = gated_loss_and_gradients(sae, x, L1)
        largest = max(value.abs().max() for name, value in out.gradients._asdict().items() if name != "b_dec")
        assert largest <= out.bound < 1e4 * max(1, largest)


def tiny(**values):
    """One latent of width 1, without biases unless they are given."""
    sae = GatedSAE(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).fill_(value)
    return sae


def test_the_bound_knows_of_large_r_and_b_mag():
    x, loss = torch.ones(1, 1, dtype=torch.float64), Loss(0.1, sparsity="l1")
    # y = .001, m = 1, x̂ = −1: dm = 4 and dy = e^r·dm.
    out = gated_loss_and_gradients(tiny(W_enc=0.001, W_dec=-1, r_mag=math.log(1000)), x, loss)
    assert 3990 < out.gradients.W_enc.abs().item() <= out.bound
    # y = −1000, m = 1 and x̂ = 1 where x = −1: dm = 4 and dr = dm·(m − b_mag).
    out = gated_loss_and_gradients(tiny(W_enc=1000, W_dec=1, b_enc=2000, b_mag=1001), -x, loss)
    assert out.gradients.r_mag.item() == pytest.approx(-4000)
    assert out.bound >= 4000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda sae, x: (JumpReLUSAE(10, 4), x, L1), TypeError, "sae: expected a GatedSAE, got JumpReLUSAE"),
        (lambda sae, x: (sae, x[:, :3], L1), ValueError, "x: expected shape [N ≥ 1, 10], got [21, 3]"),
        (lambda sae, x: (sae, x, Loss()), ValueError, "loss.sparsity: expected 'l1' with a GatedSAE, got 'l0'"),
    ],
)
def test_messages(change, error, message):
    with pytest.raises(error) as caught:
        gated_loss_and_gradients(*change(start().sae, next(data(1))))
    assert str(caught.value) == message


# ---- the routes


def plain_adam(state, batches, how):
    """Every parameter at every step, by automatic differentiation, in the dtype of the SAE."""
    sae = state.sae
    v = {name: torch.zeros_like(getattr(sae, name)) for name in NAMES}
    for number, x in enumerate(batches, start=1):
        sae.zero_grad()
        autograd_loss(sae, x.to(sae.W_dec), L1).backward()
        with torch.no_grad():
            for name in NAMES:
                p = getattr(sae, name)
                g = p.grad
                if name == "W_dec":
                    g = g - (g * p).sum(1, keepdim=True) * p
                v[name] = how.beta2 * v[name] + (1 - how.beta2) * g * g
                p.sub_(how.learning_rate * g / ((v[name] / (1 - how.beta2**number)).sqrt() + how.eps))
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return {name: getattr(sae, name).detach() for name in NAMES} | {f"v of {name}": v[name] for name in NAMES}


def expected_after(steps, dtype=torch.float64, pre_encoder_bias=True, sizes=LARGE, seed=0):
    state = start(dtype=dtype, pre_encoder_bias=pre_encoder_bias, sizes=sizes)
    return plain_adam(state, data(steps, sizes, seed), rule(True))


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_fifty_steps_equal_plain_adam_in_fp64(route, pre_encoder_bias):
    state = start(dtype=torch.float64, pre_encoder_bias=pre_encoder_bias)
    for x in data(50):
        step(route, state, x)
    assert (state.updates, state.skipped) == (50, 0)
    for name, error in errors(everything(state), expected_after(50, pre_encoder_bias=pre_encoder_bias)).items():
        assert error < 1e-11, f"{name}: {error:.2g}"


def assert_budget(state, steps, sizes):
    """As `test_step.assert_budget`."""
    allowed = {}
    for seed in range(8):
        exact, eager = (
            expected_after(steps, dtype, sizes=sizes, seed=seed) for dtype in (torch.float64, torch.float32)
        )
        for name, error in errors(eager, exact).items():
            allowed[name] = max(error, allowed.get(name, 0))
    for name, error in errors(everything(state), expected_after(steps, sizes=sizes)).items():
        limit = 2 * allowed[name] + torch.finfo(torch.float32).eps * (2 if name.startswith("v of") else 1)
        assert error <= limit, f"{name}: {error:.2g}, allowed {limit:.2g}"


@pytest.mark.parametrize(("impl", "route"), EVERYWHERE)
def test_steps_in_fp32(impl, route):
    sizes = SIZES.get(impl, LARGE)
    steps, state = 50 if sizes == LARGE else 4, start(impl)
    for x in data(steps, sizes):
        step(route, state, x)
    assert_budget(state, steps, sizes)


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_operands(impl, route):
    """What separates bf16 from fp32 is the rounding of operands, of which the reference's routes make as much."""
    sizes = SIZES[impl]
    steps = 20 if sizes == LARGE else 3

    def error_of(impl, route, seed):
        state = start(impl, compute_dtype="bf16", sizes=sizes)
        for x in data(steps, sizes, seed):
            step(route, state, x)
        assert torch.equal(state.latents.W_dec_low, state.latents.W_dec.bfloat16())
        assert torch.equal(state.latents.W_enc_low, state.latents.W_enc.bfloat16())
        return errors(everything(state), expected_after(steps, sizes=sizes, seed=seed))

    by_arithmetic = [error_of("reference", "sparse", seed) for seed in range(4)]
    for name, error in error_of(impl, route, 0).items():
        allowed = max(each[name] for each in by_arithmetic)
        assert 0 < allowed < 0.3, f"{name}: bf16 itself is {allowed:.2g} off"
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps, f"{name}: {error:.2g}, allowed {allowed:.2g}"


def test_figures_are_those_of_the_loss_and_the_module():
    for route in ("sparse", "dense", "reference"):
        state, x = start(dtype=torch.float64), next(data(1)).double()
        out, f = gated_loss_and_gradients(state.sae, x, L1), state.sae.encode(x)
        assert not torch.equal(out.firing_count > 0, out.firing_count >= 0)
        assert torch.equal(out.firing_count.long(), (f > 0).sum(0))
        x_hat = state.sae(x)
        figures = step(route, state, x)
        squares = (x_hat - x).square().sum(1)
        exact = {
            "loss": out.loss,
            "squared_error": squares.mean(),
            "fvu": squares.sum() / (x - x.mean(0)).square().sum(),
            "l0": (f > 0).sum(1).double().mean(),
            "n_entries": out.n_entries.double(),
        }
        for name, value in exact.items():
            torch.testing.assert_close(getattr(figures, name), value.detach(), msg=f"{route} {name}")
        assert torch.equal(state.tokens_since_fired, torch.where(out.firing_count > 0, 0, len(x)))


def test_tiles_of_latents_change_nothing(monkeypatch):
    states = []
    for elements in (memory.DENSE_ELEMENTS, LARGE.n * 8 * memory.GATED_TILES):
        monkeypatch.setattr(memory, "DENSE_ELEMENTS", elements)
        state = start(dtype=torch.float64)
        for x in data(10):
            step("dense", state, x)
        states.append(everything(state))
    assert max(errors(states[0], states[1]).values()) < 1e-12


@pytest.mark.parametrize(("impl", "route"), EVERYWHERE)
@pytest.mark.parametrize("value", ["nan", "-inf", "large"])
def test_an_update_that_is_not_finite_changes_no_bit(impl, route, value):
    state, batches = start(impl), list(data(3, SIZES.get(impl, LARGE)))
    step(route, state, batches[0])
    before, bad = copy.deepcopy(state), batches[1].clone()
    bad[4] = bad[4] * 1e12 if value == "large" else bad[4]
    if value != "large":
        bad[4, 3] = float(value)
    figures = step(route, state, bad)
    assert figures.loss.isfinite() == (value == "large")
    assert (figures.made, figures.stalled, state.updates, state.skipped) == (0, 0, 1, 1)
    for name, tensor in before.tensors().items():
        assert name == "skipped" or torch.equal(state.tensors()[name], tensor), name
    for after in (state, before):
        assert step(route, after, batches[2]).made == 1
    assert torch.equal(state.sae.W_dec, before.sae.W_dec)


@needs_triton
def test_entries_that_do_not_fit_change_no_bit():
    state = start("triton")
    batches = list(data(2, SMALL))
    step("sparse", state, batches[0])
    before = copy.deepcopy(state)
    figures = step("sparse", state, batches[1], room=7)
    assert figures.n_entries > 7
    assert (figures.stalled, state.updates, state.skipped) == (ROOM, 1, 0)
    for name, tensor in before.tensors().items():
        assert name == "stalled" or torch.equal(state.tensors()[name], tensor), name
    state.resume()
    for after in (state, before):
        step("sparse", after, batches[1])
    for name, tensor in before.tensors().items():
        assert torch.equal(state.tensors()[name], tensor), name


@needs_triton
def test_same_input_same_bits():
    states = []
    for _ in range(2):
        state = start("triton")
        for x in data(2, SMALL):
            step("sparse", state, x)
        states.append(everything(state))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ---- the trainer


def trainer(impl="auto", **changes):
    recipe = {"kind": "gated", "d_sae": 24, "batch_size": 16, "steps": 60, "l0_coefficient": 0.1} | changes
    return SAETrainer(TrainConfig.short(**recipe), rows(64), impl=impl)


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * torch.arange(1, 7) + 1


def bits(trained):
    return {name: tensor.clone() for name, tensor in trained.snapshot()[0].items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["auto", "sparse"])
def test_training_resumes_with_the_same_bits(route, compute_dtype):
    straight, first = (trainer(route=route, compute_dtype=compute_dtype) for _ in range(2))
    for seed in range(20):
        straight.update(rows(16, seed))
    for seed in range(9):
        first.update(rows(16, seed))
    tensors, facts = first.snapshot()
    assert {"b_mag", "r_mag", "b_mag_v", "r_mag_v"} <= tensors.keys()
    second = trainer(route=route, compute_dtype=compute_dtype)
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts)))
    others = [second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for other in others:
        for seed in range(9, 20):
            other.update(rows(16, seed))
        assert_same(bits(straight), bits(other))


def test_a_weight_changed_behind_the_copies_is_found_and_trained():
    """As `state.COPIES` says: updates are withheld until the host has made new copies, then repeated."""
    trained = trainer(route="sparse", compute_dtype="bf16")
    for seed in range(12):
        if seed == 3:
            with torch.no_grad():
                trained.sae.W_dec.data[5] = -trained.sae.W_dec.data[5]  # leaves no trace that PyTorch counts
        trained.update(rows(16, seed))
    assert torch.equal(trained.state.W_dec_low, trained.sae.W_dec.bfloat16())
    assert (trained.state.stalled, trained.state.updates, trained.report()["skipped"]) == (0, 12, 0)


@needs_triton
def test_room_is_made_and_steps_are_repeated():
    ample, cramped = (trainer("triton", route="sparse", d_sae=7, batch_size=4) for _ in range(2))
    ample.capacity, cramped.capacity = 4 * 7, 5
    for each in (ample, cramped):
        each.update(rows(4))
        each.flush()
    assert cramped.capacity > 5
    assert_same(bits(ample), bits(cramped))
    assert (ample.state.updates, cramped.report()["skipped"]) == (1, 0)


def test_a_training_lowers_the_loss_and_leaves_a_jumprelu_sae():
    trained, found = trainer(steps=300), []
    for seed in range(300):
        trained.update(rows(16, seed))
        found.append(trained.report())
    assert found[-1]["skipped"] == 0
    assert found[-1]["fvu"] < 0.3 * found[0]["fvu"]
    assert 1 < found[-1]["l0"] < 0.9 * found[0]["l0"]
    left, x = trained.sae.released(), rows(64, 1000)
    assert isinstance(left, JumpReLUSAE)
    assert left.is_folded
    torch.testing.assert_close(left(x), trained.sae(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_training_goes_on_from_a_jumprelu_sae():
    other = JumpReLUSAE(6, 24, threshold_init=0.3, input_scale=2.0, generator=torch.Generator().manual_seed(5))
    config = TrainConfig.short(kind="gated", d_sae=24, steps=10)
    begun, x = SAETrainer(config, rows(64), init_from=other).sae, rows(32, 3)
    assert (other(x) - other.b_dec).any()
    torch.testing.assert_close(begun(x), other(x), rtol=1e-5, atol=1e-5)
