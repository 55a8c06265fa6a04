"""The comparison of trainers on tiny activations: rows, verdicts, faults. Packages only where they are installed."""

import json
import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bench import trainers
from bench.contenders import UnavailableError
from bench.ours import OursTrainer
from bench.peers.sparsify import TopKSAE
from bench.quality import __main__ as quality
from bench.quality import plots, verdicts
from bench.reporting.records import read
from bench.trainers import Setting, Trainer
from gemmascope.evaluation import evaluate_sae
from gemmascope.sites import Site
from gemmascope.training.config import TrainConfig

SITE = "layer_0/resid"
TINY = ["--steps", "20", "--d-sae", "32", "--batch-size", "64", "--l0-coefficients", "2e-3", "8e-3"]
PACKAGES = {
    "saelens": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
    "sparsify_adam": "sparsify",
}


def sums_of_directions(n: int = 1500, d: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.08)
    return codes @ torch.randn(40, d, generator=generator) + 0.05 * torch.randn(n, d, generator=generator) + 1


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "activations.safetensors"
    save_file({SITE: sums_of_directions().bfloat16()}, path)
    return path


def run(activations, tmp_path, *arguments: str) -> tuple[int, list[str]]:
    given = ["--activations", str(activations), "--sites", SITE, "--results", str(tmp_path), "--out", str(tmp_path)]
    return quality.main([*given, *TINY, *arguments])


def document(capsys) -> tuple[dict, str]:
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_ours_and_the_reference_are_the_same_in_fp64(activations, tmp_path, capsys):
    assert run(activations, tmp_path, "--trainers", "ours", "reference", "--save") == 0
    found, out = document(capsys)
    (parity,) = (verdict for verdict in found["verdicts"] if verdict["kind"] == "parity")
    assert parity["met"]
    assert max(parity["l0"], parity["fvu"]) < 1e-6
    assert [row["contender"] for row in found["rows"]] == ["ours", "ours", "reference", "reference", "ours"]
    for row in found["rows"][:4]:
        assert row["tokens_seen"] == 20 * 64
        assert row["held_out_tokens"] == 150
        assert row["curve"][-1]["step"] == 20
        assert row["curve"] == sorted(row["curve"], key=lambda point: point["seconds"])
        assert row["fvu"] > 0
        assert row["seconds"] > 0
    assert "in fp64" in out
    rows = read(tmp_path / "quality.jsonl")
    assert [row["kind"] for row in rows] == ["quality"] * 4 + ["parity"]
    assert all(row["machine"]["versions"]["torch"] for row in rows)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_another_mathematics_is_noticed(activations, tmp_path, capsys, monkeypatch):
    start = OursTrainer.start

    def other(self, setting, sae, sample):
        if self.name == "reference":
            config = setting.config.changed(bandwidth=1.5 * setting.config.loss.bandwidth)
            setting = Setting(config, setting.l0)
        start(self, setting, sae, sample)

    monkeypatch.setattr(OursTrainer, "start", other)
    monkeypatch.setattr(verdicts, "PARITY", 1e-6)
    assert run(activations, tmp_path, "--trainers", "ours", "reference") == 1
    assert "missed" in document(capsys)[1]


class FakePeer(Trainer):
    """OursTrainer, with reconstructions that are beside the point."""

    name, differs = "saelens", "is off by nine"

    def start(self, setting, start, sample):
        self.ours = OursTrainer()
        self.ours.start(setting, start, sample)

    def update(self, x):
        self.ours.update(x)

    def sae(self):
        sae = self.ours.sae()
        return SimpleNamespace(
            d_model=sae.d_model,
            d_sae=sae.d_sae,
            W_dec=sae.W_dec,
            encode=sae.encode,
            decode=lambda f: sae.decode(f) + 9,
        )


def test_a_worse_peer_is_above_our_curve(activations, tmp_path, capsys, monkeypatch):
    make = quality.make
    monkeypatch.setattr(quality, "make", lambda name, impl: FakePeer() if name == "saelens" else make(name, impl))
    assert run(activations, tmp_path, "--trainers", "ours", "saelens", "--no-parity") == 0
    found, out = document(capsys)
    (verdict,) = (one for one in found["verdicts"] if one["kind"] == "curves")
    assert verdict["met"]
    assert verdict["points"] == 4
    assert verdict["most"] < 1
    assert "is off by nine" in out


@pytest.mark.parametrize(
    ("recipe", "differs"), [("published", "is off by nine, by default"), ("shared", "is off by nine")]
)
def test_every_row_says_which_recipe_it_is_of(recipe, differs, activations, tmp_path, capsys, monkeypatch):
    def make(name, impl):
        if name == "saelens":
            raise UnavailableError("sae-lens is not installed")
        return FakePeer()

    monkeypatch.setattr(FakePeer, "defaults", "by default")
    monkeypatch.setattr(quality, "make", make)
    arguments = ("--recipe", recipe, "--trainers", "dictionary_learning", "saelens", "--no-parity", "--save")
    assert run(activations, tmp_path, *arguments) == 0
    rows = read(tmp_path / "quality.jsonl")
    assert [row["kind"] for row in rows] == ["quality", "quality", "skipped"]
    assert {row["recipe"] for row in rows} == {recipe}
    assert {row["differs"] for row in rows[:2]} == {differs}
    assert f"  saelens: {differs}\n" in capsys.readouterr().out


def test_a_missing_package_is_a_row_and_the_others_go_on(activations, tmp_path, capsys, monkeypatch):
    make = quality.make

    def without_packages(name, impl):
        if name == "sparsify":
            raise UnavailableError("eai-sparsify is not installed")
        return make(name, impl)

    monkeypatch.setattr(quality, "make", without_packages)
    assert run(activations, tmp_path, "--trainers", "sparsify", "ours", "--no-parity") == 0
    found, out = document(capsys)
    assert [row["kind"] for row in found["rows"]] == ["skipped", "quality", "quality"]
    assert "eai-sparsify is not installed" in out


def test_a_training_of_ours_that_fails_is_an_exit_status(activations, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OursTrainer, "update", lambda self, x: 1 / 0)
    assert run(activations, tmp_path, "--trainers", "ours", "--no-parity") == 1
    found, out = document(capsys)
    assert found["rows"][0]["reason"] == "failed: ZeroDivisionError: division by zero"
    assert "nothing to draw" in out


def test_trainers_that_fix_l0_are_given_what_ours_reached(monkeypatch):
    configs = [TrainConfig.short(l0_coefficient=c) for c in (1e-3, 1e-2)]
    given = list(quality.settings("sparsify", configs, [19.6, 0.2], "published", True))
    assert [setting.l0 for setting in given] == [20, 1]
    assert [s.l0 for s in quality.settings("saelens", configs, [19.6, 0.2], "published", False)] == [19.6, 0.2]


@pytest.mark.parametrize(
    ("l0", "expected"),
    [(4, 0.2), (16, 0.05), (8, 0.1), (3.9, None), (17, None)],
    ids=["first point", "last point", "between", "below", "above"],
)
def test_interpolation_is_straight_in_logarithms(l0, expected):
    found = verdicts.interpolate(l0, [(16, 0.05), (4, 0.2)])
    assert found is expected is None or math.isclose(found, expected)


def test_topk_keeps_the_largest_and_decodes_them():
    coder = SimpleNamespace(
        cfg=SimpleNamespace(k=1),
        encoder=SimpleNamespace(weight=torch.eye(3, 2) + 0.5, bias=torch.tensor([0.0, 1.0, -9.0])),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]),
        b_dec=torch.tensor([0.5, 0.5]),
    )
    sae = TopKSAE(coder, input_scale=2.0)
    x = torch.tensor([[5.0, 1.0]])  # over the scale, less b_dec: (2, 0); z = (3, 2, −8)
    f = sae.encode(x)
    assert f.tolist() == [[3.0, 0.0, 0.0]]
    assert sae.decode(f).tolist() == [[2 * 3.5, 2 * 0.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "nowhere.safetensors"], "`python -m bench.quality.activations RUN` makes it"),
        (["--sites", "layer_9/resid"], "sites: expected some of layer_0/resid, found 'layer_9/resid'"),
        (["--l0", "3"], "--l0: expected 4 numbers"),
        (["--steps", "-1"], "steps: expected at least 0"),
    ],
)
def test_bad_arguments(arguments, message, activations, capsys):
    given = ["--activations", str(activations), "--sites", SITE]
    with pytest.raises(SystemExit) as exit_:
        quality.main([*given, *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_safetensors_is_said_so(tmp_path, capsys):
    path = tmp_path / "activations.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(SystemExit):
        quality.main(["--activations", str(path)])
    assert "is not a safetensors file" in capsys.readouterr().err


def test_warm_ups_shrink_with_the_steps():
    config = quality.config_of(quality.parser().parse_args(["--steps", "40"]), 2e-3)
    assert (config.steps, config.lr_warmup_steps, config.l0_warmup_steps, config.lr_decay_steps) == (40, 10, 17, 15)
    whole = quality.config_of(quality.parser().parse_args([]), 2e-3)
    assert whole == TrainConfig.short(l0_coefficient=2e-3)


def test_an_unknown_trainer_is_named():
    with pytest.raises(ValueError, match=r"trainer: expected one of ours, .* found 'other'"):
        trainers.make("other")


def test_a_picture_needs_points(tmp_path):
    rows = [{"kind": "skipped", "contender": "saelens", "site": SITE, "reason": "not here"}]
    assert plots.save(rows, {}, tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", trainers.RECIPES)
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_start_where_ours_does_and_learn(name, recipe):
    if find_spec(PACKAGES[name]) is None:  # not imported: sparsify chooses its decoder when it is
        pytest.skip(f"{name} is not installed")
    rows = sums_of_directions()
    warm_ups = {"lr_warmup_steps": 5, "l0_warmup_steps": 15, "lr_decay_steps": 10}
    config = TrainConfig.short(d_sae=48, steps=40, batch_size=64, **warm_ups)
    ours, theirs = trainers.make("ours"), trainers.make(name)
    setting = Setting(config, 4, recipe)
    ours.start(setting, None, rows)
    start = ours.sae()
    theirs.start(setting, start, rows)
    before = theirs.sae()
    if not name.startswith("sparsify"):
        x_hat, mine = before.decode(before.encode(rows)), start.decode(start.encode(rows))
        assert (x_hat - mine).norm() < 0.1 * mine.norm()  # thresholds may start elsewhere
    untrained = evaluate_sae(before, rows).fvu
    row = quality.train(theirs, setting, Site.parse(SITE), rows[:-200], rows[-200:])
    assert row["fvu"] < min(1, untrained)
    if name.startswith("sparsify"):
        assert row["l0"] <= setting.l0
