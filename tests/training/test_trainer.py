"""One SAE's update against formulas in fp64, and the training of several against what they must achieve."""

import math
from dataclasses import replace

import pytest
import torch

from gemmascope.activations import batches
from gemmascope.activations.moments import moments
from gemmascope.activations.statistics import SiteStatistics
from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation import evaluate_sae
from gemmascope.kernels import reference
from gemmascope.kernels.density import TRAINING_STEP, Switch
from gemmascope.kernels.dispatch import triton_problem
from gemmascope.sites import Site
from gemmascope.training import trainer as trainer_module
from gemmascope.training.config import TARGETED, TrainConfig
from gemmascope.training.suite import train
from gemmascope.training.trainer import SAETrainer


def sample(n=400, d=8, seed=0, scale=7.0):
    """Activations that are sparse in an overcomplete dictionary, off centre."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(20, d, generator=generator)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    codes = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.1)
    return scale * (codes @ dictionary + 0.3)


def config(**changes):
    defaults = {
        "d_sae": 24,
        "steps": 50,
        "batch_size": 64,
        "lr_decay_steps": 0,
        "bandwidth": 0.05,
        "threshold_init": 0.07,
    }
    return TrainConfig.short(**(defaults | changes))


def written_adam(rows, settings, batch_list):
    """The recipe of arXiv 2408.05147 §3.2 written out in fp64, from the same start."""
    trainer = SAETrainer(settings, rows)
    sae = trainer.sae
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    p = {name: getattr(sae, name).detach().double().clone() for name in names}
    v = {name: torch.zeros_like(p[name]) for name in names}
    for step, batch in enumerate(batch_list):
        x = batch.double() / sae.input_scale
        parameters = reference.Parameters(*(p[name] for name in names))
        forward = reference.sae_forward(x, parameters)
        gradients = reference.sae_backward(
            x, parameters, forward, settings.l0_coefficient_at(step), settings.loss.bandwidth,
            threshold_parametrisation=settings.threshold_parametrisation,
        )._asdict()  # fmt: skip
        unit = p["W_dec"]
        gradients["W_dec"] = gradients["W_dec"] - (gradients["W_dec"] * unit).sum(1, keepdim=True) * unit
        for name in names:
            g = gradients[name]
            v[name] = settings.adam_beta2 * v[name] + (1 - settings.adam_beta2) * g**2
            v_hat = v[name] / (1 - settings.adam_beta2 ** (step + 1))
            move = settings.learning_rate_at(step) * g / (v_hat.sqrt() + settings.adam_eps)
            if name == "threshold" and settings.threshold_parametrisation == "log":
                p[name] = torch.exp(torch.log(p[name]) - move)
            else:
                p[name] = p[name] - move
        p["threshold"] = p["threshold"].clamp(min=0)
        p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    return p


@pytest.mark.parametrize("parametrisation", ["raw", "log"])
def test_updates_equal_the_written_recipe(parametrisation):
    rows = sample()
    settings = config(threshold_parametrisation=parametrisation, lr_warmup_steps=3, l0_warmup_steps=4)
    stream = [batch[Site(0, "resid")] for batch in batches({Site(0, "resid"): rows}, 64, 6, seed=0)]
    trainer = SAETrainer(settings, rows)
    for batch in stream:
        trainer.update(batch)
    for name, exact in written_adam(rows, settings, stream).items():
        ours = getattr(trainer.sae, name).detach().double()
        assert (ours - exact).norm() <= 2e-5 * exact.norm() + 1e-7, name


def test_start_follows_the_recipe():
    rows = sample()
    trainer = SAETrainer(config(b_dec_init="zeros"), rows)
    sae = trainer.sae
    assert sae.input_scale == pytest.approx(rows.square().sum(1).mean().sqrt().item())
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    torch.testing.assert_close(sae.threshold, torch.full((24,), 0.07))
    centred = SAETrainer(config(b_dec_init="mean"), rows)
    torch.testing.assert_close(centred.sae.b_dec * centred.sae.input_scale, rows.mean(0))


def statistics_of(rows):
    mean, variance = moments("rows", rows)
    return SiteStatistics(len(rows), mean, variance, 1.0, 3.0, 0, 0.01)


def test_units_of_variance():
    """λ, θ and ε as if the mean had been subtracted first, which is another run from the same start."""
    rows = sample() + torch.arange(8.0)
    centred = rows - rows.mean(0)
    trainers = [SAETrainer(config(scale_by=unit), x) for unit, x in (("variance", rows), ("mean_square", centred))]
    assert trainers[0].sae.input_scale == pytest.approx(trainers[1].sae.input_scale, rel=1e-6)
    assert trainers[0].sae.input_scale == pytest.approx(centred.double().square().sum(1).mean().sqrt().item(), rel=1e-6)
    assert trainers[0].sae.input_scale < 0.5 * SAETrainer(config(), rows).sae.input_scale
    for start in range(0, 256, 64):
        trainers[0].update(rows[start : start + 64])
        trainers[1].update(centred[start : start + 64])
    for name, figure in trainers[1].report().items():
        assert trainers[0].report()[name] == pytest.approx(figure, rel=1e-4), name


@pytest.mark.parametrize("scale_by", ["mean_square", "variance"])
@pytest.mark.parametrize("b_dec_init", ["zeros", "mean"])
def test_statistics_in_place_of_a_sample(scale_by, b_dec_init):
    if (scale_by, b_dec_init) == ("variance", "zeros"):
        return
    settings, rows = config(scale_by=scale_by, b_dec_init=b_dec_init), sample()
    given, sampled = (SAETrainer(settings, each) for each in (statistics_of(rows), rows))
    assert given.sae.input_scale == sampled.sae.input_scale
    for name, tensor in sampled.state.tensors().items():
        assert torch.equal(given.state.tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"variance": 0.0}, ValueError, "sample: expected activations that vary, got a variance of 0 and a mean"),
        ({"variance": math.nan}, ValueError, "sample: expected a finite mean and variance, found NaN or Inf"),
        ({"mean": torch.tensor([1.0, math.inf])}, ValueError, "sample: expected a finite mean and variance, found"),
        ({"mean": torch.ones(1, 8)}, ValueError, r"sample.mean: expected shape \[d_model ≥ 1\], got \[1, 8\]"),
        ({"mean": torch.ones(0)}, ValueError, r"sample.mean: expected shape \[d_model ≥ 1\], got \[0\]"),
        ({"mean": [1.0]}, TypeError, "sample.mean: expected a torch.Tensor, got list"),
        ({"mean": torch.ones(3, dtype=torch.int64)}, TypeError, "sample.mean: expected a floating dtype, got int64"),
    ],
)
def test_statistics_that_set_no_scale(changes, error, message):
    with pytest.raises(error, match="^" + message):
        SAETrainer(config(), replace(statistics_of(sample()), **changes))


@pytest.mark.parametrize("route", ["dense", "sparse", "reference"])
def test_a_report_says_what_lies_in_the_window_and_where_the_thresholds_are(route):
    trainer = SAETrainer(config(route=route, bandwidth=0.2, sparsity="target_l0", target_l0=3), sample())
    trainer.update(sample(64, seed=3))
    x, sae = sample(300, seed=4), trainer.sae
    z = (x / sae.input_scale - sae.b_dec) @ sae.W_enc + sae.b_enc
    active, below = z > sae.threshold, (z <= sae.threshold) & (z > sae.threshold - 0.1)
    expected = (below.sum() / (below | active).sum()).item()
    trainer.update(x)
    row = trainer.report()
    assert 0.05 < expected < 0.95
    assert row["window"] == pytest.approx(expected, rel=1e-5)
    assert row["threshold"] == pytest.approx(trainer.sae.threshold.mean().item(), rel=1e-6)
    assert (row["target_l0"], row["step"]) == (3, 2)
    assert "target_l0" not in after_one_step(config(route=route))


def after_one_step(settings):
    trainer = SAETrainer(settings, sample())
    trainer.update(sample(64))
    return trainer.report()


def test_nothing_that_fires_is_an_empty_window():
    assert after_one_step(config(threshold_init=1e3))["window"] == 0


def test_decoder_stays_unit_norm_and_threshold_non_negative():
    trainer = SAETrainer(
        config(threshold_init=1e-3, learning_rate=0.05, lr_warmup_steps=0, l0_coefficient=0.0), sample()
    )
    for seed in range(20):
        trainer.update(sample(64, seed=seed))
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(24))
    assert trainer.sae.threshold.min() == 0 < trainer.sae.threshold.max()


def test_threshold_moves_as_far_as_its_learning_rate_allows():
    """A log θ can move lr·θ a step, a raw one lr: the reason why short runs are raw."""
    rows = sample()
    moved = {}
    for parametrisation in ("raw", "log"):
        trainer = SAETrainer(
            config(threshold_parametrisation=parametrisation, learning_rate=1e-3, lr_warmup_steps=0), rows
        )
        before = trainer.sae.threshold.detach().clone()
        for batch in batches({Site(0, "mlp"): rows}, 64, 20, seed=0):
            trainer.update(batch[Site(0, "mlp")])
        moved[parametrisation] = (trainer.sae.threshold - before).abs().max().item()
    assert moved["raw"] > 5 * moved["log"] > 0


def test_dead_latents_are_counted_by_tokens():
    trainer = SAETrainer(config(dead_after_tokens=1500), sample())
    with torch.no_grad():
        trainer.sae.threshold[:3] = 1e6
    for _ in range(3):
        trainer.update(sample(400))
    assert trainer.report()["dead"] == 0
    trainer.update(sample(400))
    assert trainer.report()["dead"] >= 3 / 24
    assert (trainer.state.tokens_since_fired[:3] == 1600).all()


def test_steps_that_are_not_finite_are_skipped_and_counted():
    rows, site = sample(), Site(1, "resid")
    bad = rows[:64].clone()
    bad[5, 2] = math.nan
    good = list(batches({site: rows}, 64, 4, seed=0))
    trainers, logged = [SAETrainer(config(lr_warmup_steps=0, l0_warmup_steps=0), rows) for _ in range(2)], []
    stream = [good[0], good[1], {site: bad}, good[2], good[3]]
    train({site: trainers[0]}, stream, log_every=5, log=lambda step, rows: logged.append(rows))
    train({site: trainers[1]}, good, log_every=4)
    assert logged[-1]["layer_1/resid"]["skipped"] == 1
    for ours, theirs in zip(trainers[0].sae.parameters(), trainers[1].sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_outlier_that_would_spoil_the_second_moments_is_skipped_and_counted():
    rows, trainers = sample(), [SAETrainer(config(lr_warmup_steps=0, l0_warmup_steps=0), sample()) for _ in range(2)]
    bad = rows[:64].clone()
    bad[5] *= 1e12
    for x in (rows[:64], bad, rows[64:128]):
        trainers[0].update(x)
    assert trainers[0].report()["skipped"] == 1
    for x in (rows[:64], rows[64:128]):
        trainers[1].update(x)
    for name, tensor in trainers[1].state.tensors().items():
        assert name == "skipped" or torch.equal(trainers[0].state.tensors()[name], tensor), name


def test_training_past_its_steps_goes_on_as_it_ended():
    """The rate would turn negative without end, and undo it all."""
    rows = sample(2000, seed=1)
    settings = config(steps=60, lr_decay_steps=30, l0_coefficient=2e-3)
    trainer, site, fvu = SAETrainer(settings, rows), Site(0, "resid"), []
    for batch in batches({site: rows}, settings.batch_size, 200, seed=3):
        trainer.update(batch[site])
        fvu.append(trainer.report()["fvu"])
    assert trainer.report()["lr"] == settings.learning_rate_at(59) > 0
    assert sum(fvu[-20:]) <= sum(fvu[40:60])


@pytest.mark.parametrize("sparsity", TARGETED)
def test_a_target_is_met_by_default(sparsity):
    """With the λ of `l0` the first of them would stay at an L0 of 7."""
    rows, site = sample(6000, d=16, seed=1), Site(0, "resid")
    settings = TrainConfig.short(d_sae=64, batch_size=256, steps=200, sparsity=sparsity, target_l0=4)
    trainer = SAETrainer(settings, rows)
    for batch in batches({site: rows}, settings.batch_size, settings.steps, seed=0):
        trainer.update(batch[site])
    assert evaluate_sae(trainer.sae, rows).l0 == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("route", ["reference", "dense", "sparse"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(0, 8), ValueError, "x: expected at least one token, got an empty batch"),
        (torch.zeros(4, 1), ValueError, "x: expected shape [N ≥ 1, 8], got [4, 1]"),
        (torch.zeros(2, 4, 8), ValueError, "x: expected shape [N ≥ 1, 8], got [2, 4, 8]"),
        (torch.zeros(8), ValueError, "x: expected shape [N ≥ 1, 8], got [8]"),
        (torch.zeros(4, 8, dtype=torch.complex64), TypeError, "x: expected a floating dtype, got complex64"),
        (torch.zeros(4, 8, dtype=torch.bool), TypeError, "x: expected a floating dtype, got bool"),
        ([[0.0] * 8], TypeError, "x: expected a torch.Tensor, got list"),
    ],
)
def test_bad_batches(route, x, error, message):
    trainer = SAETrainer(config(route=route), sample())
    with pytest.raises(error) as caught:
        trainer.update(x)
    assert str(caught.value) == message
    assert trainer.step == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_activations_of_any_precision(dtype, grad):
    """They are left as they are, also where a batch needs no other precision."""
    rows = sample().to(dtype).requires_grad_(grad)
    before, given = rows.detach().clone(), rows.detach().float()
    trainers = [SAETrainer(config(), x) for x in (rows.detach(), given)]
    trainers[0].update(rows[:64])
    assert torch.equal(rows, before)
    trainers[1].update(given[:64])
    assert trainers[0].report() == trainers[1].report()
    assert torch.equal(trainers[0].sae.W_dec, trainers[1].sae.W_dec)


def test_a_report_of_nothing():
    with pytest.raises(ValueError, match=r"^report: expected at least one update before it, got none$"):
        SAETrainer(config(), sample()).report()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": {"d_sae": 4}}, TypeError, "config: expected a TrainConfig, got dict"),
        ({"sample": [1.0]}, TypeError, "sample: expected a torch.Tensor, got list"),
        ({"sample": sample().to(torch.complex64)}, TypeError, "sample: expected a floating dtype, got complex64"),
        ({"sample": sample() > 0}, TypeError, "sample: expected a floating dtype, got bool"),
        ({"sample": sample()[None]}, ValueError, "sample: expected shape [N ≥ 1, d_model], got [1, 400, 8]"),
        ({"sample": sample()[:0]}, ValueError, "sample: expected shape [N ≥ 1, d_model ≥ 1], got [0, 8]"),
        (
            {"sample": sample().to("meta")},
            ValueError,
            "sample: expected activations, got a tensor on meta, which holds none",
        ),
        ({"dtype": torch.bfloat16}, TypeError, "dtype: expected float32 or float64, got bfloat16"),
        ({"dtype": "float32"}, TypeError, "dtype: expected float32 or float64, got str"),
        ({"device": 3}, TypeError, "device: expected a torch.device or its name, got int"),
        ({"device": "gpu"}, ValueError, "device: expected the name of a device, such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"metadata": 3}, TypeError, "metadata: expected a dict, got int"),
        (
            {"impl": "fast"},
            ValueError,
            "impl: expected one of 'auto', 'reference', 'pytorch', 'cpu', 'triton', got 'fast'",
        ),
        (
            {"device": "cuda:99"},
            EnvironmentProblemError,
            f"device: expected one of the {torch.cuda.device_count()} GPUs that PyTorch sees here, got cuda:99",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error) as caught:
        SAETrainer(**{"config": config(), "sample": sample()} | changes)
    assert str(caught.value) == message


def test_training_does_not_depend_on_the_default_dtype():
    trainers, rows = [], sample()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        try:
            torch.set_default_dtype(dtype)
            settings = config(route="reference", frequency_scale=0.1)
            trainers.append(SAETrainer(settings, rows, impl="reference"))
            for start in range(0, 256, 64):
                trainers[-1].update(rows[start : start + 64])
            assert trainers[-1].report() == trainers[0].report()
        finally:
            torch.set_default_dtype(torch.float32)
        for name, tensor in trainers[0].state.tensors().items():
            assert torch.equal(trainers[-1].state.tensors()[name], tensor), name


def test_training_does_not_depend_on_the_default_device():
    trainers, rows = [], sample()
    for device in ("cpu", "meta"):
        with torch.device(device):
            trainers.append(SAETrainer(config(route="reference"), rows, impl="reference"))
            for start in range(0, 256, 64):
                trainers[-1].update(rows[start : start + 64])
    assert trainers[0].report() == trainers[1].report()
    assert torch.equal(trainers[0].sae.W_dec, trainers[1].sae.W_dec)


def trained(route, steps=120, impl="auto", run_ahead=0, room=None, **changes):
    rows, site = sample(2000, seed=1), Site(0, "resid")
    schedule = {"l0_warmup_steps": min(50, steps)}
    settings = config(steps=steps, learning_rate=5e-3, l0_coefficient=0.01, route=route, **(schedule | changes))
    trainer = SAETrainer(settings, rows, impl=impl)
    trainer.run_ahead, trainer.capacity = run_ahead, room
    routes = []
    for batch in batches({site: rows}, settings.batch_size, steps, seed=3):
        trainer.update(batch[site])
        routes.append(trainer.route)
    trainer.flush()
    return trainer, routes


def test_a_run_that_switches_equals_those_that_do_not(monkeypatch):
    monkeypatch.setitem(TRAINING_STEP, "cpu", Switch(0.3, 0.25))
    switched, routes = trained("auto")
    first = routes.index("sparse")
    assert 0 < first < 100
    assert routes[:first] == ["dense"] * first
    for route in ("dense", "sparse", "reference"):
        other, _ = trained(route)
        for name, figure in switched.report().items():
            assert other.report()[name] == pytest.approx(figure, rel=1e-3, abs=1e-6), f"{route}: {name}"
        for ours, theirs in zip(switched.sae.parameters(), other.sae.parameters(), strict=True):
            assert (ours - theirs).norm() <= 1e-3 * ours.norm()


def test_the_switch_has_hysteresis():
    trainer = SAETrainer(config(route="auto"), sample())
    seen = []
    for density in (0.9, 0.18, 0.17, 0.15, 0.17, 0.19, 0.21, 0.17):
        trainer._choose_route(density)
        seen.append(trainer.route)
    assert seen == ["dense"] * 3 + ["sparse"] * 3 + ["dense"] * 2


@pytest.mark.skipif(triton_problem() is not None, reason="needs triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_steps_without_room_are_repeated_in_order():
    """The host looks at a step's figures two steps later; the repetition must leave the same bits all the same."""
    changes = {"steps": 6, "impl": "triton", "batch_size": 6, "d_sae": 10, "lr_warmup_steps": 0}
    roomy, _ = trained("sparse", room=60, **changes)
    cramped, _ = trained("sparse", run_ahead=2, room=8, **changes)
    assert cramped.capacity > 8
    assert cramped.state.updates == 6
    for name, tensor in roomy.state.tensors().items():
        assert torch.equal(cramped.state.tensors()[name], tensor), name
    assert roomy.report() == cramped.report()


def test_out_of_memory_names_sizes_and_a_way_out(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer_module, "dense_step", fail)
    trainer = SAETrainer(config(), sample())
    with pytest.raises(EnvironmentProblemError, match=r"^out of memory: d_model 8, d_sae 24, batch of 64 tokens take"):
        trainer.update(sample(64))


def test_too_little_memory_is_said_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(trainer_module, "available_memory", lambda device: 1 << 30)
    message = r"d_sae 1048576, batch of 4096 tokens take about .* of the 1.0 GiB there are; a d_sae of 16384 would"
    with pytest.raises(EnvironmentProblemError, match=message):
        SAETrainer(TrainConfig(d_sae=1 << 20, batch_size=4096), sample())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((5, 4), math.inf), "finite values, found NaN or Inf"),
        (torch.zeros(5, 4), "activations that vary, got a variance of 0 and a mean squared norm of 0"),
        # Their rounding in fp32 is larger than the bound, and sometimes of the right sign.
        *((torch.full((n, 4), 0.1), "activations that vary, got a variance of 0 and") for n in (5, 1000, 1001)),
        (torch.full((999, 4), 1e4).bfloat16(), "activations that vary, got a variance of 0 and"),
        (torch.tensor([[3e4], [3e4 + 0.01]]), "activations that vary, got a variance of"),
    ],
)
def test_samples_that_set_no_scale(rows, message):
    with pytest.raises(ValueError, match=f"^sample: expected {message}"):
        SAETrainer(config(), rows)


def test_a_large_mean_costs_the_scale_no_precision():
    rows = sample(5000) + 1e3
    trainer = SAETrainer(config(), rows)
    assert trainer.sae.input_scale == pytest.approx(rows.double().square().sum(1).mean().sqrt().item(), rel=1e-12)


@pytest.mark.parametrize("outlier", [0, 300.0])
@pytest.mark.parametrize("route", ["dense", "sparse", "reference"])
def test_fvu_is_that_of_the_evaluation(route, outlier):
    """By one definition, on the batch of the step, which need not be like the sample."""
    trainer = SAETrainer(config(route=route), sample())
    for seed in range(3):
        batch = 2 * sample(300, seed=seed) + 5
        batch[7] += outlier
        found = evaluate_sae(trainer.sae, batch)
        trainer.update(batch)
        report = trainer.report()
        assert (report["fvu"], report["median_fvu"]) == pytest.approx((found.fvu, found.median_fvu), rel=1e-5)
        assert report["l0"] == pytest.approx(found.l0, rel=1e-6)


class OnSecondDevice(torch.Tensor):
    """A tensor that says it is on a second GPU."""

    is_cuda = True
    device = torch.device("cuda:1")


def test_figures_are_awaited_on_the_stream_that_copies_them(monkeypatch):
    """That of the SAE's device, whichever is current: an event of another is over before the copy is."""
    recorded, empty = [], torch.empty

    class Event:
        def record(self, stream="that of the current device"):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"that of {device}")
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **named: empty(*shape, **named))
    packed = torch.tensor([1.0, 2.0], dtype=torch.float64)
    copy, event = trainer_module._to_host(packed.as_subclass(OnSecondDevice))
    assert recorded == ["that of cuda:1"]
    assert event is not None
    assert torch.equal(copy, packed)
    assert trainer_module._to_host(packed) == (packed, None)


@pytest.mark.gpu
def test_triton_and_reference_train_alike():
    """Adam amplifies rounding in single weights; what the SAEs do must agree between kernels, reference and CPU."""
    rows, site = sample(4000, d=64, seed=5), Site(0, "resid")
    settings = config(d_sae=512, batch_size=256, steps=50)
    figures = {}
    for impl, device in (("reference", "cpu"), ("reference", "cuda"), ("triton", "cuda")):
        trainer = SAETrainer(settings, rows, impl=impl, device=device)
        train({site: trainer}, batches({site: rows}, settings.batch_size, settings.steps, seed=0))
        metrics = evaluate_sae(trainer.sae, rows)
        figures[impl, device] = [metrics.l0, metrics.fvu]
    for found in figures.values():
        assert found == pytest.approx(figures["reference", "cpu"], rel=0.02)
