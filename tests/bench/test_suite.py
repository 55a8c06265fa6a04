"""The benchmark of a whole suite, rehearsed at a size of seconds."""

import json

import pytest

from bench import suite
from bench.reporting import records

pytest.importorskip("transformers")

TINY = ["--model", "tiny", "--device", "cpu", "--d-sae", "64", "--l0", "6", "--context", "32", "--ring-tokens", "1024"]
TINY += ["--batch", "128", "--forward-rows", "4", "--compute-dtype", "fp32"]


def test_row(tmp_path, capsys):
    assert suite.main([*TINY, "--blocks", "2", "--save", "--results", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["sites"] == 6
    assert row["l0"] == pytest.approx(6, rel=0.5)
    assert row["steps"] == 2 * (32 * 31 // 128)
    assert row["tokens"] == 128 * row["steps"]
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert all(share >= 0 for share in row["shares"].values())
    (saved,) = records.read(tmp_path / "suite.jsonl")
    assert saved["tokens_per_second"] == row["tokens_per_second"]


def test_chosen_sites(tmp_path, capsys):
    assert suite.main([*TINY, "--sites", "layer_1/resid", "--blocks", "1", "--ring", "host"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sites"] == 1
