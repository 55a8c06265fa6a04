"""`gemmascope evaluate` as a user meets it: runs, folders, text, what is refused, what goes on after a kill."""

import json
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

from gemmascope import JumpReLUSAE, TopKSAE
from gemmascope.__main__ import main
from gemmascope.errors import BadFileError
from gemmascope.evaluation import evaluate_sae
from gemmascope.formats.files import read_json
from gemmascope.reporting import read_evaluation, read_frequencies, read_results
from gemmascope.sites import Site
from gemmascope.suite import EvaluateConfig, evaluate, evaluate_saes, judged
from gemmascope.suite.config import ModelSection
from gemmascope.suite.export import export_saes
from gemmascope.suite.judged import Sources
from gemmascope.suite.run import train_suite
from tests.suite.small_runs import config as run_config
from tests.suite.small_runs import write_model, write_text
from tests.tiny_models import WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")

ROWS = 12  # on which the run judged its SAEs itself


def settings(sources, out, **changes):
    return EvaluateConfig(
        [*sources], out=out, **({"sequences": ROWS, "draws": 50, "control_tokens": 32 * 24} | changes)
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, undisturbed):
    out = tmp_path_factory.mktemp("evaluations") / "run"
    return out, evaluate_saes(settings([undisturbed], out))


def saved(folder, kind="jumprelu", d_model=WIDTH, seed=0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    if kind == "topk":
        sae = TopKSAE(d_model, 24, 3, generator=generator, metadata=metadata)
    else:
        options = {"threshold_init": 0.5, "generator": generator, "metadata": metadata | {"kind": kind}}
        sae = JumpReLUSAE(d_model, 24, pre_encoder_bias=False, **options)
    sae.save(folder)
    return folder


RESID = Site(1, "resid")


# ---- a run


def test_a_run_needs_nothing_else(evaluated, undisturbed):
    """Its model and what it held out: on as many rows and with as many tokens for the controls, its own figures."""
    out, results = evaluated
    own = {row["name"]: row for row in read_results(undisturbed)["saes"]}
    assert [row["name"] for row in results["saes"]] == list(own)
    assert results["model"]["sequences"] == ROWS
    assert results["model"]["loss"] == pytest.approx(read_results(undisturbed)["model"]["loss"], rel=1e-6)
    keys = ("l0", "fvu", "pca_fvu", "random_fvu", "pair_table_fvu", "delta_loss", "ablation_delta_loss")
    keys += ("loss_recovered", "reconstruction_bias", "dead_fraction", "high_freq_fraction", "gamma")
    for row in results["saes"]:
        expected = own[row["name"]]
        for key in ("site", "layer", "width", "kind", "target_l0", "seed", "tokens", "predictions"):
            assert row[key] == expected[key], key
        for key in keys:
            close = None if expected[key] is None else pytest.approx(expected[key], rel=2e-4, abs=1e-6)
            assert row[key] == close, key
        assert row["fvu_interval"][0] <= row["fvu"] <= row["fvu_interval"][1]
    frequencies, theirs = read_frequencies(out), read_frequencies(undisturbed)
    assert frequencies.keys() == theirs.keys()
    assert all((frequencies[name] == pytest.approx(theirs[name], rel=1e-6)) for name in theirs)


def test_a_part_of_a_run(evaluated, undisturbed, tmp_path):
    """A place among its SAEs: judged as those of the run, by its model and text."""
    of_site = evaluate_saes(settings([undisturbed / "saes" / "resid"], tmp_path / "site"))
    assert [row["name"] for row in of_site["saes"]] == ["layer_1/resid/width_48/target_l0_6"]
    row = next(row for row in evaluated[1]["saes"] if row["site"] == "resid")
    assert of_site["model"]["held_out"] == evaluated[1]["model"]["held_out"]
    for key in ("l0", "fvu", "pca_fvu", "delta_loss", "fvu_interval", "target_l0"):
        assert of_site["saes"][0][key] == pytest.approx(row[key], rel=1e-6), key
    file = undisturbed / row["path"]
    for place in (file, file.parent, file.parents[2]):
        (source,) = Sources.of([place]).saes
        assert (source.path, source.row["name"], source.name) == (file, row["name"], row["name"])
    both = Sources.of([undisturbed / "saes" / "mlp", file])
    assert [source.row["site"] for source in both.saes] == ["mlp", "mlp", "resid"]
    assert list(both.runs) == [undisturbed]


def test_what_is_no_part_of_a_run(undisturbed, tmp_path):
    """A folder that is called as one among its SAEs, and an SAE that the run does not list."""
    saved(tmp_path / "saes" / "resid" / "other")
    (tmp_path / "results.json").write_text("of something else")
    found = Sources.of([tmp_path / "saes" / "resid"])
    assert ([source.row for source in found.saes], found.runs) == ([None], {})


def test_a_site_that_an_sae_says_otherwise_of(tmp_path, undisturbed, model_folder, text_file):
    """Of a run, of metadata, of the names of folders; nothing where it says no site or the same."""
    given = {"model": ModelSection(str(model_folder)), "text": [str(text_file)], "site": "layer_1/resid", "context": 32}
    saved(tmp_path / "by_metadata", site="model.layers.0.output")
    saved(tmp_path / "saes" / "layer_2-resid")
    saved(tmp_path / "silent")
    saved(tmp_path / "same", site="model.layers.1.output")
    sources = [
        undisturbed / "saes" / "mlp",
        *(tmp_path / name for name in ("by_metadata", "saes/layer_2-resid", "silent", "same")),
    ]
    found = evaluate_saes(settings(sources, tmp_path / "out", **given))
    assert {row["site"] for row in found["saes"]} == {"resid"}
    said = [line.split(": the SAE says that it is of ")[1] for line in found["warnings"] if "is judged at" in line]
    at = "and is judged at layer_1/resid"
    assert said == [f"{site}, {at}" for site in ("layer_0/mlp", "layer_0/mlp", "layer_0/resid", "layer_2/resid")]


def test_what_it_leaves_is_read_back(evaluated):
    out, results = evaluated
    found = read_evaluation(out)
    assert found["saes"][0]["fvu_interval"] == results["saes"][0]["fvu_interval"]
    assert found["environment"]["torch"] == str(torch.__version__)
    assert found["evaluation"]["seed"] == 0
    assert not (out / "blocks").exists()


def test_once_finished_nothing_is_computed_again(evaluated, undisturbed, monkeypatch, capsys):
    out, results = evaluated
    monkeypatch.setattr(evaluate, "measure", None)
    again = evaluate_saes(settings([undisturbed], out))
    assert again == read_json(out / "results.json")
    assert again["saes"] == results["saes"]
    assert "finished before" in capsys.readouterr().err


def test_with_more_threads_it_is_made_anew_and_says_so(evaluated, undisturbed, tmp_path, another_thread, capsys):
    out = tmp_path / "evaluation"
    shutil.copytree(evaluated[0], out)
    found = evaluate_saes(settings([undisturbed], out))
    assert f"{out / 'results.json'}: made anew, in another environment: {another_thread}\n" in capsys.readouterr().err
    assert found["environment"]["threads"] == evaluated[1]["environment"]["threads"] + 1
    evaluate_saes(settings([undisturbed], out))
    assert "made anew" not in capsys.readouterr().err, "it was finished"
    evaluate_saes(settings([undisturbed], out, seed=1))
    assert "made anew" not in capsys.readouterr().err, "of the same environment"


def test_groups_that_fit_into_memory_give_the_same(evaluated, undisturbed, tmp_path):
    """One SAE at a time: the forward without SAEs once a group, the ablations once a site."""
    _, results = evaluated
    found = evaluate_saes(settings([undisturbed], tmp_path / "one", max_sae_bytes=1))
    assert found["saes"] == results["saes"]
    assert found["model"] == results["model"]


# ---- killed


def parts(folder):
    results = read_json(folder / "results.json")
    return results["saes"], results["model"], (folder / "frequencies.npz").read_bytes()


@pytest.mark.parametrize("stops", [(1,), (2, 1)], ids=str)
def test_interrupted_and_gone_on_with(evaluated, undisturbed, tmp_path, monkeypatch, stops):
    """Blocks of one row, groups of one SAE."""
    monkeypatch.setattr(evaluate, "rows_of_a_forward", lambda model, context: 5)
    measure, counts = evaluate.measure, []

    def counted(*args, **kwargs):
        counts.append(1)
        if stop is not None and len(counts) == stop:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(evaluate, "measure", counted)
    stop = None
    expected = tmp_path / "whole"
    evaluate_saes(settings([undisturbed], expected, max_sae_bytes=1))
    blocks = len(counts)
    assert blocks == 3 * 4
    out, done = tmp_path / "stopped", 0
    for stop in [*stops, None]:
        counts.clear()
        if stop is None:
            evaluate_saes(settings([undisturbed], out, max_sae_bytes=1))
            assert len(counts) == blocks - done
        else:
            with pytest.raises(KeyboardInterrupt):
                evaluate_saes(settings([undisturbed], out, max_sae_bytes=1))
            done += stop - 1
    assert parts(out) == parts(expected)


def test_killed_in_any_phase(worker, undisturbed, tmp_path):
    command = ["evaluate", str(undisturbed), "--sequences", str(ROWS), "--draws", "50", "--control-tokens", "768"]

    def run(out, **job):
        return worker(arguments=[*command, "--out", str(out)], output=str(tmp_path), **job)

    assert run(tmp_path / "whole") == {"exit": 0}
    out = tmp_path / "killed"
    for event, count in (("writing", 3), ("writing", 9), ("replacing", 4), ("controls", 1), ("controls", 2)):
        assert run(out, signals=[[event, count, signal.SIGKILL]]) == {"signal": 9}, (event, count)
    assert run(out, signals=[["controls", 1, signal.SIGTERM]]) == {"exit": 0}
    assert "the same command goes on" in (tmp_path / "err").read_text()
    assert run(out) == {"exit": 0}
    assert parts(out) == parts(tmp_path / "whole")


# ---- other sources


def test_folders_of_saes_of_several_kinds(tmp_path, model_folder, text_file):
    folder = tmp_path / "saes"
    for index, kind in enumerate(("jumprelu", "relu", "gated", "topk", "batchtopk", "matryoshka")):
        saved(folder / kind, kind, seed=index, site=RESID.name)
    section = ModelSection(name=str(model_folder))
    found = evaluate_saes(settings([folder], tmp_path / "out", model=section, text=[text_file], context=32))
    assert [row["name"] for row in found["saes"]] == sorted(
        ["jumprelu", "relu", "gated", "topk", "batchtopk", "matryoshka"]
    )
    assert [row["kind"] for row in found["saes"]] == [row["name"] for row in found["saes"]]
    assert {row["site"] for row in found["saes"]} == {"resid"}
    assert next(row for row in found["saes"] if row["kind"] == "topk")["l0"] == 3
    assert len({row["ablation_delta_loss"] for row in found["saes"]}) == 1


def test_the_same_sae_in_other_formats(tmp_path, model_folder, text_file):
    """Figures of the files of others are those of ours."""
    sae = saved(tmp_path / "one", site=RESID.name, layer=1)
    section = ModelSection(name=str(model_folder))
    rows = []
    for format in ("gemma-scope", "gemma-scope-2", "saelens", "safetensors"):
        export_saes([sae], format, tmp_path / format)
        out = tmp_path / "out" / format
        options = {"model": section, "text": [text_file], "context": 32, "site": "layer_1/resid"}
        rows += evaluate_saes(settings([tmp_path / format], out, **options))["saes"]
    keys = ("l0", "fvu", "delta_loss", "kl", "loss_recovered", "random_fvu")
    assert all(rows[0][key] == row[key] for row in rows for key in keys)


def test_transcoders_of_a_run(tmp_path, model_folder, text_file):
    made = run_config(model_folder, text_file, tmp_path / "run")
    tables = made.to_dict()
    plain = {"d_sae": 48, "target_l0": 6, "sites": ["layer_0/mlp_in_normed"], "target": "mlp"}
    tables["suite"] = {
        "tokens": 24 * 120,
        "batch_size": 120,
        "sae": [{"d_sae": 32, "target_l0": 4, "sites": ["layer_0/mlp"]}, plain],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_suite(type(made).from_dict(tables))
    own = read_results(tmp_path / "run")["saes"]
    found = evaluate_saes(settings([tmp_path / "run"], None))["saes"]
    assert (tmp_path / "run" / "evaluation" / "results.json").is_file()
    assert [row.get("site_out") for row in found] == [None, "mlp"]
    for key in ("l0", "fvu", "linear_fvu", "pca_fvu", "delta_loss", "ablation_delta_loss", "dead_fraction"):
        assert found[1][key] == pytest.approx(own[1][key], rel=2e-4, abs=1e-6), key
    assert found[1]["random_fvu"] is None
    assert found[0]["ablation_delta_loss"] == found[1]["ablation_delta_loss"], "of one site, made once"


def test_its_figures_are_those_of_the_activations(tmp_path, model_folder, text_file):
    """With other text, on the half of the documents that the controls are not fitted on."""
    from transformers import Gemma2ForCausalLM

    from gemmascope.activations import TokenRows, harvest

    sae = saved(tmp_path / "one", site=RESID.name)
    section = ModelSection(name=str(model_folder))
    options = {"model": section, "text": [text_file], "context": 32, "sequences": 10_000}
    found = evaluate_saes(settings([sae], tmp_path / "out", **options))
    rows = TokenRows.open(tmp_path / "out" / "tokens")
    tokens = rows.held_out(torch.arange(rows.n_held_out))
    assert found["model"]["sequences"] == len(tokens)
    assert found["warnings"] == [f"judged on {len(tokens)} rows of text, not on 10,000: there are no more"]
    model = Gemma2ForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    metrics = evaluate_sae(JumpReLUSAE.load(sae), harvest(model, tokens, [RESID])[RESID])
    (row,) = found["saes"]
    assert (row["tokens"], row["l0"]) == (metrics.tokens, pytest.approx(metrics.l0))
    assert row["fvu"] == pytest.approx(metrics.fvu, rel=1e-6)
    assert row["reconstruction_bias"] == pytest.approx(metrics.reconstruction_bias, rel=1e-6)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"saes": []}, ValueError, "saes: expected at least one, got none"),
        ({"saes": "one"}, TypeError, "saes: expected a list of paths, got str"),
        ({"text": "one"}, TypeError, "text: expected a list of paths, got str"),
        ({"model": "google/gemma-2-2b"}, TypeError, "model: expected a ModelSection, got str"),
        ({"site": "layer_1/nowhere"}, ValueError, "site: expected layer_L/KIND"),
        ({"sequences": 0}, ValueError, "sequences: expected at least 1, got 0"),
        ({"context": 1}, ValueError, "context: expected"),
        ({"outliers": 0.5}, ValueError, "outliers: expected"),
        ({"draws": 1}, ValueError, "draws: expected at least 2, got 1"),
        ({"seed": -1}, ValueError, "seed: expected"),
        ({"impl": "fast"}, ValueError, "impl: expected"),
    ],
)
def test_settings_that_cannot_be(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        EvaluateConfig(**({"saes": ["one"]} | changes))


def refusal(error, tmp_path, sources, **changes):
    with pytest.raises(error) as caught:
        evaluate_saes(settings(sources, tmp_path / "out", **changes))
    return str(caught.value)


def test_where_there_is_no_sae(tmp_path, model_folder):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    section = ModelSection(name=str(model_folder))
    found = refusal(BadFileError, tmp_path, [tmp_path / "empty"], model=section)
    assert "expected a folder with params.npz or params.safetensors, found neither" in found
    found = refusal(BadFileError, tmp_path, [tmp_path / "none"], model=section)
    assert "none: expected a file, a folder or OWNER/NAME/PATH on the hub, found none" in found


def test_an_sae_that_does_not_fit(tmp_path, model_folder, text_file):
    section, options = ModelSection(name=str(model_folder)), {"text": [text_file], "context": 32}
    wide = saved(tmp_path / "wide", d_model=20, site=RESID.name)
    found = refusal(ValueError, tmp_path, [wide], model=section, **options)
    assert "does not fit tiny-gemma: d_model of the SAE is 20, layer_1/resid is 16 wide" in found
    deep = saved(tmp_path / "deep", site="model.layers.9.output")
    found = refusal(ValueError, tmp_path, [deep], model=section, **options)
    assert "does not fit tiny-gemma: the SAE says that it is of layer_9/resid, the model has layer_0 … layer_2" in found
    silent = saved(tmp_path / "silent")
    found = refusal(ValueError, tmp_path, [silent], model=section, **options)
    assert "expected an SAE that says its site, or --site, found neither" in found
    found = refusal(ValueError, tmp_path, [silent], model=section, site="layer_7/resid", **options)
    assert "site layer_7/resid: expected a layer from 0 to 2, got 7" in found


def test_a_model_that_is_not_known_or_another_one(tmp_path, undisturbed, text_file):
    sae = saved(tmp_path / "one", site=RESID.name)
    assert refusal(ValueError, tmp_path, [sae]) == "model: expected --model, or runs of one model, got none"
    other = write_model(tmp_path / "other", seed=5)
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in (undisturbed / "results.json", undisturbed / "identity.json"):
        text = path.read_text()
        (copied / path.name).write_text(text)
    results = read_json(copied / "results.json")
    results["training"]["model"]["name"] = str(other)
    (copied / "results.json").write_text(json.dumps(results))
    for row in results["saes"]:
        (copied / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        for path in (undisturbed / row["path"]).parent.iterdir():
            (copied / row["path"]).parent.joinpath(path.name).write_bytes(path.read_bytes())
    found = refusal(ValueError, tmp_path, [copied])
    assert found == f"model: expected that of the run {copied}, found other weights; pass --model"


def test_text_that_is_too_short(tmp_path, model_folder):
    sae, section = saved(tmp_path / "one", site=RESID.name), ModelSection(name=str(model_folder))
    one = write_text(tmp_path / "one.jsonl", documents=1)
    found = refusal(ValueError, tmp_path, [sae], model=section, text=[one], context=32)
    assert found.startswith("text: expected some to train on and some held out")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    found = refusal(ValueError, tmp_path, [sae], model=section, text=[empty], context=32)
    assert found.startswith("text: expected text, got none")


def test_a_context_that_cannot_be(tmp_path, undisturbed, model_folder, text_file):
    found = refusal(ValueError, tmp_path, [undisturbed], context=64)
    assert found == "context: expected 32, as the run has its rows, got 64"
    sae, section = saved(tmp_path / "one", site=RESID.name), ModelSection(name=str(model_folder))
    found = refusal(ValueError, tmp_path, [sae], model=section, text=[text_file], context=65)
    assert found == "context: expected at most the 64 tokens that the model takes, got 65"


@pytest.mark.parametrize(
    ("ratios", "given", "expected"),
    [
        ([3.0], None, 3.0),
        ([3.0], 7, 7.0),
        ([3.0, 3.0], None, 3.0),
        ([3.0, 4.0], None, 5.0),
        ([None], None, 5.0),
        ([], None, 5.0),
    ],
)
def test_who_says_what_an_outlier_is(ratios, given, expected):
    runs = {Path(str(index)): {"training": {"activations": {"drop_norm": each}}} for index, each in enumerate(ratios)}
    assert Sources((), runs).outlier_ratio(EvaluateConfig(["one"], outliers=given)) == expected


def test_more_saes_than_results_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "MAX_SAES", 1)
    found = refusal(ValueError, tmp_path, [saved(tmp_path / "a"), saved(tmp_path / "b")])
    assert found == "saes: expected at most 1 together, got 2"


# ---- the command


def test_command(undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", str(undisturbed), "--sequences", "12", "--draws", "20", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "of 4 beat PCA of the same rank" in shown
    assert "Judged on 12 of" in shown
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == shown
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saes"] == read_json(out / "results.json")["saes"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere/at/all"], 2, "model: expected --model, or runs of one model, got none"),
        (["x", "--dtype", "float32"], 2, "model: expected --model beside --revision and --dtype, got none"),
        (["x", "--sequences", "0"], 2, "sequences: expected at least 1, got 0"),
    ],
)
def test_command_that_is_wrong(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == code
    assert message in capsys.readouterr().err
