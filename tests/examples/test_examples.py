"""The examples, run as a user runs them: each in a process of its own, in an empty folder, without a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = {"harvest_and_train", "splice_and_measure", "own_optimiser", "kernels_by_hand", "tiny_gemma", "cross_layer"}
LINES = 60


def run(folder: Path, name: str, *arguments: str | Path) -> str:
    """What the example prints."""
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def number(pattern: str, output: str) -> float:
    """The number that the group of ``pattern`` finds, once."""
    (found,) = re.findall(pattern, output)
    return float(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and the output of harvest_and_train.py."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("example")
    return folder, run(folder, "harvest_and_train", "--steps", "150", "--rows", "100")


def test_harvest_and_train(trained):
    folder, output = trained
    for site in ("mlp", "resid"):
        l0, fvu, pca, same = re.search(
            rf"saes/layer_1/{site}: L0 (\S+), FVU (\S+), PCA of that rank (\S+), same bits: (\w+)", output
        ).groups()
        assert 1 < float(l0) < 64
        assert 0 < float(fvu) < float(pca) < 1
        assert same == "True"
        assert sorted(path.name for path in (folder / "saes/layer_1" / site).iterdir()) == [
            "config.json",
            "params.safetensors",
        ]


def test_splice_an_sae_from_a_folder(trained):
    check_splice(run(trained[0], "splice_and_measure", "--rows", "100", "--sae", "saes/layer_1/resid"))


def test_splice_an_sae_trained_for_it(tmp_path):
    pytest.importorskip("transformers")
    check_splice(run(tmp_path, "splice_and_measure", "--rows", "60", "--steps", "100"))


def check_splice(output: str) -> None:
    assert number(r"logits move by (\S+) on average", output) > 0
    assert number(r"detached, by (\S+)", output) == 0
    assert number(r"with the activation itself: (\S+)", output) == 0
    sae, mean = number(r"rise with the SAE: (\S+)", output), number(r"rise with the mean: (\S+);", output)
    assert 0 < sae < mean / 2
    assert number(r"recovered: (\S+)", output) == pytest.approx(1 - sae / mean, abs=2e-3)


def test_own_optimiser(tmp_path):
    output = run(tmp_path, "own_optimiser", "--steps", "200")
    assert number(r"formulas differ by at most (\S+),", output) < 1e-5
    first, last = map(float, re.search(r"loss (\S+) -> (\S+);", output).groups())
    assert last < first / 5
    assert number(r"FVU (\S+)", output) < 0.2


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_kernels_by_hand(tmp_path, impl):
    output = run(tmp_path, "kernels_by_hand", "--impl", impl)
    assert "WRONG" not in output
    assert len(re.findall(r"differs by \S+: ok", output)) == 9


def test_cross_layer(tmp_path):
    pytest.importorskip("transformers")
    output = run(tmp_path, "cross_layer", "--lm-steps", "25", "--steps", "200", "--d-sae", "64")
    rows = [list(map(float, line)) for line in re.findall(r"^ +(\d)" + r" +(\S+)" * 5 + "$", output, re.MULTILINE)]
    assert [row[0] for row in rows] == [0, 1, 2, 3]
    for _, l0, fvu, l0_alone, fvu_alone, linear in rows:
        assert all(0 <= each < 64 for each in (l0, l0_alone))
        assert all(0 < each < 1 for each in (fvu, fvu_alone, linear))
    assert 8 < sum(row[1] for row in rows) < 64
    assert number(r"MLPs replaced: \+ (\S+);", output) < 2
    assert "gives the same bits: True" in output
    names = {f"{matrix}_{layer}.safetensors" for matrix in ("W_enc", "W_dec") for layer in range(4)}
    assert {path.name for path in (tmp_path / "clt").iterdir()} == names | {"config.yaml"}


def test_a_real_model_needs_a_text(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, EXAMPLES / "harvest_and_train.py", "--model", "somewhere/else"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "--text: expected a UTF-8 file" in done.stderr


def test_examples_stay_short_and_are_all_here():
    found = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(found) == NAMES
    assert max(found.values()) <= LINES
