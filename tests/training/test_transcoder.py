"""Transcoders in training: another target, another width, a skip connection; every route against autograd in fp64."""

import copy

import pytest
import torch

from gemmascope import Transcoder, kernels
from gemmascope.activations.statistics import SiteStatistics
from gemmascope.kernels import Rule, reference
from gemmascope.saes import JumpReLUSAE
from gemmascope.saes.scaled_transcoder import ScaledSkipTranscoder, ScaledTranscoder
from gemmascope.sites import Site
from gemmascope.training import Loss, SAESpec, SAETrainer, Suite, TrainConfig, loss_and_gradients, sparse_loss, train
from gemmascope.training.state import COPIES, TrainState
from gemmascope.training.step import StepFigures, dense_step, reference_step, sparse_step
from tests.kernels.native import needs_native
from tests.training.test_step import needs_triton

D_IN, D_OUT, F, N = 7, 11, 24, 40
WIDTHS = [pytest.param(D_IN, D_OUT, id="wider"), pytest.param(D_OUT, D_IN, id="narrower"), pytest.param(9, 9, id="one")]
SKIPS = [pytest.param(False, id="plain"), pytest.param(True, id="skip")]
LOSSES = {
    "l0": Loss(0.02, 0.1),
    "target_l0": Loss(0.3, 0.1, sparsity="target_l0", target_l0=5.0, l0_of="batch"),
    "tanh": Loss(0.02, 0.1, sparsity="tanh"),
}
RULE = Rule(3e-3, 0.99, 1e-8, False)


def pairs(n=N, d_in=D_IN, d_out=D_OUT, seed=0, dtype=torch.float64):
    """Rows x, and rows y that a small network makes of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    weights = torch.Generator().manual_seed(99)
    first = torch.randn(d_in, 16, generator=weights, dtype=torch.float64)
    second = torch.randn(16, d_out, generator=weights, dtype=torch.float64)
    y = torch.relu(x @ first - 1) @ second + 0.5 * x[:, :1]
    return (x / d_in**0.5).to(dtype), (y / (4 * d_out**0.5)).to(dtype)


def make(skip=True, d_in=D_IN, d_out=D_OUT, dtype=torch.float64, impl="reference", seed=1):
    made, generator = ScaledSkipTranscoder if skip else ScaledTranscoder, torch.Generator().manual_seed(seed)
    sae = made(d_in, d_out, F, threshold_init=0.1, generator=generator, impl=impl)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec", *sae.OTHERS):
            parameter = getattr(sae, name)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        sae.threshold[:2] = 5.0  # never fire
    sae = sae.to(dtype)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def config(**changes):
    numbers = {"d_sae": F, "steps": 40, "batch_size": N, "l0_coefficient": 1e-3, "bandwidth": 0.05}
    return TrainConfig.short(**{**numbers, **changes})


def parameters(sae):
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


# ---- the loss and its gradients


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_gradients_are_those_of_autograd(d_in, d_out, skip, loss):
    sae, (x, y), loss = make(skip, d_in, d_out), pairs(d_in=d_in, d_out=d_out), LOSSES[loss]
    found = loss_and_gradients(sae, x, loss, target=y)

    out = sae.jumprelu(x, loss.bandwidth)
    y_hat = out.f @ sae.W_dec + sae.b_dec
    if isinstance(sae, ScaledSkipTranscoder):
        y_hat = y_hat + x @ sae.W_skip.T
    penalty = {
        "l0": loss.l0_coefficient * out.l0.mean(),
        "target_l0": loss.l0_coefficient * (out.l0.mean() / 5.0 - 1) ** 2,
        "tanh": loss.l0_coefficient * torch.tanh(loss.tanh_scale * out.f).sum(1).mean(),
    }[loss.sparsity]
    total = (y_hat - y).square().sum(1).mean() + penalty
    total.backward()

    assert found.loss.item() == pytest.approx(total.item(), rel=1e-13)
    ours = found.gradients._asdict() | dict(found.others)
    assert set(ours) == {name for name, _ in sae.named_parameters()}
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-11, atol=1e-13, msg=name)


def test_the_gradient_of_a_skip_is_within_the_bound():
    """That of the latents is one for it too, however small their share of the gradients is."""
    for seed in range(10):
        sae, (x, y) = make(seed=seed), pairs(seed=seed)
        found = loss_and_gradients(sae, x, Loss(0.0, 0.1), target=100 * y)
        assert found.others["W_skip"].abs().max() <= found.bound


# ---- the routes


def step(route, state, x, y, loss):
    if route == "sparse":
        return sparse_step(state, x, loss, RULE, None, target=y)
    if route == "dense":
        return dense_step(state, x, loss, RULE, y)
    return reference_step(state, x, loss, RULE, target=y)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_fifty_steps_are_the_same_by_every_route(impl, d_in, d_out, skip):
    states = {route: TrainState.start(make(skip, d_in, d_out, impl=impl)) for route in ("reference", "sparse", "dense")}
    for number in range(50):
        x, y = pairs(d_in=d_in, d_out=d_out, seed=number)
        figures = {route: step(route, state, x, y, LOSSES["l0"]).packed for route, state in states.items()}
        for route in ("sparse", "dense"):
            torch.testing.assert_close(figures[route], figures["reference"], rtol=1e-11, atol=1e-11)
    for route in ("sparse", "dense"):
        states[route].settle(RULE.beta2)
    states["reference"].settle(RULE.beta2)
    expected = states["reference"].tensors()
    moved = parameters(make(skip, d_in, d_out, impl=impl))
    for route in ("sparse", "dense"):
        for name, tensor in states[route].tensors().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-11, msg=f"{route} {name}")
    for name, before in moved.items():
        assert not torch.equal(before, getattr(states["sparse"].sae, name)), name


def test_a_skip_moves_by_plain_adam():
    """β1 = 0: v = (1 − β2)·G², p = −lr·G/(√(v/(1 − β2)) + eps), from 0 at the start."""
    sae, (x, y) = make(), pairs()
    with torch.no_grad():
        sae.W_skip.zero_()
    gradient = loss_and_gradients(sae, x, LOSSES["l0"], target=y).others["W_skip"]
    expected = 2 / N * (sae.jumprelu(x).f @ sae.W_dec + sae.b_dec - y).T @ x
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-14)
    state = TrainState.start(sae)
    sparse_step(state, x, LOSSES["l0"], RULE, None, target=y)
    torch.testing.assert_close(sae.W_skip.data, -3e-3 * gradient / (gradient.abs() + 1e-8), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(state.others_v["W_skip"], 0.01 * gradient.square(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize("impl", ["pytorch", pytest.param("cpu", marks=needs_native)])
def test_an_sae_whose_target_is_x_is_an_sae_to_the_bit(impl, route, compute_dtype):
    """Whatever a target adds does nothing by itself: the SAE's own steps are those of a target that is x."""
    states = []
    for _ in range(2):
        sae = JumpReLUSAE(D_IN, F, threshold_init=0.1, impl=impl, generator=torch.Generator().manual_seed(2))
        states.append(TrainState.start(sae, compute_dtype))
    for number in range(5):
        x = pairs(seed=number, dtype=torch.float32)[0]
        for state, target in zip(states, (None, x.clone()), strict=True):
            if route == "sparse":
                figures = sparse_step(state, x, LOSSES["l0"], RULE, None, target=target)
            else:
                figures = dense_step(state, x, LOSSES["l0"], RULE, target)
            assert StepFigures.unpack(figures.packed)["made"] == 1
    for (name, one), other in zip(states[0].tensors().items(), states[1].tensors().values(), strict=True):
        assert torch.equal(one, other), name


def errors(found, exact):
    return {name: (found[name].double() - exact[name]).norm() / exact[name].norm() for name in exact}


@needs_native
@pytest.mark.parametrize("route", ["sparse", "dense"])
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_the_native_backend_keeps_to_the_error_of_plain_pytorch(d_in, d_out, route):
    (x, y), found = pairs(d_in=d_in, d_out=d_out), {}
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        state = TrainState.start(make(True, d_in, d_out, dtype, impl))
        step(route, state, x.to(dtype), y.to(dtype), LOSSES["l0"])
        found[impl, dtype] = parameters(state.sae)
    exact = found["reference", torch.float64]
    native, plain = (errors(found[impl, torch.float32], exact) for impl in ("cpu", "reference"))
    for name in exact:
        assert native[name] <= 2 * plain[name] + 2e-7, name


@needs_triton
@pytest.mark.parametrize(("d_in", "d_out"), [(6, 6), (7, 5), (3, 8)])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_the_triton_kernels_take_a_target(d_in, d_out, route):
    (x, y), found = pairs(8, d_in, d_out), {}
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
        state = TrainState.start(make(True, d_in, d_out, dtype, impl).to(device))
        rows, loss = [t.to(device, dtype) for t in (x, y)], LOSSES["l0"]
        figures = sparse_step(state, rows[0], loss, RULE, 8 * F, target=rows[1]) if route == "sparse" else None
        figures = dense_step(state, rows[0], loss, RULE, rows[1]) if figures is None else figures
        found[impl, dtype] = parameters(state.sae.cpu()) | {"figures": figures.packed[:5].cpu()}
    exact = found["reference", torch.float64]
    ours, plain = (errors(found[impl, torch.float32], exact) for impl in ("triton", "reference"))
    for name in exact:
        assert ours[name] <= 2 * plain[name] + 2e-7, name


@needs_triton
def test_a_trainer_of_two_widths_runs_on_the_triton_kernels():
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    for impl in ("reference", "triton"):
        trainer = SAETrainer(config(), pairs()[0].float(), target=pairs()[1].float(), impl=impl, device=device)
        for number in range(3):
            trainer.update(*(t.float().to(device) for t in pairs(seed=number)))
        assert trainer.state.impl == impl
        assert trainer.figures["made"] == 1
        found[impl] = parameters(trainer.sae.cpu())
    for name, expected in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("route", ["reference", "sparse", "dense"])
@pytest.mark.parametrize("where", ["x", "y"])
def test_what_is_not_finite_is_withheld_with_the_skip(where, route, bad):
    state = TrainState.start(make(dtype=torch.float32, impl="pytorch"))
    x, y = pairs(dtype=torch.float32)
    step(route, state, x, y, LOSSES["l0"])
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    (x if where == "x" else y)[3, 1] = bad
    figures = StepFigures.unpack(step(route, state, x, y, LOSSES["l0"]).packed)
    assert (figures["made"], figures["skipped"]) == (0, 1)
    for name, tensor in state.tensors().items():
        assert name == "skipped" or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("weight", ["W_enc", "W_dec"])
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_copies_of_both_widths_are_compared_with_the_weights(d_in, d_out, weight):
    """Column after column of the wider one; of the narrower they begin again."""
    state = TrainState.start(make(False, d_in, d_out, torch.float32, "pytorch"), "bf16")
    x, y = pairs(d_in=d_in, d_out=d_out, dtype=torch.float32)
    sparse_step(state, x, LOSSES["l0"], RULE, None, target=y)
    rows = getattr(state.sae, weight).data
    column = (rows if weight == "W_dec" else rows.T)[:, -1]
    column[1] += 1  # a row that never fires, by a view that leaves no trace
    seen = []
    for _ in range(max(d_in, d_out)):
        seen.append(int(step("sparse", state, x, y, LOSSES["l0"]).stalled) & COPIES)
    assert seen[-1] == COPIES


# ---- the module


def test_the_encoder_begins_apart_from_the_decoder():
    made = [ScaledTranscoder(9, 9, F, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for name in ("W_enc", "W_dec"):
        rows = getattr(made[0], name) if name == "W_dec" else made[0].W_enc.T
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(F))
        assert torch.equal(getattr(made[0], name), getattr(made[1], name))
        assert not torch.equal(getattr(made[0], name), getattr(made[2], name))
    cosines = (made[0].W_enc.T * made[0].W_dec).sum(1)
    assert cosines.abs().mean() < 0.5
    assert made[0].W_enc.T.is_contiguous()


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_what_is_released_computes_the_same_without_scales(d_in, d_out, skip):
    sae, (x, _) = make(skip, d_in, d_out), pairs(d_in=d_in, d_out=d_out)
    sae.input_scale, sae.output_scale = 3.7, 0.21
    with torch.no_grad():
        sae.threshold[3] = -0.5  # counts as 0
    released = sae.released()
    assert type(released) is Transcoder
    x = 3.7 * x
    with torch.no_grad():
        torch.testing.assert_close(released(x), sae(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(released.encode(x), 0.21 * sae.encode(x), rtol=1e-12, atol=1e-14)
        z = x / 3.7 @ sae.W_enc + sae.b_enc
        f = torch.where(z > sae.threshold.clamp(min=0), z, 0)
        by_hand = f @ sae.W_dec + sae.b_dec + (x / 3.7 @ sae.W_skip.T if isinstance(sae, ScaledSkipTranscoder) else 0)
    torch.testing.assert_close(released(x).detach(), 0.21 * by_hand, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(released.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    with torch.no_grad():
        sae.W_dec.zero_()
    assert released.W_dec.any()  # a copy


def test_a_state_dict_holds_both_scales():
    sae = make(dtype=torch.float32)
    sae.input_scale, sae.output_scale = 2.5, 1.25
    other = make(dtype=torch.float32, seed=5)
    other.load_state_dict(sae.state_dict())
    assert (other.input_scale, other.output_scale, other.pre_encoder_bias) == (2.5, 1.25, False)
    with pytest.raises(RuntimeError, match="output_scale: expected a finite number > 0, got 0"):
        other.load_state_dict(sae.state_dict() | {"output_scale": torch.zeros((), dtype=torch.float64)})
    for verb in ("fold", "save"):
        with pytest.raises(TypeError, match=r"^\w+: expected an SAE, got a transcoder in training"):
            getattr(sae, verb)(*([] if verb == "fold" else ["x"]))


# ---- the trainer


def test_the_means_are_where_it_begins():
    """Scales of their own; without latents ŷ is the mean of y, and z is 0 at the mean of x."""
    x, y = pairs(200, dtype=torch.float32)
    x, y = 3 * x + 2, 5 * y - 1
    for scale_by, of_mean in (("mean_square", 1), ("variance", 0)):
        sae = SAETrainer(config(scale_by=scale_by), x, target=y).sae
        assert isinstance(sae, ScaledTranscoder)
        for scale, rows in ((sae.input_scale, x), (sae.output_scale, y)):
            mean = rows.double().mean(0)
            variance = (rows.double() - mean).square().sum(1).mean()
            assert scale == pytest.approx((variance + of_mean * mean.square().sum()).sqrt().item())
        torch.testing.assert_close(sae.output_scale * sae.b_dec.data, y.mean(0))
        z = x.mean(0) / sae.input_scale @ sae.W_enc + sae.b_enc
        torch.testing.assert_close(z.detach(), torch.zeros(F), rtol=0, atol=1e-6)
    sae = SAETrainer(config(b_dec_init="zeros"), x, target=y).sae
    assert not sae.b_dec.any()
    assert not sae.b_enc.any()
    statistics = (SiteStatistics.measure(x), SiteStatistics.measure(y))
    measured = SAETrainer(config(), statistics[0], target=statistics[1]).sae
    assert torch.equal(measured.b_dec, SAETrainer(config(), x, target=y).sae.b_dec)


@pytest.mark.parametrize("skip", SKIPS)
def test_a_trained_transcoder_beats_what_it_was(skip):
    x, y = pairs(2000, dtype=torch.float32)
    trainer = SAETrainer(config(skip=skip, steps=300, d_sae=96, batch_size=256), x, target=y)
    trainer.update(x[:256], y[:256])
    before = trainer.report()["fvu"]
    for number in range(299):
        rows = torch.randint(2000, (256,), generator=torch.Generator().manual_seed(number))
        trainer.update(x[rows], y[rows])
    with torch.no_grad():
        released = trainer.sae.released()
        fvu = (released(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert fvu < 0.2 < before


@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_a_snapshot_goes_on_with_the_same_bits(route):
    x, y = pairs(400, dtype=torch.float32)

    def fresh(sample=x):
        return SAETrainer(config(skip=True, route=route), sample, target=y)

    def take(trainer, first, last):
        for number in range(first, last):
            rows = torch.randint(400, (N,), generator=torch.Generator().manual_seed(number))
            trainer.update(x[rows], y[rows])

    whole, first = fresh(), fresh()
    take(whole, 0, 12)
    take(first, 0, 5)
    tensors, facts = first.snapshot()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second = fresh(2 * x)  # another scale, which the snapshot sets
    second.restore(tensors, facts)
    assert second.output_scale == first.output_scale
    take(second, 5, 12)
    for trainer in (second, copy.deepcopy(first)):
        if trainer.step == 5:
            take(trainer, 5, 12)
        found = trainer.state.tensors()
        assert {"W_skip", "W_skip_v"} <= found.keys()
        for name, tensor in whole.state.tensors().items():
            assert torch.equal(found[name], tensor), name
        assert trainer.sae.input_scale == whole.sae.input_scale
    with pytest.raises(ValueError, match=r"^facts.output_scale: expected a finite number > 0"):
        second.restore(tensors, facts | {"output_scale": -1.0})


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_memory_counts_both_widths(compute_dtype, skip):
    x, y = pairs(dtype=torch.float32)
    trainer = SAETrainer(config(skip=skip, compute_dtype=compute_dtype), x, target=y)
    memory = SAETrainer.memory(trainer.config, D_IN, d_out=D_OUT)
    held = trainer.state.tensors()
    moments = sum(tensor.nbytes for name, tensor in held.items() if name.endswith("_v"))
    copies = sum(tensor.nbytes for name, tensor in held.items() if name.endswith("_low"))
    weights = sum(p.nbytes for p in trainer.sae.parameters())
    assert (memory.weights, memory.second_moments, memory.copies) == (weights, moments, copies)
    assert memory.pending == 0
    beside = SAETrainer.memory(trainer.config.changed(skip=False), 9, d_out=9)
    alone = SAETrainer.memory(trainer.config.changed(skip=False), 9)
    assert (beside.weights, beside.entries, beside.scratch) == (alone.weights, alone.entries, alone.scratch)
    assert beside.activations > alone.activations


def test_bad_trainers_are_refused_by_name():
    x, y = pairs(dtype=torch.float32)
    trainer, sae = SAETrainer(config(), x, target=y), SAETrainer(config(), x)
    for arguments, message in (
        ((x,), "y: expected the target of a transcoder, got None"),
        ((x, y[:, :-1]), r"y: expected shape [N ≥ 1, 11], got [40, 10]"),
        ((x, y[1:]), "y: expected the 40 tokens of x, got 39"),
        ((y, y), r"x: expected shape [N ≥ 1, 7], got [40, 11]"),
    ):
        with pytest.raises(ValueError) as caught:
            trainer.update(*arguments)
        assert str(caught.value) == message
    with pytest.raises(TypeError, match=r"^y: expected a torch.Tensor"):
        trainer.update(x, [1.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^y: expected none for an SAE, got a target"):
        sae.update(x, x)
    assert trainer.step == sae.step == 0
    with pytest.raises(ValueError, match=r"^skip: expected a target with skip=True, got none"):
        SAETrainer(config(skip=True), x)
    with pytest.raises(TypeError, match=r"^skip: expected a bool, got int"):
        config(skip=1)
    resampled = TrainConfig.short(d_sae=F, steps=40, kind="gated", resample_steps=(9,))
    with pytest.raises(ValueError, match=r"^resample_steps: expected none with a target, got \[9\]"):
        SAETrainer(resampled, x, target=y)
    with pytest.raises(ValueError, match=r"^init_from: expected none with a target"):
        SAETrainer(config(), x, target=y, init_from=JumpReLUSAE(D_IN, F))
    with pytest.raises(ValueError, match=r"^target: expected activations that vary"):
        SAETrainer(config(), x, target=torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"^target: expected what the transcoder is to give, got None"):
        loss_and_gradients(make(), x.double(), Loss())
    with pytest.raises(ValueError, match=r"^target: expected what the transcoder is to give, got None"):
        sparse_loss(make(), x.double(), Loss())
    with pytest.raises(ValueError, match=r"^target: expected shape \[40, 11\], got \[40, 7\]"):
        loss_and_gradients(make(), x.double(), Loss(), target=x.double())


def test_operators_refuse_rows_of_another_width():
    state = TrainState.start(make(False, dtype=torch.float32))
    dW, db = torch.zeros(F, D_OUT), torch.zeros(F)
    touched, ok = torch.ones(F, dtype=torch.int32), torch.ones((), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^dW_enc: expected shape \[24, 7\], got \[24, 11\]"):
        kernels.update_from_dense(state.latents, dW, dW, db, db, touched, RULE, ok, state.updates)
    latents = state.latents._replace(W_enc_v=torch.zeros(F, D_OUT))
    with pytest.raises(ValueError, match=r"^state.W_enc_v: expected shape \[24, 7\], got \[24, 11\]"):
        kernels.settle(latents, state.updates, 0.99)
    assert reference.conclusion.copies_differ(state.latents, 3) is None


# ---- several at once


X, Y = Site(1, "mlp_in"), Site(1, "mlp")


def statistics():
    x, y = pairs(400, dtype=torch.float32)
    return {X: SiteStatistics.measure(x), Y: SiteStatistics.measure(y)}


def test_a_suite_trains_transcoders_beside_saes():
    specs = [SAESpec("sae", Y, config()), SAESpec("transcoder", X, config(skip=True), target=Y)]
    suite = Suite(specs, statistics(), model_name="tiny")
    sae, alone = (
        SAETrainer(config(), statistics()[Y]),
        SAETrainer(config(skip=True), statistics()[X], target=statistics()[Y]),
    )
    for number in range(4):
        x, y = pairs(seed=number, dtype=torch.float32)
        suite.update({X: x, Y: y})
        sae.update(y)
        alone.update(x, y)
    for name, expected in (("sae", sae), ("transcoder", alone)):
        ours = suite.trainers[name].state.tensors()
        assert all(torch.equal(ours[key], tensor) for key, tensor in expected.state.tensors().items())
    metadata = suite.trainers["transcoder"].sae.metadata
    assert (metadata["site"], metadata["site_out"]) == (X.name, Y.name)
    suite.close()


def test_bad_suites_are_refused_by_name():
    spec = SAESpec("transcoder", X, config(), target=Y)
    x, y = pairs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^statistics: expected those of every SAE's site, layer_1/mlp is missing"):
        Suite([spec], {X: statistics()[X]}, model_name="tiny")
    suite = Suite([spec], statistics(), model_name="tiny")
    with pytest.raises(ValueError, match=r"^batch: expected batches of every trainer's site, layer_1/mlp is missing"):
        suite.update({X: x})
    with pytest.raises(ValueError, match=r"^batch\[layer_1/mlp\]: expected the 40 tokens of batch\["):
        suite.update({X: x, Y: y[:3]})
    suite.close()
    with pytest.raises(ValueError, match=r"^target: expected another site than layer_1/mlp itself"):
        SAESpec("sae", Y, config(), target=Y)
    with pytest.raises(ValueError, match=r"^target: expected one of att, mlp, resid, where something is written, got"):
        SAESpec("sae", Y, config(), target=X)
    with pytest.raises(ValueError, match=r"^skip: expected a target with skip=True, got none for layer_1/mlp_in"):
        SAESpec("sae", X, config(skip=True))
    with pytest.raises(ValueError, match=r"^init_from: expected none with a target, got 'x'"):
        SAESpec("sae", X, config(), "x", target=Y)
    resampled = TrainConfig.short(d_sae=F, steps=40, kind="gated", resample_steps=(9,))
    with pytest.raises(ValueError, match=r"^resample_steps: expected none with a target, got \[9\]"):
        SAESpec("sae", X, resampled, target=Y)
    with pytest.raises(TypeError, match=r"^target: expected a Site, got str"):
        SAESpec("sae", X, config(), target="mlp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^trainers: expected SAEs, got a transcoder at layer_1/mlp_in"):
        train({X: SAETrainer(config(), x, target=y)}, [{X: x}])
