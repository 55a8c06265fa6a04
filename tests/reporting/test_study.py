"""The figures of studies, from made-up rows: what is drawn, on which axes, and the same bytes each time."""

import dataclasses
import json

import numpy as np
import pytest

from gemmascope.reporting import write_study
from gemmascope.reporting.study_plots import MOST_PANELS, PALETTE, draw
from gemmascope.studies import COLUMNS, STUDIES


def made(name, layers=(0,), sites=("resid",), kinds=("jumprelu",), widths=(512,), l0s=(20.0, 100.0), scale=0.01):
    study, generator = STUDIES[name], np.random.default_rng(0)
    plot = study.plot
    series = ("SAE",) if plot.colours != "series" else ("first", "second", "first: mean ablation")
    rows = []
    for figure in plot.figures:
        for layer, site, kind, width, l0 in [
            (layer, site, kind, width, l0)
            for layer in layers
            for site in sites
            for kind in kinds
            for width in widths
            for l0 in l0s
        ]:
            for each in (*series, *plot.controls):
                for x in [l0] if plot.mark == "points" else [0.5 + step for step in range(1, 6)]:
                    y = scale * (1 + generator.random())
                    name_of = f"layer_{layer}/{site}/{kind}/{width}/{l0}"
                    of_sae = (site, layer, width, kind, l0)
                    values = (name, "tiny", *of_sae, x, y, 100, 0.9 * y, 1.1 * y, figure, each, name_of)
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
    return {"study": name, "model": "tiny", "second_model": None, "plot": dataclasses.asdict(plot), "rows": rows}


def legend(figure):
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_drawn_and_saved(tmp_path, name):
    study = made(name, layers=(0, 3), sites=("att", "resid"), kinds=("jumprelu", "topk"), widths=(512, 1024))
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(study))
    svg, png = write_study(path)
    first = svg.read_bytes()
    assert (svg.name, png.name) == (f"{name}.svg", f"{name}.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert write_study(path)[0].read_bytes() == first
    assert b"tiny" in first
    figure = draw(study)
    for control in STUDIES[name].plot.controls:
        assert control in legend(figure)
    assert all(any(axes.lines) or any(axes.patches) for axes in figure.axes)


def test_the_papers_ranges_where_they_hold_everything():
    (loss, fvu) = draw(made("bf16", scale=0.2)).axes
    assert loss.get_xlim() == (10, 1000)
    assert loss.get_ylim() == (5e-4, 1)
    assert fvu.get_ylim() == (0.1, 0.8)
    assert loss.get_yscale() == "log"
    (loss, fvu) = draw(made("bf16", scale=0.02, l0s=(5.0, 20.0))).axes
    assert loss.get_ylim() == (5e-4, 1)
    assert fvu.get_ylim()[0] < 0.02 < fvu.get_ylim()[1] < 0.1
    assert fvu.get_xlim()[0] < 5


def test_losses_that_fall_have_a_place():
    study = made("bf16")
    study["rows"][0]["y"] = -0.01
    assert draw(study).axes[0].get_yscale() == "symlog"


def test_series_in_the_rows_alone_are_not_drawn():
    study = made("subsets", scale=0.2)
    for row in study["rows"]:
        if row["series"].endswith("mean ablation"):
            row["y"] = 50.0
    figure = draw(study)
    assert figure.axes[0].get_ylim()[1] < 50
    assert legend(figure) == ["first", "second"]


def test_many_sites_are_thinned_out_and_it_says_so():
    study = made("subsets", layers=range(12))
    figure = draw(study)
    assert len(figure.axes) == 2 * MOST_PANELS
    assert figure.get_suptitle() == f"Kinds of text: tiny\n({MOST_PANELS} of 12 sites)"


def test_colours_by_layer_and_by_kind():
    several = legend(draw(made("sparsity-fidelity", layers=(1, 4))))
    assert several[:2] == ["layer 1", "layer 4"]
    one = draw(made("sparsity-fidelity", kinds=("jumprelu", "topk")))
    assert legend(one)[:2] == ["jumprelu", "topk"]
    colours = {line.get_color() for line in one.axes[0].lines if line.get_linestyle() not in ("None", "")}
    assert set(PALETTE[:2]) <= colours
    assert legend(draw(made("sparsity-fidelity", widths=(512, 1024))))[:2] == ["width 512", "width 1,024"]


def test_saes_of_one_place_share_a_label():
    study = made("position", layers=(1, 4), l0s=(20.0, 21.0, 100.0))
    assert legend(draw(study))[:3] == ["L0 20", "L0 21", "L0 100"]
    ladder = made("frequency", widths=(512, 1024), l0s=(20.0,))
    assert legend(draw(ladder))[:2] == ["L0 20, width 512", "L0 20, width 1,024"]


def test_nothing_to_draw():
    study = made("uniformity")
    for row in study["rows"]:
        row["y"] = None
    assert "nothing to draw" in draw(study).get_suptitle()
