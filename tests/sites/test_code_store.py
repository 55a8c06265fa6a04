"""Sparse codes on disk: what is read is what was collected, or an error that names the file.

pytest tests/sites/test_code_store.py
"""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from gemmascope.errors import BadFileError
from gemmascope.formats.files import read_json, seal, sha256, write_json
from gemmascope.sites import CodeStore, LatentScales, collect, collect_to_store
from tests import tiny_models as tiny
from tests.sites.test_attach import ATT, RESID
from tests.sites.test_collect import SAES, assert_same_codes, ids
from tests.sites.test_edits import D_SAE

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def model():
    return tiny.gemma2()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("stores") / "codes"
    collect_to_store(model, ids(), SAES, folder, batch_size=1, max_bytes=2100)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "codes")
    return tmp_path / "codes"


SHARD = "codes-000000.safetensors"


class TestStore:
    @pytest.mark.parametrize(("max_bytes", "shards"), [(2100, 4), (3000, 3), (1 << 20, 1)])
    def test_shards_are_the_codes_of_memory(self, model, tmp_path, max_bytes, shards):
        expected = collect(model, ids(), SAES, batch_size=1)
        store = collect_to_store(model, ids(), SAES, tmp_path / "codes", batch_size=1, max_bytes=max_bytes)
        assert len(store) == shards
        assert (store.rows, store.context, store.sites) == (5, 9, (ATT, RESID))
        assert store.d_sae == {ATT: D_SAE, RESID: D_SAE}
        found = list(store)
        assert torch.equal(torch.cat([codes.kept for codes in found]), expected.kept)
        for site, code in expected.items():
            assert torch.equal(torch.cat([codes[site].to_dense() for codes in found]), code.to_dense())
            scales = store.latent_scales[site]
            assert isinstance(scales, LatentScales)
            assert all(torch.equal(*pair) for pair in zip(scales[:3], expected.latent_scales[site][:3], strict=True))
            assert scales.n_tokens == int(expected.kept.sum())
            assert found[0].latent_scales[site] is scales
        assert all(codes.nbytes <= max_bytes for codes in found)

    def test_any_reader_of_safetensors_reads_a_shard(self, whole):
        tensors = safetensors.torch.load_file(whole / "codes-000000.safetensors")
        codes = CodeStore.open(whole).read(0)
        assert torch.equal(tensors["kept"], codes.kept)
        assert torch.equal(tensors["layer_0/att/values"], codes[ATT].values)

    def test_a_batch_beyond_the_bound(self, model, tmp_path):
        message = (
            r"^max_bytes: expected room for the codes of a batch, \d+ bytes for rows 0 to 4, got 2100; .* smaller batch"
        )
        with pytest.raises(ValueError, match=message):
            collect_to_store(model, ids(), SAES, tmp_path / "codes", batch_size=5, max_bytes=2100)
        assert_is_no_store(tmp_path / "codes")

    def test_after_an_interruption(self, model, tmp_path):
        def stop(rows):
            if rows == 4:
                raise KeyboardInterrupt

        out, settings = tmp_path / "codes", {"batch_size": 1, "max_bytes": 2100}
        with pytest.raises(KeyboardInterrupt):
            collect_to_store(model, ids(), SAES, out, progress=stop, **settings)
        assert list(out.glob("codes-*"))
        assert_is_no_store(out)
        store = collect_to_store(model, ids(), SAES, out, batch_size=1)
        assert [path.name for path in out.glob("codes-*")] == ["codes-000000.safetensors"]
        assert_same_codes(store.read(0), collect(model, ids(), SAES, batch_size=1))

    def test_a_folder_that_is_taken(self, model, folder, tmp_path):
        with pytest.raises(
            ValueError, match=r"^out: expected a new folder, found a store in .*codes; delete it first$"
        ):
            collect_to_store(model, ids(), SAES, folder)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("words")
        with pytest.raises(ValueError, match=r"^out: .* that of an earlier code store, found other files in .*mine$"):
            collect_to_store(model, ids(), SAES, tmp_path / "mine")
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"

    def test_a_shard_beyond_the_last(self, whole):
        store = CodeStore.open(whole)
        with pytest.raises(ValueError, match=rf"^shard: expected at most {len(store) - 1}, got {len(store)}$"):
            store.read(len(store))

    @pytest.mark.parametrize("name", [SHARD, "scales.safetensors"])
    def test_files_missing_and_of_another_size(self, folder, name):
        path = folder / name
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(BadFileError, match=rf"{name}: expected \d+ bytes, found \d+ bytes$"):
            CodeStore.open(folder)
        path.unlink()
        with pytest.raises(BadFileError, match=rf"{name}: expected \d+ bytes, found no file$"):
            CodeStore.open(folder)

    @pytest.mark.parametrize("name", [SHARD, "scales.safetensors"])
    def test_flipped_bits(self, folder, name):
        data = bytearray((folder / name).read_bytes())
        data[-9] ^= 4
        (folder / name).write_bytes(data)
        with pytest.raises(
            BadFileError, match=rf"{name}: expected the file as it was written, found another checksum$"
        ):
            CodeStore.open(folder).read(0)

    @pytest.mark.parametrize("text", ["", "[]", "null", '{"format": NaN}', json.dumps({"format": []})])
    def test_what_is_no_manifest(self, folder, text):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(BadFileError, match=r"manifest.json: "):
            CodeStore.open(folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"format_version": 2}, {"sites": ["layer_0/att"]}, {"sites": "layer_0/att"}, {"d_sae": [24, -1]},
            {"d_sae": [24, True]}, {"rows": 6}, {"rows": 1e3}, {"context": 0}, {"shards": []}, {"shards": [3]},
            {"shards": {}}, {"scales": []}, {"scales": {"file": "../scales.safetensors", "bytes": 3, "sha256": ""}},
            {"more": 1}, {"sites": [["layer_0/att"], ["layer_1/resid"]]}, {"n_tokens": None}, {"n_tokens": 1},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("signed", [True, False])
    def test_a_manifest_that_was_changed(self, folder, change, signed):
        rewrite(folder, lambda manifest: manifest | change, signed)
        with pytest.raises(
            BadFileError, match=r"manifest.json: (expected the manifest as it was|format_version: expected 1)"
        ):
            CodeStore.open(folder)

    def test_a_shard_elsewhere(self, folder):
        def outside(manifest):
            manifest["shards"][0]["file"] = "../codes-000000.safetensors"
            return manifest

        rewrite(folder, outside)
        with pytest.raises(BadFileError, match=r"manifest.json: expected the manifest as it was written"):
            CodeStore.open(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("kept"), r"expected 7 tensors, found other ones: 'kept'$"),
            (lambda t: t.update(more=torch.ones(1)), r"expected at most 7 tensors, found 8$"),
            (lambda t: t.update({"layer_0/att/values": t["layer_0/att/values"].half()}),
             r"values: expected F32 or F64 \["),
            (lambda t: t.update({"layer_0/att/values": t["layer_0/att/values"][:-1].clone()}),
             r"indices: expected I32 \["),
            (lambda t: t.update({"layer_0/att/values": t["layer_0/att/values"][None]}),
             r"values: expected F32 or F64 \["),
            (lambda t: t.update({"layer_0/att/offsets": t["layer_0/att/offsets"][1:].clone()}),
             r"offsets: expected I64 \["),
            (lambda t: t.update(kept=t["kept"].T.contiguous()), r"kept: expected BOOL \[1, 9\], found BOOL \[9, 1\]$"),
            (lambda t: t["kept"].fill_(True), r"kept: expected True \d+ times, found it otherwise$"),
            (lambda t: t["kept"].view(torch.uint8).mul_(2), r"kept: expected True \d+ times, found it otherwise$"),
            (lambda t: t["layer_1/resid/indices"].fill_(D_SAE), r"layer_1/resid: expected a code, found code.indices"),
            (lambda t: t["layer_1/resid/indices"].fill_(-1), r"layer_1/resid: expected a code, found code.indices"),
            (lambda t: t["layer_1/resid/offsets"].fill_(3), r"layer_1/resid: expected a code, found code.offsets"),
            (lambda t: t["layer_1/resid/values"].fill_(torch.nan),
             r"layer_1/resid: expected finite activations, found"),
        ],
    )  # fmt: skip
    def test_a_shard_that_holds_something_else(self, folder, change, message):
        """Of the right size and checksum, as a hostile manifest may say."""
        path = folder / SHARD
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)
        sign(folder)
        with pytest.raises(BadFileError, match=rf"{SHARD}: .*{message}"):
            CodeStore.open(folder).read(0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("layer_0/att/max"), r"expected 6 tensors, found other ones"),
            (lambda t: t.update({"layer_0/att/max": torch.ones(23)}), r"max: expected F32 \[24\], found F32 \[23\]$"),
            (lambda t: t["layer_0/att/mean"].fill_(torch.inf), r"expected finite scales and counts, found others$"),
            (lambda t: t["layer_0/att/firing_count"].fill_(-1), r"expected finite scales and counts, found others$"),
        ],
    )
    def test_scales_that_are_something_else(self, folder, change, message):
        path = folder / "scales.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)
        sign(folder)
        with pytest.raises(BadFileError, match=rf"scales.safetensors: .*{message}"):
            CodeStore.open(folder)

    def test_a_pickle_and_a_header_of_terabytes(self, folder):
        path = folder / SHARD
        header = json.dumps({"kept": {"dtype": "BOOL", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}).encode()
        for data in (b"\x80\x04\x95" + bytes(200), len(header).to_bytes(8, "little") + header):
            path.write_bytes(data)
            sign(folder)
            with pytest.raises(BadFileError, match=rf"{SHARD}: "):
                CodeStore.open(folder).read(0)

    def test_no_folder(self, tmp_path):
        with pytest.raises(BadFileError, match=r"manifest.json: expected a file, found none$"):
            CodeStore.open(tmp_path / "nothing")


def assert_is_no_store(folder):
    with pytest.raises(BadFileError, match=r"manifest.json: expected a file, found none$"):
        CodeStore.open(folder)


def rewrite(folder, change, signed=True):
    manifest = change(read_json(folder / "manifest.json"))
    if signed:
        manifest["sha256"] = seal({key: value for key, value in manifest.items() if key != "sha256"})
    write_json(folder / "manifest.json", manifest)


def sign(folder):
    """Have the manifest say what the files now are."""

    def facts(manifest):
        for entry in (*manifest["shards"], manifest["scales"]):
            path = folder / entry["file"]
            entry |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        return manifest

    rewrite(folder, facts)
