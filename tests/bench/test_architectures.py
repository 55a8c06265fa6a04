"""The comparison of kinds of SAE on tiny data: planted features, controls, intervals, rows and the page."""

import builtins
import json
import math
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from bench.contenders import UnavailableError
from bench.quality import __main__ as quality
from bench.quality import architectures, pareto
from bench.quality.activations import PAIRS
from bench.quality.controls import control_rows, random_dictionary
from bench.quality.synthetic import Planted, assignment, compare
from bench.reporting.records import read
from gemmascope.evaluation import evaluate_sae, pair_table_fvu, pca_fvu
from gemmascope.training.config import KINDS

SMALL = Planted(n_features=24, d_model=16, l0=3.0, group=3)

# ---- planted features


def test_the_same_seed_plants_the_same():
    assert torch.equal(SMALL.draw(300), SMALL.draw(300))
    assert not torch.equal(SMALL.draw(300), Planted(n_features=24, d_model=16, l0=3.0, group=3, seed=1).draw(300))


def test_frequencies_follow_the_power_law_and_add_up_to_l0():
    found = Planted(n_features=100, l0=5.0, power=0.5).frequencies()
    assert found.sum().item() == pytest.approx(5)
    assert (found[0] / found[3]).item() == pytest.approx(2)  # (4/1)^0.5
    steep = Planted(n_features=100, l0=5.0, power=2.0).frequencies()
    assert steep.sum().item() == pytest.approx(5)
    assert steep.max().item() == 0.5
    assert (steep[20] / steep[41]).item() == pytest.approx(4)  # (42/21)^2: below the cap as before


def test_features_fire_as_often_as_they_should_and_groups_together():
    """Read off through directions that are orthogonal, without noise."""
    planted = Planted(n_features=8, d_model=8, l0=2.0, power=0.5, group=2, correlation=0.8, noise=0.0)
    basis = torch.linalg.qr(planted.directions().T).Q.T
    object.__setattr__(planted, "directions", lambda: basis)
    x = planted.draw(20_000)
    codes = x @ basis.T
    fires = (codes - codes.min(0).values) > 0.2
    assert fires.double().mean(0).tolist() == pytest.approx(planted.frequencies().tolist(), abs=0.015)
    together = torch.corrcoef(fires.double().T)
    assert together[0, 1] > 0.4
    assert abs(together[0, 2]) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l0": 5.0}, "l0: expected"),
        ({"group": 0}, "group: expected"),
        ({"correlation": 1.5}, "correlation: expected"),
    ],
)
def test_what_cannot_be_planted(changes, message):
    with pytest.raises(ValueError, match=message):
        Planted(**{"n_features": 8, "l0": 2.0, **changes})


def without_scipy(monkeypatch) -> None:
    imported = builtins.__import__

    def importing(name, *arguments, **options):
        if name.startswith("scipy"):
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_assignment_by_hand(monkeypatch):
    similarity = torch.tensor([[0.9, 0.8, 0.0], [0.8, 0.1, 0.0]])
    if find_spec("scipy") is not None:
        columns, how = assignment(similarity)
        assert (columns.tolist(), how) == ([1, 0], "optimal")
    without_scipy(monkeypatch)
    columns, how = assignment(similarity)
    assert (columns.tolist(), how) == ([0, 1], "greedy")
    assert assignment(similarity.T)[0].tolist() == [0, 1, -1], "more features than latents"


def test_the_true_dictionary_is_found_whole():
    directions = SMALL.directions()
    found = compare(SMALL, 3 * directions.flip(0), torch.ones(24), 3.0)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert (found["found"], found["split"], found["l0_error"]) == (1.0, 0.0, 0.0)


def test_what_is_missing_doubled_and_dead():
    directions = SMALL.directions()
    latents = torch.cat([directions[:12], directions[:6], -directions[12:]])
    frequency = torch.cat([torch.ones(18), torch.zeros(12)])
    found = compare(SMALL, latents, frequency, 6.0)
    assert found["found"] == 0.5
    assert found["split"] == pytest.approx(6 / 18)
    assert found["l0_error"] == 1.0
    assert 0.5 < found["cosine"] < 0.8
    assert compare(SMALL, latents, torch.zeros(30), 0.0)["cosine"] == 0.0


# ---- controls


def test_the_random_dictionary_fires_as_often_as_asked_with_the_best_factor():
    x = SMALL.draw(2000)
    for l0 in (2.0, 6.0):
        sae = random_dictionary(x, 40, l0, seed=0)
        best = evaluate_sae(sae, x)
        assert best.l0 == pytest.approx(l0, rel=0.01)
        assert best.fvu < 1
        assert sae(x).mean(0).tolist() == pytest.approx(x.mean(0).tolist(), abs=1e-4)
        mean = sae(x).mean(0)
        for factor in (0.9, 1.1):
            other = (mean + factor * (sae(x) - mean) - x).square().sum() / (x - x.mean(0)).square().sum()
            assert other.item() > best.fvu


def test_control_rows():
    x, held_out = SMALL.draw(1200)[:900], SMALL.draw(1200)[900:]
    pairs = torch.arange(1200).reshape(600, 2).repeat(2, 1) % 7
    kept = torch.arange(300) > 2
    rows = control_rows(x, held_out, kept, 32, [2.0, 4.0], (pairs[:900], pairs[900:]))
    assert [row["contender"] for row in rows] == ["pca", "random dictionary"] * 2 + ["token pairs"]
    assert rows[2]["fvu"] == pca_fvu(x, held_out, 4)
    assert rows[2]["fvu_kept"] == pca_fvu(x, held_out[kept], 4)
    assert rows[4]["fvu"] == pair_table_fvu(x, pairs[:900], held_out, pairs[900:])
    assert control_rows(x, held_out, kept, 32, [2.0], None)[-1]["contender"] == "random dictionary"


# ---- intervals and winners


def row(contender: str, kind: str, seed: int, l0: float, fvu: float, at_l0: float, **others) -> dict:
    return {
        "kind": "architecture",
        "site": "s",
        "contender": contender,
        "architecture": kind,
        "seed": seed,
        "l0": l0,
        "l0_kept": l0,
        "fvu": fvu,
        "fvu_kept": 2 * fvu,
        "at_l0": at_l0,
        **others,
    }


def test_an_interval_over_seeds():
    assert pareto.interval([0.5]) == (0.5, None)
    found = pareto.interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.30 / math.sqrt(3))
    assert found.text(".1f") == "2.0 ± 2.5"


def test_who_wins_is_read_off_the_curves():
    rows = []
    for seed, shift in ((0, 1.0), (1, 1.01)):
        rows += [row("ours", "topk", seed, l0, shift * 0.4 / l0, l0) for l0 in (2.0, 8.0)]
        rows += [row("saelens", "gated", seed, l0, shift * 0.8 / l0, at) for l0, at in ((1.0, 2.0), (4.0, 8.0))]
    at_2, at_4, at_8 = pareto.winners(rows, "s")
    assert [level["l0"] for level in (at_2, at_4, at_8)] == [2, 4, 8]
    (first, *who), (second, *other) = at_4["places"]
    assert (who, other) == (["ours", "topk"], ["saelens", "gated"])
    assert first.mean == pytest.approx(1.005 * 0.1), "between its points, straight in logarithms"
    assert second.mean == pytest.approx(1.005 * 0.2)
    assert at_4["clear"] is True
    assert len(at_8["places"]) == 1, "no curve of the other passes there"
    assert at_8["clear"] is None
    assert pareto.winners(rows, "s", "_kept")[1]["places"][0][0].mean == pytest.approx(2 * 1.005 * 0.1)


def test_seeds_that_scatter_leave_no_clear_winner():
    rows = [row("ours", "topk", seed, 2.0, fvu, 2.0) for seed, fvu in enumerate((0.1, 0.2, 0.3))]
    rows += [row("ours", "gated", seed, 2.0, fvu, 2.0) for seed, fvu in enumerate((0.2, 0.3, 0.35))]
    (level,) = pareto.winners(rows, "s")
    assert level["places"][0][2] == "topk"
    assert level["clear"] is False


# ---- the command

TINY = [
    *("--steps", "12", "--d-sae", "32", "--batch-size", "64", "--tokens", "1024", "--features", "24"),
    *("--l0", "2", "5", "--l1-coefficients", "0.3", "0.1", "--l0-coefficients", "8e-3", "2e-3"),
]


def run(tmp_path, *arguments: str) -> int:
    return quality.main([*TINY, *arguments, "--results", str(tmp_path), "--out", str(tmp_path)])


def test_every_kind_on_planted_features(tmp_path, capsys):
    one = ("--l0", "5", "--l1-coefficients", "0.2", "--l0-coefficients", "4e-3")
    assert run(tmp_path, "--architectures", *KINDS, "--trainers", "ours", "--seeds", "0", "1", "--save", *one) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["rows"]
    trained = [row for row in found if row["kind"] == "architecture"]
    assert [row["architecture"] for row in trained] == [kind for kind in KINDS for _ in range(2)]
    assert [row["seed"] for row in trained[:2]] == [0, 1]
    for each in trained:
        assert each["tokens_seen"] == 12 * 64
        assert each["held_out_tokens"] == 103
        assert each["planted"]["l0_error"] == pytest.approx(each["l0"] / Planted.l0 - 1)
        assert each["seconds"] > 0
        assert 0 < each["fvu"] < 2
        if each["architecture"] == "topk":
            assert each["l0"] <= each["sparsity"]["k"]
        if each["architecture"] in ("batchtopk", "matryoshka"):
            assert each["l0"] == pytest.approx(each["sparsity"]["k"], rel=0.35), "calibrated"
    assert {row["contender"] for row in found if row["kind"] == "control"} == {"pca", "random dictionary"}
    assert read(tmp_path / "architectures.jsonl") == [
        {"schema": 1, "suite": "architectures", **row, "machine": json.loads(out.splitlines()[-1])["machine"]}
        for row in found
    ]
    page = (tmp_path / "architectures.html").read_text()
    assert "who wins where, without the token in a thousand" in page
    assert "2 seeds" in page
    assert "planted features" in page


def test_outliers_are_left_out_of_the_figures_kept():
    data = architectures.Data(architectures.Site(0, "resid"), SMALL.draw(64), SMALL.draw(64))
    data.held_out[7] *= 100
    assert data.kept.nonzero().flatten().tolist() == [i for i in range(64) if i != 7]


def test_activations_of_a_file_with_its_token_pairs(tmp_path, capsys):
    path, x = tmp_path / "activations.safetensors", SMALL.draw(1000)
    save_file({"layer_1/resid": x.bfloat16()}, path)
    save_file({"pairs": torch.arange(2000).reshape(1000, 2) % 5}, path.with_name(PAIRS))
    arguments = ("--architectures", "topk", "--trainers", "ours", "--data", str(path), "--sites", "layer_1/resid")
    assert run(tmp_path, *arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["site"] for row in rows} == {"layer_1/resid"}
    assert rows[-1]["contender"] == "token pairs"
    assert "planted" not in rows[0]


def test_a_package_that_is_missing_is_a_row(tmp_path, capsys, monkeypatch):
    def missing(name, kind, impl):
        if name == "saelens":
            raise UnavailableError("sae-lens is not installed")
        return made(name, kind, impl)

    made = architectures.trainer_of
    monkeypatch.setattr(architectures, "trainer_of", missing)
    assert run(tmp_path, "--architectures", "topk", "--trainers", "saelens", "ours") == 0
    out = capsys.readouterr().out
    assert [row["kind"] for row in json.loads(out.splitlines()[-1])["rows"][:2]] == ["skipped", "architecture"]
    assert "sae-lens is not installed" in out


def test_a_training_of_ours_that_fails_is_an_exit_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(architectures, "train", lambda *arguments: 1 / 0)
    assert run(tmp_path, "--architectures", "topk", "--trainers", "ours") == 1
    assert "nothing to draw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--l1-coefficients", "0.1"], "--l1-coefficients: expected 2 numbers, one for each of --l0"),
        (["--coefficients", "saelens/gated=0.1"], "--coefficients: expected 2 numbers for saelens/gated, found [0.1]"),
        (["--coefficients", "other/gated=0.1,0.2"], "expected TRAINER/KIND=NUMBER,…, found 'other/gated=0.1,0.2'"),
        (["--d-sae", "1"], "k: expected at most 1, got 2"),
        (["--data", "nowhere.safetensors"], "`python -m bench.quality.activations RUN` makes it"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--architectures", "topk", *TINY, *arguments])
    assert message in capsys.readouterr().err


def test_coefficients_of_one_trainer():
    given = architectures.parser().parse_args([*TINY, "--architectures", "relu", "--coefficients", "ours/relu=.7,.6"])
    found = {
        name: [setting.config.loss.l0_coefficient for setting in architectures.settings(given, name, "relu", 0)]
        for name in ("ours", "saelens")
    }
    assert found == {"ours": [0.7, 0.6], "saelens": [0.3, 0.1]}


def test_prefixes_end_with_all():
    assert architectures.prefixes(512) == (16, 64, 128, 240, 512)
    assert architectures.prefixes(8) == (1, 2, 4, 8)


PACKAGES = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", architectures.RECIPES)
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_train_every_kind_they_have(name, recipe, tmp_path, capsys):
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} is not installed")
    arguments = ("--architectures", *KINDS, "--trainers", name, "--recipe", recipe, "--steps", "40")
    given = architectures.parser().parse_args([*TINY, *arguments])
    (data,) = architectures.data_of(given)
    rows = architectures.run(given, data)
    assert [row["reason"] for row in rows if row["kind"] == "skipped"] == []
    for each in (row for row in rows if row["kind"] == "architecture"):
        assert 0 < each["fvu"] < 1
        if each["architecture"] == "topk":
            assert each["l0"] <= each["sparsity"]["k"]
