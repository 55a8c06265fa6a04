"""Cross-layer transcoders in training: the loss by hand and by autograd, every route, withheld updates, resume."""

import copy
import itertools
import json
import math

import pytest
import torch

from gemmascope import CrossLayerTranscoder
from gemmascope.activations.moments import moments
from gemmascope.activations.statistics import SiteStatistics
from gemmascope.kernels import Rule
from gemmascope.saes.scaled_clt import ScaledCLT
from gemmascope.saes.scaled_transcoder import ScaledTranscoder
from gemmascope.training import CLTTrainer, Loss, TrainConfig, clt_loss_and_gradients, loss_and_gradients
from gemmascope.training.checkpoint import Checkpoints
from gemmascope.training.clt_step import clt_step
from gemmascope.training.state import TrainState
from gemmascope.training.step import sparse_step
from tests.kernels.native import needs_native
from tests.training.test_step import needs_triton

D_IN, D_OUT, F, N = (7, 5, 6), (4, 6, 3), 20, 40
LOSSES = {
    "l0": Loss(0.02, 0.1),
    "target_l0": Loss(0.3, 0.1, sparsity="target_l0", target_l0=8.0, l0_of="batch"),
    "target_l0 of each token": Loss(0.3, 0.1, sparsity="target_l0", target_l0=8.0),
    "tanh": Loss(0.02, 0.1, sparsity="tanh"),
    "frequency": Loss(0.02, 0.1, frequency_scale=0.1),
    "ste_to_z": Loss(0.02, 0.1, ste_to_z=True),
    "l1": Loss(0.02, 1e-30, sparsity="l1"),
}
RULE = Rule(3e-3, 0.99, 1e-8, False)
ROUTES = ("reference", "sparse", "dense")


def batch(n=N, seed=0, dtype=torch.float64, d_in=D_IN, d_out=D_OUT):
    """Inputs of each layer, and outputs that depend on their own layer's input and on those before it."""
    generator, weights = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    xs = [torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5 for d in d_in]
    ys = []
    for layer, d in enumerate(d_out):
        y = 0.1
        for x in xs[: layer + 1]:
            y = y + torch.relu(x @ torch.randn(x.shape[1], d, generator=weights, dtype=torch.float64)) / d**0.5 / 2
        ys.append(y)
    return [x.to(dtype) for x in xs], [y.to(dtype) for y in ys]


def make(dtype=torch.float64, impl="reference", seed=1, d_in=D_IN, d_out=D_OUT, scales=None):
    generator = torch.Generator().manual_seed(seed)
    scales = scales or [1.0] * len(d_in)
    options = {"threshold_init": 0.1, "generator": generator, "impl": impl}
    clt = ScaledCLT(d_in, d_out, F, input_scales=scales, output_scales=scales[::-1], **options)
    with torch.no_grad():
        for source in clt.sources:
            for parameter in (source.W_enc, source.b_enc, source.b_dec):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            source.threshold[:2] = 5.0  # never fire
        clt = clt.to(dtype)
        for source in clt.sources:
            source.W_dec.div_(source.W_dec.norm(dim=1, keepdim=True))
    return clt


def started(clt, compute_dtype="fp32"):
    return [TrainState.start(source, compute_dtype) for source in clt.sources]


def tensors_of(states):
    return {f"{i}.{name}": t for i, state in enumerate(states) for name, t in state.tensors().items()}


def config(**changes):
    numbers = {"d_sae": F, "steps": 40, "batch_size": N, "l0_coefficient": 1e-3, "bandwidth": 0.05}
    return TrainConfig.short(**{**numbers, **changes})


# ---- the loss and its gradients


def test_a_case_by_hand():
    """Two layers, one latent each, everything one wide. x = (2, 1), y = (3, 10).

    Both encoders are 1 with bias 0, so that f = (2, 1), above θ = 0.5. Latent 0 writes .6 to output 0 and .8 to output
    1, latent 1 writes 1 to output 1. ŷ = (.6·2, .8·2 + 1·1) = (1.2, 2.6), r = (−1.8, −7.4), g = 2r = (−3.6, −14.8).
    """
    clt = make(d_in=(1, 1), d_out=(1, 1))
    with torch.no_grad():
        for source in clt.sources:
            source.W_enc.zero_()[0, 0], source.threshold[:] = 1, 0.5
            source.b_enc.zero_()
            source.b_dec.zero_()
            source.b_enc[1:] = -100
        clt.sources[0].W_dec[0], clt.sources[1].W_dec[0] = torch.tensor([0.6, 0.8], dtype=torch.float64), 1
    xs, ys = [torch.tensor([[v]], dtype=torch.float64) for v in (2, 1)], [[3.0], [10.0]]
    ys = [torch.tensor([v], dtype=torch.float64) for v in ys]
    found = clt_loss_and_gradients(clt, xs, ys, Loss(0.25, 0.1))
    assert found.loss.item() == pytest.approx(1.8**2 + 7.4**2 + 0.25 * 2, rel=1e-14)
    assert [e.item() for e in found.errors] == pytest.approx([3.24, 54.76])
    assert found.l0.tolist() == [1, 1]
    first, second = found.gradients
    u = 0.6 * -3.6 + 0.8 * -14.8  # −14
    assert first.b_enc[0].item() == pytest.approx(u)
    assert first.W_enc[0, 0].item() == pytest.approx(2 * u)
    assert first.W_dec[0].tolist() == pytest.approx([2 * -3.6, 2 * -14.8])
    assert first.b_dec.tolist() == pytest.approx([-3.6])
    assert second.b_enc[0].item() == pytest.approx(-14.8)
    assert second.W_dec[0].tolist() == pytest.approx([-14.8])
    assert second.b_dec.tolist() == pytest.approx([-14.8])
    with torch.no_grad():
        clt.sources[0].threshold[0] = 1.96  # 2 is in the window of ±.05
    found = clt_loss_and_gradients(clt, xs, ys, Loss(0.25, 0.1))
    assert found.gradients[0].threshold[0].item() == pytest.approx(-(1.96 * u + 0.25) / 0.1)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("frequency", "ste_to_z")])
def test_gradients_are_those_of_autograd(name):
    clt, (xs, ys), loss = make(), batch(), LOSSES[name]
    found = clt_loss_and_gradients(clt, xs, ys, loss)

    outs = [source.jumprelu(x, loss.bandwidth) for source, x in zip(clt.sources, xs, strict=True)]
    y_hat = [source.b_dec.expand(N, -1) for source in clt.sources]
    for layer, (source, out) in enumerate(zip(clt.sources, outs, strict=True)):
        parts = (out.f @ source.W_dec).split(D_OUT[layer:], 1)
        y_hat[layer:] = [y + part for y, part in zip(y_hat[layer:], parts, strict=True)]
    l0, f = sum(out.l0 for out in outs), torch.cat([out.f for out in outs], 1)
    penalty = {
        "l0": loss.l0_coefficient * l0.mean(),
        "target_l0": loss.l0_coefficient
        * ((l0.mean() / 8 - 1) ** 2 if loss.l0_of == "batch" else ((l0 / 8 - 1) ** 2).mean()),
        "tanh": loss.l0_coefficient * torch.tanh(loss.tanh_scale * f).sum(1).mean(),
        "l1": loss.l0_coefficient * f.sum(1).mean(),
    }[loss.sparsity]
    total = sum((a - b).square().sum(1).mean() for a, b in zip(y_hat, ys, strict=True)) + penalty
    total.backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-13)
    for layer, source in enumerate(clt.sources):
        for key, parameter in source.named_parameters():
            ours = getattr(found.gradients[layer], key)
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-11, atol=1e-13, msg=f"{layer} {key}")
            assert parameter.grad.abs().max() <= found.bound


def test_the_gradient_of_the_frequency_penalty():
    """(2λ/s)·p_j/N for each token in the window, as of a penalty λ·Σ p_j²/s."""
    clt, (xs, ys) = make(), batch()
    with_it, without = (clt_loss_and_gradients(clt, xs, ys, LOSSES[name]) for name in ("frequency", "l0"))
    shares = []
    for layer, (source, x) in enumerate(zip(clt.sources, xs, strict=True)):
        z = x @ source.W_enc + source.b_enc
        shares.append((z > source.threshold).double().mean(0))
        p, inside = shares[-1], (z - source.threshold).abs() < 0.05
        expected = -(2 * 0.02 / 0.1) * p / N * inside.sum(0) / 0.1
        difference = with_it.gradients[layer].threshold - without.gradients[layer].threshold
        torch.testing.assert_close(difference, expected.detach(), rtol=1e-9, atol=1e-12)
        assert difference.abs().max() > 0
    rise = 0.02 * torch.cat(shares).square().sum() / 0.1
    assert (with_it.loss - without.loss).item() == pytest.approx(rise.item(), rel=1e-5)  # shares are fp32


def test_one_layer_is_a_transcoder():
    clt, (xs, ys), loss = make(d_in=(7,), d_out=(4,)), batch(d_in=(7,), d_out=(4,)), LOSSES["l0"]
    transcoder = ScaledTranscoder(7, 4, F).double()
    with torch.no_grad():
        for name, parameter in clt.sources[0].named_parameters():
            getattr(transcoder, name).copy_(parameter)
    expected = loss_and_gradients(transcoder, xs[0], loss, target=ys[0])
    found = clt_loss_and_gradients(clt, xs, ys, loss)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-14)
    transcoder.impl = "pytorch"
    clt = make(impl="pytorch", d_in=(7,), d_out=(4,))
    states, state = started(clt), TrainState.start(transcoder)
    for number in range(5):
        xs, ys = batch(seed=number, d_in=(7,), d_out=(4,))
        clt_step(clt, states, xs, ys, loss, RULE, "sparse")
        sparse_step(state, xs[0], loss, RULE, None, target=ys[0])
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(states[0].tensors()[name], tensor, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_training_leaves_computes_the_same(dtype):
    clt, (xs, _) = make(dtype, scales=[2.0, 0.5, 3.0]), batch(dtype=dtype)
    raw = [x * 2 for x in xs]
    released = clt.released()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for ours, theirs in zip(released(raw), clt(raw), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    before = released.sources[0].W_dec.clone()
    with torch.no_grad():
        clt.sources[0].W_dec.zero_()
    assert torch.equal(released.sources[0].W_dec, before)


# ---- the routes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_fifty_steps_are_the_same_by_every_route(impl, loss):
    clts = {route: make(impl=impl) for route in ROUTES}
    states = {route: started(clt) for route, clt in clts.items()}
    for number in range(50):
        (xs, ys), figures = batch(seed=number), {}
        for route in ROUTES:
            figures[route] = clt_step(clts[route], states[route], xs, ys, LOSSES[loss], RULE, route)
        for route in ROUTES[1:]:
            ours, expected = figures[route], figures["reference"]
            assert [*ours.l0, *ours.fvu, ours.loss] == pytest.approx(
                [*expected.l0, *expected.fvu, expected.loss], 1e-11
            )
            assert (ours.n_entries, ours.made, ours.skipped) == (expected.n_entries, True, 0)
    for each in states.values():
        for state in each:
            state.settle(RULE.beta2)
    expected = tensors_of(states["reference"])
    for route in ROUTES[1:]:
        for name, tensor in tensors_of(states[route]).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-11, msg=f"{route} {name}")
    for source, before in zip(clts["sparse"].sources, make(impl=impl).sources, strict=True):
        for name, parameter in before.named_parameters():
            assert torch.equal(parameter, getattr(source, name)) == (loss == "l1" and name == "threshold"), name
        torch.testing.assert_close(source.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64), rtol=0, atol=1e-13)


def test_in_tiles_of_latents(monkeypatch):
    steps = []
    for elements in (1 << 29, 7 * N):
        monkeypatch.setattr("gemmascope.training.memory.DENSE_ELEMENTS", elements)
        monkeypatch.setattr("gemmascope.training.clt_step.DENSE_ELEMENTS", elements)
        clt = make(impl="pytorch")
        states = started(clt)
        for number in range(3):
            clt_step(clt, states, *batch(seed=number), LOSSES["tanh"], RULE, "dense")
        steps.append(tensors_of(states))
    for name, tensor in steps[0].items():
        torch.testing.assert_close(steps[1][name], tensor, rtol=1e-12, atol=1e-13, msg=name)


def errors(found, exact):
    return {name: (found[name].double() - exact[name]).norm() / exact[name].norm() for name in exact}


@needs_native
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_the_native_backend_keeps_to_the_error_of_plain_pytorch(route):
    found = {}
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        clt = make(dtype, impl)
        clt_step(clt, started(clt), *batch(dtype=dtype), LOSSES["l0"], RULE, route)
        found[impl, dtype] = {name: p.detach() for name, p in clt.named_parameters()}
    exact = found["reference", torch.float64]
    native, plain = (errors(found[impl, torch.float32], exact) for impl in ("cpu", "reference"))
    for name in exact:
        assert native[name] <= 2 * plain[name] + 2e-7, name


@needs_triton
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_the_triton_kernels_keep_to_the_error_of_plain_pytorch(route):
    """Decoders wider than encoders, and in the last layer narrower; two steps, the second with first moments."""
    device, found, rule = "cuda" if torch.cuda.is_available() else "cpu", {}, RULE._replace(beta1=0.7)
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        where = device if impl == "triton" else "cpu"
        clt = make(dtype, impl).to(where)
        states = [TrainState.start(source, first_moments=True) for source in clt.sources]
        assert all(state.impl == impl for state in states)
        for number in range(2):
            xs, ys = ([t.to(where) for t in of] for of in batch(seed=number, dtype=dtype))
            clt_step(clt, states, xs, ys, LOSSES["l0"], rule, route)
        found[impl, dtype] = {name: p.detach().cpu() for name, p in clt.named_parameters()}
    exact = found["reference", torch.float64]
    ours, plain = (errors(found[impl, torch.float32], exact) for impl in ("triton", "reference"))
    for name in exact:
        assert ours[name] <= 2 * plain[name] + 2e-7, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("where", ["x of the first", "x of the last", "y of the last"])
def test_what_is_not_finite_is_withheld_in_every_layer(where, route, bad):
    clt = make(torch.float32, "pytorch")
    states, (xs, ys) = started(clt), batch(dtype=torch.float32)
    assert clt_step(clt, states, xs, ys, LOSSES["l0"], RULE, route).made
    before = {name: tensor.clone() for name, tensor in tensors_of(states).items()}
    {"x of the first": xs[0], "x of the last": xs[-1], "y of the last": ys[-1]}[where][3, 1] = bad
    figures = clt_step(clt, states, xs, ys, LOSSES["l0"], RULE, route)
    assert (figures.made, figures.skipped) == (False, 1)
    for name, tensor in tensors_of(states).items():
        if name.endswith("skipped"):
            assert tensor.item() == 1
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("route", ROUTES)
def test_a_weight_that_is_not_finite_is_seen(route):
    clt, (xs, ys) = make(torch.float32, "pytorch"), batch(dtype=torch.float32)
    states = started(clt)
    with torch.no_grad():
        clt.sources[1].b_enc[5] = math.nan
    figures = clt_step(clt, states, xs, ys, LOSSES["l0"], RULE, route)
    assert not figures.made
    assert math.isnan(figures.fvu[1])
    assert math.isnan(figures.fvu[2])
    assert math.isfinite(figures.fvu[0])


@pytest.mark.parametrize("what", ["an input", "activations"])
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_that_are_too_large_are_withheld_in_whichever_layer(route, layer, what):
    """With a loss that says nothing of them: an input that no latent reads, a latent whose output the target has."""
    clt, (xs, ys) = make(torch.float32, "pytorch"), batch(dtype=torch.float32)
    states, source = started(clt), clt.sources[layer]
    with torch.no_grad():
        if what == "an input":
            source.W_enc[0] = 0
            xs[layer][:, 0] = 1e25
        else:
            source.b_enc[4] = 1e13
            for target, part in enumerate(source.W_dec[4].split(D_OUT[layer:]), layer):
                ys[target] += 1e13 * part
    before = {name: p.clone() for name, p in clt.named_parameters()}
    figures = clt_step(clt, states, xs, ys, LOSSES["l0"], RULE, route)
    assert math.isfinite(figures.loss)
    assert (figures.made, figures.skipped) == (False, 1)
    for name, parameter in clt.named_parameters():
        assert torch.equal(parameter, before[name]), name


# ---- the trainer


def samples(n=400, **options):
    xs, ys = batch(n, seed=7, dtype=torch.float32, **options)
    return [3 * x + 1 for x in xs], [0.5 * y for y in ys]


def rows(given, seed, n=N):
    picked = torch.randint(len(given[0][0]), (n,), generator=torch.Generator().manual_seed(seed))
    return [x[picked] for x in given[0]], [y[picked] for y in given[1]]


def trained(given, until, trainer=None, **changes):
    trainer = trainer or CLTTrainer(config(**changes), given[0], targets=given[1])
    for step in range(trainer.step, until):
        trainer.update(*rows(given, step))
    return trainer


@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
def test_it_learns(kind):
    given = samples(2000)
    changes = {"l0_coefficient": 1e-3} if kind == "jumprelu" else {"kind": "relu", "l0_coefficient": 1e-2}
    trainer = trained(given, 300, steps=300, **changes)
    report = trainer.report()
    assert report["l0"] == pytest.approx(sum(report["l0_of_layers"]))
    assert 0 < report["l0"] < 2.5 * F
    assert max(report["fvu_of_layers"]) < 0.5
    y_hat = trainer.released()(given[0])
    for y, guess, fvu in zip(given[1], y_hat, report["fvu_of_layers"], strict=True):
        found = (y - guess).square().sum() / (y - y.mean(0)).square().sum()
        assert found.item() == pytest.approx(fvu, rel=0.5)
    if kind == "relu":
        assert all((source.threshold == 0).all() for source in trainer.clt.sources)


def test_later_layers_are_explained_by_earlier_latents():
    """The output of the last layer depends on the inputs of all: latents that cannot write to it leave more of it."""
    given = samples(2000)
    trainer = trained(given, 300, steps=300)
    alone = CLTTrainer(trainer.config, given[0][-1:], targets=given[1][-1:])
    for step in range(300):
        xs, ys = rows(given, step)
        alone.update(xs[-1:], ys[-1:])
    assert trainer.report()["fvu_of_layers"][-1] < 0.7 * alone.report()["fvu_of_layers"][-1]


def test_scales_and_means_are_those_of_the_samples():
    xs, ys = samples()
    trainer = CLTTrainer(config(), xs, targets=ys)
    for source, scale, x, y in zip(trainer.clt.sources, trainer.clt.output_scales, xs, ys, strict=True):
        assert source.input_scale == pytest.approx(x.square().sum(1).mean().sqrt().item(), rel=1e-5)
        assert scale == pytest.approx(y.square().sum(1).mean().sqrt().item(), rel=1e-5)
        torch.testing.assert_close(source.b_dec.data, y.mean(0) / scale, rtol=1e-4, atol=1e-5)
        z = (x.mean(0) / source.input_scale) @ source.W_enc + source.b_enc
        torch.testing.assert_close(z, torch.zeros(F), rtol=0, atol=1e-5)
    of_inputs = [SiteStatistics(len(x), *moments("x", x), 1.0, 3.0, 0, 0.01) for x in xs]
    assert CLTTrainer(config(), of_inputs, targets=ys).clt.input_scales == pytest.approx(trainer.clt.input_scales)


@pytest.mark.parametrize("route", ["sparse", "dense", "reference"])
def test_dead_latents_of_every_layer_revive(route):
    """Those that have not fired for 3 batches, from the third update on, by the learning rate of each."""
    given = samples()
    options = {"route": route, "dead_after_tokens": 3 * N, "steps": 40}
    falling, still = (CLTTrainer(config(**options, revival_rate=r), given[0], targets=given[1]) for r in (1.0, 0.0))
    for trainer in (falling, still):
        for source in trainer.clt.sources:
            source.threshold.data[1] = 50.0
        trained(given, 5, trainer)
    fallen = sum(falling.config.learning_rate_at(step) for step in (2, 3, 4))
    for a, b in zip(falling.clt.sources, still.clt.sources, strict=True):
        assert b.threshold[1] == 50
        assert a.threshold[1].item() == pytest.approx(50 - fallen, abs=2e-5)
        assert torch.equal(a.threshold[2:] < 50, b.threshold[2:] < 50)


def test_the_route_follows_the_density():
    given = samples(2000)
    trainer = CLTTrainer(config(steps=300, l0_coefficient=0.05), given[0], targets=given[1])
    assert trainer.route == "dense"
    trained(given, 300, trainer)
    assert trainer.route == "sparse"
    assert trained(given, 2, route="sparse").route == "sparse"


def test_a_step_that_was_withheld_changes_no_route():
    """Every pair of NaN is an entry."""
    given = samples()
    trainer = trained(given, 2)
    trainer.route = "sparse"
    xs, ys = rows(given, 2)
    trainer.update([x * math.nan for x in xs], ys)
    assert trainer.report()["skipped"] == 1
    assert trainer.route == "sparse"


def test_scales_are_restored():
    given = samples()
    trainer, other = (
        trained(given, 2),
        CLTTrainer(config(), [2 * x for x in given[0]], targets=[3 * y for y in given[1]]),
    )
    other.restore(*trainer.snapshot())
    assert other.clt.input_scales == trainer.clt.input_scales
    assert other.clt.output_scales == trainer.clt.output_scales
    for one, two in zip(other.released()(given[0]), trainer.released()(given[0]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("route", ["auto", "sparse", "dense", "reference"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(route, tmp_path):
    given, names = samples(), {"route": route, "l0_coefficient": 0.02}
    whole = trained(given, 30, **names)
    trainer, checkpoints = trained(given, 13, **names), Checkpoints(tmp_path, identity={})
    tensors, facts = trainer.snapshot()
    checkpoints.save(13, {"clt": tensors}, facts, wait=True)
    checkpoints.close()

    found = Checkpoints(tmp_path, identity={}).latest()
    other = CLTTrainer(config(**names), given[0], targets=given[1])
    other.restore(found.part("clt"), json.loads(json.dumps(found.facts)) | {"config": trainer.config.to_dict()})
    assert other.report() == trainer.report()
    trained(given, 30, other)
    for name, tensor in whole.snapshot()[0].items():
        assert torch.equal(other.snapshot()[0][name], tensor), name
    assert other.report() == whole.report()


def test_copies_go_on_alone():
    given = samples()
    trainer = trained(given, 3)
    other = copy.deepcopy(trainer)
    trained(given, 6, trainer)
    assert other.step == 3
    trained(given, 6, other)
    for (name, one), two in zip(trainer.snapshot()[0].items(), other.snapshot()[0].values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: f.update(step=-1), "facts.step: expected"),
        (lambda t, f: f.update(route="reference"), "facts.route: expected"),
        (lambda t, f: f["input_scales"].pop(), r"facts.input_scales: expected those of 3 layers, got 2"),
        (lambda t, f: f["output_scales"].__setitem__(1, 0.0), r"facts.output_scales\[1\]: expected"),
        (lambda t, f: f["config"].update(seed=3), "config.seed: expected 0, got 3"),
        (lambda t, f: f.pop("figures"), "'figures' is missing"),
        (lambda t, f: f["figures"].pop("l0.2"), "'l0.2' is missing"),
        (lambda t, f: t.pop("2.W_dec"), "'2.W_dec' is missing"),
        (lambda t, f: t.update({"0.b_dec": t["0.b_dec"][1:]}), r"tensors\['0.b_dec'\]: expected float32 \[4\]"),
    ],
)
def test_another_snapshot_is_refused(change, message):
    given = samples()
    trainer, other = trained(given, 2), trained(given, 1)
    tensors, facts = trainer.snapshot()
    tensors, facts = dict(tensors), copy.deepcopy(facts)
    change(tensors, facts)
    before = {name: tensor.clone() for name, tensor in other.snapshot()[0].items()}
    with pytest.raises(ValueError, match=message):
        other.restore(tensors, facts)
    assert other.step == 1
    for name, tensor in other.snapshot()[0].items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "topk", "k": 3, "l0_coefficient": 0.0}, "kind: expected 'jumprelu' or 'relu', got 'topk'"),
        ({"compute_dtype": "bf16"}, "compute_dtype: expected 'fp32' or 'tf32', got 'bf16'"),
        ({"skip": True}, "skip: expected False"),
        ({"kind": "relu", "resample_steps": (3,)}, "resample_steps: expected none"),
        ({"pre_act_coefficient": 1e-3, "route": "reference"}, "pre_act_coefficient: expected 0"),
        ({"kind": "relu", "p_end": 0.5}, "p_end: expected None"),
        ({"kind": "relu", "p": 0.5}, "p: expected 1"),
        ({"kind": "topk", "k": 2, "l0_coefficient": 0.0}, "kind: expected "),
    ],
)
def test_what_a_clt_has_not_is_refused(changes, message):
    xs, ys = samples()
    with pytest.raises(ValueError, match=message):
        CLTTrainer(config(**changes), xs, targets=ys)


def test_bad_samples():
    xs, ys = samples()
    for given, error, message in (
        ((xs[0], ys), TypeError, "samples: expected a list of samples"),
        (([], []), ValueError, "samples: expected at least one layer"),
        ((xs[:2], ys), ValueError, "targets: expected those of 2 layers as of samples, got 3"),
        ((xs, [ys[0], ys[1] * 0, ys[2]]), ValueError, r"targets\[1\]: expected activations that vary"),
        (([xs[0], xs[1] * math.nan, xs[2]], ys), ValueError, r"samples\[1\]: "),
        (([xs[0], xs[1].int(), xs[2]], ys), TypeError, r"samples\[1\]: expected a floating dtype, got int32"),
    ):
        with pytest.raises(error, match=message):
            CLTTrainer(config(), given[0], targets=given[1])
    with pytest.raises(TypeError, match="dtype: expected float32 or float64, got float16"):
        CLTTrainer(config(), xs, targets=ys, dtype=torch.float16)
    with pytest.raises(TypeError, match="config: expected"):
        CLTTrainer({}, xs, targets=ys)


def test_bad_batches():
    given = samples()
    trainer = CLTTrainer(config(), given[0], targets=given[1])
    xs, ys = rows(given, 0)
    with pytest.raises(ValueError, match="report: expected at least one update"):
        trainer.report()
    for batch, error, message in (
        ((xs[:2], ys), ValueError, "xs: expected activations of 3 layers, got 2"),
        ((xs[::-1], ys), ValueError, r"xs\[0\]: expected shape \[..., N, 7\], got \[40, 6\]"),
        ((xs, [ys[0], ys[2], ys[1]]), ValueError, r"ys\[1\]: expected shape \[..., N, 6\], got \[40, 3\]"),
        (([xs[0], xs[1][:5], xs[2]], ys), ValueError, r"xs\[1\]: expected the tokens of layer 0, \[40\], got \[5\]"),
        ((xs, [y[:9] for y in ys]), ValueError, "ys: expected the 40 tokens of xs, got 9"),
        (([x[:0] for x in xs], [y[:0] for y in ys]), ValueError, r"xs\[0\]: expected shape \[N ≥ 1, 7\], got \[0, 7\]"),
        (([x[None] for x in xs], ys), ValueError, r"xs\[0\]: expected shape \[N ≥ 1, 7\], got \[1, 40, 7\]"),
        ((xs[0], ys), TypeError, "xs: expected a list of tensors, one for each layer, got Tensor"),
        (([x.int() for x in xs], ys), TypeError, r"xs\[0\]: expected a floating dtype, got int32"),
    ):
        with pytest.raises(error, match=message):
            trainer.update(*batch)
    assert trainer.step == 0


def test_a_loss_of_a_bad_batch():
    clt, (xs, ys) = make(), batch()
    for given, error, message in (
        (([x.float() for x in xs], ys), TypeError, r"xs\[0\]: expected dtype float64"),
        (([x[:0] for x in xs], [y[:0] for y in ys]), ValueError, "xs: expected at least one token"),
        ((xs, [y[:3] for y in ys]), ValueError, r"ys\[0\]: expected shape \[40, 4\], got \[3, 4\]"),
    ):
        with pytest.raises(error, match=message):
            clt_loss_and_gradients(clt, *given, LOSSES["l0"])
    with pytest.raises(TypeError, match="clt: expected"):
        clt_loss_and_gradients(clt.released(), xs, ys, LOSSES["l0"])


def test_memory_counts_what_lasts():
    given = samples()
    trainer = trained(given, 1)
    lasting = [t for name, t in trainer.snapshot()[0].items() if t.dtype == torch.float32 and t.ndim]
    activations = 4 * N * (sum(D_IN) + 4 * sum(D_OUT))
    assert CLTTrainer.memory(trainer.config, D_IN, D_OUT) == sum(t.nbytes for t in lasting) + activations
    assert isinstance(trainer.released(), CrossLayerTranscoder)
    with pytest.raises(ValueError, match="d_outs: expected those of 3 layers, got 2"):
        CLTTrainer.memory(trainer.config, D_IN, D_OUT[:2])


def test_same_input_same_bits():
    given = samples()
    one, two = (trained(given, 10, route="sparse", l0_coefficient=0.02).snapshot()[0] for _ in range(2))
    assert all(itertools.starmap(torch.equal, zip(one.values(), two.values(), strict=True)))
