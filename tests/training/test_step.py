"""The routes of the training step against plain Adam on the written gradients, in fp64."""

import copy
import math
from typing import NamedTuple

import pytest
import torch

from gemmascope.kernels.dispatch import triton_problem
from gemmascope.kernels.entries import Rule
from gemmascope.kernels.reference import Parameters
from gemmascope.saes import JumpReLUSAE
from gemmascope.training import memory
from gemmascope.training import step as step_module
from gemmascope.training.config import Loss
from gemmascope.training.losses import loss_and_gradients
from gemmascope.training.state import ROOM, TrainState
from gemmascope.training.step import dense_step, reference_step, sparse_step
from tests.kernels.native import needs_native
from tests.training.test_losses import LOSSES

# In the interpreter, or on a GPU where there is one.
ON_GPU = torch.cuda.is_available()
needs_triton = pytest.mark.gpu if ON_GPU else pytest.mark.skipif(triton_problem() is not None, reason="needs triton")


class Sizes(NamedTuple):
    n: int
    d_model: int
    d_sae: int


LARGE = Sizes(21, 10, 37)
SMALL = LARGE if ON_GPU else Sizes(5, 6, 12)  # a step takes the interpreter half a second
SIZES = {"reference": LARGE, "cpu": LARGE, "triton": SMALL}
NAMES = Parameters._fields
BETA1 = 0.6

IMPLS = [
    pytest.param("reference", id="reference"),
    pytest.param("cpu", id="cpu", marks=needs_native),
    pytest.param("triton", id="triton", marks=needs_triton),
]
DEVICE = "cuda" if ON_GPU else "cpu"


def start(impl="reference", dtype=torch.float32, compute_dtype="fp32", pre_encoder_bias=True, sizes=None, beta1=0.0):
    generator, (_, d_model, d_sae) = torch.Generator().manual_seed(0), sizes or SIZES[impl]
    options = {"threshold_init": 0.15, "pre_encoder_bias": pre_encoder_bias}
    sae = JumpReLUSAE(d_model, d_sae, impl=impl, generator=generator, **options)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec", "threshold"):
            parameter = getattr(sae, name)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        sae.threshold.clamp_(min=0.02)
        sae.threshold[:3] = 3.0  # never fire, never move
    sae = sae.to(DEVICE if impl == "triton" else "cpu", dtype)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))  # unit to the last digit: idle rows are not touched again
    return TrainState.start(sae, compute_dtype, first_moments=beta1 > 0)


def data(steps, sizes=LARGE, seed=0):
    """Batches in which some latents fire rarely; one token twice, one that is zero."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(sizes.n, sizes.d_model, generator=generator) / sizes.d_model**0.5
        x[1], x[2] = x[0], 0
        yield x


def rule(log_threshold=False, learning_rate=2e-3, beta1=0.0):
    return Rule(learning_rate, 0.99, 1e-8, log_threshold, beta1)


def take(route, state, x, loss, rule):
    x = x.to(state.sae.W_dec)
    if route == "sparse":
        return sparse_step(state, x, loss, rule, len(x) * state.sae.d_sae if state.impl == "triton" else None)
    return {"dense": dense_step, "reference": reference_step}[route](state, x, loss, rule)


def plain_adam(state, batches, loss, rule):
    """Every parameter at every step, no latent skipped, in the dtype of the SAE; returns the moments. With a first
    moment latents without a gradient wait, while their moments decay."""
    sae = state.sae
    v, m = ({name: torch.zeros_like(getattr(sae, name)) for name in NAMES} for _ in range(2))
    for step, x in enumerate(batches, start=1):
        gradients = loss_and_gradients(sae, x.to(sae.W_dec), loss).gradients._asdict()
        with torch.no_grad():
            along = (gradients["W_dec"] * sae.W_dec).sum(1, keepdim=True)
            gradients["W_dec"] = gradients["W_dec"] - along * sae.W_dec
            if rule.log_threshold:
                gradients["threshold"] = gradients["threshold"] * sae.threshold
            moves = (gradients["W_enc"] != 0).any(0) | (gradients["W_dec"] != 0).any(1) | (gradients["threshold"] != 0)
            for name, g in gradients.items():
                p = getattr(sae, name)
                v[name] = rule.beta2 * v[name] + (1 - rule.beta2) * g * g
                m[name] = rule.beta1 * m[name] + (1 - rule.beta1) * g
                change = m[name] / (1 - rule.beta1**step) / ((v[name] / (1 - rule.beta2**step)).sqrt() + rule.eps)
                waits = torch.zeros_like(moves) if name == "b_dec" else ~moves
                waits = waits[:, None] if name == "W_dec" else waits
                change = rule.learning_rate * (change if name == "b_dec" else change.masked_fill(waits, 0))
                if name == "threshold" and rule.log_threshold:
                    p.copy_(torch.exp(torch.log(p) - change))
                else:
                    p.sub_(change)
            sae.threshold.clamp_(min=0)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    moments = {f"v of {name}": value for name, value in v.items()}
    return moments | {f"m of {name}": value for name, value in m.items() if rule.beta1}


def everything(state):
    """Parameters and settled moments, by name."""
    state, kept = copy.deepcopy(state), state.W_enc_m is not None
    state.settle(0.99, BETA1 if kept else 0.0)
    found = {name: getattr(state.sae, name).detach() for name in NAMES}
    for each in ("v", "m") if kept else ("v",):
        found |= {f"{each} of {name}": getattr(state, f"{name}_{each}") for name in NAMES}
        found[f"{each} of W_enc"] = found[f"{each} of W_enc"].T
    return found


def by_latent(name, value):
    """A row for each latent; one for all of a bias, whose elements pass through zero."""
    value = value.double().cpu()
    if name.endswith("b_dec") or name == "b_enc":
        return value[None]
    return value.T if name.endswith("W_enc") else value.reshape(len(value), -1)


def distance(found, exact):
    """Relative errors by name: the root mean square over the latents, so that none of them dominates."""
    errors = {}
    for name, value in found.items():
        ours, theirs = by_latent(name, value), by_latent(name, exact[name])
        error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
        errors[name] = torch.where((ours == theirs).all(1), 0, error).square().mean().sqrt().item()
    return errors


def expected_after(steps, loss, rule, dtype=torch.float64, pre_encoder_bias=True, sizes=LARGE, seed=0):
    state = start(dtype=dtype, pre_encoder_bias=pre_encoder_bias, sizes=sizes)
    moments = plain_adam(state, data(steps, sizes, seed), loss, rule)
    return {name: getattr(state.sae, name).detach() for name in NAMES} | moments


def assert_budget(state, steps, loss, rule, sizes):
    """err ≤ 2·err(plain PyTorch in fp32) + one ulp for each tensor, two for second moments, being squares.

    The error of plain PyTorch is its worst on eight sets of data: on any one of them a sum of few terms may come out
    exact, or cancel, by luck.
    """
    allowed = {}
    for seed in range(8):
        exact, eager = (
            expected_after(steps, loss, rule, dtype, sizes=sizes, seed=seed) for dtype in (torch.float64, torch.float32)
        )
        for name, error in distance(eager, exact).items():
            allowed[name] = max(error, allowed.get(name, 0))
    for name, error in distance(everything(state), expected_after(steps, loss, rule, sizes=sizes)).items():
        limit = 2 * allowed[name] + torch.finfo(torch.float32).eps * (2 if name.startswith("v of") else 1)
        assert error <= limit, f"{name}: {error:.2g}, allowed {limit:.2g}"


ROUTES_64 = ["sparse", "dense", "reference"]
FAST_LOSSES = {name: loss for name, loss in LOSSES.items() if not loss.pre_act_coefficient}


@pytest.mark.parametrize("log_threshold", [False, True], ids=["raw", "log"])
@pytest.mark.parametrize("loss", FAST_LOSSES.values(), ids=FAST_LOSSES)
@pytest.mark.parametrize("route", ROUTES_64)
def test_fifty_steps_equal_plain_adam_in_fp64(route, loss, log_threshold):
    """In fp64 the routes are the same mathematics to the last digits: lazy decay, projection, every loss."""
    state = start(dtype=torch.float64)
    for x in data(50):
        take(route, state, x, loss, rule(log_threshold))
    assert state.updates == 50
    for name, error in distance(everything(state), expected_after(50, loss, rule(log_threshold))).items():
        assert error < 1e-9, f"{name}: {error:.2g}"


@pytest.mark.parametrize("log_threshold", [False, True], ids=["raw", "log"])
@pytest.mark.parametrize("loss", FAST_LOSSES.values(), ids=FAST_LOSSES)
@pytest.mark.parametrize("route", ROUTES_64)
def test_fifty_steps_with_a_first_moment_in_fp64(route, loss, log_threshold):
    """Most latents are idle now and then, and some never fire: those wait."""
    state, momentum = start(dtype=torch.float64, beta1=BETA1), rule(log_threshold, beta1=BETA1)
    before = copy.deepcopy(state)
    for x in data(50):
        take(route, state, x, loss, momentum)
    for name, error in distance(everything(state), expected_after(50, loss, momentum)).items():
        assert error < 1e-9, f"{name}: {error:.2g}"
    assert torch.equal(state.sae.W_dec[:3], before.sae.W_dec[:3])
    idle = everything(state)["m of W_dec"].norm(dim=1) == 0
    assert idle[:3].all()
    assert not idle.all()


@pytest.mark.parametrize("log_threshold", [False, True], ids=["raw", "log"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("impl", IMPLS)
def test_steps_with_a_first_moment_in_fp32(impl, route, log_threshold):
    steps, arguments = 2 if impl == "triton" else 50, (LOSSES["l0"], rule(log_threshold, beta1=BETA1))
    state = start(impl, beta1=BETA1)
    for x in data(steps, SIZES[impl]):
        take(route, state, x, *arguments)
    assert_budget(state, steps, *arguments, SIZES[impl])


def _steps_of(impl, route, log_threshold):
    """Fifty take Triton's interpreter a minute; the quick runs of it have twelve, both routes and both rules."""
    rule_name = "log" if log_threshold else "raw"
    for steps in (12, 50) if impl.id == "triton" else (50,):
        if steps == 12 and (route == "sparse") != log_threshold:
            continue
        marks = [*impl.marks, *[pytest.mark.slow] * (impl.id == "triton" and steps == 50)]
        name = f"{impl.id}-{route}-{rule_name}-{steps}"
        yield pytest.param(*impl.values, route, log_threshold, steps, id=name, marks=marks)


@pytest.mark.parametrize(
    ("impl", "route", "log_threshold", "steps"),
    [
        each
        for impl in IMPLS
        for route in ("sparse", "dense")
        for log in (False, True)
        for each in _steps_of(impl, route, log)
    ],
)
def test_many_steps_in_fp32(impl, route, log_threshold, steps):
    sizes, arguments = SIZES[impl], (LOSSES["l0"], rule(log_threshold))
    state = start(impl)
    for x in data(steps, sizes):
        take(route, state, x, *arguments)
    assert_budget(state, steps, *arguments, sizes)


@pytest.mark.parametrize("log_threshold", [False, True], ids=["raw", "log"])
@pytest.mark.parametrize("loss", FAST_LOSSES.values(), ids=FAST_LOSSES)
@pytest.mark.parametrize("route", ["sparse", "dense"])
@needs_native
def test_fifty_steps_of_every_loss_natively(route, loss, log_threshold):
    arguments = loss, rule(log_threshold)
    state = start("cpu")
    for x in data(50):
        take(route, state, x, *arguments)
    assert_budget(state, 50, *arguments, LARGE)


@pytest.mark.parametrize("loss", FAST_LOSSES.values(), ids=FAST_LOSSES)
@pytest.mark.parametrize("route", ["sparse", "dense"])
@needs_triton
def test_every_loss_by_the_kernels(route, loss):
    """A few steps from one state; fifty are the business of the test above."""
    state = start("triton")
    for x in data(2, SMALL):
        figures = take(route, state, x, loss, rule())
    assert_budget(state, 2, loss, rule(), SMALL)
    assert figures.loss.isfinite()


@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_operands(impl, route):
    """Weights, second moments and the gate stay fp32; what separates bf16 from fp32 is the rounding of operands."""
    sizes = SIZES[impl]
    steps, loss = 50 if sizes == LARGE else 8, LOSSES["l0"]

    def trained(impl, seed):
        state = start(impl, compute_dtype="bf16", sizes=sizes)
        for x in data(steps, sizes, seed):
            take(route, state, x, loss, rule())
        return state

    def error(state, seed):
        return distance(everything(state), expected_after(steps, loss, rule(), sizes=sizes, seed=seed))

    state = trained(impl, 0)
    assert {value.dtype for value in everything(state).values()} == {torch.float32}
    by_arithmetic = [error(trained("reference", seed), seed) for seed in range(4)]
    for name, found in error(state, 0).items():
        allowed = max(errors[name] for errors in by_arithmetic)
        assert allowed < 0.3, f"{name}: bf16 itself is {allowed:.2g} off"
        assert found <= 2 * allowed + torch.finfo(torch.bfloat16).eps, f"{name}: {found:.2g}, allowed {allowed:.2g}"
    assert torch.equal(state.latents.W_dec_low, state.latents.W_dec.bfloat16())
    assert torch.equal(state.latents.W_enc_low, state.latents.W_enc.bfloat16())


@needs_triton
def test_bf16_kernels_equal_bf16_arithmetic():
    """One step from one state: the kernels round where `reference_training` says, and nowhere else."""
    for route in ("sparse", "dense"):
        found = {}
        for impl in ("reference", "triton"):
            state = start(impl, compute_dtype="bf16", sizes=SMALL)
            take(route, state, next(data(1, SMALL)), LOSSES["l0"], rule())
            found[impl] = everything(state)
        for name, error in distance(found["triton"], {k: v.double() for k, v in found["reference"].items()}).items():
            assert error <= 1e-3 * (10 if name.startswith("v of") else 1), f"{route} {name}: {error:.2g}"


@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_without_a_pre_encoder_bias(route):
    state = start(dtype=torch.float64, pre_encoder_bias=False)
    for x in data(20):
        take(route, state, x, LOSSES["l0"], rule())
    exact = expected_after(20, LOSSES["l0"], rule(), pre_encoder_bias=False)
    assert max(distance(everything(state), exact).values()) < 1e-9


def test_figures_are_the_loss_and_its_parts():
    for route in ("sparse", "dense", "reference"):
        for name, loss in FAST_LOSSES.items():
            state, x = start(dtype=torch.float64), next(data(1)).double()
            out = loss_and_gradients(state.sae, x, loss)
            figures = take(route, state, x, loss, rule())
            for field in ("loss", "squared_error", "l0", "n_entries"):
                value, expected = getattr(figures, field).double(), getattr(out, field).double()
                torch.testing.assert_close(value, expected, msg=f"{route} {name} {field}")


def test_tiles_of_latents_change_nothing(monkeypatch):
    loss = LOSSES["ste-all"]
    states = []
    for elements in (memory.DENSE_ELEMENTS, LARGE.n * 8):
        monkeypatch.setattr(memory, "DENSE_ELEMENTS", elements)
        state = start(dtype=torch.float64)
        for x in data(10):
            dense_step(state, x.double(), loss, rule())
        states.append(everything(state))
    assert max(distance(states[0], states[1]).values()) < 1e-12


def test_tf32_is_asked_for_and_given_back(monkeypatch):
    products, seen, matmul = torch.backends.cuda.matmul, [], step_module.matmul
    monkeypatch.setattr(step_module, "matmul", lambda a, b: seen.append(products.fp32_precision) or matmul(a, b))
    before = products.fp32_precision
    dense_step(start(compute_dtype="tf32"), next(data(1)), LOSSES["l0"], rule())
    assert set(seen) == {"tf32"}
    assert products.fp32_precision == before


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(
    ("impl", "route"),
    [
        *(("reference", route) for route in ("sparse", "dense", "reference")),
        *(pytest.param("cpu", route, marks=needs_native) for route in ("sparse", "dense")),
        *(pytest.param("triton", route, marks=needs_triton) for route in ("sparse", "dense")),
    ],
)
def test_a_loss_that_is_not_finite_changes_no_bit(impl, route, value):
    state = start(impl)
    batches = list(data(3, SIZES[impl]))
    take(route, state, batches[0], LOSSES["l0"], rule())
    before = copy.deepcopy(state)
    bad = batches[1].clone()
    bad[4, 3] = value
    figures = take(route, state, bad, LOSSES["l0"], rule())
    assert not figures.loss.isfinite()
    assert (state.updates, state.skipped) == (1, 1)
    for name, tensor in before.tensors().items():
        assert name == "skipped" or torch.equal(state.tensors()[name], tensor), name
    for after in (state, before):
        take(route, after, batches[2], LOSSES["l0"], rule())
    assert torch.equal(state.sae.W_dec, before.sae.W_dec)


EVERYWHERE = [
    *(("reference", route) for route in ("sparse", "dense", "reference")),
    *(("pytorch", route) for route in ("sparse", "dense")),
    *(pytest.param("cpu", route, marks=needs_native) for route in ("sparse", "dense")),
    *(pytest.param("triton", route, marks=needs_triton) for route in ("sparse", "dense")),
]


@pytest.mark.parametrize("loss", ["l0", "ste-all"])
@pytest.mark.parametrize(("impl", "route"), EVERYWHERE)
def test_gradients_too_large_for_second_moments_change_no_bit(impl, route, loss):
    """A token 10¹² times too large: its loss is finite in fp32, the squares of its gradients are not."""
    sizes, loss = SIZES.get(impl, LARGE), LOSSES[loss]
    state = start(impl, sizes=sizes)
    batches = list(data(3, sizes))
    take(route, state, batches[0], loss, rule())
    before = copy.deepcopy(state)
    bad = batches[1].clone()
    bad[4] *= 1e12
    figures = take(route, state, bad, loss, rule())
    assert figures.loss.isfinite()
    assert (figures.made, figures.stalled) == (0, 0)
    assert (state.updates, state.skipped) == (1, 1)
    for name, tensor in before.tensors().items():
        assert name == "skipped" or torch.equal(state.tensors()[name], tensor), name
    for after in (state, before):
        assert take(route, after, batches[2], loss, rule()).made == 1
    assert torch.equal(state.sae.W_dec, before.sae.W_dec)


@pytest.mark.parametrize(("impl", "route"), [place for place in EVERYWHERE if "triton" not in str(place)])
@pytest.mark.parametrize("log_threshold", [False, True], ids=["raw", "log"])
def test_what_is_made_is_finite(impl, route, log_threshold):
    """Outliers of every size: those of 10⁴ times the norm are trained on; nothing is left that is not finite."""
    made = {}
    for exponent in range(0, 40, 2):
        state = start(impl, sizes=LARGE)
        for x in data(2):
            x[4] *= 10.0**exponent
            made[exponent] = bool(take(route, state, x, LOSSES["l0"], rule(log_threshold)).made)
            assert all(tensor.isfinite().all() for tensor in state.tensors().values())
    assert all(made[exponent] for exponent in (0, 2, 4))
    assert not any(made[exponent] for exponent in (12, 18, 20, 38))
    assert list(made.values()) == sorted(made.values(), reverse=True)


def test_the_routes_withhold_the_same_updates():
    for exponent in range(0, 24):
        x = next(data(1))
        x[4] *= 10.0**exponent
        made = {take(route, start(), x, LOSSES["l0"], rule()).made.item() for route in ROUTES_64}
        assert len(made) == 1, exponent


@needs_triton
def test_entries_that_do_not_fit_change_no_bit():
    state, room = start("triton"), SMALL.n * SMALL.d_sae
    batches = [x.to(DEVICE) for x in data(2, SMALL)]
    sparse_step(state, batches[0], LOSSES["l0"], rule(), room)
    before = copy.deepcopy(state)
    figures = sparse_step(state, batches[1], LOSSES["l0"], rule(), 7)
    assert figures.n_entries > 7
    assert (figures.stalled, state.updates, state.skipped) == (ROOM, 1, 0)
    for route in ("sparse", "dense"):  # until somebody makes room
        take(route, state, batches[1], LOSSES["l0"], rule())
    assert (state.updates, state.skipped) == (1, 0)
    for name, tensor in before.tensors().items():
        assert name == "stalled" or torch.equal(state.tensors()[name], tensor), name
    state.resume()
    for after in (state, before):
        sparse_step(after, batches[1], LOSSES["l0"], rule(), room)
    for name, tensor in before.tensors().items():
        assert torch.equal(state.tensors()[name], tensor), name


@needs_triton
def test_a_batch_that_is_not_finite_asks_for_no_room():
    """Every latent of a NaN token is an entry; the step is skipped, not repeated with room for all of them."""
    state = start("triton")
    x = next(data(1, SMALL)).to(DEVICE)
    x[3:] = math.nan
    figures = sparse_step(state, x, LOSSES["l0"], rule(), 7)
    assert figures.n_entries > 7
    assert (figures.stalled, state.skipped, state.updates) == (0, 1, 0)


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
@needs_triton
def test_same_input_same_bits(route, compute_dtype):
    states = []
    for _ in range(2):
        state = start("triton", compute_dtype=compute_dtype)
        for x in data(2, SMALL):
            take(route, state, x, LOSSES["l0"], rule())
        states.append(everything(state))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype", ["fp32", "tf32", "bf16"])
def test_full_shapes(compute_dtype):
    """Both routes make the same step, and the sparse one the same bits, at the width of Gemma 2 2B.

    With eps = 1 Adam's step is proportional to the gradient. What the routes may differ by is the rounding of products
    and the few of some 250,000 entries that it carries across a threshold: each is worth 0.2 % of the step's norm.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4096, 2304, device="cuda", generator=generator) / 2304**0.5
    states = []
    for route in ("sparse", "sparse", "dense"):
        sae = JumpReLUSAE(
            2304, 16384, threshold_init=0.055, impl="triton", device="cuda", generator=torch.Generator().manual_seed(0)
        )
        states.append(TrainState.start(sae, compute_dtype))
        arguments = (states[-1], x, Loss(1e-3, 5e-3), Rule(1e-2, 0.999, 1.0, False))
        figures = sparse_step(*arguments, 4096 * 256) if route == "sparse" else dense_step(*arguments)
        assert 20 < figures.l0 < 200
        assert (figures.stalled, figures.skipped) == (0, 0)
    start = sae_weights(JumpReLUSAE(2304, 16384, threshold_init=0.055, generator=torch.Generator().manual_seed(0)))
    ours, again, dense = (sae_weights(state.sae) for state in states)
    for name, weight in ours.items():
        assert torch.equal(weight, again[name]), name
        change = (weight - start[name]).norm()
        assert change > 0
        assert (weight - dense[name]).norm() <= 0.02 * change, name


def sae_weights(sae):
    return {name: getattr(sae, name).detach().cpu() for name in NAMES}
