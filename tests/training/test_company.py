"""Several SAEs in one suite: each as it would be alone, whatever becomes of the others."""

import json
import math
import threading
from contextlib import closing

import pytest
import torch

from gemmascope.errors import BadFileError, TrainingFailedError
from gemmascope.sites import Site
from gemmascope.training import SAESpec, Suite
from gemmascope.training import company as company_module
from gemmascope.training.company import GIVE_UP_AFTER
from gemmascope.training.trainer import SAETrainer
from tests.training.changes import assert_same, values
from tests.training.test_trainer import config, sample, statistics_of

A, B = Site(0, "resid"), Site(1, "att")
ROWS = {A: sample(2000, seed=1), B: sample(2000, d=6, seed=2)}
NAN = {A: torch.full((64, 8), math.nan), B: torch.full((64, 6), math.nan)}


STATISTICS = {site: statistics_of(rows) for site, rows in ROWS.items()}
SPECS = (
    SAESpec("a/small", A, config(seed=1)),
    SAESpec("a/large", A, config(d_sae=40, compute_dtype="bf16")),
    SAESpec("a/variance", A, config(scale_by="variance", sparsity="quadratic_l0", target_l0=3, l0_of="batch")),
    SAESpec("b", B, config(l0_coefficient=0.02)),
    SAESpec("b/short", B, config(steps=9, lr_warmup_steps=0, l0_warmup_steps=0)),
)


def a_suite(specs=SPECS, **options):
    return Suite(specs, STATISTICS, **{"model_name": "a model"} | options)


def batch(i, sites=(A, B)):
    return {site: ROWS[site][64 * (i % 30) : 64 * (i % 30) + 64] for site in sites}


def run(suite, steps, spoil=lambda i, x: x, start=0):
    for i in range(start, start + steps):
        suite.update(spoil(i, batch(i)))
    return suite


def state_of(suite):
    return {name: values(trainer) for name, trainer in suite.trainers.items()}


def assert_equal(found, expected, names):
    for name in names:
        assert_same(found.trainers[name], expected.trainers[name])
        assert found.trainers[name].report() == expected.trainers[name].report(), name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", [spec.name for spec in SPECS])
def test_an_sae_is_the_same_alone_and_in_company(name, n, threads):
    threads(n)
    with closing(a_suite()) as suite:
        run(suite, 20)
        assert torch.get_num_threads() == n
    threads(1)
    with closing(a_suite([spec for spec in SPECS if spec.name == name])) as alone:
        for i in range(min(20, alone.specs[name].config.steps)):
            alone.update(batch(i))
    assert_equal(suite, alone, [name])


@pytest.mark.parametrize("together", [1, 2])
def test_threads_of_a_step_do_not_depend_on_the_company(together, threads, monkeypatch):
    """Also for sizes at which products and sums are split among threads."""
    seen, update = [], SAETrainer.update

    def look(trainer, x):
        update(trainer, x)
        seen.append((torch.get_num_threads(), threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(SAETrainer, "update", look)
    threads(2)
    rows = sample(4000, d=64, seed=3)
    specs = [
        SAESpec(str(i), A, config(d_sae=512, batch_size=2000, threshold_init=0.02, seed=i)) for i in range(together)
    ]
    found = []
    for n in (1, 2):
        threads(n)
        with closing(Suite(specs, {A: statistics_of(rows)}, model_name="a model")) as suite:
            for i in range(4):
                suite.update({A: rows[2000 * (i % 2) : 2000 * (i % 2) + 2000]})
            found.append(suite)
        assert torch.get_num_threads() == n
    assert {each for each, _ in seen} == {1}
    assert [main for _, main in seen].count(False) == (8 if together == 2 else 0)
    assert_equal(*found, [spec.name for spec in specs])


def test_more_threads_are_given_when_asked_for(threads, monkeypatch):
    seen, update = [], SAETrainer.update
    monkeypatch.setattr(SAETrainer, "update", lambda *given: seen.append(torch.get_num_threads()) or update(*given))
    threads(4)
    with closing(a_suite(threads=2)) as suite:
        run(suite, 2)
    assert seen == [2] * 10
    assert torch.get_num_threads() == 4


def test_threads_that_start_later_have_what_they_had(threads):
    threads(2)
    with closing(a_suite()) as suite:
        run(suite, 2)
        seen = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert seen == [2]


def test_closing_ends_the_threads(threads):
    threads(2)
    before = threading.active_count()
    with closing(a_suite()) as suite:
        run(suite, 1)
        assert threading.active_count() > before
    assert threading.active_count() == before


# ---- those that stop


@pytest.mark.parametrize("n", [1, 2])
def test_one_that_raises_is_parked_and_leaves_the_others(n, threads, monkeypatch):
    threads(n)
    with closing(a_suite()) as suite, closing(a_suite([spec for spec in SPECS if spec.name != "a/large"])) as without:
        monkeypatch.setattr(suite.trainers["a/large"], "_launch", lambda *job: math.sqrt(-job[1] - 1))
        with pytest.warns(RuntimeWarning, match=r"^a/large: ValueError in its update after step 0: .*: it gave up$"):
            run(suite, 1)
        run(suite, 19, start=1)
        run(without, 20)
    assert list(suite.parked) == ["a/large"]
    assert suite.active == ["a/small", "a/variance", "b"]
    assert suite.finished == without.finished == {"b/short"}
    assert suite.report() == without.report()
    assert list(suite.report()) == suite.active
    assert_equal(suite, without, without.trainers)


def look_now_and_then(suite, look_every):
    for i in range(25):
        if i == 9:
            suite.trainers["b"].sae.W_dec.data[0, 0] = math.nan
        suite.update(batch(i))
        if i % look_every == 0:
            suite.report()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("run_ahead", [0, 4])
def test_one_whose_updates_are_withheld_is_parked(n, run_ahead, threads):
    """On a GPU, too, at one and the same step, however often the figures were looked at."""
    threads(n)
    found = []
    for look_every in (1, 3, 1000):
        with closing(a_suite()) as suite:
            for trainer in suite.trainers.values():
                trainer.run_ahead = run_ahead
            with pytest.warns(RuntimeWarning, match=r"^b: the loss or .* last 10 updates, up to step .*: it gave up$"):
                look_now_and_then(suite, look_every)
            assert suite.trainers["b"].step == 9 + GIVE_UP_AFTER + run_ahead
            found.append((state_of(suite), suite.parked, suite.active))
    states, parked, active = zip(*found, strict=True)
    assert parked[0] == parked[1] == parked[2]
    assert active[0] == active[1] == active[2] == ["a/small", "a/large", "a/variance"]
    for name in SPECS[:3]:
        for other in states[1:]:
            assert_same(states[0][name.name], other[name.name])


def test_one_that_has_taken_its_steps_is_finished_and_reported_once():
    with closing(a_suite()) as suite:
        run(suite, 9)
        assert suite.trainers["b/short"].step == 9
        assert suite.finished == {"b/short"}
        assert "b/short" in suite.report()
        run(suite, 1, start=9)
        assert suite.trainers["b/short"].step == 9
        assert "b/short" not in suite.report()


def test_a_suite_of_which_all_have_finished():
    with closing(a_suite(SPECS[4:])) as suite:
        run(suite, 9)
        assert suite.active == []
        with pytest.raises(ValueError, match=r"^update: expected an active SAE, found none"):
            suite.update(batch(9))


def test_all_that_are_parked_are_a_training_that_failed():
    with closing(a_suite(SPECS[:2])) as suite:
        run(suite, 3)
        message = r"^a/small: the loss .* up to step 13; .*: it gave up; a/large: the loss .*: it gave up$"
        with pytest.raises(TrainingFailedError, match=message):
            run(suite, 20, lambda i, x: NAN)
        assert suite.trainers["a/small"].step == 13
        assert list(suite.parked) == ["a/small", "a/large"]


def test_the_rest_of_a_short_recipe_that_was_withheld_is_said():
    with closing(a_suite(SPECS[4:])) as suite:
        with pytest.warns(
            RuntimeWarning, match=r"^b/short: the loss .* in the last 3 updates, up to step 9; .*finite$"
        ):
            run(suite, 9, lambda i, x: x if i < 6 else NAN)
        assert suite.finished == {"b/short"}
    expected = pytest.raises(TrainingFailedError, match=r"^b/short: .* last 9 updates")
    with closing(a_suite(SPECS[4:])) as suite, expected:
        run(suite, 9, lambda i, x: NAN)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("n", [1, 2])
def test_an_interrupt_parks_nothing_and_is_raised(error, n, threads, monkeypatch):
    threads(n)

    def interrupted(x):
        raise error

    with closing(a_suite()) as suite, closing(a_suite()) as other:
        run(suite, 2)
        parts, facts = suite.snapshot()
        parts = {name: {key: t.clone() for key, t in part.items()} for name, part in parts.items()}
        with monkeypatch.context() as patch:
            patch.setattr(suite.trainers["a/large"], "update", interrupted)
            with pytest.raises(error):
                run(suite, 1, start=2)
        assert suite.parked == {}
        assert torch.get_num_threads() == n
        for go_on in (suite.snapshot, lambda: suite.update(batch(2))):
            with pytest.raises(RuntimeError, match=r"^suite: expected whole steps, found an update that was interrupt"):
                go_on()
        suite.restore(parts, facts)
        run(suite, 3, start=2)
        run(other, 5)
        assert_equal(suite, other, suite.trainers)


# ---- snapshots of a suite


@pytest.mark.parametrize("k", [0, 4, 9, 15, 22])
def test_a_suite_goes_on_with_the_same_bits(k):
    def steps(suite, start, stop):
        for i in range(start, stop):
            suite.update({A: batch(i)[A], B: NAN[B] if 9 <= i < 19 else batch(i)[B]})

    def stopped_and_gone_on(first, second):
        steps(first, 0, k)
        parts, facts = first.snapshot()
        parts = {name: {key: t.clone() for key, t in part.items()} for name, part in parts.items()}
        second.restore(parts, json.loads(json.dumps(facts, allow_nan=False)))
        steps(second, k, 25)
        return parts

    with closing(a_suite()) as whole, closing(a_suite()) as first, closing(a_suite()) as second:
        with pytest.warns(RuntimeWarning, match="it gave up"):
            steps(whole, 0, 25)
        with pytest.warns(RuntimeWarning, match="it gave up"):
            parts = stopped_and_gone_on(first, second)
        assert second.parked == whole.parked
        assert second.finished == whole.finished
        assert second.active == whole.active == ["a/small", "a/large", "a/variance"]
        assert second.report() == whole.report()
        assert_equal(second, whole, whole.active)
        assert second.snapshot()[1] == whole.snapshot()[1]
    assert set(parts) == {spec.name for spec in SPECS} - set(first.parked)


def other(**changes):
    return [*SPECS[:3], SAESpec("b", B, SPECS[3].config.changed(**changes)), SPECS[4]]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (SPECS[:4], r"facts: SAEs: expected the keys 'a/small', .*; found also 'b/short'"),
        ([*SPECS, SAESpec("c", A, config())], r"facts: SAEs: expected the keys .*; 'c' is missing"),
        (other(seed=3), "b: config.seed: expected 3, got 0"),
        (other(d_sae=25), "b: config.d_sae: expected 25, got 24"),
        (
            [*SPECS[:3], SAESpec("b", A, SPECS[3].config), SPECS[4]],
            r"b: tensors\['W_enc'\]: expected float32 \[24, 8\]",
        ),
    ],
    ids=["fewer", "more", "seed", "width", "site"],
)
def test_a_snapshot_of_another_suite_is_refused_and_changes_nothing(specs, message):
    with closing(a_suite()) as source, closing(a_suite(specs)) as suite:
        run(source, 3)
        before = state_of(suite)
        with pytest.raises(ValueError, match="^" + message):
            suite.restore(*source.snapshot())
        for name, state in state_of(suite).items():
            assert_same(state, before[name])
        assert suite.step == 0


# ---- arguments


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Suite([], STATISTICS, model_name="m"), ValueError, r"specs: expected at least one SAE, got none"),
        (lambda: Suite(3, STATISTICS, model_name="m"), TypeError, r"specs: expected a sequence of SAESpec, got int"),
        (lambda: Suite([3], STATISTICS, model_name="m"), TypeError, r"specs: expected a SAESpec, got int"),
        (
            lambda: Suite([SPECS[0]] * 2, STATISTICS, model_name="m"),
            ValueError,
            r"specs: expected a name of its own for each SAE, got two of 'a/small'",
        ),
        (lambda: Suite(SPECS, 3, model_name="m"), TypeError, r"statistics: expected a Mapping, got int"),
        (
            lambda: Suite(SPECS, {A: STATISTICS[A]}, model_name="m"),
            ValueError,
            r"statistics: expected those of every SAE's site, layer_1/att is missing",
        ),
        (
            lambda: Suite(SPECS, {A: 3, B: 4}, model_name="m"),
            TypeError,
            r"statistics\[layer_0/resid\]: expected a SiteStatistics, got int",
        ),
        (lambda: a_suite(model_name=3), TypeError, r"model_name: expected a str, got int"),
        (lambda: a_suite(threads=0), ValueError, r"threads: expected at least 1, got 0"),
        (
            lambda: a_suite().update({A: ROWS[A]}),
            ValueError,
            r"batch: expected batches of every trainer's site, layer_1/att is missing",
        ),
        (lambda: a_suite().update(ROWS[A]), TypeError, r"batch: expected batches {site: activations}, got Tensor"),
        (
            lambda: a_suite().update({A: ROWS[A], B: ROWS[A]}),
            ValueError,
            r"batch\[layer_1/att\]: expected shape \[N ≥ 1, 6\], got \[2000, 8\]",
        ),
        (
            lambda: a_suite().update({A: ROWS[A], B: ROWS[B][:0]}),
            ValueError,
            r"batch\[layer_1/att\]: expected at least one token, got an empty batch",
        ),
        (
            lambda: a_suite([SAESpec("x", A, config(), init_from="/nowhere/at/all")]),
            BadFileError,
            r".*/nowhere/at/all: expected",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match="^" + message):
        call()


def test_a_batch_that_is_refused_steps_nobody():
    with closing(a_suite()) as suite:
        with pytest.raises(ValueError, match=r"^batch\["):
            suite.update({A: ROWS[A], B: ROWS[A]})
        assert suite.step == 0


def test_metadata_says_of_what_it_is():
    with closing(a_suite()) as suite:
        expected = {"model": "a model", "site": "model.layers.1.self_attn.o_proj.input", "layer": 1}
        assert suite.trainers["b"].sae.metadata == expected


def test_a_company_on_a_gpu_takes_its_steps_in_order(monkeypatch):
    order = []
    with closing(a_suite()) as suite:
        monkeypatch.setattr(suite._steps, "_on_gpu", True)
        monkeypatch.setattr(company_module, "_attempt", lambda trainer, x: order.append(trainer))
        run(suite, 1)
        assert order == list(suite.trainers.values())
