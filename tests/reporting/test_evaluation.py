"""The table, the plots and the page of an evaluation, from made-up results in the schema that it writes."""

import io
import json
import re

import numpy as np
import pytest
import rich.console
import torch

from gemmascope import reporting
from gemmascope.errors import BadFileError
from gemmascope.reporting import evaluation
from gemmascope.reporting.results import write_frequencies
from gemmascope.training.config import KINDS


def made(kinds=KINDS, layers=(0, 3), sites=("resid",)):
    draw = np.random.default_rng(0)
    saes = []
    for layer in layers:
        for site in sites:
            for kind in kinds:
                for l0 in (5.04, 20.3):
                    row = {"name": f"layer_{layer}/{site}/{kind}/{l0}", "site": site, "layer": layer, "kind": kind}
                    row |= {"width": 16384, "k": None, "seed": 0, "path": "saes/params.npz"}
                    for suffix in evaluation.SETS:
                        fvu, delta = draw.uniform(0.02, 0.1), draw.uniform(0.004, 0.15)
                        row |= {f"l0{suffix}": l0, f"l0_interval{suffix}": [l0 - 0.2, l0 + 0.2]}
                        row |= {f"fvu{suffix}": fvu, f"fvu_interval{suffix}": [fvu - 0.004, fvu + 0.006]}
                        row |= {f"delta_loss{suffix}": delta, f"tokens{suffix}": 2_000_000, f"kl{suffix}": 0.0123}
                        row |= {f"delta_loss_interval{suffix}": [delta - 0.002, delta + 0.002]}
                        row |= {f"loss_recovered{suffix}": 0.97}
                    row |= {"pca_fvu": 0.05, "random_fvu": 0.7, "pair_table_fvu": 0.2, "dead_fraction": 0.125}
                    row |= {"ablation_delta_loss": 2.5, "zero_ablation_delta_loss": 3.5, "reconstruction_bias": 0.987}
                    row |= {"outliers": 17, "outlier_share": 0.00011, "gamma": 1.5, "cosine": 0.98}
                    saes.append(row)
    return {
        "title": "Evaluation on tiny",
        "model": {"name": "tiny", "loss": 2.1, "held_out": "64 of 938 rows of 128 tokens, of 21 documents"},
        "saes": saes,
        "evaluation": {"draws": 1000, "level": 0.95, "seed": 0},
        "warnings": [],
        "environment": {"torch": "2.13.0"},
    }


def written(folder, results):
    (folder / "results.json").write_text(json.dumps(results))
    names = {row["name"]: torch.rand(64) * (torch.rand(64) > 0.2) for row in results["saes"]}
    write_frequencies(folder, names)
    return folder


def shown(folder, width=100):
    out = io.StringIO()
    console = rich.console.Console(file=out, width=width)
    console.print(reporting.evaluation_table(reporting.read_evaluation(folder)))
    return out.getvalue()


def test_table(tmp_path):
    results = made()
    lines = shown(written(tmp_path, results)).splitlines()
    row = results["saes"][0]
    [line] = [line for line in lines if " jumprelu " in line and " 0 " in line and " 5.0 " in line]
    mark = "✓" if row["fvu"] < 0.05 else "✗"
    fvu, delta = f"{row['fvu']:.3f}"[1:], f"{row['delta_loss']:+.3f}".replace("0.", ".", 1)
    expected = ["resid", "0", "jumprelu", "16384", "5.0", f"{fvu}±.005", ".050", mark, ".700", f"{delta}±.002", ".970"]
    assert line.split() == [*expected, "12%", ".99"]
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines), "nothing is cut"
    text = " ".join(" ".join(lines).split())
    assert f"{sum(row['fvu'] < 0.05 for row in results['saes'])} of 24 beat PCA of the same rank" in text
    assert "24 of 24 a random dictionary of the same L0" in text
    assert "±: half of the 95% interval over documents, 1,000 draws" in text
    assert "In the report alone: ΔLM loss, mean ablation; FVU of token pairs" in text


def test_table_of_one_kind_has_room_for_every_control(tmp_path):
    text = shown(written(tmp_path, made(kinds=("jumprelu",))))
    assert "pairs" in text
    assert "jumprelu" not in text
    assert "In the report alone: ΔLM loss, mean ablation." in " ".join(text.split())


def test_what_is_not_known_is_a_dash(tmp_path):
    results = made(kinds=("jumprelu",), layers=(0,))
    for key in ("fvu", "fvu_interval", "delta_loss", "loss_recovered", "l0_interval"):
        results["saes"][0][key] = None
    text = shown(written(tmp_path, results))
    assert "–" in text
    assert "1 of 1 a random dictionary" in " ".join(text.split())
    assert reporting.write_evaluation(tmp_path).is_file()


def test_page(tmp_path):
    results = made(layers=(0,))
    results["saes"][3]["name"] = "<script>alert(1)</script>"
    results["warnings"] = ["a & b"]
    page = reporting.write_evaluation(written(tmp_path, results)).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &amp; b" in page
    row = results["saes"][0]
    low, high = row["fvu_interval"]
    assert f"{row['fvu']:.3f} ({low:.3f} to {high:.3f})" in re.sub(r" [✓✗]", "", page)
    low, high = row["delta_loss_interval_every"]
    assert f"{row['delta_loss_every']:+.3f} ({low:+.3f} to {high:+.3f})" in page
    for heading in ("Explained variance, mean of tokens", "FVU, no outliers", "KL, special tokens too", "Norm ratio"):
        assert heading in page
    assert page.count("<img ") == 4
    assert "matryoshka" in page
    for name in ("l0_delta_loss", "l0_fvu", "firing_frequency", "delta_loss"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_files_give_the_same_page(tmp_path):
    written(tmp_path, made(layers=(0,), sites=("att", "mlp", "resid")))
    assert reporting.write_evaluation(tmp_path).read_bytes() == reporting.write_evaluation(tmp_path).read_bytes()


def test_a_rise_below_0_is_counted_and_not_drawn():
    from gemmascope.reporting.evaluation_plots import l0_against_delta_loss

    saes = made(kinds=("jumprelu", "topk"), layers=(0,))["saes"]
    assert "cost nothing" not in l0_against_delta_loss(saes)._suptitle.get_text()
    saes[0]["delta_loss"], saes[1]["delta_loss"] = -0.1, 0.0
    figure = l0_against_delta_loss(saes)
    assert "without 2 that cost nothing" in figure._suptitle.get_text()
    drawn = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert sum(len(line.get_xdata()) for line in drawn) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fvu_interval": 3}, r"saes\[0\]: expected two numbers 'fvu_interval', found 3"),
        ({"fvu_interval": [1, 2, 3]}, r"saes\[0\]: expected two numbers 'fvu_interval', found \[1, 2, 3\]"),
        ({"fvu_interval": [1, "2"]}, r"saes\[0\]: expected two numbers 'fvu_interval'"),
        ({"kl_every": "much"}, r"saes\[0\]: expected a number 'kl_every', found 'much'"),
        ({"cosine": [1]}, r"saes\[0\]: expected a number 'cosine'"),
        ({"kind": "new"}, r"saes\[0\]: expected a 'kind'"),
    ],
)
def test_damaged_results(tmp_path, changes, message):
    results = made()
    results["saes"][0] |= changes
    with pytest.raises(BadFileError, match=message):
        reporting.read_evaluation(written(tmp_path, results))


def test_results_of_a_run_are_no_evaluation(tmp_path):
    results = made()
    del results["evaluation"]
    written(tmp_path, results)
    assert not reporting.is_evaluation(tmp_path)
    with pytest.raises(BadFileError, match="expected the results of an evaluation, found those of a run"):
        reporting.read_evaluation(tmp_path)
