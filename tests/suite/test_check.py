"""`gemmascope check` on a model and SAEs trained for it: what fits, and each way in which something may not."""

import dataclasses
import inspect
import json
import re

import pytest
import torch

from gemmascope.__main__ import main
from gemmascope.activations import Document
from gemmascope.activations.packing import as_encoder, is_held_out
from gemmascope.commands import judge
from gemmascope.demo.byte_tokenizer import BOS, byte_tokenizer
from gemmascope.errors import BadFileError
from gemmascope.saes import JumpReLUSAE, TopKSAE
from gemmascope.sites import Site
from gemmascope.suite import CheckConfig, check_sae, load_model
from gemmascope.suite import check as job
from gemmascope.suite.config import ModelSection
from gemmascope.suite.excerpts import Excerpts
from gemmascope.suite.stated import Stated, stated_of
from tests.suite import checked
from tests.suite.checked import CONTEXT, D_MODEL, SITES, rescaled

RESID = Site(1, "resid")
DOCUMENTS = [Document(f"{number}", f"Text number {number} for the model to read. " * 20, "s") for number in range(60)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checked.make(tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="module")
def config(made):
    section = ModelSection(name=str(made.model), dtype="float32")
    return CheckConfig(made.paths[RESID], section, tokens=512, context=CONTEXT)


@pytest.fixture(scope="module")
def loaded(config):
    return load_model(config.model, "cpu")


@pytest.fixture(scope="module")
def half(config):
    return load_model(dataclasses.replace(config.model, dtype="bfloat16"), "cpu")


@pytest.fixture(scope="module")
def on_model(config, loaded):
    """Checks on the model, loaded once: of an SAE, what it states, and settings that differ."""
    excerpts = job.read_excerpts(config, loaded)

    def check(sae, stated, loaded=loaded, **changes):
        return job.check_loaded(sae, stated, loaded, excerpts, dataclasses.replace(config, **changes))

    return check


def finding(diagnosis, name):
    [found] = [each for each in diagnosis.findings if each.name == name]
    return found


# ---- what is recognised


@pytest.mark.parametrize("site", SITES, ids=str)
def test_an_sae_of_its_model_fits(made, on_model, site):
    found = on_model(made.saes[site].fold(), Stated(site, checked.L0))
    assert found.verdict == "fits", found.lines()
    assert finding(found, "site").text.startswith(f"{site}, as stated; of 6 sites it fits best there")
    assert finding(found, "scale").status == "ok"
    assert finding(found, "l0").status in ("ok", "note")
    assert finding(found, "tokenizer").text == "does not put a BOS before a text by itself, which the check did"
    assert found.figures["fvu"] < 0.15


@pytest.mark.parametrize(
    ("site", "stated"),
    [
        *((RESID, stated) for stated in (Site(0, "resid"), Site(0, "att"), Site(1, "mlp"), Site(1, "att"))),
        (Site(0, "resid"), RESID),
        (Site(1, "mlp"), Site(0, "mlp")),
        (Site(1, "att"), Site(1, "mlp")),
    ],
    ids=str,
)
def test_the_wrong_site(made, on_model, site, stated):
    found = on_model(made.saes[site].fold(), Stated(stated))
    kind = "layer" if stated.kind == site.kind else "site"
    assert re.match(f"does not fit: the wrong {kind}: at {stated} FVU is .*, at {site} 0.0", found.verdict)
    assert found.figures["best_site"] == str(site)


def test_a_site_that_nothing_states_is_found(made, on_model):
    found = on_model(made.saes[RESID].fold(), Stated())
    assert found.fits
    assert finding(found, "site").text.startswith("stated nowhere; of 6 sites it fits layer_1/resid best, then layer_")


@pytest.mark.parametrize("site", [RESID, Site(1, "mlp"), Site(1, "att")], ids=str)
def test_a_missing_bos(made, on_model, site):
    found = on_model(made.saes[site].fold(), Stated(site), bos=False)
    assert found.verdict.startswith("does not fit: BOS is missing, put it before every text")
    assert finding(on_model(made.saes[site].fold(), Stated(site)), "bos").status == "ok"


@pytest.mark.parametrize(
    ("factor", "stated"),
    [(1 / 30, Stated(RESID)), (0.6, Stated(RESID)), (1.6, Stated(RESID)), (1000.0, Stated(RESID)), (8.0, Stated())],
)
def test_the_wrong_scale(made, on_model, factor, stated):
    found = on_model(rescaled(made.saes[RESID], factor), stated)
    assert found.verdict.startswith("does not fit: the wrong scale: it fits inputs times ")
    assert found.figures["best_site"] == str(RESID)
    assert found.figures["best_factor"] == pytest.approx(factor, rel=0.15)


def test_the_scale_of_training_that_was_not_folded_in(made, on_model):
    """The weights of a training SAE without its input_scale."""
    sae = made.saes[RESID]
    found = on_model(rescaled(sae, 1 / sae.input_scale), Stated(RESID))
    assert found.figures["best_factor"] == pytest.approx(1 / sae.input_scale, rel=0.15)
    assert "the wrong scale" in found.verdict


def test_bfloat16_of_the_model(made, on_model, half):
    weights = {name: p.clone() for name, p in half.model.named_parameters()}
    found = on_model(made.saes[RESID].fold(), Stated(RESID), loaded=half)
    dtype = finding(found, "dtype")
    assert dtype.status == "note"
    assert dtype.text.startswith("the model ran in bfloat16; rounding is ")
    assert 1e-6 < found.figures["rounding"]["share"] < 1e-2
    assert found.figures["rounding"]["fvu"] != found.figures["rounding"]["fvu_exact"]
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, weights[name]) for name, p in half.model.named_parameters())
    in_full = finding(on_model(made.saes[RESID].fold(), Stated(RESID)), "dtype")
    assert (in_full.status, in_full.text) == ("ok", "the model ran in float32; weights of the SAE in float32")


def test_bfloat16_of_the_model_without_memory_for_float32(made, on_model, half, monkeypatch):
    monkeypatch.setattr(job, "host_memory", lambda: 1000)
    found = on_model(made.saes[RESID].fold(), Stated(RESID), loaded=half)
    assert finding(found, "dtype").text == "the model ran in bfloat16; weights of the SAE in float32"
    assert finding(found, "dtype").status == "note"


def test_bfloat16_of_the_weights(made, on_model):
    sae = made.saes[RESID].fold().bfloat16().float()
    found = finding(on_model(sae, Stated(RESID)), "dtype")
    assert found.status == "note"
    assert found.text == "the model ran in float32; weights of the SAE in float32, once rounded to bfloat16"


def test_another_width(made, on_model):
    wide = JumpReLUSAE(D_MODEL + 1, 8)
    found = on_model(wide, Stated(RESID))
    assert found.verdict == f"does not fit: d_model of the SAE is {D_MODEL + 1}, layer_1/resid is {D_MODEL} wide"
    found = on_model(wide, Stated())
    assert (
        found.verdict == f"does not fit: d_model of the SAE is {D_MODEL + 1}, every site of the model is {D_MODEL} wide"
    )
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_layer_that_the_model_does_not_have(made, on_model):
    found = on_model(made.saes[RESID].fold(), Stated(Site(20, "resid")))
    assert found.verdict.startswith("does not fit: the SAE says that it is of layer_20/resid, the model has layer_0 … ")
    with pytest.raises(ValueError, match="site layer_20/resid: expected a layer from 0 to 1, got 20"):
        on_model(made.saes[RESID].fold(), Stated(), site="layer_20/resid")


def test_the_model_that_the_sae_says(on_model):
    sae = JumpReLUSAE(D_MODEL + 1, 8)
    assert finding(on_model(sae, Stated(RESID, model="owner/model")), "model").text == "model, as the SAE says"
    other = finding(on_model(sae, Stated(RESID, model="google/gemma-2-2b\x1b")), "model")
    assert (other.status, other.text) == ("note", "model; the SAE says that it is of 'google/gemma-2-2b\\x1b'")


# ---- what an SAE states


@pytest.mark.parametrize(
    ("path", "metadata", "stated"),
    [
        ("runs/a/saes/mlp/layer_12/width_16k/average_l0_79/params.npz", {}, Stated(Site(12, "mlp"), 79.0)),
        ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", {}, Stated(Site(20, "resid"), 71.0)),
        ("google/gemma-scope-2b-pt-att/layer_3/width_16k/canonical", {}, Stated(Site(3, "att"))),
        ("hub/models--google--gemma-scope-9b-pt-mlp/snapshots/abc/layer_2/width_16k", {}, Stated(Site(2, "mlp"))),
        ("gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_small", {"l0": 20}, Stated(Site(12, "resid"), 20.0)),
        ("attn_out/layer_5_width_65k_l0_medium", {"l0": True}, Stated(Site(5, "att"))),
        ("x/layer_9/average_l0_5_2/params.npz", {"site": "model.layers.1.output"}, Stated(RESID, 5.0)),
        ("x", {"site": "layer_1/resid", "average_l0": 5.25, "model": "m"}, Stated(RESID, 5.25, "m")),
        ("x", {"l0": 10**400, "average_l0": float("inf")}, Stated()),
        ("res/a/b/c/layer_9/average_l0_0", {"site": "blocks.1", "model": 3, "l0": -1}, Stated()),
        ("res-mlp/layer_9", {"site": None}, Stated()),
        ("player_9/mlp", {}, Stated()),
        ("mlp/layer_9999999", {}, Stated()),
    ],
)  # fmt: skip
def test_what_an_sae_states(path, metadata, stated):
    assert stated_of(path, metadata) == stated


# ---- the text


def excerpts(*texts, tokens=10**6, skipped=(BOS,)):
    documents = [Document(f"{number}", text, "s") for number, text in enumerate(texts)]
    return Excerpts.of(documents, as_encoder(byte_tokenizer()), skipped, tokens)


def test_rows_begin_with_bos_and_so_do_documents():
    found = excerpts("abcdefgh", "ijklmnop")
    rows = ["".join("^" if i == BOS else chr(i) for i in row) for row in found.rows(5, 100, bos=True).tolist()]
    assert rows == ["^abcd", "^efgh", "^^ijk", "^lmno"]
    plain = found.rows(5, 100, bos=False)
    assert plain.shape == (4, 4)
    assert not (plain == BOS).any()
    assert found.beginnings(3, 4).shape == (3, 4)
    assert found.beginnings(3, 9).shape == (0, 9)


def test_text_is_held_out_where_that_is_enough():
    texts = [chr(97 + number % 26) * 40 for number in range(200)]
    held_out = sum(is_held_out(Document(f"{number}", text, "s"), 16) for number, text in enumerate(texts))
    assert 0 < held_out < 40
    assert len(excerpts(*texts, tokens=40 * held_out).texts) == held_out
    assert len(excerpts(*texts, tokens=40 * held_out + 1).texts) == 200


def test_ids_that_are_no_text_to_the_model_are_left_out():
    found = excerpts("abcabc", skipped=(BOS, ord("b")))
    assert found.texts[0].tolist() == list(b"acac")


def test_no_more_is_read_than_is_needed(monkeypatch):
    monkeypatch.setattr("gemmascope.suite.excerpts.MAX_CHARACTERS", 1 << 18)

    def endless():
        for number in range(10**9):
            yield Document(str(number), "x" * (1 << 20), "s")

    found = Excerpts.of(endless(), as_encoder(byte_tokenizer()), (BOS,), 10**9)
    assert sum(map(len, found.texts)) == 1 << 18
    assert max(map(len, found.texts)) == 1 << 15


def test_too_little_text():
    with pytest.raises(ValueError, match="text: expected at least 31 tokens for a row of 32, got 3"):
        excerpts("abc").rows(32, 100, bos=False)


# ---- the command


@pytest.fixture
def command(made, monkeypatch):
    documents = DOCUMENTS
    monkeypatch.setattr(job, "python_documentation", lambda: documents)
    return ["check", str(made.paths[RESID]), "--model", str(made.model), "--tokens", "600", "--context", str(CONTEXT)]


def test_the_command_says_it_in_lines(command, capsys):
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["model", "width", "tokenizer", "site", "norm", "scale", "bos", "dtype", "fvu", "l0", "errors", "verdict"]
    assert [line.split()[0] for line in lines] == names
    assert lines[-1].split() == ["verdict", "fits"]


def test_what_does_not_fit_is_exit_code_6(command, capsys):
    assert main([*command, "--site", "layer_0/resid", "--json"]) == 6
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["verdict"].startswith("does not fit: the wrong layer")
    assert found["figures"]["best_site"] == "layer_1/resid"


def test_own_text(command, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("Some text of one's own. " * 400)
    assert main([*command, "--text", str(tmp_path / "*.txt"), "--no-bos", "--json"]) in (0, 6)
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["bos"] is False
    assert figures["tokens"] == 611  # the fewest rows of 47 that hold 600
    (tmp_path / "own.txt").write_text("short")
    assert main([*command, "--text", str(tmp_path / "own.txt")]) == 2
    assert "text: expected at least 47 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["--site", "layer_1/out"], 2, "site: expected layer_L/KIND"),
        (["--site", "layer_7/mlp"], 2, "site layer_7/mlp: expected a layer from 0 to 1, got 7"),
        (["--tokens", "5"], 2, "tokens: expected at least 512, got 5"),
        (["--context", "3"], 2, "context: expected at least 16, got 3"),
        (["--dtype", "int8"], 2, "dtype: expected"),
        (["--device", "tpu"], 2, "run.device: expected"),
        (["--text", "none-*.txt"], 3, "none-*.txt: expected a file or a glob that matches some"),
        (["--model", "none"], 2, "model.name: expected a folder or OWNER/NAME on the hub, found neither: none"),
    ],
)
def test_wrong_options_are_named(command, capsys, changed, code, message):
    assert main([*command, *changed]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"gemmascope: error: {message}" in err.splitlines()[-1]


def test_the_defaults_of_the_command_are_those_of_the_config():
    """Written out there, so that `gemmascope --help` need not load all this."""
    options = inspect.signature(judge.check).parameters
    fields = {field.name: field.default for field in dataclasses.fields(CheckConfig)}
    for name in ("site", "bos", "tokens", "context", "device"):
        assert options[name].default == fields[name], name
    section = {field.name: field.default for field in dataclasses.fields(ModelSection)}
    for name in ("revision", "dtype"):
        assert options[name].default == section[name], name


@pytest.mark.parametrize("sae", ["none", "./a/b/c", "../a/b", "", "/nowhere/at/all", "~/a/b"])
def test_an_sae_that_is_not_there(config, sae):
    with pytest.raises(BadFileError, match="expected a file, a folder or OWNER/NAME/PATH on the hub, found none"):
        check_sae(dataclasses.replace(config, sae=sae))


def test_an_sae_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "gemmascope.saes.load.load_pretrained_sae", lambda *names, **_: asked.append(names) or "the SAE"
    )
    name = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    assert job.load(name) == ("the SAE", name)
    assert asked == [("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")]


def test_a_topk_sae(made, config, tmp_path):
    """Of the same dictionary, whose folder and metadata state nothing but the site."""
    trained = made.saes[RESID].fold()
    k = 8
    sae = TopKSAE(D_MODEL, trained.d_sae, k, pre_encoder_bias=False, metadata={"site": str(RESID)})
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(sae, name).copy_(getattr(trained, name))
    sae.save(tmp_path / "topk")
    found = check_sae(dataclasses.replace(config, sae=tmp_path / "topk"))
    assert found.verdict == "fits", found.lines()
    assert finding(found, "site").text.startswith(f"{RESID}, as stated; of 6 sites it fits best there")
    assert found.figures["l0"] == pytest.approx(k, abs=0.1)
    elsewhere = check_sae(dataclasses.replace(config, sae=tmp_path / "topk", site="layer_0/resid"))
    assert elsewhere.verdict.startswith("does not fit: the wrong layer: at layer_0/resid")


def test_a_damaged_sae_is_a_bad_file(made, command, tmp_path):
    weights = tmp_path / "params.npz"
    weights.write_bytes((made.paths[RESID] / "params.npz").read_bytes()[:-100])
    assert main(["check", str(weights), *command[2:]]) == 3


def test_a_bos_that_the_model_does_not_know(config, loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.config, "bos_token_id", 5)
    with pytest.raises(ValueError, match=r"model: expected a config whose bos_token_id is that of the tokenizer, 256"):
        job.read_excerpts(config, loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "a.txt"}, "text: expected a list of paths or globs, got str"),
        ({"bos": 1}, "bos: expected"),
        ({"model": "google/gemma-2-2b"}, "model: expected"),
        ({"sae": 5}, "sae: expected"),
        ({"site": 5}, "site: expected"),
        ({"device": None}, "device: expected"),
    ],
)
def test_settings_of_the_wrong_kind(config, changes, message):
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(config, **changes)
