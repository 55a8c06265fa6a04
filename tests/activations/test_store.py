"""A store gives the bits that were streamed or says which file is at fault; what was finished is never lost."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from gemmascope.activations import ActivationStore, Feed, Harvester, Ring, harvest_to_store, store
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats.files import read_json, seal, write_json
from gemmascope.runs import Run
from gemmascope.sites import Site
from tests.activations.superblocks import FakeRows
from tests.tiny_models import gemma2

SITES = [Site(0, "att"), Site(1, "resid")]
BLOCKS = 3


@pytest.fixture(scope="module")
def model():
    return gemma2()


@pytest.fixture
def rows():
    return FakeRows()


@pytest.fixture
def source(model, rows):
    return harvester(model, rows)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def harvester(model, rows, sites=SITES, **settings):
    return Harvester(model, rows, sites, **({"seed": 3, "rows_per_block": 4, "identity": {"name": "tiny"}} | settings))


def written(source, folder, blocks=BLOCKS, dtype=torch.bfloat16, **settings):
    return harvest_to_store(source, folder, blocks=blocks, dtype=dtype, **settings)


def ring_for(source, dtype=torch.bfloat16):
    return Ring(source.widths, source.capacity, dtype=dtype, device="cpu")


def contents(source, block, dtype=torch.bfloat16):
    """Everything that a ring then holds."""
    ring = ring_for(source, dtype)
    ring.fill(source, block)
    parts = [*ring.activations.values(), *ring.norms.values(), ring.row, ring.position]
    return [part[: ring.n].clone() for part in parts]


def assert_whole(source, folder, blocks=BLOCKS):
    found = ActivationStore.open(folder, source.identity)
    found.verify()
    assert found.blocks == blocks
    for block in range(blocks):
        assert all(map(torch.equal, contents(found, block), contents(source, block)))
    names = {"manifest.json", "run.lock", "stages.json", *(shard.file for shard in found.shards)}
    assert set(os.listdir(folder)) == names


def harvested(rows):
    """How many superblocks since the last call."""
    n, rows.read = len(rows.read) // 4, []
    return n


# ---- what it holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [64, 16 << 20])
def test_fills_a_ring_as_the_harvester_does(source, folder, dtype, chunk, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK_BYTES", chunk)
    done = []
    made = written(source, folder, dtype=dtype, progress=done.append)
    assert done == [1, 2, 3]
    for found in (made, ActivationStore.open(folder)):
        assert found.sites == source.sites
        assert found.widths == source.widths
        assert found.capacity == source.capacity
        assert found.content == source.content
        for block in (2, 0, 0, 1):
            assert all(map(torch.equal, contents(found, block, dtype), contents(source, block, dtype)))


def test_any_tool_opens_a_shard(source, folder):
    written(source, folder)
    ring = ring_for(source)
    ring.fill(source, 1)
    tensors = safetensors.torch.load_file(folder / "superblock-000001.safetensors")
    assert set(tensors) == {"row", "position", "norms", *map(str, SITES)}
    for site in SITES:
        assert torch.equal(tensors[str(site)], ring.activations[site][: ring.n])
    assert torch.equal(tensors["norms"], torch.stack([ring.norms[site][: ring.n] for site in SITES]))
    assert torch.equal(tensors["row"], ring.row[: ring.n])
    assert torch.equal(tensors["position"], ring.position[: ring.n])


def test_superblocks_without_a_token(source, rows, folder):
    rows.ids[:] = 2
    found = written(source, folder)
    assert [shard.tokens for shard in found.shards] == [0] * BLOCKS
    assert contents(found, 0)[0].shape == (0, 24)


def test_many_sites(model, rows, folder):
    """More than safetensors files that others made may have here."""
    sites = [Site(layer, kind) for layer in range(3) for kind in ("att", "mlp", "resid")]
    source = harvester(model, rows, sites)
    found = written(source, folder, 1)
    assert all(map(torch.equal, contents(found, 0), contents(source, 0)))


def test_it_ends(source, folder):
    found = written(source, folder)
    with pytest.raises(ValueError, match="expected a superblock from 0 to 2, got 3; harvest more"):
        contents(found, 3)


def test_a_ring_of_another_dtype(source, folder):
    found = written(source, folder)
    with pytest.raises(ValueError, match=r"dtype: expected bfloat16 as in .*store, got float32"):
        Feed(found, batch_size=8, seed=0, dtype=torch.float32, device="cpu")


# ---- interruptions


def test_goes_on_where_it_was_interrupted(source, rows, folder):
    def interrupt(block):
        if block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(source, folder, progress=interrupt)
    assert harvested(rows) == 2
    assert ActivationStore.open(folder).blocks == 2
    written(source, folder)
    assert harvested(rows) == 1
    assert_whole(source, folder)


def test_is_extended(source, rows, folder):
    written(source, folder, 1)
    written(source, folder, 3)
    assert harvested(rows) == 3
    assert written(source, folder, 2).blocks == 3
    assert harvested(rows) == 0
    assert_whole(source, folder)


KILLED = """
import sys, time
import torch
from gemmascope.activations import Harvester, harvest_to_store, store
from tests.activations.superblocks import FakeRows
from tests.tiny_models import gemma2

chunks = store._chunks

def slowly(data):
    for number, chunk in enumerate(chunks(data)):
        yield chunk
        if list(store.Path(sys.argv[1]).glob("superblock-000001*")) and number == 1:
            print("ready", flush=True)
            time.sleep(300)

store._chunks, store._CHUNK_BYTES = slowly, 100
source = Harvester(
    gemma2(), FakeRows(), ["layer_0/att", "layer_1/resid"], seed=3, rows_per_block=4, identity={"name": "tiny"}
)
harvest_to_store(source, sys.argv[1], blocks=3, dtype=torch.bfloat16)
"""


def test_killed_while_a_shard_is_written(source, rows, folder):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(EnvironmentProblemError, match=f"no other process to work in it, found pid {process.pid} "):
            written(source, folder)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert [path for path in os.listdir(folder) if path.startswith(".tmp-")]
    assert ActivationStore.open(folder).blocks == 2
    rows.read = []
    written(source, folder)
    assert harvested(rows) == 1
    assert_whole(source, folder)


@pytest.mark.parametrize("limit", [200, 1500])
def test_no_room_on_the_disk(source, rows, folder, limit):
    """At the manifest (200) or in the middle of a shard; files beyond a limit fail as on a full disk."""
    written(source, folder, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}
    assert len(before["superblock-000000.safetensors"]) > 1500
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(EnvironmentProblemError, match="cannot be written: File too large"):
            written(source, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"} == before
    harvested(rows)
    written(source, folder)
    assert harvested(rows) == 2
    assert_whole(source, folder)


def test_two_writers(source, folder):
    written(source, folder, 1)
    with (
        Run(folder),
        pytest.raises(EnvironmentProblemError, match=f"no other process to work in it, found pid {os.getpid()}"),
    ):
        written(source, folder)


def test_a_folder_of_other_files(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected a new folder or that of an earlier activation store, found other"):
        written(source, tmp_path)


def test_activations_that_are_not_finite_are_not_written(rows, folder):
    rows.ids[rows.ids == 40] = 41
    rows.ids[-2, 3] = 40
    broken = gemma2()
    broken.model.embed_tokens.weight.data[40] = torch.nan  # a token that the probe does not read
    source = harvester(broken, rows, rows_per_block=1)
    bad = [block for block in range(10) if source._order.block(block, 1).item() == 8]
    with pytest.raises(EnvironmentProblemError, match=f"NaN or Inf in .* of superblock {bad[0]}: row 8 position 1, "):
        written(source, folder, 10)
    assert ActivationStore.open(folder).blocks == bad[0] > 0


# ---- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def make_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": truncate,
    "lengthened": lengthen,
    "missing": os.unlink,
    "renamed": lambda path: path.rename(path.with_name("superblock-000007.safetensors")),
    "empty": lambda path: path.write_bytes(b""),
    "length flipped": lambda path: flip(path, 1),
    "header flipped": lambda path: flip(path, 40),
    "row flipped": lambda path: flip(path, 600),
    "last byte flipped": lambda path: flip(path, -1),
    "another superblock": lambda path: shutil.copy(path.with_name("superblock-000000.safetensors"), path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("when", ["before", "after"])
def test_damage_is_named_and_repaired(source, rows, folder, damage, when):
    """Damaged before the store is opened, and after."""
    written(source, folder)
    harvested(rows)
    opened = ActivationStore.open(folder)
    damage(folder / "superblock-000001.safetensors")
    with pytest.raises(BadFileError, match=r"superblock-000001\.safetensors"):
        contents(ActivationStore.open(folder) if when == "before" else opened, 1)
    with pytest.raises(BadFileError, match=r"these damaged: superblock-000001\.safetensors$"):
        opened.verify()
    assert len(contents(opened, 0)[0]) == len(contents(opened, 0)[0]) > 0
    (folder / "superblock-000007.safetensors").unlink(missing_ok=True)
    written(source, folder)
    assert harvested(rows) == 1
    assert_whole(source, folder)


def test_every_damaged_file_is_named(source, folder):
    written(source, folder)
    truncate(folder / "superblock-000000.safetensors")
    (folder / "superblock-000002.safetensors").unlink()
    with pytest.raises(
        BadFileError,
        match=r"or of another size: superblock-000000\.safetensors, superblock-000002\.safetensors; harvest",
    ):
        ActivationStore.open(folder)


def test_every_flipped_byte_of_a_small_shard(model, folder):
    source = harvester(model, FakeRows(context=2), ["layer_0/resid"], rows_per_block=1)
    found = written(source, folder, 1)
    path = folder / "superblock-000000.safetensors"
    data, ring = path.read_bytes(), ring_for(source)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BadFileError, match="superblock-000000"):
            ring.fill(found, 0)
        assert ring.n == 0
    path.write_bytes(data)
    ring.fill(found, 0)


def test_a_checksum_is_taken_once_and_the_size_each_time(source, folder, monkeypatch):
    found = written(source, folder)
    path, taken, sha256 = folder / "superblock-000000.safetensors", [], store.hashlib.sha256
    monkeypatch.setattr(store.hashlib, "sha256", lambda *data: (taken.append(data), sha256(*data))[1])
    contents(found, 0)
    contents(found, 0)
    assert len(taken) == 1
    truncate(path)
    with pytest.raises(BadFileError, match=r"superblock-000000.safetensors: .* found \d+ bytes instead of \d+"):
        contents(found, 0)


def test_cut_short_while_it_is_read(source, folder, monkeypatch):
    found = written(source, folder)
    pread = store.os.preadv
    monkeypatch.setattr(store.os, "preadv", lambda file, data, at: pread(file, data, at) if at < 1000 else 0)
    with pytest.raises(BadFileError, match=r"superblock-000000.safetensors: .* found fewer bytes"):
        contents(found, 0)


def test_a_disk_that_cannot_be_read(source, folder, monkeypatch):
    found = written(source, folder)

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store.os, "preadv", fail)
    with pytest.raises(EnvironmentProblemError, match=r"superblock-000000.safetensors: cannot be read: Input/output"):
        contents(found, 0)


def test_what_comes_out_other_than_it_was_is_not_mixed_in(source, folder, monkeypatch):
    written(source, folder)
    (folder / "superblock-000001.safetensors").unlink()
    fill = source.fill

    def otherwise(block, ring):
        fill(block, ring)
        ring.activations[SITES[0]][0, 0] += 1

    monkeypatch.setattr(source, "fill", otherwise)
    with pytest.raises(EnvironmentProblemError, match=r"superblock-000001.safetensors: .* found other ones: something"):
        written(source, folder)
    monkeypatch.undo()
    written(source, folder)
    assert_whole(source, folder)


# ---- the manifest


def test_a_store_of_something_else(model, rows, source, folder):
    written(source, folder)
    others = {
        r"seed: the store has 3, this run 4": harvester(model, rows, seed=4),
        r"model\.name: the store has 'tiny', this run 'other'": harvester(model, rows, identity={"name": "other"}),
        r"rows_per_block: the store has 4, this run 5": harvester(model, rows, rows_per_block=5),
        r"forward_rows: the store has 8, this run 2": harvester(model, rows, forward_rows=2),
        r"text: the store has 'text', this run 'other'": harvester(model, FakeRows(content="other")),
        r"sites: the store has 2 entries, this run 1 entries": harvester(model, rows, SITES[:1]),
        r"weights: the store has '\w+', this run '\w+'": harvester(gemma2(seed=1), rows),
    }
    for match, other in others.items():
        with pytest.raises(BadFileError, match=f"store: expected a store of the same, found .*{match}"):
            written(other, folder)
        with pytest.raises(BadFileError, match=f"store: expected a store of the same, found .*{match}"):
            ActivationStore.open(folder, other.identity)
    with pytest.raises(BadFileError, match="found dtype: the store has 'bfloat16', this run 'float32'"):
        written(source, folder, dtype=torch.float32)
    with pytest.raises(BadFileError, match="found dtype: the store has 'bfloat16', this run 'float32'"):
        ActivationStore.open(folder, source.identity | {"dtype": "float32"})
    assert_whole(source, folder)


def test_every_flipped_byte_of_the_manifest(source, folder):
    written(source, folder, 1)
    path = folder / "manifest.json"
    data = path.read_bytes()
    whole = ActivationStore.open(folder)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with contextlib.suppress(BadFileError):
            found = ActivationStore.open(folder)  # it was white space
            assert (found.identity, found.shards) == (whole.identity, whole.shards)


def set_to(key, value):
    return lambda manifest: manifest.update({key: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_to("format", "other"), "format: expected 'gemmascope-activations', found another file"),
        (set_to("format_version", 2), "format_version: expected 1, found 2"),
        (set_to("more", 1), "expected the manifest as it was written"),
        (set_to("identity", {}), "expected the manifest as it was written"),
        (
            set_to("shards", [{"file": "../x", "tokens": 1, "bytes": 1, "sha256": ""}]),
            "expected the manifest as it was",
        ),
        (set_to("shards", None), "expected the manifest as it was written"),
    ],
    ids=["format", "version", "a key more", "identity", "a file outside", "no shards"],
)
def test_another_manifest(source, folder, change, match):
    """Whose checksum fits."""
    written(source, folder, 1)
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    write_json(folder / "manifest.json", content | {"sha256": seal(content)})
    for action in (ActivationStore.open, lambda folder: written(source, folder)):
        with pytest.raises(BadFileError, match=rf"manifest\.json: {match}"):
            action(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": NaN}', json.dumps({"format": []})])
def test_no_manifest(tmp_path, text):
    with pytest.raises(BadFileError, match=r"manifest\.json: expected a file, found none"):
        ActivationStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadFileError, match=r"manifest\.json: (format: )?expected"):
        ActivationStore.open(tmp_path)


def test_wrong_arguments(source, folder):
    with pytest.raises(TypeError, match="source: expected a Harvester, got NoneType"):
        written(None, folder)
    with pytest.raises(ValueError, match="blocks: expected at least 1, got 0"):
        written(source, folder, 0)
    with pytest.raises(ValueError, match="dtype: expected"):
        written(source, folder, dtype=torch.float16)
    with pytest.raises(TypeError, match="progress: expected a function, got str"):
        written(source, folder, progress="yes")
    assert not folder.exists()
