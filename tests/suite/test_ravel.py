"""`gemmascope ravel` as a user meets it: SAEs and controls at known directions, what is refused, what goes on."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from gemmascope import JumpReLUSAE
from gemmascope.__main__ import main
from gemmascope.errors import BadFileError
from gemmascope.formats.files import read_json
from gemmascope.ravel import protocol_of
from gemmascope.reporting import is_ravel, ravel_table, read_ravel_results
from gemmascope.saes import Transcoder
from gemmascope.suite import RavelConfig, ravel, ravel_saes
from gemmascope.suite.config import ModelSection
from tests.ravel.known import WIDTH, small_model

FEW = protocol_of("ravel", pairs=24, test_pairs=16, epochs=1, rotation_epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of the model, its facts as the benchmark writes them, and the SAE of the true directions."""
    root = tmp_path_factory.mktemp("ravel")
    known = small_model()
    known.model.save_pretrained(root / "model")
    known.tokenizer.save_pretrained(root / "model")
    sae = known.dictionary()
    sae.metadata = {"site": "layer_0/resid", "kind": "relu"}
    sae.save(root / "sae")
    data, folder = known.data, root / "data"
    folder.mkdir()
    entities = {town: {name: data.labels[name][town] for name in data.attributes} for town in data.entities}
    files = {
        "entity_attributes": entities,
        "attribute_to_prompts": {name: list(t) for name, t in data.templates.items()},
    }
    files |= {"entity_to_split": dict(data.entity_split), "prompt_to_split": dict(data.template_split)}
    for name, content in files.items():
        (folder / f"ravel_town_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def settings(place: Path, out: Path, saes=("sae",), **changes) -> RavelConfig:
    given = {
        "model": ModelSection(name=str(place / "model"), dtype="float32"),
        "data": place / "data",
        "entity_type": "town",
        "protocol": FEW,
        "controls": ("neurons", "mdas"),
        "draws": 50,
        "device": "cpu",
    }
    return RavelConfig([place / name for name in saes], out=out, **(given | changes))


@pytest.fixture(scope="module")
def judged(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged") / "out"
    results = ravel_saes(settings(place, out, seeds=2))
    assert results is not None
    return out, results


def without_time(results) -> dict:
    return {key: value for key, value in results.items() if key != "seconds"}


def test_rows_and_summary(judged):
    _, results = judged
    rows, summary = results["rows"], results["summary"]
    # 3 methods, 2 attributes, 2 parts of the test, 2 seeds; 2 floors without seeds.
    assert len(rows) == 3 * 2 * 2 * 2 + 2 * 2 * 2
    assert len(summary) == 2 * (3 + 2)
    [sae] = [row for row in summary if row["method"] == "sae" and row["test"] == "entities"]
    assert (sae["kind"], sae["width"], sae["layer"], sae["site"]) == ("relu", 7, 0, "resid")
    assert sae["disentangle"] == pytest.approx((sae["cause"] + sae["isolation"]) / 2)
    own = [row for row in rows if row["method"] == "sae" and row["test"] == "entities"]
    assert {(row["attribute"], row["seed"]) for row in own} == {(a, s) for a in ("colour", "shape") for s in (0, 1)}
    assert sae["cause"] == pytest.approx(sum(row["cause"] for row in own) / 4)
    assert sae["exchanged"] == pytest.approx(sum(row["exchanged"] for row in own) / 4)
    assert sae["entity_fvu"] == pytest.approx(own[0]["entity_fvu"]) != 0
    assert all(row.get("entity_fvu") is None for row in rows if row["method"] != "sae")
    low, high = sae["disentangle_interval"]
    assert low <= sae["disentangle"] <= high
    floor = {row["method"]: row for row in summary if row["test"] == "entities"}
    assert (floor["always base"]["cause"], floor["always base"]["isolation"]) == (0.0, 1.0)
    assert sae["disentangle"] > 0.9 > floor["always base"]["disentangle"] == 0.5
    assert results["ravel"]["seeds"] == [0, 1]
    assert results["version"]
    assert results["environment"]["torch"]
    assert results["ravel"]["knowledge"]["known_entities"] == 60


def test_what_it_leaves(judged, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out, results = judged
    assert is_ravel(out)
    assert (out / "activations" / "layer_0" / "resid.safetensors").exists()
    found = read_ravel_results(out)
    assert found["rows"] == results["rows"]
    table = ravel_table(found)
    assert table.row_count == (1 + 2) + (1 + 3), "the floors and a site, each below its heading"
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "always base" in shown
    assert "DAS + mask" in shown
    assert (out / "plots" / "cause_isolation.png").exists()


def test_once_finished_nothing_is_computed_again(judged, place, monkeypatch):
    out, results = judged
    monkeypatch.setattr(ravel, "train_sae", None)
    monkeypatch.setattr(ravel, "answers", None)
    assert ravel_saes(settings(place, out, seeds=2)) == read_json(out / "results.json") == results


def test_with_more_threads_it_is_made_anew_and_says_so(judged, place, tmp_path, another_thread, capsys):
    out = tmp_path / "ravel"
    shutil.copytree(judged[0], out)
    ravel_saes(settings(place, out, seeds=2))
    assert f"{out / 'results.json'}: made anew, in another environment: {another_thread}\n" in capsys.readouterr().err


def test_a_sweep_runs_the_layers_before_the_site_no_more(place, tmp_path, monkeypatch):
    """Another SAE and another seed: what the model knows and the trainings that are done stay."""
    out = tmp_path / "out"
    first = ravel_saes(settings(place, out, controls=("neurons",)))
    asked = []
    monkeypatch.setattr(ravel, "answers", lambda *args: asked.append(1))
    monkeypatch.setattr(ravel, "activations", lambda *args: asked.append(2))
    trained = []
    for name in ("train_control", "train_sae"):  # the SAE is the same under another name
        monkeypatch.setattr(ravel, name, lambda *args: trained.append(args[0]))
    second = ravel_saes(settings(place, out, saes=("sae", "sae"), controls=("neurons",)))
    assert first is not None
    assert second is not None
    assert not asked
    assert not trained
    names = [row["name"] for row in second["summary"] if row["method"] == "sae" and row["test"] == "entities"]
    assert len(set(names)) == 2
    for row in first["rows"]:
        if row["method"] == "neurons":
            assert row in second["rows"]


def test_it_goes_on_where_it_was_stopped(place, tmp_path, monkeypatch):
    whole = ravel_saes(settings(place, tmp_path / "whole"))
    out, real, done = tmp_path / "stopped", ravel.train_control, []

    def stopping_at_the_second(*args):
        done.append(args[0])
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(ravel, "train_control", stopping_at_the_second)
    assert ravel_saes(settings(place, out)) is None
    assert not (out / "results.json").exists()
    found = ravel_saes(settings(place, out))
    assert found is not None
    assert whole is not None
    assert without_time(found) == without_time(whole)
    assert len(done) == 2 + 3  # of four, the first was done


def test_controls_alone_at_several_sites(place, tmp_path):
    config = settings(place, tmp_path / "out", saes=(), controls=("das",), sites=["layer_0/resid", "layer_1/mlp"])
    results = ravel_saes(config)
    assert results is not None
    at = [(row["layer"], row["site"]) for row in results["summary"] if row["test"] == "entities" and "site" in row]
    assert at == [(0, "resid"), (1, "mlp")]


def test_the_other_presets_run(place, tmp_path):
    for name, changes in (
        ("sae-ravel", {"pairs": 16, "test_pairs": 8, "epochs": 1, "bos": True}),
        ("saebench", {"pairs": 16, "test_pairs": 8, "epochs": 1}),
    ):
        config = settings(place, tmp_path / name, controls=(), protocol=protocol_of(name, **changes))
        results = ravel_saes(config)
        assert results is not None
        assert {row["test"] for row in results["summary"]} == {"pairs"}
        assert results["ravel"]["protocol"]["name"] == name
        assert any("the same entity is in training and test" in text for text in results["warnings"])


def test_a_gpt2(tmp_path, place):
    """Its residual stream, by the command."""
    from transformers import GPT2Config, GPT2LMHeadModel

    known = small_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = len(known.tokenizer)
        config = GPT2Config(vocab_size=size, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, bos_token_id=2)
        config.eos_token_id = 1
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    known.tokenizer.save_pretrained(tmp_path / "gpt2")
    section = ModelSection(name=str(tmp_path / "gpt2"), dtype="float32")
    with pytest.raises(ValueError, match="entities: expected at least two whose colour and shape the model knows"):
        ravel_saes(settings(place, tmp_path / "out", model=section))
    with pytest.raises(ValueError, match="site layer_0/mlp: expected layer_0/resid to layer_1/resid of a GPT-2"):
        ravel_saes(settings(place, tmp_path / "out", saes=(), sites=["layer_0/mlp"], model=section))


def test_bad_settings(place, tmp_path):
    out = tmp_path / "out"
    for changes, message in (
        ({"sites": ["layer_0/att"], "saes": ()}, "site: expected one of kind resid or mlp, got layer_0/att"),
        ({"sites": ["layer_0/resid", "layer_1/resid"]}, "site: expected at most one beside SAEs"),
        ({"saes": ()}, "saes: expected some, or --site"),
        ({"saes": (), "sites": ["layer_0/resid"], "controls": ()}, "controls: expected some"),
        ({"controls": ("lda",)}, "controls: expected 'neurons'"),
        ({"seeds": 0}, "seeds: expected"),
        ({"data": None}, "entity_type: expected 'city', got 'town'"),
        ({"templates": 0}, "templates: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(place, out, **changes)
    with pytest.raises(TypeError, match="saes: expected a list"):
        RavelConfig("sae")
    for changes, message in (
        ({"attributes": ("colour", "price")}, "attributes: expected some of colour, shape of a town, got 'price'"),
        ({"saes": (), "sites": ["layer_9/resid"]}, "site layer_9/resid: expected a layer from 0 to 2"),
        ({"protocol": dataclasses.replace(FEW, entity_tokens=2)}, "entities: expected prompts with an entity that"),
    ):
        with pytest.raises(ValueError, match=message):
            ravel_saes(settings(place, out, **changes))
    assert not (out / "results.json").exists()


def test_an_sae_that_does_not_fit(place, tmp_path):
    JumpReLUSAE(WIDTH + 1, 8, metadata={"site": "layer_0/resid"}).save(tmp_path / "wide")
    with pytest.raises(ValueError, match=f"d_model of the SAE is {WIDTH + 1}"):
        ravel_saes(settings(place, tmp_path / "out", saes=(tmp_path / "wide",)))
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (WIDTH, 8), "b_enc": (8,), "threshold": (8,), "W_dec": (8, WIDTH), "b_dec": (WIDTH,)}
    tensors = {name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()}
    Transcoder(tensors, metadata={"site": "model.layers.0.pre_feedforward_layernorm.output"}).save(
        tmp_path / "transcoder"
    )
    with pytest.raises(ValueError, match=r"expected an SAE of a site of kind resid or mlp, got one that reads at"):
        ravel_saes(settings(place, tmp_path / "out", saes=(tmp_path / "transcoder",)))


def test_the_command(place, tmp_path, capsys):
    arguments = ["ravel", str(place / "sae"), "--model", str(place / "model"), "--dtype", "float32"]
    arguments += ["--data", str(place / "data"), "--entity-type", "town", "--control", "neurons", "--device", "cpu"]
    arguments += [
        "--pairs",
        "24",
        "--test-pairs",
        "16",
        "--epochs",
        "1",
        "--error",
        "drop",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "RAVEL, colour, shape: model" in shown.out
    assert "known: 60 of 60 entities" in shown.err
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ravel"]["protocol"]["error"] == "drop"
    assert printed["ravel"]["protocol"]["pairs"] == 24
    assert main([*arguments, "--preset", "raven"]) == 2
    assert "preset: expected 'ravel'" in capsys.readouterr().err


def test_results_that_are_damaged(judged, tmp_path):
    _, results = judged
    for damage, message in (
        ({"summary": []}, "expected a list 'summary'"),
        ({"summary": [{"method": "sae"}]}, "strings 'method' and 'test'"),
        ({"summary": [{"method": "sae", "test": "entities"}]}, "the string 'site'"),
        ({"summary": [results["summary"][0] | {"cause": "much"}]}, "a number 'cause'"),
        ({"summary": [results["summary"][0] | {"cause_interval": 3}]}, "two numbers 'cause_interval'"),
        ({"warnings": "none"}, "strings 'warnings'"),
        ({"model": None}, "an object 'model'"),
        ({"ravel": None}, "results of a RAVEL evaluation"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(results | damage), encoding="utf-8")
        with pytest.raises(BadFileError, match=message):
            read_ravel_results(tmp_path)
    assert not is_ravel(tmp_path / "nowhere")
