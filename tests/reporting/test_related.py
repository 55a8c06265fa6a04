"""What the page of a run links to, from folders made up as the commands leave them."""

import json

import pytest

from gemmascope import reporting
from gemmascope.reporting.related import Related, related
from gemmascope.reporting.results import source_of

from .test_report import make_results, write_run

TEXT = {"text": "held-out rows", "sequences": 64, "context": 128}


def put(folder, path, content=""):
    path = folder / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", make_results())
    reporting.write_plots(folder)
    return folder


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({}, ""),
        (
            {"model": {"held_out": "8 of 9 rows", "seed": 3}, "environment": {"gemmascope": "1.2"}},
            "8 of 9 rows; seed 3; gemmascope 1.2",
        ),
        (
            {"evaluation": {"sequences": 64, "context": 128, "seed": 0}, "version": "1.2"},
            "64 rows of 128 tokens; seed 0; gemmascope 1.2",
        ),
        ({"text": TEXT, "seed": 7, "version": "1.2"}, "64 rows of 128 tokens of held-out rows; seed 7; gemmascope 1.2"),
        ({"ravel": {"seed": 5}, "rows": [], "version": "1.2"}, "seed 5; gemmascope 1.2"),
        ({"model": TEXT, "seed": None, "environment": 3}, "64 rows of 128 tokens of held-out rows"),
        ({"model": [], "text": "x", "version": 3}, ""),
    ],
)
def test_figures_say_their_rows_seed_and_version(results, expected):
    assert source_of(results) == expected


def test_nothing_else_is_there(run):
    assert related(run) == []
    page = reporting.write_html(run).read_text(encoding="utf-8")
    assert "More of this run" not in page


def test_page_links_what_is_there(run):
    put(run, "evaluation/results.json", {"evaluation": {"sequences": 64, "context": 128, "seed": 0}, "version": "1.2"})
    put(run, "evaluation/report.html")
    study = {
        "study": "sparsity-fidelity",
        "conclusion": "FVU falls with <L0>.",
        "text": TEXT,
        "seed": 1,
        "version": "1.2",
        "plot": {},
        "rows": [],
    }
    put(run, "studies/sparsity-fidelity.json", study)
    put(run, "studies/sparsity-fidelity.svg")
    put(run, "studies/sparsity-fidelity.csv")
    put(run, "studies/stages.json", {})
    put(run, "ravel/results.json", {"ravel": {"seed": 5}, "version": "1.2"})
    put(run, "ravel/cause isolation.png")
    put(run, "ravel/stages.json", {})
    put(run, "probing/results.json", {"probing": {**TEXT, "seed": 6}, "version": "1.2"})
    put(run, "probing/probing.png")
    put(run, "dashboards/results.json", {"model": TEXT, "seed": 2, "version": "1.2"})
    put(run, "dashboards/site/index.html")
    found = related(run)
    assert [each.title for each in found] == [
        *("Evaluation", "Study: sparsity fidelity", "RAVEL", "Probes", "Dashboards of latents"),
    ]
    assert found[1] == Related(
        "Study: sparsity fidelity",
        "FVU falls with <L0>",
        "64 rows of 128 tokens of held-out rows; seed 1; gemmascope 1.2",
        {f"{name.upper()}": f"studies/sparsity-fidelity.{name}" for name in ("svg", "csv", "json")},
    )
    assert dict(found[2].links) == {
        "cause isolation.png": "ravel/cause isolation.png",
        "results.json": "ravel/results.json",
    }
    assert found[3].source == "64 rows of 128 tokens of held-out rows; seed 6; gemmascope 1.2"
    assert dict(found[3].links) == {
        "probing.png": "probing/probing.png",
        "results.json": "probing/results.json",
    }
    page = reporting.write_html(run).read_text(encoding="utf-8")
    for link in ("evaluation/report.html", "studies/sparsity-fidelity.svg", "ravel/cause%20isolation.png"):
        assert f'<a href="{link}">' in page
    assert '<a href="dashboards/site/index.html">Dashboards of latents</a>' in page
    assert "FVU falls with &lt;L0&gt;. 64 rows of 128 tokens of held-out rows; seed 1; gemmascope 1.2." in page


def test_what_cannot_be_read_is_said(run):
    put(run, "dashboards/results.json", "{")
    put(run, "dashboards/site/index.html")
    put(run, "studies/a.json", "[]")
    put(run, "studies/b.json", {"study": 3})
    assert [(each.title, each.source) for each in related(run)] == [
        ("Dashboards of latents", "its results cannot be read"),
    ]


def test_a_run_links_what_was_made_later(run, tmp_path):
    assert reporting.link_from_run(run / "dashboards") is None, "it has no page yet"
    reporting.write_html(run)
    put(run, "dashboards/results.json", {"model": TEXT})
    put(run, "dashboards/site/index.html")
    assert reporting.link_from_run(run / "dashboards") == run / "report.html"
    assert "dashboards/site/index.html" in (run / "report.html").read_text(encoding="utf-8")
    assert reporting.link_from_run(tmp_path / "elsewhere") is None
    (run / "results.json").write_text("{}")
    assert reporting.link_from_run(run / "dashboards") is None, "a run that is being made again"


def test_captions_of_plots_say_what_they_are_of(run):
    page = reporting.write_html(run).read_text(encoding="utf-8")
    assert page.count("<small>(128 of 1,056 held-out rows [by the seed])</small></figcaption>") == 4
