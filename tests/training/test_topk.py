"""Training of TopK, BatchTopK and Matryoshka SAEs: gradients, routes, what is withheld, the threshold."""

import copy

import pytest
import torch

from gemmascope.kernels import Rule
from gemmascope.saes import BatchTopKSAE, JumpReLUSAE
from gemmascope.training.calibrate import calibrate_threshold
from gemmascope.training.config import TrainConfig
from gemmascope.training.kinds import new_sae
from gemmascope.training.state import TrainState
from gemmascope.training.topk import THRESHOLD_DECAY, topk_loss_and_gradients, topk_step
from gemmascope.training.trainer import SAETrainer
from tests.kernels.native import needs_native
from tests.training.test_step import DEVICE, needs_triton

D, F, N, K = 7, 30, 11, 4
PREFIXES = (5, 12, F)
KINDS = ("topk", "batchtopk", "matryoshka")
kinds = pytest.mark.parametrize("kind", KINDS)


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
        x = x.to(state.sae.W_dec)
        made = topk_step(state, x, config, rule, None if dead is None else dead.to(x.device))
        if figures is not None:
            figures.append(made.packed)


def relative(found, exact):
    return {
        name: ((t.double().cpu() - exact[name].double()).norm() / exact[name].double().norm().clamp(min=1e-300)).item()
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
    if dead is not None:  # dead ones that fire all the same have two kinds of entries in one update
        assert (states[0].tokens_since_fired[dead] < 50 * N).any()


def by_hand(**changes):
    """Two latents and two dimensions: N = 2, k = 1, latent 1 dead."""
    config = TrainConfig.short(kind="topk", d_sae=2, k=1, aux_k=1, aux_coefficient=0.5, batch_size=2, **changes)
    sae = new_sae(config, 2, pre_encoder_bias=False).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_enc.zero_()
    return config, sae, torch.tensor([[2.0, 1.0], [1.0, 0.0]], dtype=torch.float64)


def test_one_case_by_hand():
    # z = [[2, .5], [1, 0]], so f = [[2, 0], [1, 0]], x̂ − x = [[0, −1], [0, 0]] and the loss 1/2.
    config, sae, x = by_hand()
    out = topk_loss_and_gradients(sae, x, config)
    assert out.loss == 0.5
    assert out.l0 == 1
    assert out.smallest == 1.5  # of each token's own k: their mean
    assert out.firing_count.tolist() == [2, 0]
    # g = (2/2)·[[0, −1], [0, 0]]: dz = ⟨g, W_dec[0]⟩ = 0, dW_dec[0] = 2·[0, −1], db_dec = [0, −1].
    assert out.gradients.W_dec.tolist() == [[0, -2], [0, 0]]
    assert out.gradients.b_dec.tolist() == [0, -1]
    assert out.gradients.W_enc.abs().sum() == 0
    # AuxK: e = [[0, 1], [0, 0]], f' = [.5, 0], ê − e = [[0, −.5], [0, 0]]; Σ‖e − mean e‖² = .5: loss + .5·.25/.5.
    out = topk_loss_and_gradients(sae, x, config, torch.tensor([False, True]))
    assert out.loss == 0.75
    # ∂/∂ê = 2·.5/.5·(ê − e) = [[0, −1], [0, 0]]: dz = −1, dW_enc[:, 1] = −x_0, dW_dec[1] = .5·[0, −1].
    assert out.gradients.W_enc.tolist() == [[0, -2], [0, -1]]
    assert out.gradients.b_enc.tolist() == [0, -1]
    assert out.gradients.W_dec.tolist() == [[0, -2], [0, -0.5]]
    assert out.squared_error == 0.5


@pytest.mark.parametrize("route", ["reference", "sparse"])
def test_aux_loss_of_what_does_not_vary_is_nothing(route):
    config, sae, x = by_hand(route=route)
    x = x[:1].expand(2, 2).contiguous()
    state, figures = TrainState.start(sae), []
    take(route, state, config, [x], torch.tensor([False, True]), figures)
    assert figures[0][0] == 1  # ‖x − x̂‖² alone
    assert sae.W_enc[:, 1].tolist() == [0, 0.5]
    assert state.updates == 1


@kinds
@pytest.mark.parametrize(
    "impl", [pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=needs_triton)], ids=["cpu", "triton"]
)
def test_other_implementations_are_as_good_as_plain_fp32(kind, impl):
    """err ≤ 2·err(plain PyTorch in fp32) + one ulp, each tensor in the Euclidean norm, after a few steps."""
    steps, n = (10, N) if impl == "cpu" else (2, 5)
    config, dead, exact, allowed = config_of(kind), seldom(), {}, {}
    for seed in range(0, 80, 10):
        batches = [batch(seed + i, n) for i in range(steps)]
        states = [TrainState.start(sae_of(config, dtype)) for dtype in (torch.float64, torch.float32)]
        for state in states:
            take("reference", state, config, batches, dead)
            state.settle(0.99)
        exact[seed] = states[0].tensors()
        for name, error in relative(states[1], exact[seed]).items():
            allowed[name] = max(error, allowed.get(name, 0.0))
    state = TrainState.start(sae_of(config, torch.float32, impl).to(DEVICE if impl == "triton" else "cpu"))
    take("sparse", state, config, [batch(i, n) for i in range(steps)], dead)
    state.settle(0.99)
    assert state.updates == steps
    for name, error in relative(state, exact[0]).items():
        assert error <= 2 * allowed[name] + 2**-22, name


# ---- the trainer


def rows(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(20, D, generator=torch.Generator().manual_seed(7))
    return torch.rand(n, 20, generator=generator).pow(6) @ dictionary + 1


def trainer_of(kind, **changes):
    given = {"dead_after_tokens": 20, "learning_rate": 5e-3, "lr_warmup_steps": 0, "lr_decay_steps": 0} | changes
    return SAETrainer(config_of(kind, **given), rows())


WAYS = [("fp32", "sparse"), ("bf16", "sparse"), ("fp32", "reference")]
every_way = pytest.mark.parametrize(("compute_dtype", "route"), WAYS)


def assert_same(one, other):
    tensors = [trainer.state.tensors() for trainer in (one, other)]
    assert list(tensors[0]) == list(tensors[1])
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    assert one.figures == other.figures


@kinds
@every_way
def test_a_restored_and_a_copied_trainer_go_on_with_the_same_bits(kind, compute_dtype, route):
    trainers = [trainer_of(kind, compute_dtype=compute_dtype, route=route) for _ in range(2)]
    for step in range(30):
        trainers[0].update(rows(N, step))
    assert (trainers[0].state.tokens_since_fired >= 20).any(), "nothing is dead"
    tensors, facts = trainers[0].snapshot()
    assert ("smallest_kept" in tensors) == (kind != "topk")
    trainers[1].restore({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    trainers.append(copy.deepcopy(trainers[0]))
    for trainer in trainers:
        for step in range(30, 36):
            trainer.update(rows(N, step))
    assert_same(trainers[0], trainers[1])
    assert_same(trainers[0], trainers[2])
    assert trainers[0].state.updates == 36


@kinds
@every_way
def test_what_is_not_finite_is_withheld_and_counted(kind, compute_dtype, route):
    trainer = trainer_of(kind, compute_dtype=compute_dtype, route=route)
    for step in range(8):  # until something is dead
        trainer.update(rows(N, step))
    before = {name: tensor.clone() for name, tensor in trainer.state.tensors().items() if name != "skipped"}
    for bad in (torch.nan, torch.inf, 1e30, 1e12):  # the last leaves the loss finite
        x = rows(N, 8)
        x[3, 2] = bad
        trainer.update(x)
    for name, tensor in before.items():
        assert torch.equal(trainer.state.tensors()[name], tensor), name
    assert trainer.figures["skipped"] == 4
    assert trainer.figures["made"] == 0
    trainer.update(rows(N, 9))
    assert trainer.figures["made"] == 1


@kinds
def test_bf16_copies_follow_and_the_routes_agree_on_them(kind):
    trainer = trainer_of(kind, compute_dtype="bf16")
    for step in range(12):
        trainer.update(rows(N, step))
    tensors = trainer.state.tensors()
    for name in ("W_enc", "W_dec"):
        assert torch.equal(tensors[f"{name}_low"], tensors[name].bfloat16())
    trainer.sae.W_dec.data[3] = trainer.sae.W_dec.data[4]  # behind its back: found within d_model steps
    for step in range(12, 12 + D):
        trainer.update(rows(N, step))
    trainer.flush()
    tensors = trainer.state.tensors()
    assert torch.equal(tensors["W_dec_low"], tensors["W_dec"].bfloat16())


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("route", ["reference", "sparse"])
def test_the_threshold_is_the_moving_average_of_the_smallest_that_fired(kind, route):
    trainer, weights, expected = trainer_of(kind, route=route), [], []
    for step in range(6):
        x = (rows(N, step) / trainer.sae.input_scale - trainer.sae.b_dec.detach()).double()
        z = x @ trainer.sae.W_enc.detach().double() + trainer.sae.b_enc.detach().double()
        expected.append(z.flatten().sort(descending=True).values[K * N - 1])
        trainer.update(rows(N, step))
        weights = [THRESHOLD_DECAY * weight for weight in weights] + [1]
        mean = sum(w * e for w, e in zip(weights, expected, strict=True)) / sum(weights)
        torch.testing.assert_close(trainer.sae.threshold.double(), mean.expand(F), rtol=1e-5, atol=0)


@pytest.mark.parametrize("route", ["reference", "sparse"])
def test_where_fewer_fire_than_may_the_smallest_is_nothing(route):
    trainer = trainer_of("batchtopk", route=route, k=F)
    trainer.update(rows(N))
    assert trainer.figures["l0"] < F
    assert (trainer.sae.threshold == 0).all()
    assert isinstance(trainer.sae, BatchTopKSAE)


@kinds
def test_figures(kind):
    trainer = trainer_of(kind)
    x = rows(N, 3)
    before = copy.deepcopy(trainer.sae).double()
    trainer.update(x)
    x = x.double() / trainer.sae.input_scale
    out = topk_loss_and_gradients(before, x, trainer.config, torch.zeros(F, dtype=torch.bool))
    row = trainer.report()
    assert row["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert row["l0"] == K
    spread = (x - x.mean(0)).square().sum(1)
    assert row["fvu"] == pytest.approx((out.residual.square().sum(1).mean() / spread.mean()).item(), rel=1e-5)
    assert row["window"] == 0
    assert trainer.figures["n_entries"] == K * N


@kinds
def test_goes_on_from_a_jumprelu(kind):
    start = JumpReLUSAE(D, F, input_scale=2.0, generator=torch.Generator().manual_seed(3))
    trainer = SAETrainer(config_of(kind), rows(), init_from=start)
    torch.testing.assert_close(trainer.sae.W_dec, start.W_dec)
    trainer.update(rows(N))
    assert trainer.figures["made"] == 1


@kinds
def test_the_small_recipe_learns_and_its_l0_is_what_was_asked_for(kind):
    width, k = 48, 6
    generator = torch.Generator().manual_seed(1)
    dictionary = torch.nn.functional.normalize(torch.randn(160, width, generator=generator), dim=1)

    def activations(n, seed):
        generator = torch.Generator().manual_seed(seed)
        fires = torch.rand(n, 160, generator=generator) < 0.12 / (1 + torch.arange(160) / 15)
        return 5 * (fires * (0.5 + torch.rand(n, 160, generator=generator))) @ dictionary + 1

    prefixes = {"prefixes": (16, 64, 256)} if kind == "matryoshka" else {}
    config = TrainConfig.small(kind=kind, k=k, d_sae=256, steps=150, batch_size=256, **prefixes)
    sample, fvu = activations(8000, 0), []
    trainer = SAETrainer(config, sample)
    for step in range(config.steps):
        trainer.update(sample[torch.randint(8000, (256,), generator=torch.Generator().manual_seed(step))])
        fvu.append(trainer.report()["fvu"])
    assert trainer.report()["l0"] == pytest.approx(k, rel=0.01)
    assert fvu[-1] < min(0.5, 0.6 * fvu[0]), fvu[::30]
    if isinstance(trainer.sae, BatchTopKSAE):
        found = calibrate_threshold(trainer.sae, lambda: activations(4000, 1).split(1000))
        assert found.l0_before == pytest.approx(k, rel=0.15)
        assert found.l0_after == pytest.approx(k, rel=1e-3)
        assert trainer.sae.encode_sparse(activations(4000, 2)).nnz / 4000 == pytest.approx(k, rel=0.02)
        released = trainer.sae.released()
        assert released.encode_sparse(activations(4000, 2)).nnz / 4000 == pytest.approx(k, rel=0.02)
