"""The recipe: the published numbers, the schedules, and one test per message."""

import math

import pytest

from gemmascope.training.config import (
    L0_COEFFICIENTS,
    SHORT_L0_COEFFICIENTS,
    SMALL_L0_COEFFICIENTS,
    SPARSITIES_OF,
    TARGETED,
    Loss,
    TrainConfig,
)


def test_gemma_scope_is_the_published_recipe():
    config = TrainConfig.gemma_scope()
    assert (config.learning_rate, config.adam_beta2, config.adam_eps) == (7e-5, 0.999, 1e-8)
    assert (config.batch_size, config.loss.bandwidth, config.threshold_init) == (4096, 1e-3, 1e-3)
    assert (config.lr_warmup_steps, config.lr_warmup_start, config.l0_warmup_steps) == (1000, 0.1, 10_000)
    assert (config.threshold_parametrisation, config.b_dec_init) == ("log", "zeros")
    assert 3.99e9 < config.steps * config.batch_size < 4e9


def test_learning_rate_warms_up_along_a_cosine_and_decays_to_zero():
    config = TrainConfig(
        steps=1000, learning_rate=0.01, lr_warmup_steps=100, lr_warmup_start=0.2, lr_decay_steps=50, l0_warmup_steps=0
    )
    assert config.learning_rate_at(0) == pytest.approx(0.002)
    assert config.learning_rate_at(50) == pytest.approx(0.006)
    assert config.learning_rate_at(25) == pytest.approx(0.01 * (0.2 + 0.8 * 0.5 * (1 - math.cos(math.pi / 4))))
    assert config.learning_rate_at(500) == 0.01
    assert config.learning_rate_at(975) == pytest.approx(0.005)
    assert config.learning_rate_at(999) == pytest.approx(0.01 / 50)


@pytest.mark.parametrize("decay", [0, 50])
def test_schedules_hold_their_last_value(decay):
    config = TrainConfig.short(steps=100, lr_decay_steps=decay, l0_warmup_steps=100)
    last = config.learning_rate_at(99), config.l0_coefficient_at(99)
    assert last == (pytest.approx(3e-3 / (decay or 1)), pytest.approx(8e-3 * 99 / 100))
    for step in (100, 101, 150, 10**12):
        assert (config.learning_rate_at(step), config.l0_coefficient_at(step)) == last
    assert config.loss_at(500).l0_coefficient == last[1]


def test_the_schedules_of_a_short_run_take_their_share_of_it():
    def schedules(config):
        return config.lr_warmup_steps, config.lr_decay_steps, config.l0_warmup_steps

    assert schedules(TrainConfig.short()) == (100, 150, 170)
    assert schedules(TrainConfig.short(steps=200)) == (50, 75, 85)
    assert schedules(TrainConfig.short(steps=3)) == (0, 1, 1)
    assert schedules(TrainConfig.short(steps=0)) == (0, 0, 0)
    assert schedules(TrainConfig.short(steps=200, lr_warmup_steps=7)) == (7, 75, 85)


def test_small_aims_at_an_l0_of_the_batch_in_units_of_variance():
    config = TrainConfig.small(steps=200, target_l0=10, seed=3)
    assert (config.scale_by, config.b_dec_init, config.seed) == ("variance", "mean", 3)
    assert (config.loss.sparsity, config.loss.l0_of, config.loss.target_l0) == ("target_l0", "batch", 10)
    assert TrainConfig.small().loss.target_l0 == 40
    assert TrainConfig.small(sparsity="l0").loss.target_l0 is None
    assert TrainConfig.small(loss=Loss(0.25)).loss == Loss(0.25)


@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
def test_lambda_of_small_rises_linearly_in_a_third(kind):
    config = TrainConfig.small(steps=300, kind=kind)
    rising = [config.l0_coefficient_at(step) for step in range(300)]
    assert rising[50] == pytest.approx(config.loss.l0_coefficient / 2)
    assert rising[:101] == sorted(set(rising[:101]))
    assert set(rising[100:]) == {config.loss.l0_coefficient}


def test_small_revives_the_latents_of_jumprelu_alone():
    small = TrainConfig.small()
    assert small.revival_rate == 4
    sizes = {"d_sae": 16384, "batch_size": 1024}
    assert [TrainConfig.small(steps=n, **sizes).revival_rate for n in (0, 120, 400, 600, 9000)] == [1, 1, 1, 1.5, 4]
    assert small.changed(kind="gated").revival_rate == TrainConfig.small(kind="topk", k=4).revival_rate == 0
    assert small.changed(kind="jumprelu", seed=1).revival_rate == 4
    assert TrainConfig.gemma_scope().revival_rate == TrainConfig.short().revival_rate == 0


@pytest.mark.parametrize("sparsity", SPARSITIES_OF["jumprelu"])
def test_each_kind_of_penalty_has_its_own_coefficient(sparsity):
    target = {"target_l0": 5} if sparsity in TARGETED else {}
    assert Loss(sparsity=sparsity, **target).l0_coefficient == L0_COEFFICIENTS[sparsity]
    assert Loss(0.25, sparsity=sparsity, **target).l0_coefficient == 0.25
    changes = {"sparsity": sparsity} | target
    for recipe, coefficients in (
        (TrainConfig.gemma_scope, L0_COEFFICIENTS),
        (TrainConfig.short, SHORT_L0_COEFFICIENTS),
        (TrainConfig.small, SMALL_L0_COEFFICIENTS),
    ):
        assert recipe(**changes).loss.l0_coefficient == coefficients[sparsity]
        assert recipe(**changes, l0_coefficient=0.25).loss.l0_coefficient == 0.25
        assert recipe(**changes).changed(seed=1, bandwidth=0.1).loss.l0_coefficient == coefficients[sparsity]
        for other in SPARSITIES_OF["jumprelu"]:
            goal = {"target_l0": 7} if other in TARGETED else {}
            changed = recipe(**changes, l0_coefficient=0.25).changed(sparsity=other, **goal).loss
            assert changed.l0_coefficient == (0.25 if other == sparsity else L0_COEFFICIENTS[other])
            assert changed.target_l0 == goal.get("target_l0")


def test_an_aim_stays_when_its_penalty_changes():
    loss = TrainConfig.short(sparsity="target_l0", target_l0=9).changed(sparsity="quadratic_l0").loss
    assert (loss.target_l0, loss.l0_coefficient) == (9, L0_COEFFICIENTS["quadratic_l0"])


def test_a_loss_given_whole_is_taken_whole():
    assert TrainConfig.short(loss=Loss(0.5, 0.25)).loss == Loss(0.5, 0.25)
    assert TrainConfig.short(loss=Loss(0.5, 0.25), bandwidth=0.1).loss == Loss(0.5, 0.1)


def test_l0_coefficient_rises_linearly():
    config = TrainConfig.gemma_scope(l0_coefficient=0.5, l0_warmup_steps=200)
    assert [config.l0_coefficient_at(step) for step in (0, 50, 200, 9999)] == [0, 0.125, 0.5, 0.5]
    assert TrainConfig.gemma_scope(l0_coefficient=0.5, l0_warmup_steps=0).l0_coefficient_at(0) == 0.5


def test_short_takes_changes():
    config = TrainConfig.short(d_sae=77, seed=3)
    assert (config.d_sae, config.seed, config.threshold_parametrisation) == (77, 3, "raw")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"d_sae": 0}, ValueError, "d_sae: expected at least 1, got 0", id="d_sae"),
        pytest.param({"d_sae": 16.0}, TypeError, "d_sae: expected an int, got float", id="d_sae-type"),
        pytest.param({"steps": -1}, ValueError, "steps: expected at least 0, got -1", id="steps"),
        pytest.param({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0", id="batch_size"),
        pytest.param({"lr_warmup_steps": True}, TypeError, "lr_warmup_steps: expected an int, got bool", id="warmup"),
        pytest.param({"seed": -2}, ValueError, "seed: expected at least 0, got -2", id="seed"),
        pytest.param(
            {"learning_rate": 0.0}, ValueError, "learning_rate: expected a finite number > 0 and ≤ 1", id="lr"
        ),
        pytest.param({"learning_rate": "1"}, TypeError, "learning_rate: expected a number, got str", id="lr-type"),
        pytest.param({"lr_warmup_start": 1.5}, ValueError, "lr_warmup_start: .*≥ 0 and ≤ 1, got 1.5", id="lr-start"),
        pytest.param({"adam_beta2": 1.0}, ValueError, "adam_beta2: expected a finite number > 0 and ≤ 1", id="beta2"),
        pytest.param(
            {"l0_warmup_power": 0}, ValueError, "l0_warmup_power: expected a finite number > 0, got 0", id="power"
        ),
        pytest.param({"adam_eps": 0}, ValueError, "adam_eps: expected a finite number ≥ 1.17549e-38, got 0", id="eps"),
        pytest.param({"l0_coefficient": math.nan}, ValueError, "l0_coefficient: .* got nan", id="l0-nan"),
        pytest.param(
            {"bandwidth": 0.0}, ValueError, "bandwidth: expected a finite number > 0, got 0.0", id="bandwidth"
        ),
        pytest.param({"threshold_init": 0.0}, ValueError, "threshold_init: .* > 0, got 0.0", id="log-theta-zero"),
        pytest.param(
            {"threshold_parametrisation": "exp"}, ValueError, "expected 'log' or 'raw', got 'exp'", id="parametrisation"
        ),
        pytest.param({"b_dec_init": "median"}, ValueError, "expected 'zeros' or 'mean', got 'median'", id="b_dec"),
        pytest.param({"sparsity": "l1"}, ValueError, "sparsity: expected 'l0' or .*, got 'l1'", id="sparsity"),
        pytest.param({"l0_of": "row"}, ValueError, "l0_of: expected 'token' or 'batch', got 'row'", id="l0_of"),
        pytest.param({"compute_dtype": "fp8"}, ValueError, "compute_dtype: expected .*, got 'fp8'", id="compute_dtype"),
        pytest.param({"route": "fast"}, ValueError, "route: expected 'auto' or .*, got 'fast'", id="route"),
        pytest.param({"ste_to_z": 1}, TypeError, "ste_to_z: expected a bool, got int", id="ste_to_z"),
        pytest.param({"tanh_scale": 0}, ValueError, "tanh_scale: expected a finite number > 0, got 0", id="tanh_scale"),
        pytest.param({"frequency_scale": -1}, ValueError, "frequency_scale: .* > 0, got -1", id="frequency_scale"),
        pytest.param({"dead_after_tokens": 0}, ValueError, "dead_after_tokens: expected at least 1, got 0", id="dead"),
        pytest.param({"sparsity": "target_l0", "target_l0": 0}, ValueError, "target_l0: .* > 0, got 0", id="target"),
        pytest.param(
            {"sparsity": "quadratic_l0"}, ValueError, "target_l0: expected a number with sparsity='quad", id="no-target"
        ),
        pytest.param(
            {"target_l0": 5.0}, ValueError, "target_l0: expected None with sparsity='l0', got 5.0", id="needless-target"
        ),
        pytest.param(
            {"sparsity": "target_l0", "target_l0": 70.5, "d_sae": 70},
            ValueError,
            "target_l0: expected at most d_sae = 70, got 70.5",
            id="target-beyond-d_sae",
        ),
        pytest.param(
            {"steps": 50, "lr_warmup_steps": 0},
            ValueError,
            "l0_warmup_steps: expected at most steps = 50, got 10000",
            id="l0-warm-up",
        ),
        pytest.param(
            {"steps": 50, "lr_warmup_steps": 51, "l0_warmup_steps": 0},
            ValueError,
            r"lr_warmup_steps: expected at most steps = 50 with lr_decay_steps, got 51 \+ 0",
            id="lr-warm-up",
        ),
        pytest.param(
            {"steps": 50, "lr_warmup_steps": 30, "lr_decay_steps": 21, "l0_warmup_steps": 0},
            ValueError,
            r"lr_warmup_steps: expected at most steps = 50 with lr_decay_steps, got 30 \+ 21",
            id="lr-warm-up-and-decay",
        ),
        pytest.param(
            {"learning_rate": 1.0, "adam_beta2": 0.9999},
            ValueError,
            "learning_rate: expected at most 0.4 for log θ with adam_beta2=0.9999, got 1.0",
            id="log-step",
        ),
        pytest.param({"seed": 2**63}, ValueError, "seed: expected at most 9223372036854775807, got", id="seed-64-bits"),
        pytest.param(
            {"pre_act_coefficient": 0.1},
            ValueError,
            "route: expected 'reference', the one with a pre-act",
            id="pre-act",
        ),
        pytest.param(
            {"compute_dtype": "bf16", "route": "reference"},
            ValueError,
            "compute_dtype: expected 'fp32' with route='reference', got 'bf16'",
            id="reference-bf16",
        ),
    ],
)
def test_messages(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig.gemma_scope(**changes)


def test_the_loss_is_nested_and_changed_by_its_own_names():
    config = TrainConfig(loss=Loss(0.5, sparsity="target_l0", target_l0=30), seed=2)
    changed = config.changed(target_l0=60.0, d_sae=80)
    assert (changed.loss, changed.d_sae, changed.seed) == (Loss(0.5, sparsity="target_l0", target_l0=60.0), 80, 2)
    assert config.loss.target_l0 == 30
    assert config.changed(loss=Loss(0.1), bandwidth=0.2).loss == Loss(0.1, 0.2)
    assert config.to_dict()["loss"]["target_l0"] == 30
    assert config.loss_at(3).l0_coefficient == pytest.approx(0.5 * 3 / 10_000)
    with pytest.raises(TypeError, match="expected the names of its fields or its loss's, got 'width'"):
        config.changed(width=3)
    with pytest.raises(TypeError, match="loss: expected a Loss, got float"):
        TrainConfig(loss=0.5)


def test_raw_threshold_may_start_at_zero():
    assert TrainConfig(threshold_parametrisation="raw", threshold_init=0.0).threshold_init == 0


def test_units_of_variance_leave_the_mean_to_b_dec():
    message = (
        r"^b_dec_init: expected 'mean' with scale_by='variance', got 'zeros': else the latents have to learn the mean"
    )
    with pytest.raises(ValueError, match=message):
        TrainConfig(scale_by="variance")
    assert TrainConfig(scale_by="variance", b_dec_init="mean").changed(seed=1).scale_by == "variance"
    assert TrainConfig.short(scale_by="variance").to_dict()["scale_by"] == "variance"
    with pytest.raises(ValueError, match=r"^scale_by: expected 'mean_square' or 'variance', got 'norm'$"):
        TrainConfig(scale_by="norm")
