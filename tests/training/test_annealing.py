"""Penalties of a power of the activations, and p-annealing: the formulas by hand and by automatic differentiation,
every route against them in fp64, and the factor by which λ follows."""

import copy
import math

import pytest
import torch

from gemmascope.saes import GatedSAE, JumpReLUSAE
from gemmascope.training import SAETrainer, TrainConfig
from gemmascope.training.annealing import compared, concave, factor, follow, slope, steepest
from gemmascope.training.annealing import start as start_annealing
from gemmascope.training.config import CLOSED_WINDOW, P_OFFSET, P_WINDOW, Annealing, Loss
from gemmascope.training.gated import gated_loss_and_gradients
from gemmascope.training.losses import loss_and_gradients
from gemmascope.training.sparse_loss import sparse_loss
from gemmascope.training.state import TrainState
from tests.training.test_step import DEVICE, IMPLS, ON_GPU, needs_triton

D, F, N = 6, 24, 16
P = Loss(0.05, CLOSED_WINDOW, sparsity="l1", p=0.4)


def rows(n, seed=0, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) + 1


def recipe(kind="relu", **changes):
    options = {"d_sae": F, "steps": 60, "l0_coefficient": 0.05, "p_end": 0.3, "anneal_start": 13, "anneal_changes": 4}
    return TrainConfig.short(**{"kind": kind, **options, **changes})


def made(kind, dtype=torch.float64):
    cls = {"relu": JumpReLUSAE, "gated": GatedSAE}[kind]
    options = {"threshold_init": 0.0} if kind == "relu" else {}
    sae = cls(D, F, generator=torch.Generator().manual_seed(0), dtype=dtype, **options)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", *sae.OTHERS):
            parameter = getattr(sae, name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return sae


def penalty(f, p):
    return ((f + P_OFFSET) ** p - P_OFFSET**p).sum()


def autograd_loss(sae, x, coefficient, p):
    """The loss, and the activations that its penalty is of."""
    centred = x - sae.b_dec if sae.pre_encoder_bias else x
    z = centred @ sae.W_enc + sae.b_enc
    rectified = torch.relu(z)
    if not isinstance(sae, GatedSAE):
        error = (rectified @ sae.W_dec + sae.b_dec - x).square().sum()
        return (error + coefficient * penalty(rectified, p)) / len(x), rectified
    m = sae.r_mag.exp() * (centred @ sae.W_enc) + sae.b_mag
    f = (z > 0) * torch.relu(m)
    frozen = (rectified @ sae.W_dec.detach() + sae.b_dec.detach() - x).square().sum()
    error = (f @ sae.W_dec + sae.b_dec - x).square().sum()
    return (error + coefficient * penalty(rectified, p) + frozen) / len(x), rectified


# ---- the penalty


def test_by_hand():
    """f = 2 and x = 3: ‖r‖² = 1, λ(√(2 + δ) − √δ) with λ = ¼; ∂L/∂f = 2·(−1) + λ·½/√(2 + δ)."""
    sae = JumpReLUSAE(1, 1, threshold_init=0.0, dtype=torch.float64)
    with torch.no_grad():
        for name, value in {"W_enc": 1, "W_dec": 1, "b_enc": -1}.items():
            getattr(sae, name).fill_(value)
    out = loss_and_gradients(sae, torch.tensor([[3.0]], dtype=torch.float64), Loss(0.25, sparsity="l1", p=0.5))
    assert out.loss.item() == pytest.approx(1 + 0.25 * (math.sqrt(2.0001) - 0.01), rel=1e-14)
    assert out.gradients.b_enc.item() == pytest.approx(-2 + 0.125 / math.sqrt(2.0001), rel=1e-14)


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
def test_the_bounded_form_is_the_power(p):
    f = torch.tensor([0.0, 1e-9, 1e-4, 0.5, 300.0], dtype=torch.float64, requires_grad=True)
    of_power = (f + P_OFFSET) ** p - P_OFFSET**p
    (gradient,) = torch.autograd.grad(of_power.sum(), f)
    torch.testing.assert_close(steepest(p) * concave(f, p), of_power, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(steepest(p) * slope(f, p), gradient)
    assert slope(f, p).max() == slope(f, p)[0] == 1
    assert (concave(f, p) <= f).all()
    nan = torch.tensor([math.nan, 1.0])
    assert concave(nan, p).isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_gradients_equal_automatic_differentiation(kind):
    sae, x = made(kind), rows(N).double() / 8
    expected, _ = autograd_loss(sae, x, P.l0_coefficient, P.p)
    expected.backward()
    out = (loss_and_gradients if kind == "relu" else gated_loss_and_gradients)(sae, x, P)
    torch.testing.assert_close(out.loss, expected.detach())
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", *sae.OTHERS):
        torch.testing.assert_close(getattr(out.gradients, name), getattr(sae, name).grad)
        assert getattr(out.gradients, name).abs().amax() <= out.bound or name == "b_dec"
    plain = P.l0_coefficient * 0.4 * P_OFFSET**-0.6
    assert out.bound >= plain  # the steepest slope


@pytest.mark.parametrize("impl", IMPLS)
def test_sparse_loss_has_the_penalty(impl):
    sae, x = made("relu", torch.float32), rows(5 if impl == "triton" else N) / 8
    exact = loss_and_gradients(copy.deepcopy(sae).double(), x.double(), P)
    sae, x = sae.to(DEVICE if impl == "triton" else "cpu"), x.to(DEVICE if impl == "triton" else "cpu")
    sae.impl = impl
    loss = sparse_loss(sae, x, P)
    loss.backward()
    assert loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        expected = getattr(exact.gradients, name)
        error = (getattr(sae, name).grad.double().cpu() - expected).norm() / expected.norm()
        assert error < 2e-6, name


# ---- annealing


def test_the_schedule():
    config = recipe()
    found = [config.annealing_at(step) for step in range(60)]
    changes = [each.changes for each in found]
    # 47 updates in four parts from update 13 on
    assert [changes.index(number) for number in range(5)] == [0, 13, 25, 37, 49]
    assert {each.p for each in found} == {1.0, 0.825, 0.65, 0.475, 0.3}
    assert [step for step, each in enumerate(found) if each.next_p is not None] == [
        step for change in (13, 25, 37, 49) for step in range(change - P_WINDOW, change)
    ]
    for now, after in zip(found, found[P_WINDOW:], strict=False):
        assert now.next_p is None or now.next_p == pytest.approx(1 - 0.175 * (now.changes + 1))
        assert after.changes <= now.changes + 1
    assert config.annealing_at(1000) == found[-1]
    assert [config.loss_at(step).p for step in (0, 30, 59)] == [1, 0.65, 0.3]
    assert recipe(p_end=None, anneal_start=None).annealing_at(30) is None
    # by default from where the warm-up of λ ends, or from the second update on
    assert recipe(anneal_start=None, l0_warmup_steps=20).annealing_at(20).changes == 1
    assert recipe(anneal_start=None, l0_warmup_steps=20).annealing_at(19).changes == 0
    assert recipe(anneal_start=None, l0_warmup_steps=0).annealing_at(1).changes == 1


def oracle(config, trainer, batches):
    """Plain Adam on automatic differentiation, with the queue of the paper's code; the λ of every update, too."""
    sae, queue, times, used = copy.deepcopy(trainer.sae), [], 1.0, []
    names = [name for name, _ in sae.named_parameters() if name != "threshold"]
    v = {name: torch.zeros_like(getattr(sae, name)) for name in names}
    p = 1.0
    for step, x in enumerate(batches):
        now = config.annealing_at(step)
        if now.p != p:
            times *= sum(old for old, _ in queue) / sum(new for _, new in queue)
            p, queue = now.p, []
        used.append(config.l0_coefficient_at(step) * times)
        sae.zero_grad()
        loss, f = autograd_loss(sae, x.double() / sae.input_scale, used[-1], p)
        loss.backward()
        f = f.detach()
        queue.append((penalty(f, p).item(), penalty(f, p - 0.7 / config.anneal_changes).item()))
        queue = queue[-P_WINDOW:]
        with torch.no_grad():
            for name, moment in v.items():
                parameter = getattr(sae, name)
                g = parameter.grad
                if name == "W_dec":
                    g = g - (g * parameter).sum(1, keepdim=True) * parameter
                moment.mul_(config.adam_beta2).add_((1 - config.adam_beta2) * g * g)
                unbiased = moment / (1 - config.adam_beta2 ** (step + 1))
                parameter.sub_(config.learning_rate_at(step) * g / (unbiased.sqrt() + config.adam_eps))
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return {name: getattr(sae, name).detach() for name in names}, used


@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_a_training_equals_plain_adam_in_fp64(kind, route):
    config, used = recipe(kind, route=route), []
    trainer = SAETrainer(config, rows(64), impl="reference", dtype=torch.float64)
    batches = [rows(N, seed) for seed in range(60)]
    expected, coefficients = oracle(config, trainer, batches)
    for x in batches:
        trainer.update(x)
        used.append(trainer.report()["l0_coefficient"])
    assert used == pytest.approx(coefficients, rel=1e-9)
    assert trainer.report()["p"] == 0.3
    for name, value in expected.items():
        error = (getattr(trainer.sae, name).detach() - value).norm() / value.norm()
        assert error < 1e-9, f"{name}: {error:.2g}"
    # λ was changed by the measured ratios, and not by little
    assert used[-1] / config.l0_coefficient_at(59) == pytest.approx(math.prod(ratios(used, config)), rel=1e-9)
    assert abs(math.log(used[-1] / config.l0_coefficient_at(59))) > 0.1


def ratios(used, config):
    return [
        used[step] / used[step - 1] * config.l0_coefficient_at(step - 1) / config.l0_coefficient_at(step)
        for step in (13, 25, 37, 49)
    ]


@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("pytorch", id="pytorch")])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_routes_in_fp32(kind, impl, route):
    """As far from fp64 as a run of the reference's whose start is moved by an ulp or so; in the interpreter the
    schedule is a short one."""
    short = impl == "triton" and not ON_GPU
    options = {"steps": 6, "anneal_start": 2, "anneal_changes": 2, "d_sae": 12} if short else {}
    config = recipe(kind, **options, route=route)
    batches = [rows(5 if short else N, seed) for seed in range(config.steps)]

    def trained(impl, dtype, device="cpu", moved=0):
        trainer = SAETrainer(config, rows(64), impl=impl, dtype=dtype, device=device)
        with torch.no_grad():
            noise = torch.randn(trainer.sae.W_enc.shape, generator=torch.Generator().manual_seed(moved))
            trainer.sae.W_enc.mul_((1 + 2e-7 * bool(moved) * noise).to(trainer.sae.W_enc))
        for x in batches:
            trainer.update(x)
        return {name: p.detach().double().cpu() for name, p in trainer.sae.named_parameters()} | {
            "λ": torch.tensor(trainer.report()["l0_coefficient"], dtype=torch.float64)
        }

    exact = trained("reference", torch.float64)
    moved = [trained("reference", torch.float32, moved=seed) for seed in range(1, 6)]
    found = trained(impl, torch.float32, DEVICE if impl == "triton" else "cpu")
    for name, value in exact.items():
        if name == "threshold":
            assert not found[name].any()
            continue
        allowed = max((each[name] - value).norm() for each in moved)
        assert (found[name] - value).norm() <= 3 * allowed + 2e-6 * value.norm(), name


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_tiles_of_latents_change_nothing(kind, monkeypatch):
    from gemmascope.training import memory

    found = []
    for elements in (memory.DENSE_ELEMENTS, N * 8 * (memory.GATED_TILES if kind == "gated" else 1)):
        monkeypatch.setattr(memory, "DENSE_ELEMENTS", elements)
        trainer = SAETrainer(recipe(kind, route="dense"), rows(64), dtype=torch.float64)
        for seed in range(30):
            trainer.update(rows(N, seed))
        found.append((trainer.sae.W_dec.detach(), trainer.state.annealing))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_it_goes_on_with_the_same_bits_between_two_changes(kind):
    trainer = SAETrainer(recipe(kind), rows(64))
    for seed in range(20):
        trainer.update(rows(N, seed))
    tensors, facts = trainer.snapshot()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other = SAETrainer(recipe(kind), rows(64))
    other.restore(tensors, facts)
    assert other.state.annealing is not None
    assert other.state.annealing[2] > 0  # amid what is compared
    for each in (trainer, other):
        for seed in range(20, 40):
            each.update(rows(N, seed))
    assert trainer.report() == other.report()
    for name, tensor in trainer.state.tensors().items():
        assert torch.equal(other.state.tensors()[name], tensor), name


@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_what_is_withheld_leaves_the_factor_alone(route):
    """NaN in the window before a change adds nothing, and at the change itself the next update makes it."""
    factors, before = [], None
    for bad in ((), (8, 13)):
        trainer = SAETrainer(recipe(route=route), rows(64), dtype=torch.float64)
        for step in range(15):
            x = rows(N, step)
            if step in bad:
                before = trainer.state.annealing.clone()
                x[3, 2] = math.nan
            trainer.update(x)
            if step in bad:
                assert torch.equal(trainer.state.annealing, before)
        factors.append(trainer.state.annealing[:2].tolist())
        assert trainer.report()["skipped"] == len(bad)
    assert factors[0][0] == factors[1][0] == 1
    assert factors[0][1] == pytest.approx(factors[1][1], rel=0.2)
    assert 1 != factors[1][1] != factors[0][1]


@needs_triton
def test_entries_that_do_not_fit_leave_the_factor_alone():
    found = []
    for capacity in (None, 7):
        config = recipe(route="sparse", steps=4, anneal_start=1, anneal_changes=2, d_sae=12)
        trainer = SAETrainer(config, rows(64), impl="triton", device=DEVICE)
        trainer.update(rows(5))
        trainer.capacity = capacity
        for seed in (1, 2, 3):
            trainer.update(rows(5, seed))
        trainer.flush()
        found.append(trainer.state.annealing.tolist())
    assert found[0] == found[1]
    assert found[0][:1] == [2]


def test_the_factor_by_hand():
    kept, f = start_annealing(torch.device("cpu")), torch.tensor([0.0, 2.0], dtype=torch.float64)
    before, after = Annealing(0, 1.0, 0.5), Annealing(1, 0.5, None)
    of_batch = compared(before, f)
    torch.testing.assert_close(of_batch, torch.tensor([2.0, math.sqrt(2.0001) - 0.01], dtype=torch.float64))
    follow(kept, before, of_batch, torch.tensor(1))
    follow(kept, before, 3 * of_batch, torch.tensor(0))  # withheld
    assert factor(kept, before) == 1
    assert factor(kept, after) == of_batch[0] / of_batch[1]
    follow(kept, after, compared(after, f), torch.tensor(1))
    assert kept.tolist() == [1, of_batch[0] / of_batch[1], 0, 0]
    assert factor(kept, Annealing(2, 0.2, None)) == kept[1]  # nothing was compared


def test_a_relu_transcoder_has_the_penalty():
    found = []
    for route in ("reference", "sparse", "dense"):
        config = recipe(route=route)
        y = [rows(n, seed + 100, 4) for n, seed in ((64, 0), *((N, seed) for seed in range(30)))]
        trainer = SAETrainer(config, rows(64), target=y[0], dtype=torch.float64)
        for seed in range(30):
            trainer.update(rows(N, seed), y[seed + 1])
        found.append((trainer.sae.W_dec.detach(), trainer.state.annealing))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(other[1], found[0][1], rtol=1e-9, atol=0)
    assert found[0][1][1] != 1


def test_a_small_p_leaves_fewer_latents_for_the_same_error():
    """On directions of which two make up each token: what p-annealing is for."""
    directions = torch.nn.functional.normalize(torch.randn(20, 12, generator=torch.Generator().manual_seed(3)), dim=1)

    def tokens(n, seed):
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(20, (n, 2), generator=generator)
        return (directions[which] * (1 + torch.rand(n, 2, 1, generator=generator))).sum(1)

    found = {}
    for p_end in (None, 0.3):
        options = {"d_sae": 40, "steps": 400, "anneal_changes": 10, "l0_coefficient": 0.2}
        config = recipe(**options, p_end=p_end, anneal_start=None)
        trainer, reports = SAETrainer(config, tokens(512, 1)), []
        for seed in range(400):
            trainer.update(tokens(128, seed))
            if seed >= 380:
                reports.append(trainer.report())
        found[p_end] = [sum(each[name] for each in reports) / 20 for name in ("fvu", "l0")]
    assert found[0.3][0] < found[None][0]
    assert found[0.3][1] < found[None][1]


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p_end": 0}, "p_end: expected a finite number > 0 and ≤ 1, got 0"),
        ({"p_end": 1.5}, "p_end: expected "),
        ({"p": 0.5, "p_end": 0.6}, "p_end: expected "),
        ({"p": 0}, "p: expected "),
        ({"p_end": None}, "anneal_start: expected None without p_end, got 13"),
        ({"anneal_start": 0}, "anneal_start: expected "),
        ({"anneal_changes": 0}, "anneal_changes: expected "),
        ({"anneal_start": 57}, "anneal_changes: expected at most the 3 updates from update 57 to the end, got 4"),
        ({"anneal_start": 99}, "anneal_changes: expected at most the 0 updates from update 99 to the end, got 4"),
        ({"kind": "jumprelu", "l0_coefficient": 1e-3}, "p_end: expected None with kind='jumprelu', got 0.3"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError) as error:
        recipe(**changes)
    assert str(error.value).startswith(message)


def test_a_power_belongs_to_l1():
    with pytest.raises(ValueError, match=r"p: expected 1 with sparsity='l0', got 0\.5"):
        Loss(p=0.5)


def test_states_have_it_where_it_is_annealed():
    assert TrainState.start(made("relu", torch.float32)).annealing is None
    assert SAETrainer(recipe(p_end=None, anneal_start=None), rows(64)).state.annealing is None
