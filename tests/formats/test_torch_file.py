"""State dicts of `torch.save`, read without unpickling: round trips, damage, hostile pickles and zips."""

import collections
import copy
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmascope.errors import BadFileError
from gemmascope.formats.torch_file import MAX_PICKLE_BYTES, read_torch_file

SETTINGS = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def state(**more) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 4, generator=generator)
    return {
        "encoder.weight": wide,
        "transposed": wide.T.clone(),
        "a view": wide.T,
        "a row": wide[2],
        "half": wide.half(),
        "bfloat": wide.bfloat16(),
        "double": wide.double(),
        "k": torch.tensor(7, dtype=torch.int32),
        "long": torch.arange(3),
        "none": torch.zeros(0, 3),
    } | more


def refusal(path, **arguments) -> str:
    with pytest.raises(BadFileError) as caught:
        read_torch_file(path, **arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def rewrite(path, change=None, *, compression=zipfile.ZIP_STORED, **members) -> None:
    """The zip again with some members changed: bytes, or None to leave one out. Folders before the name are kept."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    for key, content in members.items():
        name = next(name for name in contents if name.endswith(f"/{key.replace('__', '/')}") or key == name)
        contents[name] = content
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(change(name) if change else name, content)


def with_pickle(path, program: bytes) -> str:
    torch.save(state(), path)
    rewrite(path, **{"data.pkl": program})
    return refusal(path)


# ---- what torch.save writes


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("protocol", [2, 4])
def test_round_trip(tmp_path, kind, protocol):
    torch.save(kind(state()), tmp_path / "a.pt", pickle_protocol=protocol)
    headers = {}
    found = read_torch_file(tmp_path / "a.pt", headers.update)
    assert found.keys() == state().keys()
    for key, expected in state().items():
        assert (found[key].dtype, found[key].stride()) == (expected.dtype, expected.stride()), key
        assert (headers[key].dtype, headers[key].shape) == (expected.dtype, tuple(expected.shape)), key
        assert torch.equal(found[key], expected), key


def test_state_dict_of_a_module(tmp_path):
    module = torch.nn.Linear(3, 5)
    torch.save(module.state_dict(), tmp_path / "a.pt")
    found = read_torch_file(tmp_path / "a.pt")
    assert torch.equal(found["weight"], module.weight)
    torch.save(dict(module.named_parameters()), tmp_path / "b.pt")
    assert torch.equal(read_torch_file(tmp_path / "b.pt")["weight"], module.weight)
    with open(tmp_path / "a.pt", "rb") as file:
        assert torch.equal(read_torch_file(tmp_path / "a.pt", file=file)["bias"], module.bias)


def test_shared_storage_is_read_once(tmp_path):
    whole = torch.randn(40, 50)
    torch.save({"a": whole, "b": whole[1:]}, tmp_path / "a.pt")
    found = read_torch_file(tmp_path / "a.pt")
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_the_check_comes_before_the_data(tmp_path):
    torch.save(state(), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.find(state()["encoder.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "a.pt").write_bytes(data)

    def check(headers):
        raise BadFileError(f"{tmp_path}/a.pt: the check")

    assert refusal(tmp_path / "a.pt", check=check) == "the check"
    assert refusal(tmp_path / "a.pt").startswith('expected a torch.save file, found damage: "Bad CRC-32')


# ---- hostile pickles


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (Evil(os.system, "touch /tmp/never"), "the object 'posix.system'"),
        ({"a": Evil(exec, "1/0")}, "the object '__builtin__.exec'"),
        (Evil(getattr, Evil, "x"), "the object '__builtin__.getattr'"),
        (Evil(bytearray, 1 << 40), "the object '__builtin__.bytearray'"),
        (torch.nn.Linear(1, 1), "the object 'torch.nn.modules.linear.Linear'"),
        ([1, 2], "the instruction EMPTY_LIST"),
        (torch.zeros(2), "a tensor"),
        ("a", "a str"),
        (None, "a NoneType"),
        ({"a": 1}, "a int as a"),
        ({"a": {"b": torch.zeros(1)}}, "a dict as a"),
        ({"a": 1.5}, "the instruction BINFLOAT"),
        ({1: torch.zeros(1)}, "damage of its pickle"),
        ({"a\n": None}, "a NoneType as 'a\\n'"),
        (torch.zeros(2, dtype=torch.bool), "the object 'torch.BoolStorage'"),
        ({"a": torch.zeros(2).to_sparse()}, "the object 'torch._utils._rebuild_sparse_tensor'"),
        ({str(i): torch.zeros(1) for i in range(65)}, "65 entries, over 64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_anything_but_tensors(tmp_path, value, found):
    torch.save(value, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt") == f"expected a dict of tensors and nothing else, found {found}"
    assert not os.path.exists("/tmp/never")


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + value.to_bytes(8, "little")


def sizes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def tensor(numel: int, shape: tuple, stride: tuple, offset: int = 0, key: bytes = b"0") -> bytes:
    """A pickle of {"a": a tensor} with sizes of one's own."""
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu") + number(numel) + b"tQ"
    call = storage + number(offset) + sizes(shape) + sizes(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"tRs."


def test_the_writer_of_hostile_tensors_is_right(tmp_path):
    torch.save(state(), tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", **{"data.pkl": tensor(24, (4, 6), (1, 4))})
    assert torch.equal(read_torch_file(tmp_path / "a.pt")["a"], state()["encoder.weight"].reshape(6, 4).T)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor(24, (25,), (1,)), "found a tensor of shape [25] in a storage of 24 numbers"),
        (tensor(24, (1 << 40,), (0,)), "found a tensor of shape [1099511627776] in a storage of 24 numbers"),
        (tensor(24, (6, 4), (4, 1), 1), "found a tensor of shape [6, 4] in a storage of 24 numbers"),
        (tensor(24, (6,), (5,)), "found a tensor of shape [6] in a storage of 24 numbers"),
        (tensor(24, (3,), (-1,), 5), "found damage of its pickle"),
        (tensor(24, (-3,), (1,)), "found damage of its pickle"),
        (tensor(24, (3,), (1,), -1), "found damage of its pickle"),
        (tensor(24, (3, 1), (1,)), "found damage of its pickle"),
        (tensor(24, (1,) * 9, (1,) * 9), "found damage of its pickle"),
        (tensor(1 << 60, (3,), (1,)), "found damage of its pickle"),
    ],
)
def test_tensors_beyond_their_storage(tmp_path, program, message):
    expected = "expected a dict of tensors and nothing else, "
    assert with_pickle(tmp_path / "a.pt", program) == expected + message


def test_storages_that_are_not_there(tmp_path):
    path = tmp_path / "a.pt"
    assert with_pickle(path, tensor(24, (3,), (1,), key=b"../x")) == (
        "expected the data '../x' that its pickle names, found none"
    )
    assert with_pickle(path, tensor(1 << 40, (1 << 40,), (1,))) == (
        f"data/0: expected {1 << 42} bytes for {1 << 40} numbers, found 96"
    )


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80\x02",
        b".",
        b"}",
        b"}}s.",
        b"(.",
        b"t.",
        b"0.",
        b"}(K\x01u.",
        b"}X\x01\x00\x00\x00ah\x07s.",
        b"}K\x01b.",
        b"K\x01K\x02R.",
        b"K\x01Q.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s." + b"\xff",
        b"I" + b"9" * 5000 + b"\n.",
        b"((((((((((" * 5000 + b".",
        b"c" + b"x" * 100,
    ],
)
def test_programs_that_make_no_sense(tmp_path, program):
    assert with_pickle(tmp_path / "a.pt", program).startswith("expected a dict of tensors and nothing else, found ")


def test_nested_tuples_without_end_cost_nothing(tmp_path):
    """2²⁰⁰ parts if anybody looked at them all."""
    program = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"}X\x01\x00\x00\x00ah\x00s."
    expected = "expected a dict of tensors and nothing else, found a tuple as a"
    assert with_pickle(tmp_path / "a.pt", program) == expected


def test_a_long_program(tmp_path):
    message = with_pickle(tmp_path / "a.pt", b"\x80\x02" + b"N" * MAX_PICKLE_BYTES + b".")
    assert message == f"data.pkl: expected at most {MAX_PICKLE_BYTES} bytes, found {MAX_PICKLE_BYTES + 3}"


def test_a_key_twice(tmp_path):
    one = tensor(24, (3,), (1,))
    program = one[:-1] + one[3:-1] + b"."  # the same pair again into the same dict
    assert with_pickle(tmp_path / "a.pt", program).endswith("found the key a twice")


# ---- hostile zips


def test_what_is_no_zip(tmp_path):
    path = tmp_path / "a.pt"
    for content in (b"", b"PK", pickle.dumps({"a": 1}), b"<html>", os.urandom(100)):
        path.write_bytes(content)
        assert refusal(path) == "expected a torch.save file, found damage: 'File is not a zip file'"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    assert refusal(path) == "expected a torch.save file, found damage: 'File is not a zip file'"
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert refusal(path).startswith("expected a torch.save file, found damage: ")


def test_compressed_members(tmp_path):
    """What unpacks to more than its size is not even looked at: torch.save compresses nothing."""
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 1 << 16
    assert refusal(tmp_path / "a.pt").endswith("expected stored data, found another method")


def test_members_that_overlap(tmp_path):
    """Five names for the same bytes, which would be five times as many in memory."""
    torch.save({"a": torch.zeros(1 << 10)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        [info] = [info for info in archive.filelist if info.filename.endswith("data/0")]
        for at in range(1, 5):
            again = copy.copy(info)
            again.filename = again.orig_filename = info.filename.replace("data/0", f"data/{at}")
            archive.filelist.append(again)
        archive._didModify = True
    assert "that of the file, found" in refusal(tmp_path / "a.pt")


def test_members_missing_or_elsewhere(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(state(), path)
    rewrite(path, **{"data.pkl": None})
    assert refusal(path) == "expected the members of torch.save, found no data.pkl"
    torch.save(state(), path)
    rewrite(path, lambda name: name.replace("/data/0", "/../data/0"))
    assert refusal(path) == "expected the data '0' that its pickle names, found none"
    torch.save(state(), path)
    rewrite(path, lambda name: "b/version" if name.endswith("/version") else name)
    assert refusal(path).endswith("expected members of one folder, each once")
    torch.save(state(), path)
    rewrite(path, byteorder=b"big")
    assert refusal(path) == "byteorder: expected 'little', found b'big'"
    torch.save({str(at): torch.zeros(1) for at in range(100)}, path)
    assert refusal(path).startswith("expected at most 80 members, found ")


@SETTINGS
@given(data=st.data())
def test_any_flipped_byte_is_refused_or_changes_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a.pt"
    torch.save(state(), path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_torch_file(path)
    except BadFileError:
        return
    for key, expected in state().items():
        assert torch.equal(found[key], expected)
