"""Rows of tokens under faults: full disks, two writers, kills at every point, damage of every byte."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from gemmascope.activations import TokenRows, packing, read_documents
from gemmascope.errors import BadFileError, EnvironmentProblemError
from tests.activations.token_rows import PROSE, document, everything, make


def test_what_a_failure_leaves(tokenizer, tmp_path, corpus, small_shards):
    old = everything(make(read_documents(["*.txt"], base=corpus), tokenizer, tmp_path / "out"))
    (corpus / "9.txt").write_bytes(b"\xff")
    for out in ("out", "new/folder"):
        with pytest.raises(BadFileError, match=r"9.txt: expected UTF-8"):
            make(read_documents(["*.txt"], base=corpus), tokenizer, tmp_path / out)
    assert everything(TokenRows.open(tmp_path / "out")) == old
    assert not any(name.startswith(".tmp") for name in os.listdir(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


def test_reading_that_fails_is_not_taken_for_a_full_disk(tokenizer, tmp_path):
    def documents():
        yield document("abc")
        raise OSError(5, "Input/output error")

    with pytest.raises(EnvironmentProblemError, match=r"^documents: cannot be read: Input/output error$"):
        make(documents(), tokenizer, tmp_path / "out")


def test_a_full_disk(tokenizer, tmp_path, small_shards, monkeypatch):
    def write(path, *parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write", write)
    with pytest.raises(EnvironmentProblemError, match="cannot be written: No space left on device"):
        make([document(PROSE), document("h", held_out=True)], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_writers(tokenizer, tmp_path):
    def documents():
        yield document("abc")
        with pytest.raises(EnvironmentProblemError, match="expected no other process to write there, found one"):
            make([document("d"), document("h", held_out=True)], tokenizer, tmp_path)
        yield document("h", held_out=True)

    assert make(documents(), tokenizer, tmp_path).n_train == 1


KILLS = """
    import os, shutil, signal, sys
    from pathlib import Path
    from gemmascope.activations import TokenRows, packing, tokenise
    from gemmascope.demo.byte_tokenizer import byte_tokenizer
    from gemmascope.errors import BadFileError
    from tests.activations.test_tokens import document, everything, make

    packing.SHARD_BYTES, packing.DOCUMENTS_PER_FILE, packing.BATCH_CHARACTERS = 64, 3, 80
    folder, tokenizer = Path(sys.argv[1]), byte_tokenizer()
    sets = [
        [document(f"{name} {i}", held_out=i == 0, index=i) for i in range(5)] for name in ("old", "new")
    ]
    make(sets[0], tokenizer, folder / "old")
    olds, news = (everything(make(found, tokenizer, folder / f"expected{i}")) for i, found in enumerate(sets))

    def killing(function, left):
        def killed(*arguments, **settings):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)
        return killed

    kills, states = 0, set()
    while True:
        kills += 1
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "old", out)
        child = os.fork()
        if child == 0:
            left = [kills]
            for name in ("replace", "fsync", "unlink", "open"):
                setattr(os, name, killing(getattr(os, name), left))
            make(sets[1], tokenizer, out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            found = everything(TokenRows.open(out))
            assert found in (olds, news)
            states.add("old" if found == olds else "new")
        except BadFileError:
            assert not (out / "manifest.json").exists()
            states.add("none")
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        assert everything(make(sets[1], tokenizer, out)) == news
        assert not [name for name in os.listdir(out) if name.startswith(".tmp")], kills
        assert sorted(os.listdir(out)) == sorted(os.listdir(folder / "expected1"))
    print(kills, sorted(states))
"""


def test_killed_at_every_point(tmp_path):
    """What is left is the old rows, none or the new ones, each whole, and the next run mends it."""
    code, environment = textwrap.dedent(KILLS), os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    kills, states = run.stdout.split(maxsplit=1)
    assert int(kills) > 30
    assert states.strip() == "['new', 'none', 'old']"


# ---- damage


@pytest.fixture
def folder(tokenizer, tmp_path, small_shards):
    documents = [document(f"text number {index}", held_out=index == 3, index=index) for index in range(4)]
    make(documents, tokenizer, tmp_path / "rows")
    return tmp_path / "rows"


def damaged(folder):
    """What is wrong, or None when all that is read is as it was."""
    try:
        return everything(TokenRows.open(folder))
    except BadFileError as error:
        return str(error)


@pytest.mark.parametrize("name", ["manifest.json", "train-00001.safetensors", "documents-00001.jsonl"])
def test_every_flipped_byte_is_found(folder, name):
    path, expected = folder / name, damaged(folder)
    assert not isinstance(expected, str)
    good = path.read_bytes()
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1 << index % 8]) + good[index + 1 :])
        found = damaged(folder)
        assert isinstance(found, str), index
        assert name in found, (index, found)
    path.write_bytes(good)
    assert damaged(folder) == expected


def test_files_that_are_cut_missing_extra_or_exchanged(folder):
    def after(change):
        originals = {path.name: path.read_bytes() for path in folder.iterdir()}
        change()
        found = damaged(folder)
        for path in folder.iterdir():
            path.unlink()
        for name, data in originals.items():
            (folder / name).write_bytes(data)
        return found

    shard, other = folder / "train-00000.safetensors", folder / "train-00001.safetensors"
    size = shard.stat().st_size
    assert after(lambda: os.truncate(shard, 40)) == f"{shard}: expected {size} bytes, found 40"
    assert after(shard.unlink) == f"{shard}: expected a file, found none"
    extra = folder / "train-00099.safetensors"
    assert after(lambda: extra.write_bytes(b"")) == f"{extra}: expected no such file beside this manifest, found one"
    assert after((folder / "manifest.json").unlink) == f"{folder}/manifest.json: expected a file, found none"
    assert not isinstance(after((folder / "note.txt").touch), str)

    def exchange():
        first, second = shard.read_bytes(), other.read_bytes()
        assert len(first) == len(second)
        shard.write_bytes(second), other.write_bytes(first)

    assert after(exchange).startswith(f"{shard}: expected SHA-256 ")


def test_damage_after_the_first_reading(folder):
    rows = TokenRows.open(folder)
    rows.train(torch.tensor([2]))
    path = folder / "train-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFileError, match=r"train-00001.safetensors: expected SHA-256 "):
        rows.train(torch.tensor([2]))
    os.truncate(path, 10)
    with pytest.raises(BadFileError, match=r"train-00001.safetensors: expected \d+ bytes, found 10"):
        rows.documents_of("train", torch.tensor([2]))


def test_a_file_cut_while_it_is_read(folder, monkeypatch):
    rows = TokenRows.open(folder)
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(BadFileError, match=r"train-00000.safetensors: expected 32 bytes at \d+, found 0"):
        rows.train(torch.tensor([0]))


def rewritten(folder, change):
    """Change the manifest and seal it again, as an attacker would."""
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    change(found)
    del found["manifest_sha256"]
    path.write_text(json.dumps(found | {"manifest_sha256": packing.digest(found)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(format_version=2), "format_version: expected 1, found 2"),
        (lambda found: found.update(format="other"), "format: expected 'gemmascope tokens', found another file"),
        (lambda found: found.update(new=1), "found new"),
        (lambda found: found.pop("bos"), "found bos"),
        (lambda found: found.update(context=1), "context: expected at least 2, found 1"),
        (lambda found: found.update(context=True), "context: expected another type, found bool"),
        (lambda found: found.update(context=9), "expected train-00000.safetensors of"),
        (lambda found: found["parts"].pop("train"), "parts: expected train, held_out, found train"),
        (lambda found: found["parts"]["train"][0].update(file="../a.safetensors"), "found '../a.safetensors'"),
        (lambda found: found["parts"]["train"][0].update(rows=1 << 70), "expected train-00000.safetensors of"),
        (lambda found: found["parts"]["train"][0].update(rows=-1), "expected rows and documents, found none"),
        (lambda found: found["documents"][0].update(file="/etc/passwd"), "found '/etc/passwd'"),
        (lambda found: found["documents"].append(3), "documents 2: expected file, bytes, sha256, documents"),
        (lambda found: found["documents"][0].update(documents=4), "documents-00000.jsonl: expected 4 lines, found 3"),
    ],
    ids=range(14),
)
def test_manifests_of_others(folder, change, message):
    rewritten(folder, change)
    assert message in damaged(folder)


def test_a_damaged_folder_is_not_made_again_unasked(tokenizer, tmp_path):
    documents = [document("abc"), document("h", held_out=True)]
    make(documents, tokenizer, tmp_path)
    os.truncate(tmp_path / "train-00000.safetensors", 3)
    with pytest.raises(
        BadFileError, match=rf"expected \d+ bytes, found 3; delete {tmp_path} to have the rows made again"
    ):
        make(documents, tokenizer, tmp_path)
