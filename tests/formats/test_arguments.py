"""Arguments of the wrong kind: a ValueError, a TypeError or an error of ours that names the argument or the file."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemmascope import JumpReLUSAE
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats import arrays, files, release
from gemmascope.formats.manifest import SAEConfig
from tests.formats.test_release import make_sae

OURS = (ValueError, TypeError, BadFileError, EnvironmentProblemError)


class BytesPath(os.PathLike):
    def __fspath__(self):
        return b"a"


NO_PATHS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=3), st.lists(st.text(), max_size=2),
    st.builds(object), st.builds(BytesPath), st.just(torch.ones(2)),
)  # fmt: skip
# Such as no file here has: nothing is written to where they point.
ODD_PATHS = st.sampled_from(["a\0b", "\ud800", "nul\0.npz", "\udfff.safetensors", "x" * 5000, "a/" * 3000 + "b.npz"])
ANYTHING = NO_PATHS | st.text(max_size=3) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
SETTINGS = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def complaint(call, *arguments, **named) -> str:
    with pytest.raises(OURS) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.isprintable()
    return message


def write_something(path):
    with files.atomic_write(path) as temporary:
        temporary.write_text("")


PATH_CALLS = {
    "load": JumpReLUSAE.load,
    "save": lambda path: make_sae().save(path),
    "atomic_write": write_something,
    "write_json": lambda path: files.write_json(path, 1),
    "read_json": files.read_json,
    "open_file": files.open_file,
    "sha256": files.sha256,
    "read_npz": arrays.read_npz,
    "read_safetensors": arrays.read_safetensors,
    "from_pretrained": lambda path: JumpReLUSAE.from_pretrained("google/x", path),
}


@pytest.mark.parametrize("name", PATH_CALLS)
@SETTINGS
@given(path=NO_PATHS)
@example(path=0)
def test_what_is_no_path(name, path):
    assert complaint(PATH_CALLS[name], path) == f"path: expected a str or an os.PathLike, got {type(path).__name__}"


@pytest.mark.parametrize("name", [name for name in PATH_CALLS if name != "from_pretrained"])
@SETTINGS
@given(path=ODD_PATHS)
def test_paths_that_no_file_has(name, path):
    assert files.shown(Path(path)).strip("'") in complaint(PATH_CALLS[name], path)


@SETTINGS
@given(folder=NO_PATHS)
def test_no_folder(folder):
    assert complaint(files.remove_stale_temporaries, folder).startswith(
        "folder: expected a str or an os.PathLike, got "
    )


@SETTINGS
@given(repo=NO_PATHS)
def test_no_repository(repo):
    assert complaint(JumpReLUSAE.from_pretrained, repo, "a").startswith("repo: expected a str or an os.PathLike, got ")


@SETTINGS
@given(revision=NO_PATHS.filter(lambda value: value is not None))
def test_no_revision(revision):
    message = complaint(JumpReLUSAE.from_pretrained, "google/x", "a", revision=revision)
    assert message == f"revision: expected a str, got {type(revision).__name__}"


@SETTINGS
@given(data=st.data())
def test_gemma_scope_path(data):
    names = ("layer", "width", "average_l0")
    arguments = {"layer": 1, "width": 16384, "average_l0": 71.0}
    name = data.draw(st.sampled_from(names))
    arguments[name] = data.draw(ANYTHING.filter(lambda value: not isinstance(value, int | float)) | st.just(-1))
    assert complaint(release.gemma_scope_path, **arguments).startswith(f"{name}: expected ")


@SETTINGS
@given(tensors=ANYTHING, config=ANYTHING)
def test_write(tmp_path, tensors, config):
    stored = {key: getattr(make_sae(), key).detach() for key in release.KEYS}
    assert complaint(release.write, tmp_path / "a", tensors, SAEConfig()).startswith(
        ("tensors", "sae: expected the keys")
    )
    assert complaint(release.write, tmp_path / "a", stored, config).startswith("config: expected a SAEConfig, got ")
    assert complaint(release.write, tmp_path / "a", stored | {"b_enc": tensors}, SAEConfig()).startswith(
        ("tensors['b_enc']: expected a Tensor, got", "sae: b_enc: expected shape")
    ) or isinstance(tensors, torch.Tensor)
    assert os.listdir(tmp_path) == []


@SETTINGS
@given(data=NO_PATHS.filter(lambda value: not isinstance(value, bytes)))
def test_parse_json(data):
    assert complaint(files.parse_json, data, "a") == f"data: expected a bytes, got {type(data).__name__}"


@SETTINGS
@given(max_bytes=ANYTHING.filter(lambda value: type(value) is not int) | st.integers(max_value=-1))
def test_read_json_max_bytes(tmp_path, max_bytes):
    files.write_json(tmp_path / "a.json", 1)
    assert complaint(files.read_json, tmp_path / "a.json", max_bytes).startswith("max_bytes: expected ")


def test_json_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    for value, problem in (
        (10**40, "a number of 41 digits"),
        ([[[]]] * 2 + [None], None),
        ({1: 2, "1": 3}, "the key '1' twice"),
    ):
        if problem is None:
            files.write_json(tmp_path / "a.json", value)
        else:
            assert complaint(files.write_json, tmp_path / "a.json", value).endswith(f"expected JSON, found {problem}")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    message = complaint(files.write_json, tmp_path / "a.json", "x" * 100)
    assert message == f"{tmp_path}/a.json: expected at most 100 bytes of JSON, got 103"
    assert files.read_json(tmp_path / "a.json") == [[[]], [[]], None]
