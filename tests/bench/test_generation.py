"""The bench of generation, tiny: every contender generates, and one that reconstructs something else is not timed."""

import torch

from bench import generation
from bench.reporting import records

SIZES = generation.Sizes(
    layers=2, hidden=16, intermediate=24, heads=2, key_value_heads=1, head_dim=12, vocabulary=61, d_sae=64, l0=8,
    new_tokens=3,
)  # fmt: skip
CPU = torch.device("cpu")


def test_rows():
    rows = generation.measure(SIZES, rounds=2, device=CPU)
    assert [row["contender"] for row in rows] == ["model", "ours", "ours_steered", "dense"]
    assert all(row["p50_ms"] > 0 and row["repeats"] == 2 and row["n_saes"] == 6 for row in rows)
    assert all(abs(row["l0"] - 8) < 1 for row in rows)


def test_no_time_without_parity(monkeypatch):
    forward = generation.Dense.forward
    monkeypatch.setattr(generation.Dense, "forward", lambda self, x: 1.001 * forward(self, x))
    rows = generation.measure(SIZES, rounds=1, device=CPU)
    [failed] = [row for row in rows if "failed" in row]
    assert failed["contender"] == "dense"
    assert failed["failed"].startswith("error 0.001 against fp64")
    assert "p50_ms" not in failed


def test_nan_is_no_parity(monkeypatch):
    monkeypatch.setattr(generation.Dense, "forward", lambda self, x: torch.full_like(x, torch.nan))
    rows = generation.measure(SIZES, rounds=1, device=CPU)
    assert [row["contender"] for row in rows if "failed" in row] == ["dense"]


def test_the_command(tmp_path, capsys):
    assert generation.main(["--rounds", "1", "--d-sae", "32", "--save", "--results", str(tmp_path)], SIZES) == 0
    rows = records.read(tmp_path / "generation.jsonl")
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 4
    assert {row["d_sae"] for row in rows} == {32}
