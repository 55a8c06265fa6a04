"""Gated transcoders: both residuals are of the target. Gradients against autograd, routes, what is left of a run."""

import copy
import json
import math

import pytest
import torch

from gemmascope import Transcoder
from gemmascope.evaluation import evaluate_transcoder
from gemmascope.kernels import Rule
from gemmascope.saes import GatedSAE
from gemmascope.saes.gated_transcoder import GatedTranscoder, SkipGatedTranscoder
from gemmascope.training import SAETrainer, TrainConfig
from gemmascope.training.config import Annealing, Loss
from gemmascope.training.gated import gated_loss_and_gradients
from gemmascope.training.gated_step import gated_step
from gemmascope.training.state import TrainState
from gemmascope.training.step import StepFigures
from tests.kernels.native import needs_native
from tests.training.test_step import DEVICE, needs_triton
from tests.training.test_transcoder import D_IN, D_OUT, SKIPS, WIDTHS, F, N, errors, pairs

L1 = Loss(0.02, sparsity="l1")
RULE = Rule(3e-3, 0.99, 1e-8, True)
ROUTES = ("reference", "sparse", "dense")


def make(skip=True, d_in=D_IN, d_out=D_OUT, dtype=torch.float64, impl="reference", seed=1):
    made, generator = SkipGatedTranscoder if skip else GatedTranscoder, torch.Generator().manual_seed(seed)
    sae = made(d_in, d_out, F, generator=generator, impl=impl)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec", *sae.OTHERS):
            parameter = getattr(sae, name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.b_enc[:2] = -5.0  # never fire
        sae.b_mag[2] = -5.0  # the gate opens, but no magnitude is positive
    sae = sae.to(dtype)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def loss_by_autograd(sae, x, y, loss):
    """Equation 8 of arXiv 2404.16014 with y in the place of x; what decodes is constant in the last term."""
    pi = x @ sae.W_enc + sae.b_enc
    f = (pi > 0).to(x.dtype) * torch.relu(sae.r_mag.exp() * (x @ sae.W_enc) + sae.b_mag)
    first, frozen = f @ sae.W_dec + sae.b_dec, torch.relu(pi) @ sae.W_dec.detach() + sae.b_dec.detach()
    if isinstance(sae, SkipGatedTranscoder):
        first, frozen = first + x @ sae.W_skip.T, frozen + x @ sae.W_skip.detach().T
    penalty = loss.l0_coefficient * torch.relu(pi).sum(1)
    return ((y - first).square().sum(1) + penalty + (y - frozen).square().sum(1)).mean()


def step(route, state, x, y, loss=L1, annealing=None):
    room = len(x) * F if route == "sparse" and state.impl == "triton" else None
    rows = [None if t is None else t.to(state.b_dec_v) for t in (x, y)]
    return gated_step(state, rows[0], loss, RULE, route, room, rows[1], annealing)


def settled(state):
    state = copy.deepcopy(state)
    state.settle(RULE.beta2)
    return {name: tensor.cpu() for name, tensor in state.tensors().items()}


# ---- the loss


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_gradients_are_those_of_autograd(d_in, d_out, skip):
    sae, (x, y) = make(skip, d_in, d_out), pairs(d_in=d_in, d_out=d_out)
    total = loss_by_autograd(sae, x, y, L1)
    total.backward()
    found = gated_loss_and_gradients(sae, x, L1, y)
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-13)
    ours = found.gradients._asdict() | dict(found.others)
    assert set(ours) == {name for name, _ in sae.named_parameters()}
    assert set(found.others) == set(sae.OTHERS)
    for name, p in sae.named_parameters():
        assert p.grad is not None
        assert p.grad.any(), name
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-11, atol=1e-13, msg=name)
        if name != "b_dec":
            assert ours[name].abs().max() <= found.bound, name


def by_hand():
    """x = 3 of width 1, y = (4, 1) of width 2; W_enc = (1, −1), b_gate = (−1, 1): π = (2, −2). e^r = ½, b_mag = 1:
    m = (2.5, −.5), f = (2.5, 0). W_dec = ((1, 0), (0, 1)), W_skip = (1, 0)ᵀ: ŷ = (5.5, 0) and r = (1.5, −1)."""
    sae = SkipGatedTranscoder(1, 2, 2, dtype=torch.float64)
    values = {"W_enc": [[1, -1]], "b_enc": [-1, 1], "b_mag": [1, 1], "r_mag": [math.log(0.5)] * 2}
    with torch.no_grad():
        for name, value in (values | {"W_dec": [[1, 0], [0, 1]], "b_dec": [0, 0], "W_skip": [[1], [0]]}).items():
            getattr(sae, name).copy_(torch.tensor(value))
    return sae, torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([[4.0, 1.0]], dtype=torch.float64)


def test_by_hand():
    """relu(π) = (2, 0), of which ρ = (2 + 3 − 4, −1) = (1, −1). With λ = ¼ the loss is 3.25 + ½ + 2. dm = (2·1.5, 0),
    dπ = (2·1 + ¼, 0), dy = (½·3 + 2.25, 0)."""
    sae, x, y = by_hand()
    out = gated_loss_and_gradients(sae, x, Loss(0.25, sparsity="l1"), y)
    assert out.loss.item() == pytest.approx(3.25 + 0.5 + 2)
    assert (out.l0.item(), out.firing_count.tolist(), out.n_entries.item()) == (1, [1, 0], 1)
    exact = {
        "W_enc": [3 * 3.75, 0],
        "b_enc": [2.25, 0],
        "W_dec": [2.5 * 3, 2.5 * -2, 0, 0],
        "b_dec": [3, -2],
        "b_mag": [3, 0],
        "r_mag": [3 * (2.5 - 1), 0],
        "W_skip": [3 * 3, 3 * -2],
    }
    ours = out.gradients._asdict() | dict(out.others)
    assert set(ours) == set(exact)
    for name, value in exact.items():
        assert ours[name].flatten().tolist() == pytest.approx(value), name


def test_the_bound_knows_of_the_skip_where_magnitudes_are_small():
    """With a tiny e^r the gradients of the encoder say nothing about that of the skip."""
    sae, x, y = by_hand()
    with torch.no_grad():
        sae.r_mag.fill_(-20)
        sae.b_mag.zero_()
        sae.b_enc.fill_(-100)
    x, y = 1e3 * x, torch.tensor([[3e3, 1e5]], dtype=torch.float64)
    out = gated_loss_and_gradients(sae, x / 1e3, Loss(0.0, sparsity="l1"), y)
    assert out.others["W_skip"].abs().max() <= out.bound
    with torch.no_grad():  # all of ρ is gone, and r is of the skip alone
        sae.b_enc.fill_(1e5)
        sae.W_enc.zero_()
        sae.W_skip.zero_()
        sae.b_dec.copy_(torch.tensor([3e3 - 1e5, 0]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1]]))
    out = gated_loss_and_gradients(sae, x, Loss(0.0, sparsity="l1"), y)
    assert out.gradients.b_enc.abs().max() < 1e-6
    assert 1e8 < out.others["W_skip"].abs().max() <= out.bound


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda y: None, "target: expected what the transcoder is to give, got None"),
        (lambda y: y[:, 1:], f"target: expected shape [{N}, {D_OUT}], got [{N}, {D_OUT - 1}]"),
        (lambda y: y[1:], f"target: expected shape [{N}, {D_OUT}], got [{N - 1}, {D_OUT}]"),
    ],
)
def test_messages(target, message):
    x, y = pairs()
    with pytest.raises(ValueError, match=r"^target: ") as caught:
        gated_loss_and_gradients(make(), x, L1, target(y))
    assert str(caught.value) == message


# ---- the routes


def plain_adam(sae, batches):
    """Every parameter at every step by automatic differentiation."""
    v = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
    for number, (x, y) in enumerate(batches, start=1):
        sae.zero_grad()
        loss_by_autograd(sae, x.to(sae.W_dec), y.to(sae.W_dec), L1).backward()
        with torch.no_grad():
            for name, p in sae.named_parameters():
                g = p.grad
                assert g is not None
                if name == "W_dec":
                    g = g - (g * p).sum(1, keepdim=True) * p
                v[name] = RULE.beta2 * v[name] + (1 - RULE.beta2) * g * g
                p.sub_(RULE.learning_rate * g / ((v[name] / (1 - RULE.beta2**number)).sqrt() + RULE.eps))
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    found = {name: p.detach() for name, p in sae.named_parameters()} | {f"{name}_v": v[name] for name in v}
    return found | {name: found[name].T for name in ("W_enc", "W_enc_v")}


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_fifty_steps_are_plain_adam_by_every_route(impl, d_in, d_out, skip):
    batches = [pairs(d_in=d_in, d_out=d_out, seed=seed) for seed in range(50)]
    exact = plain_adam(make(skip, d_in, d_out), batches)
    states = {route: TrainState.start(make(skip, d_in, d_out, impl=impl)) for route in ROUTES}
    for x, y in batches:
        figures = {route: step(route, state, x, y).packed for route, state in states.items()}
        for route in ("sparse", "dense"):
            torch.testing.assert_close(figures[route], figures["reference"], rtol=1e-10, atol=1e-12)
    for route, state in states.items():
        assert (state.updates, state.skipped) == (50, 0)
        found = settled(state)
        for name, error in errors(found, exact).items():
            assert error < 1e-11, f"{route} {name}: {error:.2g}"


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("impl", "compute_dtype"),
    [
        ("pytorch", "fp32"),
        ("pytorch", "bf16"),
        pytest.param("cpu", "fp32", marks=needs_native),
        pytest.param("cpu", "bf16", marks=needs_native),
        pytest.param("triton", "fp32", marks=needs_triton),
        pytest.param("triton", "bf16", marks=needs_triton),
    ],
)
def test_implementations_keep_to_the_error_of_plain_pytorch(impl, compute_dtype, route):
    """The allowance is the worst of four seeds by the reference's own arithmetic."""
    (d_in, d_out), n = ((6, 6), 8) if impl == "triton" else ((D_IN, D_OUT), N)

    def after(dtype, by, low, seed):
        state = TrainState.start(make(True, d_in, d_out, dtype, by).to(DEVICE if by == "triton" else "cpu"), low)
        for number in range(3):
            assert step(route, state, *pairs(n, d_in, d_out, 10 * seed + number)).made == 1
        found = settled(state)
        return {name: found[name].double() for name in exact_names}

    exact_names = ("W_enc", "b_enc", "W_dec", "b_dec", "b_mag", "r_mag", "W_skip")
    allowed = dict.fromkeys(exact_names, 0.0)
    for seed in range(4):
        exact = after(torch.float64, "reference", "fp32", seed)
        plain = errors(after(torch.float32, "reference", compute_dtype, seed), exact)
        allowed = {name: max(allowed[name], error.item()) for name, error in plain.items()}
        if seed == 0:
            ours = errors(after(torch.float32, impl, compute_dtype, seed), exact)
    eps = torch.finfo(torch.bfloat16 if compute_dtype == "bf16" else torch.float32).eps
    for name, error in ours.items():
        assert error <= 2 * allowed[name] + eps, f"{name}: {error:.2g}, allowed {allowed[name]:.2g}"


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ROUTES)
def test_an_sae_whose_target_is_x_is_an_sae_to_the_bit(route, compute_dtype):
    states = []
    for _ in range(2):
        sae = GatedSAE(D_IN, F, impl="pytorch", generator=torch.Generator().manual_seed(2))
        states.append(TrainState.start(sae, compute_dtype))
    for seed in range(5):
        x = pairs(seed=seed, dtype=torch.float32)[0]
        for state, target in zip(states, (None, x.clone()), strict=True):
            assert step(route, state, x, target).made == 1
    for (name, one), other in zip(states[0].tensors().items(), states[1].tensors().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("where", ["x", "y"])
def test_what_is_not_finite_is_withheld_with_the_skip(where, route, bad):
    state = TrainState.start(make(dtype=torch.float32, impl="pytorch"))
    x, y = pairs(dtype=torch.float32)
    step(route, state, x, y)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    (x if where == "x" else y)[3, 1] = bad
    figures = StepFigures.unpack(step(route, state, x, y).packed)
    assert (figures["made"], figures["skipped"]) == (0, 1)
    for name, tensor in state.tensors().items():
        assert name == "skipped" or torch.equal(tensor, before[name]), name


def test_the_penalty_of_a_power_is_annealed_by_every_route():
    """λ is multiplied by the ratio of the penalties with the old and the new p, of relu(π) of the target's batches."""
    annealing = [Annealing(0, 1.0, 0.5), Annealing(1, 0.5, None)]
    states = {route: TrainState.start(make(), annealed=True) for route in ROUTES}
    for number in range(4):
        x, y = pairs(seed=number)
        at = annealing[number >= 2]
        loss = Loss(0.02, sparsity="l1", p=at.p)
        figures = {route: step(route, state, x, y, loss, at).packed for route, state in states.items()}
        for route in ("sparse", "dense"):
            torch.testing.assert_close(figures[route], figures["reference"], rtol=1e-10, atol=1e-12)
    expected = settled(states["reference"])
    for route in ("sparse", "dense"):
        found = settled(states[route])
        for name in ("W_enc", "b_enc", "W_dec", "b_mag", "W_skip", "annealing"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12, msg=f"{route} {name}")


# ---- the module


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_what_is_released_is_the_jumprelu_transcoder_that_it_is(d_in, d_out, skip, tmp_path):
    sae, (x, _) = make(skip, d_in, d_out), pairs(d_in=d_in, d_out=d_out)
    sae.input_scale, sae.output_scale = 3.7, 0.21
    released, x = sae.released(), 3.7 * x
    assert type(released) is Transcoder
    assert (released.W_skip is not None) == skip
    with torch.no_grad():
        y = x / 3.7 @ sae.W_enc
        f = (y + sae.b_enc > 0) * torch.relu(sae.r_mag.exp() * y + sae.b_mag)
        by_hand = f @ sae.W_dec + sae.b_dec + (x / 3.7 @ sae.W_skip.T if isinstance(sae, SkipGatedTranscoder) else 0)
        assert 0 < (f > 0).sum() < f.numel()
        for made in (released, sae):
            torch.testing.assert_close(made(x), 0.21 * by_hand, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(released.encode(x), 0.21 * sae.encode(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(released.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    released.metadata["site"] = "a"
    released.save(tmp_path / "saved")
    assert torch.equal(Transcoder.load(tmp_path / "saved").threshold, released.threshold)
    with torch.no_grad():
        sae.W_dec.zero_()
    assert released.W_dec.any()  # a copy


def test_what_belongs_to_saes_is_refused():
    sae = make()
    for verb, *arguments in (("fold",), ("save", "x"), ("to_jumprelu",)):
        with pytest.raises(TypeError, match=rf"^{verb}: expected an SAE, got a transcoder in training"):
            getattr(sae, verb)(*arguments)
    other = make(seed=5)
    sae.output_scale = 1.25
    other.load_state_dict(sae.state_dict())
    assert (other.output_scale, other.kind) == (1.25, "gated")
    with pytest.raises(TypeError, match="threshold_init"):
        GatedTranscoder(3, 4, 9, threshold_init=0.1)


# ---- the trainer


def trainer(x, y, **changes):
    recipe = {"kind": "gated", "d_sae": F, "batch_size": N, "steps": 60, "l0_coefficient": 0.02} | changes
    return SAETrainer(TrainConfig.short(**recipe), x, target=y, metadata={"site": "a"})


def take(trained, x, y, first, last):
    for number in range(first, last):
        rows = torch.randint(len(x), (N,), generator=torch.Generator().manual_seed(number))
        trained.update(x[rows], y[rows])


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["auto", "sparse"])
def test_a_snapshot_goes_on_with_the_same_bits(route, compute_dtype):
    x, y = pairs(400, dtype=torch.float32)
    whole, first, second = (trainer(x, y, skip=True, route=route, compute_dtype=compute_dtype) for _ in range(3))
    take(whole, x, y, 0, 12)
    take(first, x, y, 0, 5)
    tensors, facts = first.snapshot()
    assert {"b_mag", "r_mag", "W_skip", "b_mag_v", "r_mag_v", "W_skip_v"} <= tensors.keys()
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts)))
    take(second, x, y, 5, 12)
    for name, tensor in whole.state.tensors().items():
        assert torch.equal(second.state.tensors()[name], tensor), name


@pytest.mark.parametrize("skip", SKIPS)
def test_a_training_leaves_a_transcoder_that_is_better_than_what_it_was(skip):
    x, y = pairs(1000, dtype=torch.float32)
    trained = trainer(x[:800], y[:800], skip=skip, steps=400, d_sae=96)
    before = evaluate_transcoder(trained.sae.released(), x[800:], y[800:])
    take(trained, x[:800], y[:800], 0, 400)
    after = evaluate_transcoder(trained.sae.released(), x[800:], y[800:])
    assert after.fvu < 0.3 * before.fvu
    assert after.l0 < 0.8 * before.l0
    assert trained.report()["skipped"] == 0
    assert trained.route == ("sparse" if trained.report()["l0"] < 2 else "dense")


def test_memory_counts_both_residuals_of_the_target():
    config = TrainConfig.short(kind="gated", d_sae=F, batch_size=N, steps=10)
    wide, narrow = (SAETrainer.memory(config, 16, d_out=d_out) for d_out in (64, 16))
    # y, its rounding and both residuals of it, in fp32 and as the products read them
    assert wide.activations - narrow.activations == N * (64 - 16) * (2 * 8 + 8)
