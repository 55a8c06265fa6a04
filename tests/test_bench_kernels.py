"""The timing script: gated, and complete; what it times is the GPU's business."""

import json

import pytest
import torch

from bench import kernels as bench

pytest.importorskip("triton")

SMALL = ["--device", "cpu", "--tokens", "24", "--d-model", "16", "--d-sae", "96", "--l0", "8", "--repeats", "1"]


def test_every_row_and_the_json_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "kernels.jsonl")
    rows = bench.main([*SMALL, "--dtype", "float32", "--save"])
    assert {(row["op"], row["impl"]) for row in rows} == {
        ("encode", "triton"), ("encode", "torch.mm alone"), ("decode", "triton"), ("decode", "torch.mm of dense f"),
        ("jumprelu forward", "triton"), ("jumprelu forward", "reference"),
        ("jumprelu backward", "triton"), ("jumprelu backward", "reference"),
    }  # fmt: skip
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(rows))
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == len(rows)
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)


def test_a_red_gate_times_nothing():
    with pytest.raises(SystemExit, match=r"decode: relative error 1 exceeds 0.001; nothing is timed on a red gate"):
        bench.gate("decode", torch.zeros(3), torch.ones(3), 1e-3)


def test_work_by_hand():
    assert bench.work("encode", 2, 3, 5, 4, 2) == (60, 2 * (6 + 15) + 32)
    assert bench.work("decode", 2, 3, 5, 4, 2) == (24, 2 * (12 + 6) + 32)
    assert bench.work("jumprelu forward", 2, 3, 5, 4, 4) == (20, 80)
    assert bench.work("jumprelu backward", 2, 3, 5, 4, 4) == (80, 120)
