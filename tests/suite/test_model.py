"""Loading a language model from a folder or the hub, and what identifies it."""

import json
import re
from pathlib import Path

import pytest
import torch

from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats import files
from gemmascope.sites import Site
from gemmascope.suite import load_architecture, load_model, model
from gemmascope.suite.config import ModelSection
from tests import tiny_models
from tests.formats.test_from_pretrained import response_error

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

BUILDERS = {"gemma2": tiny_models.gemma2, "gemma3_text": tiny_models.gemma3, "gemma3": tiny_models.gemma3_multimodal}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def quiet():
    """transformers' progress bars fill the output of a failure."""
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tiny_models.VOCAB)}, unk_token="t3"))
    special = {"pad_token": "t0", "eos_token": "t1", "bos_token": "t2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save(folder: Path, kind: str = "gemma2", **options) -> torch.nn.Module:
    built = BUILDERS[kind](**options)
    built.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return built


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "tiny")
    return tmp_path / "tiny"


def section(folder: Path, **options) -> ModelSection:
    return ModelSection(str(folder), **options)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_a_folder(tmp_path, kind):
    built = save(tmp_path / "tiny", kind)
    loaded = load_model(section(tmp_path / "tiny"), "cpu")
    ids = tiny_models.tokens()
    assert torch.equal(loaded.model(ids).logits, built(ids).logits)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.bos_token_id == tiny_models.BOS
    assert len(loaded.sites) == 3 * tiny_models.LAYERS
    assert {site.kind: loaded.width(site) for site in loaded.sites} == {"att": 24, "mlp": 16, "resid": 16}
    assert loaded.name == "tiny"
    assert loaded.identity == {
        "name": "tiny",
        "revision": None,
        "files": model.content_of(tmp_path / "tiny"),
        "type": kind,
        "dtype": "float32",
        "attention": "eager",
    }
    assert files.json_text(loaded.identity, "identity")


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_an_architecture_reads_the_config_alone(tmp_path, kind):
    built = save(tmp_path / "tiny", kind)
    for path in (tmp_path / "tiny").iterdir():
        if path.name != "config.json":
            path.unlink()
    found = load_architecture(section(tmp_path / "tiny"), "cpu")
    assert found.is_meta
    assert found.tokenizer is None
    assert found.sites == tuple(Site(layer, site) for layer in range(3) for site in ("att", "mlp", "resid"))
    assert sum(p.numel() for p in found.model.parameters()) == sum(p.numel() for p in built.parameters())
    assert found.identity["files"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(folder, dtype):
    loaded = load_model(section(folder, dtype=dtype), "cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.identity["dtype"] == dtype
    architecture = load_architecture(section(folder, dtype=dtype), "cpu")
    assert {p.dtype for p in architecture.model.parameters()} == {getattr(torch, dtype)}


def test_auto_is_bfloat16_on_a_gpu_only():
    assert model.dtype_of(ModelSection("m"), torch.device("cuda")) == torch.bfloat16
    assert model.dtype_of(ModelSection("m"), torch.device("cpu")) == torch.float32


def test_what_the_caller_set_as_pytorchs_defaults_changes_nothing(folder):
    before = load_model(section(folder), "cpu")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            after = load_model(section(folder), "cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in before.model.state_dict().items():
        assert torch.equal(p, after.model.state_dict()[name])
    assert {b.dtype for b in after.model.buffers()} == {b.dtype for b in before.model.buffers()}


# ---- identity


def test_identity_follows_every_byte(folder):
    before = model.content_of(folder)
    assert model.content_of(folder) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = model.content_of(folder)
    assert changed != before
    edit(folder / "config.json", rope_theta=3.0)
    assert model.content_of(folder) not in (before, changed)


def test_identity_follows_the_names_of_the_files(folder):
    before = model.content_of(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert model.content_of(folder) != before


def test_progress_of_the_hashing(folder, monkeypatch):
    monkeypatch.setattr(model, "_HASHED_AT_ONCE", 1000)
    seen = []
    load_model(section(folder), "cpu", lambda done, total: seen.append((done, total)))
    size = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 3


def test_the_environment_is_recorded():
    found = model.environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["threads"] == torch.get_num_threads()
    assert set(found) == {"gemmascope", "python", "torch", "transformers", "device", "threads", "processors"}
    assert files.json_text(found, "environment")


# ---- what is refused


def test_sdpa_where_it_drops_the_soft_cap(folder):
    for load in (load_model, load_architecture):
        with pytest.raises(
            EnvironmentProblemError, match=r"^attention: expected one that applies attn_logit_softcapping"
        ):
            load(section(folder, attention="sdpa"), "cpu")


def test_sdpa_where_there_is_no_soft_cap(tmp_path):
    save(tmp_path / "tiny", "gemma3_text")
    loaded = load_model(section(tmp_path / "tiny", attention="sdpa"), "cpu")
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.identity["attention"] == "sdpa"


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma3n_text", None, 5])
def test_other_models(folder, kind):
    edit(folder / "config.json", model_type=kind)
    message = rf"^model\.name: expected a Gemma 2 or Gemma 3, got tiny, whose type is {re.escape(repr(kind))}$"
    with pytest.raises(ValueError, match=message):
        load_model(section(folder), "cpu")


def test_a_config_that_is_no_table(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"^model\.name: expected a Gemma 2 or Gemma 3, got tiny, whose type is None$"):
        load_model(section(folder), "cpu")


def test_quantised_weights(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"^model\.name: expected weights that are not quantised, got tiny"):
        load_model(section(folder), "cpu")


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": "three"}, {"hidden_size": -4}, {"layer_types": ["x"]}], ids=str
)
def test_configs_that_make_no_model(folder, change):
    edit(folder / "config.json", **change)
    with pytest.raises((BadFileError, ValueError)) as found:
        load_architecture(section(folder), "cpu")
    assert "expected " in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "expected weights of a Gemma, found "),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "expected weights of a Gemma, found "),
        (lambda path: path.write_bytes(b""), "expected weights of a Gemma, found "),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "expected weights of a Gemma, found "),
    ],
    ids=["missing", "truncated", "empty", "pickle"],
)
def test_damaged_weights(folder, damage, message):
    damage(folder / "model.safetensors")
    with pytest.raises(BadFileError, match=rf"^{re.escape(str(folder))}: {message}") as found:
        load_model(section(folder), "cpu")
    assert "\n" not in str(found.value)


def test_weights_that_are_missing_or_of_another_shape(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(gone, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BadFileError, match=r"expected all weights of its config, found \S*layers\.1\.mlp\S+ missing and 2"
    ):
        load_model(section(folder), "cpu")
    name = next(name for name in weights if "layers.1.mlp" in name)
    save_file(
        weights | {name: weights[name][:-1].contiguous()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(BadFileError, match=rf"^{re.escape(str(folder))}: expected "):
        load_model(section(folder), "cpu")


def test_a_folder_without_a_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadFileError, match=rf"^{re.escape(str(folder))}: expected a tokenizer, tokenizer\.json or"):
        load_model(section(folder), "cpu")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(BadFileError, match=r"config\.json: expected a file, found none$"):
        load_model(section(tmp_path), "cpu")


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match=r"^model\.revision: expected none for the folder .*, got 'main'$"):
        load_model(section(folder, revision="main"), "cpu")


@pytest.mark.parametrize("name", ["./absent", "/absent", "a/b/c", "absent", "../a", "a b/c", "~/model"])
def test_names_that_are_neither_folder_nor_repository(name):
    with pytest.raises(
        ValueError, match=r"^model\.name: expected a folder or OWNER/NAME on the hub, found neither: "
    ) as found:
        load_model(ModelSection(name), "cpu")
    assert type(found.value) is ValueError


def test_a_tokenizer_that_is_damaged(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BadFileError, match=rf"^{re.escape(str(folder))}: expected a tokenizer, found "):
        load_model(section(folder), "cpu")


def test_a_device_that_is_not_here(folder):
    with pytest.raises(EnvironmentProblemError, match=r"^run\.device: expected one of the \d+ GPUs"):
        load_model(section(folder), "cuda:99")


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The repository owner/tiny at COMMIT, in a cache as the hub's; what was asked for."""
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / COMMIT
    save(snapshot)
    asked = []

    def download(repo, path, revision=None):
        asked.append((repo, path, revision))
        return str(snapshot / path)

    def snapshot_download(repo, revision=None, allow_patterns=None):
        asked.append((repo, tuple(allow_patterns), revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_repository_is_pinned_to_its_commit(hub):
    loaded = load_model(ModelSection("owner/tiny", revision="main"), "cpu")
    assert hub == [("owner/tiny", "config.json", "main"), ("owner/tiny", model.WANTED, COMMIT)]
    assert loaded.name == "owner/tiny"
    assert (loaded.identity["name"], loaded.identity["revision"], loaded.identity["files"]) == (
        "owner/tiny",
        COMMIT,
        None,
    )


def test_the_architecture_of_a_repository_needs_no_weights(hub):
    found = load_architecture(ModelSection("owner/tiny"), "cpu")
    assert hub == [("owner/tiny", "config.json", None)]
    assert found.is_meta
    assert found.identity["revision"] == COMMIT


def test_nothing_but_safetensors_and_tokenizers_is_fetched():
    assert not any(pattern.endswith((".bin", ".pt", ".py", ".pkl")) or pattern == "*" for pattern in model.WANTED)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("GatedRepoError", EnvironmentProblemError, "owner/tiny/config.json: access is restricted: accept its licence"),
        ("RepositoryNotFoundError", BadFileError, "owner/tiny: expected a Hugging Face repository, found none"),
        ("RevisionNotFoundError", BadFileError, "owner/tiny: expected revision 'v9', found none of that name"),
        (
            "LocalEntryNotFoundError",
            EnvironmentProblemError,
            "owner/tiny/config.json: not in the local cache and the hub",
        ),
        ("RemoteEntryNotFoundError", BadFileError, "owner/tiny/config.json: expected a file of that name"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, kind, message):
    def refuse(*args, **kwargs):
        raise response_error(getattr(huggingface_hub.errors, error), "the reason")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(kind, match="^" + re.escape(message)):
        load_model(ModelSection("owner/tiny", revision="v9"), "cpu")


def test_weights_that_are_not_in_the_cache_offline(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        EnvironmentProblemError, match=r"^owner/tiny: not in the local cache and the hub cannot be reached$"
    ):
        load_model(ModelSection("owner/tiny"), "cpu")


def test_a_snapshot_without_weights_offline(hub, tmp_path):
    (tmp_path / "models--owner--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(BadFileError, match=r": expected weights of a Gemma, found "):
        load_model(ModelSection("owner/tiny"), "cpu")
