"""`gemmascope export` and `gemmascope import`: whole runs, sets of transcoders, names, the card, and refusals."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from gemmascope import JumpReLUSAE, TopKSAE, Transcoder, load_sae
from gemmascope.__main__ import main
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats.export import FORMATS, write
from gemmascope.reporting import read_results
from gemmascope.suite import export_saes, import_sae
from tests.formats.test_export import FACTS, SITES, transcoder_config, transcoder_tensors
from tests.formats.test_release import METADATA, assert_same_bits, make_sae

OF_SAES = [format for format in FORMATS if format != "circuit-tracer"]


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def sae(tmp_path):
    make_sae().save(tmp_path / "saes" / "one")
    return tmp_path / "saes" / "one"


@pytest.fixture
def layers(tmp_path):
    """Transcoders of three layers, in folders of Gemma Scope 2."""
    folders = []
    for layer in range(3):
        sites = {key: site.replace("layers.3", f"layers.{layer}") for key, site in SITES.items()}
        folders.append(tmp_path / "transcoders" / str(layer))
        Transcoder(transcoder_tensors(seed=layer), metadata=FACTS | sites | {"layer": layer}).save(folders[-1])
    return folders


def refusal(*arguments, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        export_saes(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---- runs


@pytest.mark.parametrize("format", OF_SAES)
def test_a_whole_run(tmp_path, undisturbed, format):
    """Every SAE with the bits of the run, and the figures of its results in the card."""
    results = read_results(undisturbed)
    exported = export_saes([undisturbed], format, tmp_path / "out")
    assert exported.folder == tmp_path / "out"
    assert len({entry.folder for entry in exported.entries}) == len(results["saes"]) == 4
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for entry, row in zip(exported.entries, results["saes"], strict=True):
        trained = JumpReLUSAE.load(undisturbed / row["path"])
        assert entry.row == row
        assert entry.site == trained.metadata["site"]
        folder = tmp_path / "out" / entry.folder
        if format == "saelens":
            stored = safetensors.torch.load_file(folder / "sae_weights.safetensors")
            assert all(torch.equal(stored[name], weight) for name, weight in trained.named_parameters())
        else:
            assert_same_bits(JumpReLUSAE.load(folder), trained)
        [line] = [line for line in card.splitlines() if entry.folder in line and f"{row['fvu']:.3f}" in line]
        assert f"| {row['l0']:.1f} |" in line
    assert ('library_name: "saelens"' in card) == (format == "saelens")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")], "temporaries are gone"


def test_names_of_folders(tmp_path, undisturbed):
    """What a reader of Gemma Scope expects; two of one name are numbered."""
    folders = {
        format: [entry.folder for entry in export_saes([undisturbed] * 2, format, tmp_path / format).entries]
        for format in ("gemma-scope", "gemma-scope-2", "saelens")
    }
    row = read_results(undisturbed)["saes"][0]
    average = round(JumpReLUSAE.load(undisturbed / row["path"]).metadata["average_l0"])
    kind, layer, width = row["site"], row["layer"], row["width"]
    theirs = {"att": "attn_out", "mlp": "mlp_out", "resid": "resid_post"}[kind]
    assert folders["gemma-scope"][0] == f"{kind}/layer_{layer}/width_{width}/average_l0_{average}"
    assert folders["gemma-scope-2"][0] == f"{theirs}/layer_{layer}_width_{width}_l0_{average}"
    assert folders["saelens"][0] == f"{kind}/layer_{layer}_width_{width}_l0_{average}"
    for format, names in folders.items():
        assert len(names) == len(set(names)) == 8
        assert f"{names[0]}_2" in names
        assert "## Figures" not in (tmp_path / format / "README.md").read_text(), "of two runs"


def edit(run, path):
    results = json.loads((run / "results.json").read_text())
    results["saes"][0]["path"] = path
    (run / "results.json").write_text(json.dumps(results))


@pytest.fixture
def loose(tmp_path, undisturbed):
    """A copy of a run without its stages, whose results can be changed."""
    shutil.copytree(undisturbed / "saes", tmp_path / "run" / "saes")
    shutil.copy(undisturbed / "results.json", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("path", ["../other/params.npz", "/etc/passwd", "saes/../../x", "", 3, None, "a\0b", "link"])
def test_paths_of_results_stay_in_the_run(tmp_path, loose, sae, path):
    (loose / "link").symlink_to(sae)
    edit(loose, path)
    message = refusal([loose], "saelens", tmp_path / "out", error=BadFileError)
    assert message.startswith(f"{loose}/results.json: ")
    assert not (tmp_path / "out").exists()


def test_an_sae_of_a_run_that_is_gone(tmp_path, loose):
    edit(loose, "saes/none/params.npz")
    assert "expected a file, found none" in refusal([loose], "saelens", tmp_path / "out", error=BadFileError)
    assert sorted(os.listdir(tmp_path)) == ["run"]


# ---- single SAEs


def test_an_sae_of_the_hub(tmp_path, sae, monkeypatch):
    """Where nothing of that name is here."""
    asked = []

    def fetch(repo, path, **placement):
        asked.append((repo, path))
        return load_sae(sae, **placement)

    monkeypatch.setattr("gemmascope.saes.load.load_pretrained_sae", fetch)
    monkeypatch.chdir(tmp_path)
    export_saes(["google/repository/layer_1/it"], "safetensors", tmp_path / "out")
    import_sae("google/repository/layer_1/it", tmp_path / "in", dtype=torch.float64)
    assert asked == [("google/repository", "layer_1/it")] * 2
    expected = load_sae(sae)
    assert torch.equal(load_sae(tmp_path / "out").W_enc, expected.W_enc)
    assert torch.equal(load_sae(tmp_path / "in").W_enc, expected.W_enc.double())


@pytest.mark.parametrize("name", ["none", "./a/b/c", "../a/b", "/nowhere/at/all", "a//b"])
def test_what_is_neither_here_nor_on_the_hub(tmp_path, name):
    message = refusal([name], "saelens", tmp_path / "out", error=BadFileError)
    assert message.endswith("expected a file, a folder or OWNER/NAME/PATH on the hub, found none")
    with pytest.raises(BadFileError, match="OWNER/NAME/PATH on the hub, found none"):
        import_sae(name, tmp_path / "out")


@pytest.mark.parametrize("format", OF_SAES)
def test_one_sae_goes_into_the_folder_itself(tmp_path, sae, format):
    [entry] = export_saes([sae], format, tmp_path / "out").entries
    assert (entry.folder, entry.kind, entry.d_in, entry.d_sae) == ("", "JumpReLUSAE", 4, 7)
    assert entry.hook_name == "blocks.3.hook_resid_post"
    if format != "saelens":
        assert_same_bits(JumpReLUSAE.load(tmp_path / "out"), make_sae())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`model.layers.3.output`" in text
    assert "`blocks.3.hook_resid_post`" in text
    assert 'base_model: "google/gemma-2-2b"' in text
    assert "## Figures" not in text


@pytest.mark.parametrize("format", ["saelens", "safetensors"])
def test_topk(tmp_path, format):
    """There and back, with the bits and the k of what was exported."""
    made = TopKSAE(4, 7, 3, metadata=METADATA, generator=torch.Generator().manual_seed(0))
    made.save(tmp_path / "topk")
    [entry] = export_saes([tmp_path / "topk"], format, tmp_path / "out").entries
    assert (entry.kind, entry.changes) == ("TopKSAE", [])
    back = import_sae(tmp_path / "out", tmp_path / "back")
    assert isinstance(back, TopKSAE)
    assert (back.k, back.pre_encoder_bias) == (3, True)
    for name, parameter in made.named_parameters():
        assert torch.equal(getattr(back, name), parameter)
    assert "for a TopK SAE, got 'gemma-scope'" in refusal([tmp_path / "topk"], "gemma-scope", tmp_path / "no")


@pytest.mark.parametrize("folded", [False, True])
def test_saelens_and_back(tmp_path, folded):
    sae = make_sae()
    sae.pre_encoder_bias = not folded
    sae.save(tmp_path / "ours")
    export_saes([tmp_path / "ours"], "saelens", tmp_path / "out")
    found = import_sae(tmp_path / "out", tmp_path / "back")
    assert_same_bits(found, sae)
    assert found.metadata["site"] == METADATA["site"]


def test_what_says_no_site_is_numbered(tmp_path):
    for name in ("a", "b"):
        plain = make_sae()
        plain.metadata = {}
        plain.save(tmp_path / name)
    entries = export_saes([tmp_path / "a", tmp_path / "b"], "saelens", tmp_path / "out").entries
    assert [entry.folder for entry in entries] == ["sae_1", "sae_2"]


def test_changes_are_told(tmp_path):
    make_sae(folded=False).save(tmp_path / "scaled")
    exported = export_saes([tmp_path / "scaled"], "gemma-scope", tmp_path / "out")
    [change] = exported.entries[0].changes
    assert change.startswith("folded: input_scale 2.5 and the pre-encoder bias moved into the weights")
    assert "folded: input\\_scale 2.5" in (tmp_path / "out" / "README.md").read_text()
    assert_same_bits(JumpReLUSAE.load(tmp_path / "out"), make_sae())


def test_dtype(tmp_path, sae):
    export_saes([sae], "gemma-scope-2", tmp_path / "out", dtype=torch.bfloat16)
    assert_same_bits(JumpReLUSAE.load(tmp_path / "out"), make_sae().to(torch.bfloat16))


# ---- transcoders


@pytest.mark.parametrize("format", ["gemma-scope-2", "saelens"])
def test_transcoders(tmp_path, layers, format):
    entries = export_saes(layers, format, tmp_path / "out").entries
    assert [entry.folder for entry in entries] == [f"transcoder/layer_{n}_width_7_l0_21" for n in range(3)]
    if format == "gemma-scope-2":
        for layer, entry in enumerate(entries):
            loaded = Transcoder.load(tmp_path / "out" / entry.folder)
            assert all(torch.equal(t, loaded.tensors[key]) for key, t in transcoder_tensors(seed=layer).items())


def test_a_set_for_circuit_tracer_and_back(tmp_path, layers):
    exported = export_saes(layers[::-1], "circuit-tracer", tmp_path / "set")
    assert [entry.folder for entry in exported.entries] == ["", "", ""]
    names = ["README.md", "config.yaml", *(f"layer_{n}.safetensors" for n in range(3))]
    assert sorted(os.listdir(tmp_path / "set")) == names
    entries = export_saes([tmp_path / "set"], "gemma-scope-2", tmp_path / "back").entries
    for layer, entry in enumerate(entries):
        loaded = Transcoder.load(tmp_path / "back" / entry.folder)
        assert all(torch.equal(t, loaded.tensors[key]) for key, t in transcoder_tensors(seed=layer).items())
        assert loaded.metadata["site_out"] == f"model.layers.{layer}.post_feedforward_layernorm.output"


def test_sets_that_circuit_tracer_cannot_load(tmp_path, layers):
    out = tmp_path / "out"
    assert "of all layers from 0 for circuit-tracer, got 0, 2" in refusal(layers[::2], "circuit-tracer", out)
    assert "one transcoder a layer, got two of layer 1" in refusal([layers[1]] * 2, "circuit-tracer", out)
    plain = Transcoder(transcoder_tensors(skip=False), metadata=FACTS | {"layer": 1})
    plain.metadata |= {key: site.replace("layers.3", "layers.1") for key, site in SITES.items()}
    plain.save(tmp_path / "plain")
    assert "of one shape, with or without skip" in refusal([layers[0], tmp_path / "plain"], "circuit-tracer", out)
    assert not out.exists()


def test_an_sae_is_refused_for_circuit_tracer_whatever_its_layer(tmp_path):
    sae = make_sae()
    sae.metadata = {"layer": [1]}
    sae.save(tmp_path / "sae")
    message = refusal([tmp_path / "sae"], "circuit-tracer", tmp_path / "out")
    assert message.startswith("format: expected gemma-scope or ")


# ---- the folder


def test_out_is_there_whole_or_not_at_all(tmp_path, sae, undisturbed):
    """The second of the sources is no SAE: of the first nothing is left."""
    before = tree(tmp_path)
    assert "expected" in refusal([sae, tmp_path], "saelens", tmp_path / "out", error=BadFileError)
    assert refusal([undisturbed, sae], "circuit-tracer", tmp_path / "out").startswith("format: expected gemma-scope or")
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["saes"]


def test_out_must_be_new_or_empty(tmp_path, sae):
    (tmp_path / "empty").mkdir()
    export_saes([sae], "saelens", tmp_path / "empty")
    before = tree(tmp_path)
    for out in (tmp_path / "empty", sae / "config.json"):
        assert refusal([sae], "saelens", out).startswith("out: expected a new or empty folder, got ")
    with pytest.raises(ValueError, match="out: expected a new or empty folder"):
        import_sae(sae, tmp_path / "empty")
    assert tree(tmp_path) == before


def test_out_that_cannot_be_made(tmp_path, sae):
    (tmp_path / "file").write_text("")
    assert "cannot be" in refusal([sae], "saelens", tmp_path / "file" / "out", error=EnvironmentProblemError)
    assert refusal([sae], "saelens", "a\0b").startswith("path: expected a path, got")


def test_arguments(tmp_path, sae):
    assert refusal([], "saelens", tmp_path / "out") == "sources: expected at least one SAE, got none"
    assert refusal([sae], "numpy", tmp_path / "out").startswith("format: expected 'gemma-scope' or ")
    assert refusal(str(sae), "saelens", tmp_path / "out", error=TypeError).startswith("sources: expected a list")
    assert refusal([3], "saelens", tmp_path / "out", error=TypeError).startswith("sources: expected a str or")
    assert refusal([sae], "saelens", 3, error=TypeError).startswith("out: expected a str or")
    for out in ("x.npz", "x.safetensors"):
        with pytest.raises(ValueError, match="out: expected the name of a folder"):
            import_sae(sae, tmp_path / out)
    with pytest.raises(TypeError, match="dtype: expected"):
        import_sae(sae, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


# ---- import


@pytest.mark.parametrize("format", ["gemma-scope", "gemma-scope-2", "safetensors"])
def test_import(tmp_path, sae, format):
    export_saes([sae], format, tmp_path / "foreign")
    found = import_sae(tmp_path / "foreign", tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "params.safetensors"]
    assert_same_bits(JumpReLUSAE.load(tmp_path / "ours"), make_sae())
    assert found.metadata["site"] == METADATA["site"]
    import_sae(tmp_path / "foreign", tmp_path / "half", dtype=torch.bfloat16)
    assert_same_bits(JumpReLUSAE.load(tmp_path / "half"), make_sae().to(torch.bfloat16))


def test_import_of_a_transcoder(tmp_path, layers):
    export_saes(layers, "circuit-tracer", tmp_path / "set")
    import_sae(tmp_path / "set" / "layer_1.safetensors", tmp_path / "ours")
    loaded = Transcoder.load(tmp_path / "ours")
    assert all(torch.equal(t, loaded.tensors[key]) for key, t in transcoder_tensors(seed=1).items())


# ---- the command line


def test_commands(tmp_path, sae, capsys):
    assert main(["export", str(sae), str(sae), "--format", "saelens", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/out/resid/layer_3_width_7_l0_6: JumpReLUSAE, model.layers.3.output, 7 latents" in shown
    assert shown.endswith(f"2 in {tmp_path}/out, with README.md\n")
    command = ["import", str(sae), "--out", str(tmp_path / "ours"), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f" in {tmp_path}/ours\n")
    assert JumpReLUSAE.load(tmp_path / "ours").W_enc.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "SAE", "--format", "sae", "--out", "OUT"], 2, "format: expected 'gemma-scope' or"),
        (["export", "SAE", "--format", "saelens", "--out", "OUT", "--dtype", "int8"], 2, "dtype: expected float32 or"),
        (["export", "SAE", "--format", "circuit-tracer", "--out", "OUT"], 2, "format: expected gemma-scope or"),
        (["export", "NONE", "--format", "saelens", "--out", "OUT"], 3, "expected a"),
        (["export", "--format", "saelens", "--out", "OUT"], 2, "Missing argument"),
        (["import", "NONE", "--out", "OUT"], 3, "expected a"),
        (["import", "SAE", "--out", "SAE"], 2, "out: expected a new or empty folder"),
    ],
)
def test_commands_that_fail(tmp_path, sae, capsys, arguments, code, message):
    places = {"SAE": str(sae), "OUT": str(tmp_path / "out"), "NONE": str(tmp_path / "none")}
    assert main([places.get(argument, argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemmascope: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_transcoder_is_exported_as_one(tmp_path):
    """Gemma Scope 1's arrays, in a folder that says transcoder."""
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3"
    write("gemma-scope", transcoder_tensors(skip=False), transcoder_config(), folder)
    (folder / "config.json").unlink()
    [entry] = export_saes([folder], "saelens", tmp_path / "out").entries
    assert (entry.kind, entry.hook_name) == ("Transcoder", "blocks.3.ln2.hook_normalized")
