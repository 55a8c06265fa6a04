"""`from_pretrained`: local folders, and the hub with a stand-in for `hf_hub_download`."""

import builtins
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from gemmascope import JumpReLUSAE, load_pretrained_sae, load_sae
from gemmascope.errors import BadFileError, EnvironmentProblemError
from tests.formats import others
from tests.formats.test_release import METADATA, arrays, assert_same_bits, make_sae, write_gemma_scope_2

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub is an extra")
from huggingface_hub import errors  # noqa: E402

REPO, FOLDER, COMMIT = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", "c0ffee" * 6


# ---- local folders


def test_local_folder(tmp_path):
    make_sae().save(tmp_path / FOLDER / "params.npz")
    make_sae(folded=False).save(tmp_path / "ours")
    assert_same_bits(JumpReLUSAE.from_pretrained(str(tmp_path), FOLDER), make_sae())
    assert_same_bits(JumpReLUSAE.from_pretrained(str(tmp_path), FOLDER + "/params.npz"), make_sae())
    assert_same_bits(JumpReLUSAE.from_pretrained(str(tmp_path), "ours"), make_sae(folded=False))


def test_local_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match=r"^revision: expected None for the local folder .*, got 'main'$"):
        JumpReLUSAE.from_pretrained(str(tmp_path), FOLDER, revision="main")


@pytest.mark.parametrize("path", ["", "../other", "a/../../b", "/etc", "a\\..\\b", "C:x"])
@pytest.mark.parametrize("local", [False, True])
def test_path_that_leaves_the_repository(tmp_path, path, local):
    make_sae().save(tmp_path / "other" / "params.npz")
    (tmp_path / "repo").mkdir()
    with pytest.raises(BadFileError) as caught:
        JumpReLUSAE.from_pretrained(str(tmp_path / "repo") if local else REPO, path)
    assert str(caught.value) == f"path: expected a relative path inside the repository, found {path!r}"


@pytest.mark.parametrize("linked", ["folder", "params.npz", "config.json"])
def test_link_that_leaves_the_local_folder(tmp_path, linked):
    make_sae().save(tmp_path / "outside" / "params.npz")
    sae = tmp_path / "repo" / "sae"
    sae.parent.mkdir()
    if linked == "folder":
        sae.symlink_to(tmp_path / "outside")
    else:
        make_sae().save(sae / "params.npz")
        (sae / linked).unlink()
        (sae / linked).symlink_to(tmp_path / "outside" / linked)
    with pytest.raises(BadFileError, match=r"/repo/sae/.*: expected a file inside .*/repo, found a link out of it$"):
        JumpReLUSAE.from_pretrained(str(tmp_path / "repo"), "sae")


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache laid out like the hub's, with links from snapshots to blobs; `.calls` are the requests."""
    snapshot = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / COMMIT
    hub = types.SimpleNamespace(snapshot=snapshot, calls=[], failure=None)

    def download(repo_id, filename, *, revision=None):
        hub.calls.append((repo_id, filename, revision))
        if hub.failure is not None:
            raise hub.failure
        file = snapshot / filename
        if not file.exists():
            raise response_error(errors.RemoteEntryNotFoundError, f"404: {filename}")
        if not file.is_symlink():
            blob = snapshot.parent.parent / "blobs" / str(len(hub.calls))
            blob.parent.mkdir(exist_ok=True)
            file.rename(blob)
            file.symlink_to(os.path.relpath(blob, file.parent))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return hub


def response_error(kind: type[Exception], message: str) -> Exception:
    """An error of the hub without the response that its constructor asks for."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


@pytest.mark.parametrize("path", [FOLDER, FOLDER + "/params.npz"])
def test_gemma_scope_1_from_the_hub(hub, path):
    make_sae().save(hub.snapshot / FOLDER / "params.npz")
    (hub.snapshot / FOLDER / "config.json").unlink()
    sae = JumpReLUSAE.from_pretrained(REPO, path)
    assert_same_bits(sae, make_sae())
    assert sae.metadata == {"repo": REPO, "path": path, "revision": COMMIT}
    assert hub.calls == [(REPO, f"{FOLDER}/config.json", None), (REPO, f"{FOLDER}/params.npz", None)]


def test_our_files_from_the_hub(hub):
    make_sae(folded=False).save(hub.snapshot / "ours")
    make_sae().save(hub.snapshot / "npz" / "params.npz")
    for path, folded in (("ours", False), ("ours/params.safetensors", False), ("npz", True)):
        sae = JumpReLUSAE.from_pretrained(REPO, path, revision="v1")
        assert_same_bits(sae, make_sae(folded=folded))
        assert sae.metadata == METADATA | {"repo": REPO, "path": path, "revision": COMMIT}
    assert {(name.endswith("json"), revision) for _, name, revision in hub.calls} == {(True, "v1"), (False, COMMIT)}


def test_gemma_scope_2_from_the_hub(hub):
    (hub.snapshot / "resid_post").mkdir(parents=True)
    write_gemma_scope_2(hub.snapshot / "resid_post" / "layer_17_width_65k_l0_medium")
    sae = JumpReLUSAE.from_pretrained(REPO, "resid_post/layer_17_width_65k_l0_medium")
    assert sae.metadata["site"] == "model.layers.17.output"


def test_transcoders_are_refused_before_they_are_fetched(hub):
    repo = "google/gemma-scope-2b-pt-transcoders"
    for path in (FOLDER, FOLDER + "/params.npz"):
        with pytest.raises(BadFileError) as caught:
            JumpReLUSAE.from_pretrained(repo, path)
        assert str(caught.value).startswith(f"{repo}/{path}: expected an SAE, found the name {repo.split('/')[1]!r}: ")
    assert {name for _, name, _ in hub.calls} == {f"{FOLDER}/config.json"}
    make_sae().save(hub.snapshot / FOLDER / "params.npz")
    assert_same_bits(JumpReLUSAE.from_pretrained(repo, FOLDER), make_sae())


@pytest.mark.parametrize(
    ("write", "case", "weights", "config"),
    [
        (others.write_saelens, others.saelens("jumprelu"), "sae_weights.safetensors", "cfg.json"),
        (others.write_sparsify, others.sparsify(), "sae.safetensors", "cfg.json"),
        (others.write_dictionary_learning, others.dictionary("GatedAutoEncoder"), "ae.pt", "config.json"),
    ],
)
def test_files_of_others_from_the_hub(hub, write, case, weights, config):
    local = load_sae(write(hub.snapshot / "blocks.3", case.tensors, case.config))
    for path in ("blocks.3", f"blocks.3/{weights}"):
        sae = load_pretrained_sae("someone/saes", path, revision="v1")
        assert type(sae) is type(local)
        assert sae.metadata == local.metadata | {"repo": "someone/saes", "path": path, "revision": COMMIT}
        for a, b in zip(sae.parameters(), local.parameters(), strict=True):
            assert torch.equal(a, b)
    (hub.snapshot / "blocks.3" / config).unlink()
    with pytest.raises(BadFileError, match=f"/{config}: expected a file of that name in the repository, found none"):
        load_pretrained_sae("someone/saes", f"blocks.3/{weights}")
    with pytest.raises(BadFileError, match=r"/blocks.3/params.safetensors: expected a file of that name"):
        load_pretrained_sae("someone/saes", "blocks.3")


EMBEDDING = "embedding/width_4k/average_l0_6"


def test_embedding_saes_from_the_hub(hub):
    (hub.snapshot / EMBEDDING).mkdir(parents=True)
    np.savez(hub.snapshot / EMBEDDING / "params.npz", **arrays())
    for path in (EMBEDDING, EMBEDDING + "/params.npz"):
        sae = JumpReLUSAE.from_pretrained(REPO, path)
        assert np.array_equal(sae.W_enc.detach().numpy(), arrays()["W_enc"] / 2)
        assert sae.metadata == {"embedding_scale": 2.0, "repo": REPO, "path": path, "revision": COMMIT}


def test_paths_of_pathlib(hub):
    make_sae().save(hub.snapshot / FOLDER / "params.npz")
    for repo in (hub.snapshot, REPO):
        assert_same_bits(JumpReLUSAE.from_pretrained(repo, Path(FOLDER)), make_sae())


def test_a_snapshot_folder_is_a_local_folder(hub):
    make_sae().save(hub.snapshot / FOLDER / "params.npz")
    JumpReLUSAE.from_pretrained(REPO, FOLDER)
    assert (hub.snapshot / FOLDER / "params.npz").is_symlink()
    assert_same_bits(JumpReLUSAE.from_pretrained(str(hub.snapshot), FOLDER), make_sae())


def test_damaged_download_is_named(hub):
    (hub.snapshot / FOLDER).mkdir(parents=True)
    (hub.snapshot / FOLDER / "params.npz").write_bytes(b"<html>")
    with pytest.raises(BadFileError, match=r"params.npz: expected a .npz file, found damage: 'File is not a zip"):
        JumpReLUSAE.from_pretrained(REPO, FOLDER)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            errors.GatedRepoError,
            EnvironmentProblemError,
            f"{REPO}/a.json: access is restricted: accept its licence on huggingface.co and log in (hf auth login)",
        ),
        (
            errors.RepositoryNotFoundError,
            BadFileError,
            f"{REPO}: expected a Hugging Face repository, found none (or a private one)",
        ),
        (errors.RevisionNotFoundError, BadFileError, f"{REPO}: expected revision 'v9', found none of that name"),
        (
            errors.RemoteEntryNotFoundError,
            BadFileError,
            f"{REPO}/a.npz: expected a file of that name in the repository, found none",
        ),
        (
            errors.LocalEntryNotFoundError,
            EnvironmentProblemError,
            f"{REPO}/a.npz: not in the local cache and the hub cannot be reached",
        ),
        (errors.HfHubHTTPError, EnvironmentProblemError, f"{REPO}/a.json: cannot be fetched: the reason"),
        (ConnectionError, EnvironmentProblemError, f"{REPO}/a.json: cannot be fetched: the reason"),
        (
            errors.HFValidationError,
            BadFileError,
            f"repo: expected an existing folder or 'owner/name', found {REPO!r}",
        ),
    ],
)
def test_failures_of_the_hub(hub, kind, error, message):
    hub.failure = response_error(kind, "the reason\nand more")
    with pytest.raises(error) as caught:
        JumpReLUSAE.from_pretrained(REPO, "a.npz", revision="v9")
    assert str(caught.value) == message


def test_folder_that_the_hub_does_not_have(hub):
    with pytest.raises(BadFileError, match=r"/missing/params.safetensors: expected a file of that name"):
        JumpReLUSAE.from_pretrained(REPO, "missing")


def test_hub_not_installed(monkeypatch):
    real_import = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(EnvironmentProblemError) as caught:
        JumpReLUSAE.from_pretrained(REPO, FOLDER)
    assert str(caught.value) == (
        'huggingface_hub: expected to be installed to read from the hub, found none: pip install "gemmascope[train]"'
    )


def test_real_hub_offline(monkeypatch, tmp_path):
    """Not the stand-in: the library's own error for a file that it cannot reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentProblemError, match=r"not in the local cache and the hub cannot be reached$"):
        JumpReLUSAE.from_pretrained(REPO, FOLDER)
    with pytest.raises(BadFileError, match=r"^repo: expected an existing folder or 'owner/name', found 'a/b/c'$"):
        JumpReLUSAE.from_pretrained("a/b/c", FOLDER)
    assert list(Path(tmp_path).rglob("*.npz")) == []
