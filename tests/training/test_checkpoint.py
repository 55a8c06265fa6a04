"""Checkpoints: what is saved comes back, in the background, one at a time, and the newest two that verify stay."""

import hashlib
import json
import math
import os
import threading
import weakref

import pytest
import safetensors.torch
import torch

from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.training import checkpoint as module
from gemmascope.training.checkpoint import Checkpoints, differences

IDENTITY = {"model": {"name": "gemma", "revision": "abc"}, "sites": ["layer_0/residual", "layer_1/residual"]}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def checkpoints_in(folder, **options) -> Checkpoints:
    return Checkpoints(folder, **({"identity": IDENTITY} | options))


def parts_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Different bytes for each step, in two parts."""
    W = torch.arange(12.0, dtype=torch.float32).view(3, 4) + step
    return {"sae": {"W_enc": W, "step": torch.tensor(step)}, "suite/other": {"turn": torch.tensor([step, 2])}}


def save(checkpoints: Checkpoints, *steps: int, wait: bool = True) -> None:
    for step in steps:
        checkpoints.save(step, parts_of(step), {"tokens": step * 10}, wait=wait)


def bytes_in(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes_in(found[name]) == bytes_in(tensor), name


def assert_is(checkpoint, step: int) -> None:
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts, checkpoint.identity) == (step, {"tokens": step * 10}, IDENTITY)
    assert checkpoint.files.keys() == parts_of(step).keys()
    for name, tensors in parts_of(step).items():
        assert_same(checkpoint.part(name), tensors)


def names_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


def steps_in(folder) -> list[int]:
    """Raises for any other name."""
    return [int(name.removeprefix("step-")) for name in names_in(folder)]


class Gate:
    """Holds writers back at their first write until `open` is set."""

    def __init__(self, monkeypatch):
        self.open, self.reached, self.write = threading.Event(), threading.Event(), os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor, data):
        self.reached.set()
        assert self.open.wait(60)
        return self.write(descriptor, data)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


# ---- what is saved comes back


def kinds(device) -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32, device=device).view(4, 6)
    tensors = {
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "expanded": base[:1].expand(3, 6),
        "shared": base,
        "shared too": base.view(-1)[3:],
        "scalar": torch.tensor(3.5, dtype=torch.float64, device=device),
        "empty": torch.empty(0, 5, dtype=torch.float32, device=device),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float32, device=device)),
        "nan": torch.tensor([math.nan, -math.inf, -0.0], dtype=torch.float32, device=device),
        "küche/ 1": torch.ones(1, dtype=torch.float32, device=device),
    }
    for dtype in module.STORED_DTYPES.values():
        tensors[str(dtype)] = torch.tensor([1, 0, 1], dtype=torch.uint8, device=device).to(dtype)
    return tensors


def test_every_kind_of_tensor(tmp_path, device, monkeypatch):
    monkeypatch.setattr(module, "PINNED_BYTES", 16)
    checkpoints = checkpoints_in(tmp_path)
    parts = {"all": kinds(device), "none": {}, "a/b c": {"x": torch.zeros(1, dtype=torch.int64, device=device)}}
    checkpoints.save(7, parts, {"cursor": (3, 17), "nothing": None, "text": "ü"}, wait=True)
    found = checkpoints_in(tmp_path).latest()
    assert found.facts == {"cursor": [3, 17], "nothing": None, "text": "ü"}
    assert found.files.keys() == parts.keys()
    for name, tensors in parts.items():
        assert_same(found.part(name), {key: tensor.detach().cpu() for key, tensor in tensors.items()})
    shared = found.part("all")
    shared["shared"].zero_()
    assert shared["shared too"][0] == 3


def test_the_files_are_ordinary_safetensors(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, {"a": kinds("cpu")}, {}, wait=True)
    record = checkpoints.latest().files["a"]
    path = tmp_path / "step-000000001" / record["file"]
    assert_same(safetensors.torch.load_file(path), kinds("cpu"))
    assert path.stat().st_size == record["bytes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    manifest = json.loads((tmp_path / "step-000000001" / "manifest.json").read_text())
    assert manifest.keys() == {"schema", "step", "identity", "facts", "parts", "sha256"}


def test_many_tensors_and_many_parts(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    parts = {f"{part}.": {str(name): torch.tensor(name) for name in range(100)} for part in range(70)}
    checkpoints.save(1, parts, {}, wait=True)
    found = checkpoints.latest()
    assert_same(found.part("69."), parts["69."])
    assert len({record["file"] for record in found.files.values()}) == 70


def test_bytes(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, {"a": kinds("cpu"), "b": {}}, {}, wait=True)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert Checkpoints.bytes_of({"a": kinds("cpu"), "b": {}}) == size
    planned = {"a": {"W": torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16, device="meta")}}
    assert 0 < Checkpoints.bytes_of(planned) - 2 * 2**40 < 200


def test_nothing_there(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints_in(folder).latest() is None
    assert names_in(folder) == []


def test_identity_is_that_of_the_run_that_wrote_it(tmp_path):
    save(checkpoints_in(tmp_path), 1)
    mine = IDENTITY | {"model": {"name": "gemma", "revision": "def"}}
    found = checkpoints_in(tmp_path, identity=mine).latest()
    assert differences(found.identity, mine, "the checkpoint", "this run") == [
        "model.revision: the checkpoint has 'abc', this run 'def'"
    ]


def test_identity_and_facts_are_copied(tmp_path, gate):
    identity, facts = {"a": [1]}, {"b": [2]}
    checkpoints = checkpoints_in(tmp_path, identity=identity)
    checkpoints.save(1, {}, facts)
    identity["a"].append(3)
    facts["b"].append(4)
    gate.open.set()
    found = checkpoints.latest()
    assert (found.identity, found.facts) == ({"a": [1]}, {"b": [2]})


def test_an_unknown_part(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(ValueError, match=r"name: expected one of the parts \['sae', 'suite/other'\], got 'x'"):
        checkpoints.latest().part("x")


# ---- in the background, one at a time


def test_what_changes_after_the_call_is_not_saved(tmp_path, gate, device):
    checkpoints = checkpoints_in(tmp_path)
    parts = {part: {name: t.to(device) for name, t in tensors.items()} for part, tensors in parts_of(1).items()}
    checkpoints.save(1, parts, {"tokens": 10})
    assert gate.reached.wait(60)
    for tensors in parts.values():
        for tensor in tensors.values():
            tensor.fill_(9)
    gate.open.set()
    assert_is(checkpoints.latest(), 1)


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1, wait=False)
    assert gate.reached.wait(60)
    checkpoints.poll()  # does not wait
    assert not any(name.startswith("step") for name in names_in(tmp_path))
    blocked = checkpoints.seconds
    timer = threading.Timer(0.05, gate.open.set)
    timer.start()
    save(checkpoints, 2, wait=False)
    assert "step-000000001" in names_in(tmp_path)
    assert checkpoints.seconds > blocked > 0
    checkpoints.close()
    timer.join()
    assert steps_in(tmp_path) == [1, 2]
    checkpoints.close()


def test_the_end_of_a_with_waits(tmp_path):
    with checkpoints_in(tmp_path) as checkpoints:
        save(checkpoints, 1, wait=False)
    assert steps_in(tmp_path) == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_the_same_step_again_is_left_as_it_is(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1)
    before = (tmp_path / "step-000000001").stat()
    for again in (checkpoints, checkpoints_in(tmp_path)):
        again.save(1, {"other": {}}, {}, wait=True)
        assert os.path.samestat((tmp_path / "step-000000001").stat(), before)
        assert_is(again.latest(), 1)


def test_the_same_step_damaged_is_saved_anew(tmp_path):
    save(checkpoints_in(tmp_path), 1)
    (tmp_path / "step-000000001" / "manifest.json").unlink()
    checkpoints = checkpoints_in(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"manifest.json: expected a file, found none; .* is kept as .bad-step-"):
        save(checkpoints, 1)
    assert_is(checkpoints.latest(), 1)
    assert len(names_in(tmp_path)) == 2


def test_the_same_step_of_another_run(tmp_path):
    save(checkpoints_in(tmp_path), 1)
    other = checkpoints_in(tmp_path, identity=IDENTITY | {"sites": []})
    with pytest.raises(
        EnvironmentProblemError, match=r"step-000000001: expected no checkpoint of another run, found .*: sites"
    ):
        save(other, 1)
    assert other.latest().identity == IDENTITY
    save(other, 1)  # which this run went on from, after all
    assert steps_in(tmp_path) == [1]


def test_a_step_before_one_that_is_there(tmp_path):
    save(checkpoints_in(tmp_path), 5)
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(
        EnvironmentProblemError, match="expected no checkpoint after step 4, found step 5; go on from it"
    ):
        save(checkpoints, 4)
    checkpoints.clear()
    save(checkpoints, 4)
    assert steps_in(tmp_path) == [4]


def test_copies_are_freed_as_they_are_written(tmp_path, monkeypatch):
    alive, copied, write = [], module._copied, os.write
    copies = []

    def copied_and_watched(tensor):
        found = copied(tensor)
        copies.extend(map(weakref.ref, found))
        return found

    def write_and_count(descriptor, data):
        alive.append(sum(copy() is not None for copy in copies))
        return write(descriptor, data)

    monkeypatch.setattr(module, "_copied", copied_and_watched)
    monkeypatch.setattr(os, "write", write_and_count)
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, {"a": {name: torch.ones(9, dtype=torch.float32) for name in "xyz"}}, {}, wait=True)
    assert alive[0] == 3
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] == 0


def test_all_is_flushed_before_it_is_named(tmp_path, monkeypatch):
    """Files, then their folder, then the name, then the folder of the names."""
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    checkpoints, done, rename = checkpoints_in(tmp_path), [], os.rename

    def watched(source, target):
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "rename", watched)
    save(checkpoints, 1)
    assert [os.path.basename(path) for path in done] == [
        "0000-sae.safetensors",
        "0001-suite_other.safetensors",
        "manifest.json",
        "step-000000001",
        "rename",
        tmp_path.name,
    ]


def test_memory_does_not_grow(tmp_path):
    """50 saves of 4 MiB take no more than the first ones, and nothing is held once a save is done."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    checkpoints = checkpoints_in(tmp_path)
    parts = {"a": {"W": torch.ones(1 << 20, dtype=torch.float32), "b": torch.ones(1 << 10, dtype=torch.float32)}}
    for step in range(50):
        checkpoints.save(step, parts, {})
        if step == 5:
            checkpoints.close()
            before = resident()
    checkpoints.close()
    assert resident() - before < 32 << 20  # the 44 saves between are 176 MiB


# ---- retention


@pytest.mark.parametrize("keep", [2, 3])
def test_how_many_stay(tmp_path, keep):
    checkpoints = checkpoints_in(tmp_path, keep=keep)
    for step in range(1, 7):
        save(checkpoints, step)
        assert steps_in(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


def test_one_that_is_damaged_does_not_count(tmp_path):
    save(checkpoints_in(tmp_path, keep=4), 1, 2, 3)
    (tmp_path / "step-000000003" / "manifest.json").write_bytes(b"")
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 4, wait=False)
    with pytest.warns(RuntimeWarning, match=r"step-000000003/manifest.json: expected a manifest .*, found damage; "):
        checkpoints.close()
    bad, *rest = names_in(tmp_path)
    assert bad.startswith(".bad-step-000000003-")
    assert rest == ["step-000000002", "step-000000004"]


def test_old_ones_are_not_read_when_enough_are_known(tmp_path, monkeypatch):
    save(checkpoints_in(tmp_path), 1, 2)
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.latest().step == 2
    monkeypatch.setattr(module, "_verify", None)
    save(checkpoints, 3, 4)
    assert steps_in(tmp_path) == [3, 4]


def test_newest_is_by_step_not_by_time(tmp_path):
    checkpoints = checkpoints_in(tmp_path, keep=3)
    save(checkpoints, 9, 10, 1_234_567_890)
    for age, name in enumerate(names_in(tmp_path)):
        os.utime(tmp_path / name, (2e9 - age * 1e6,) * 2)
    assert checkpoints_in(tmp_path).latest().step == 1_234_567_890
    save(checkpoints, 1_234_567_891)
    assert steps_in(tmp_path) == [10, 1_234_567_890, 1_234_567_891]


def test_what_is_not_ours_is_left_alone(tmp_path):
    names = ["notes.txt", "step-1", "step-000000009.old", "step-0000000001", ".tmp-mine", ".del-notes", ".bad-mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.latest() is None
    save(checkpoints, 1, 2, 3)
    assert set(names_in(tmp_path)) == {*names, "step-000000002", "step-000000003"}
    checkpoints.clear()
    assert names_in(tmp_path) == sorted(names)
    assert all((tmp_path / name / "file").exists() for name in names)


def test_what_was_left_half_done_is_removed_at_the_start(tmp_path):
    for name in (".tmp-0123456789abcdef", ".del-step-000000001-0123456789abcdef"):
        (tmp_path / name / "step-000000001").mkdir(parents=True)
        (tmp_path / name / "step-000000001" / "manifest.json").touch()
    (tmp_path / ".tmp-0123456789abcdef" / ".tmp-lock").touch()
    checkpoints_in(tmp_path)
    assert names_in(tmp_path) == []


def test_clear_forgets_damage_too(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1, 2)
    (tmp_path / "step-000000002" / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match="found none"):
        assert checkpoints.latest().step == 1
    checkpoints.clear()
    assert names_in(tmp_path) == []
    assert checkpoints.latest() is None
    save(checkpoints, 1)
    assert_is(checkpoints.latest(), 1)


# ---- wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 1}, ValueError, "keep: expected at least 2, got 1"),
        ({"keep": 2.0}, TypeError, "keep: expected an int"),
        ({"identity": None}, TypeError, "identity: expected a Mapping, got NoneType"),
        ({"identity": {"a": math.nan}}, ValueError, "identity: expected values that JSON can hold"),
        ({"identity": {"a": {1: 2}}}, TypeError, "identity: key 1: expected a str, got int"),
        ({"folder": 3}, TypeError, "folder: expected a str or an os.PathLike, got int"),
        ({"folder": "a\0b"}, ValueError, "path: expected a path"),
    ],
    ids=str,
)
def test_wrong_settings(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        checkpoints_in(**({"folder": tmp_path} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": -1}, ValueError, "step: expected at least 0, got -1"),
        ({"step": True}, TypeError, "step: expected an int"),
        ({"step": 10**16}, ValueError, "step: expected at most"),
        ({"wait": 1}, TypeError, "wait: expected a bool"),
        ({"facts": [1]}, TypeError, "facts: expected a Mapping"),
        ({"facts": {"loss": math.inf}}, ValueError, "facts: expected values that JSON can hold"),
        ({"facts": {"t": torch.ones(1)}}, TypeError, "facts: expected values that JSON can hold"),
        ({"facts": {"a": [{2: 1}]}}, TypeError, "facts: key 2: expected a str"),
        ({"facts": {"a": "x" * (16 << 20)}}, ValueError, "facts: expected a manifest of at most"),
        ({"parts": [1]}, TypeError, "parts: expected a Mapping"),
        ({"parts": {1: {}}}, TypeError, "parts: name: expected a str"),
        ({"parts": {"a": torch.ones(1)}}, TypeError, "parts: a: expected a Mapping, got Tensor"),
        ({"parts": {"a": {"x": 1}}}, TypeError, "parts: a/x: expected a Tensor, got int"),
        ({"parts": {"a": {1: torch.ones(1)}}}, TypeError, "parts: a/1: name: expected a str"),
        ({"parts": {"a": {"__metadata__": torch.ones(1)}}}, ValueError, "parts: a/__metadata__: expected another name"),
        ({"parts": {"a": {"x": torch.ones(1, dtype=torch.complex64)}}}, TypeError, "a/x: .* got complex64"),
        ({"parts": {"a": {"x": torch.ones(2, 2).to_sparse()}}}, TypeError, "a/x: expected a dense tensor"),
        ({"parts": {"a": {"x": torch.ones([1] * 9)}}}, ValueError, "a/x: expected at most 8 dimensions, got 9"),
        ({"parts": {"a": {"x" * (1 << 20): torch.ones(1)}}}, ValueError, "parts: a: expected fewer tensors"),
        ({"parts": {"a": {"x": torch.ones(1, device="meta")}}}, EnvironmentProblemError, "cannot be copied to host"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_saved(tmp_path, options, error, message):
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(error, match=message):
        checkpoints.save(**({"step": 1, "parts": {}, "facts": {}, "wait": True} | options))
    assert names_in(tmp_path) == []
    save(checkpoints, 1)
    assert_is(checkpoints.latest(), 1)


def test_a_checkpoint_that_a_newer_version_wrote(tmp_path):
    """Refused, not taken for damage, and not counted or removed either."""
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 1, 2)
    path = tmp_path / "step-000000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_bytes(module._sealed(manifest | {"schema": 2, "more": 1}))
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(BadFileError, match=r"manifest.json: expected schema 1, found 2: a newer version .*; update"):
        checkpoints.latest()
    save(checkpoints, 3)
    assert steps_in(tmp_path) == [1, 2, 3]
