"""The page of recorded trainings: which rows count, FVU at an L0, what cannot be compared, and the files."""

import json

import pytest

from bench.quality import recorded
from bench.quality.recorded import Setting, fvu_at, lines_at, newest

SETTING = Setting("layer_1/resid", "shared", 64)


def row(contender="ours", architecture="topk", seed=0, l0=40.0, fvu=0.2, at_l0=40.0, **changes):
    return {
        "kind": "architecture",
        "contender": contender,
        "architecture": architecture,
        "site": SETTING.site,
        "recipe": SETTING.recipe,
        "d_sae": SETTING.d_sae,
        "seed": seed,
        "at_l0": at_l0,
        "l0": l0,
        "fvu": fvu,
        "l0_kept": l0,
        "fvu_kept": fvu,
        "dead": 0.1,
        "cpu_seconds": 3.0,
        "peak_bytes": 0,
        "tokens_seen": 1000,
        "held_out_tokens": 50,
        "machine": {"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234"},
    } | changes


def test_the_newest_row_of_a_training_counts():
    found = newest([row(fvu=0.5), row(seed=1, fvu=0.4), row(fvu=0.3), row(d_sae=128, fvu=0.1)])
    assert [each["fvu"] for each in found[SETTING]] == [0.3, 0.4]
    assert list(found) == [SETTING, SETTING._replace(d_sae=128)]


def test_one_sparsity_is_moved_along_the_slope_from_nearby():
    assert fvu_at(40, [row(l0=40.0, fvu=0.2)]) == pytest.approx(0.2)
    assert fvu_at(40, [row(l0=44.0, fvu=0.2)]) == pytest.approx(0.2 * 1.1**0.27)
    assert fvu_at(40, [row(l0=49.0, fvu=0.2)]) is not None
    assert fvu_at(40, [row(l0=51.0, fvu=0.2)]) is None
    assert fvu_at(40, [row(l0=31.0, fvu=0.2)]) is None
    assert fvu_at(40, [row(l0=0.0, fvu=0.2)]) is None


def test_several_sparsities_are_joined_by_a_line_and_nothing_is_guessed_far_beyond():
    curve = [row(l0=20.0, fvu=0.4, at_l0=20.0), row(l0=80.0, fvu=0.1, at_l0=80.0)]
    assert fvu_at(40, curve) == pytest.approx(0.2)  # the geometric mean, half way in logarithms
    assert fvu_at(90, curve) == pytest.approx(0.1 * (80 / 90) ** 0.27)  # from the nearer one
    assert fvu_at(19, curve) == pytest.approx(0.4 * (20 / 19) ** 0.27)
    assert fvu_at(101, curve) is fvu_at(15, curve) is None


def test_lines_are_ordered_by_what_can_be_compared():
    rows = [
        *(row(seed=seed, fvu=fvu) for seed, fvu in enumerate((0.20, 0.22, 0.30))),
        row("saelens", l0=70.0, fvu=0.1),  # too far away for its FVU to say anything
        row("sparsify", l0=40.0, fvu=0.21, peak_bytes=200 << 20),
    ]
    first, second, last = lines_at(rows, 40.0)
    assert (first.trainer, first.at_l0, first.spread, first.seeds) == ("sparsify", 0.21, None, 1)
    assert (second.trainer, second.at_l0, second.seeds) == ("ours", 0.22, 3)
    assert (second.fvu, second.spread) == (pytest.approx(0.24), pytest.approx(0.05))
    assert (last.trainer, last.at_l0) == ("saelens", None)
    assert first.cells()[8] == "200"
    assert second.cells()[8] == "–"


def test_one_seed_that_is_too_far_away_leaves_a_line_uncompared():
    line = lines_at([row(seed=0), row(seed=1, l0=90.0)], 40.0)[0]
    assert (line.at_l0, line.seeds) == (None, 2)


def test_page_and_tables(tmp_path, capsys):
    control = {"kind": "control", "contender": "pca", "l0": 40.0, "fvu": 0.5, "fvu_kept": 0.5, "at_l0": 40.0}
    control |= {"site": SETTING.site, "recipe": SETTING.recipe, "d_sae": SETTING.d_sae, "machine": row()["machine"]}
    lines = [json.dumps({"schema": 1, "suite": "architectures"} | each) for each in (row(), row("saelens"), control)]
    (tmp_path / "architectures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert recorded.main(["--results", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    shown = capsys.readouterr().out
    assert "### layer_1/resid, shared recipe, 64 latents" in shown
    assert "| topk | gemmascope | 40.0 | 0.2000 | 0.2000 | – | 10% | 3.0 | – | 1 |" in shown
    assert "Controls at L0 40: pca 0.500 at L0 40.0." in shown
    page = (tmp_path / "page" / "kinds.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "<td>SAELens</td>" in page


def test_no_rows(tmp_path, capsys):
    with pytest.raises(SystemExit):
        recorded.main(["--results", str(tmp_path)])
    assert "expected rows in" in capsys.readouterr().err
