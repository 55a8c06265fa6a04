"""`gemmascope probe` as a user meets it: a run, labels of one's own, what is refused, what goes on after a stop."""

import json
import shutil

import pytest
import torch

from gemmascope import JumpReLUSAE
from gemmascope.__main__ import main
from gemmascope.errors import BadFileError
from gemmascope.reporting import is_probing, probing_table, read_evaluation, read_probing
from gemmascope.reporting.probing import PROBES
from gemmascope.suite import ProbeConfig, probe, probe_saes
from gemmascope.suite.config import ModelSection
from gemmascope.suite.labelled import read_labels
from tests.tiny_models import WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")

KS = (1, 3)


def settings(sources, out, **changes):
    return ProbeConfig([*sources], out=out, **({"draws": 20, "ks": KS, "splits": 2, "tokens": 32 * 30} | changes))


@pytest.fixture(scope="module")
def probed(tmp_path_factory, undisturbed):
    out = tmp_path_factory.mktemp("probes") / "run"
    return out, probe_saes(settings([undisturbed], out))


def saved(folder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"threshold_init": 0.5, "generator": generator, "metadata": {"site": "layer_1/resid"}}
    JumpReLUSAE(WIDTH, 24, pre_encoder_bias=False, **options).save(folder)
    return folder


@pytest.fixture
def labelled(tmp_path):
    """Documents of digits, and documents of letters."""
    path = tmp_path / "labels.jsonl"
    generator, lines = torch.Generator().manual_seed(0), []
    for number in range(40):
        first, last = ("0", "9") if number % 2 else ("a", "z")
        drawn = torch.randint(ord(first), ord(last) + 1, (20,), generator=generator)
        lines.append(
            json.dumps({"text": "".join(map(chr, drawn.tolist())), "label": ["letters", "digits"][number % 2]})
        )
    path.write_text("\n".join(lines) + "\n\n")
    return path


# ---- a run


def test_a_run_needs_nothing_else(probed):
    out, results = probed
    names = [sae["name"] for sae in results["saes"]]
    assert len(names) > 1
    tasks = [task["name"] for task in results["probing"]["tasks"]]
    assert tasks
    for row in results["rows"]:
        assert row["probe"] in PROBES
        assert row["task"] in tasks
        assert 0 <= row["balanced_accuracy"] <= 1
        assert row["balanced_accuracy"] == pytest.approx(sum(row["of_splits"]) / 2)
        assert len(row["columns"]) == (0 if row["k"] is None else row["k"])
    of_saes = [row for row in results["rows"] if row["sae"] is not None and row["probe"] == "latents"]
    assert len(of_saes) == len(names) * len(tasks) * len(KS)
    sites = {(sae["layer"], sae["site"]) for sae in results["saes"]}
    dense = [row for row in results["rows"] if row["probe"] == "dense"]
    assert len(dense) == len(sites) * len(tasks)
    assert all(row["sae"] is None and row["k"] is None for row in dense)
    assert (results["version"], results["seed"]) == (1, 0)
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]


def test_means_are_those_of_the_rows(probed):
    _, results = probed
    sae = results["saes"][1]
    for probe_of, key in (("latents", "3"), ("random", "1"), ("neurons", "3"), ("dense", "all")):
        rows = [
            row
            for row in results["rows"]
            if row["probe"] == probe_of
            and row["sae"] == (sae["name"] if probe_of in ("latents", "random") else None)
            and (row["layer"], row["site"]) == (sae["layer"], sae["site"])
            and row["k"] == (None if key == "all" else int(key))
        ]
        assert len(rows) == len(results["probing"]["tasks"])
        for figure in ("balanced_accuracy", "auc"):
            expected = sum(row[figure] for row in rows) / len(rows)
            assert sae[f"{probe_of}_{figure}"][key] == pytest.approx(expected)


def test_what_it_leaves_is_read_back(probed, capsys):
    out, results = probed
    assert is_probing(out)
    found = read_probing(out)
    assert found["rows"] == results["rows"]
    table = probing_table(found)
    sites = {(sae["layer"], sae["site"]) for sae in results["saes"]}
    assert table.row_count == len(sites) + 2 * len(results["saes"])
    with pytest.raises(BadFileError, match="expected the results of an evaluation"):
        read_evaluation(out)
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Balanced accuracy of probes that read k latents" in shown
    assert (out / "plots" / "score_against_k.png").stat().st_size > 10_000


def test_stopped_it_goes_on_to_the_same_figures(probed, undisturbed, tmp_path, monkeypatch):
    _, whole = probed
    probed_before, count = probe.probe_task, 0

    def stopping(*arguments):
        nonlocal count
        count += 1
        if count == 9:
            raise probe.Stopped
        return probed_before(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(probe, "probe_task", stopping)
        assert probe_saes(settings([undisturbed], tmp_path / "run")) is None
    again = probe_saes(settings([undisturbed], tmp_path / "run"))
    assert again is not None
    assert (again["rows"], again["saes"]) == (whole["rows"], whole["saes"])
    monkeypatch.setattr(probe, "probe_task", None)
    finished = probe_saes(settings([undisturbed], tmp_path / "run"))
    assert finished is not None
    assert finished["rows"] == whole["rows"]


# ---- labels of one's own


def test_with_more_threads_they_are_made_anew_and_say_so(probed, undisturbed, tmp_path, another_thread, capsys):
    out = tmp_path / "probes"
    shutil.copytree(probed[0], out)
    probe_saes(settings([undisturbed], out))
    assert f"{out / 'results.json'}: made anew, in another environment: {another_thread}\n" in capsys.readouterr().err


def test_labels_that_are_given(labelled, model_folder, tmp_path):
    """A document's mean of tokens that are digits tells it from one of letters."""
    out, sae = tmp_path / "out", saved(tmp_path / "sae")
    section = ModelSection(str(model_folder))
    results = probe_saes(settings([sae], out, model=section, labels=labelled, tokens=10**6))
    assert results is not None
    assert [task["name"] for task in results["probing"]["tasks"]] == ["label: letters"]
    assert results["probing"]["tasks"][0] == {"name": "label: letters", "of": "documents", "rows": 40, "positive": 20}
    assert results["model"]["documents"] == 40
    assert results["model"]["tokens"] == 40 * 20
    [dense] = [row for row in results["rows"] if row["probe"] == "dense"]
    assert dense["balanced_accuracy"] > 0.95
    assert dense["auc_interval"][1] == 1


def test_long_documents_are_cut_and_said(labelled, model_folder, tmp_path):
    sae, section = saved(tmp_path / "sae"), ModelSection(str(model_folder))
    results = probe_saes(settings([sae], tmp_path / "out", model=section, labels=labelled, context=11, sequences=20))
    assert results is not None
    assert results["model"]["tokens"] == 20 * 10
    assert "40 of 40 documents are read up to their token 10" in results["warnings"]
    assert any(text.startswith("20 of 40 documents are probed") for text in results["warnings"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a", "label": "x"}'], "expected 2 to 100 different labels, found 1"),
        (['{"text": "a", "label": "x"}', "[]"], "line 2: expected an object, found list"),
        (['{"text": " ", "label": "x"}'], "line 1: text: expected a string with some text"),
        (['{"text": "a", "label": true}'], "line 1: label: expected a string of 1 to 200 characters or an integer"),
        (['{"text": "a"}'], "line 1: label: expected"),
    ],
)
def test_bad_labels_are_refused_by_line(lines, message, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BadFileError) as caught:
        read_labels(path)
    assert message in str(caught.value)


def test_integers_are_labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": "b", "label": 0, "other": null}')
    assert read_labels(path) == (["a", "b"], ["1", "0"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ks": (2, 1)}, ValueError, r"^ks: expected at least one, ascending, got \[2, 1\]"),
        ({"ks": (0,)}, ValueError, r"^ks: expected "),
        ({"ks": 3}, TypeError, r"^ks: expected a list of ints, got int"),
        ({"splits": 0}, ValueError, r"^splits: expected"),
        ({"tokens": 0}, ValueError, r"^tokens: expected"),
        ({"labels": "x", "text": ["y"]}, ValueError, r"^text: expected none beside labels"),
        ({"draws": 1}, ValueError, r"^draws: expected"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        settings(["x"], "out", **changes)


def test_text_without_two_classes_is_refused(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 300)
    other = tmp_path / "other.txt"
    other.write_text("b" * 300)
    sae, section = saved(tmp_path / "sae"), ModelSection(str(model_folder))
    with pytest.raises(ValueError, match=r"^text: expected "):
        probe_saes(settings([sae], tmp_path / "out", model=section, text=[str(text), str(other)], context=16))
