"""The study of dead latents on tiny data."""

import math

import pytest
import torch
from safetensors.torch import save_file

from bench.quality import dead
from bench.quality.synthetic import Planted
from bench.reporting.records import read

TINY = ["--d-sae", "24", "--steps", "12", "--batch-size", "64", "--l0", "3"]


def activations(folder, *sites):
    x = Planted(n_features=24, d_model=16, l0=3.0, group=3).draw(1500)
    x[::500] *= 100
    folder.mkdir()
    path = folder / "activations.safetensors"
    save_file({site: (x + shift).bfloat16() for shift, site in enumerate(sites)}, path)
    return path


def test_rank_correlation_by_hand():
    assert dead.spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]) == pytest.approx(0.8)  # 1 − 6·2/(4·15)
    assert dead.spearman([1.0, 2.0, 3.0], [5.0, 3.0, 1.0]) == pytest.approx(-1)
    assert dead.spearman([1.0, 1.0, 2.0], [3.0, 3.0, 9.0]) == pytest.approx(1)
    assert math.isnan(dead.spearman([1.0, 2.0], [1.0, 2.0]))
    assert math.isnan(dead.spearman([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))


def test_gamma_by_hand():
    rows = torch.tensor([[3.0, 4.0], [5.0, 4.0]])
    assert dead.gamma(rows) == pytest.approx(32**0.5)  # ‖(4, 4)‖/1


def test_outliers_are_measured_by_the_median():
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 3.1], [1.0, 0.0], [0.5, 0.0]])
    assert dead.without_outliers(rows).tolist() == rows[[0, 1, 3, 4]].tolist()


def test_every_treatment_is_a_row_and_the_table_has_them(tmp_path, capsys):
    path = activations(tmp_path / "small", "layer_0/resid", "layer_1/resid", "layer_2/resid")
    assert dead.main([str(path), *TINY, "--save", "--results", str(tmp_path)]) == 0
    rows = read(tmp_path / "dead.jsonl")
    names = list(dead.treatments(3, 12))
    assert [row["treatment"] for row in rows] == names * 3
    for row in rows:
        assert row["data"] == "small"
        assert 0 <= row["dead"] <= 1
        assert row["outlier_share"] == pytest.approx(3 / 1350)
        assert row["held_out_tokens"] == 150
    seen = {row["treatment"]: row["gamma_seen"] for row in rows[: len(names)]}
    assert seen["topk: as harvested"] == rows[0]["gamma"] != seen["topk: all"]
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_what_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dead.main([str(tmp_path / "none.safetensors"), *TINY])
    assert "none.safetensors" in capsys.readouterr().err
