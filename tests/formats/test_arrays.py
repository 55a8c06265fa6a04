"""Reading .npz and .safetensors: what is documented comes out exactly; damage and hostility are refused cheaply."""

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from gemmascope.errors import BadFileError
from gemmascope.formats import arrays
from gemmascope.formats.arrays import MAX_HEADER_BYTES, MAX_INFLATION, STORED_DTYPES, read_npz, read_safetensors


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(text: str, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", size) + text.encode("latin-1")


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        for name, data in members:
            archive.writestr(name, data)
    return path


def write_safetensors(path, header: dict | bytes, payload: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refusal(read, path) -> str:
    """The message of the BadFileError, which has one line, begins with the path and comes at once."""
    start = time.perf_counter()
    with pytest.raises(BadFileError) as caught:
        read(path)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


# ---- .npz that is in order


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (5, 0), (2, 3, 4)])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_values_are_exact(tmp_path, dtype, shape, compressed):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    arrays = {"c": array, "f": np.array(array, order="F")}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
    read = read_npz(tmp_path / "a.npz")
    assert read.keys() == arrays.keys()
    for tensor in read.values():
        assert tensor.dtype == torch.from_numpy(array.astype(dtype.replace(">", "<"))).dtype
        assert tensor.shape == shape
        assert tensor.numpy().tobytes() == array.astype(dtype.replace(">", "<")).tobytes()


def test_npz_larger_than_a_chunk(tmp_path):
    array = np.random.default_rng(0).standard_normal((700, 1001)).astype("<f4")
    np.savez_compressed(tmp_path / "a.npz", a=array)
    assert np.array_equal(read_npz(tmp_path / "a.npz")["a"].numpy(), array)


def test_check_sees_the_headers_and_stops_the_reading(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros((2, 3), "<f4"))
    safetensors.torch.save_file({"a": torch.zeros(2, 3)}, tmp_path / "a.safetensors")

    def check(headers):
        assert headers == {"a": (torch.float32, (2, 3))}
        raise BadFileError("no")

    for read, name in ((read_npz, "a.npz"), (read_safetensors, "a.safetensors")):
        with pytest.raises(BadFileError, match="no"):
            read(tmp_path / name, check)


# ---- .npz that is not

GOOD = npy(np.ones(4, "<f4"))
PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }\n"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.npy", GOOD), ("a.npy", GOOD)], "a: expected one array of that name, found two"),
        ([("a.npy", GOOD), ("readme.txt", b"")], "expected members ending in .npy, found 'readme.txt'"),
        ([(f"a{i}.npy", GOOD) for i in range(65)], "expected at most 64 arrays, found 65"),
        ([("a.npy", b"MZ" + bytes(30))], "a: expected a .npy array, found b'MZ\\x00\\x00\\x00\\x00\\x00\\x00'"),
        ([("a.npy", b"\x93NUMPY")], "a: expected a .npy array, found b'\\x93NUMPY'"),
        ([("a.npy", GOOD[:6] + b"\x09" + GOOD[7:])], "a: expected a .npy array, found b'\\x93NUMPY\\t\\x00'"),
        ([("a.npy", npy(np.ones(4, "<i8")))], "a: expected float16, float32 or float64, found dtype '<i8'"),
        ([("a.npy", npy(np.ones(4, "<c8")))], "a: expected float16, float32 or float64, found dtype '<c8'"),
        ([("a.npy", npy(np.ones(4, bool)))], "a: expected float16, float32 or float64, found dtype '|b1'"),
        ([("a.npy", GOOD + b"\x00")], "a: expected 16 bytes of data for shape [4], found 17"),
        ([("a.npy", GOOD[:-1])], "a: expected 16 bytes of data for shape [4], found 15"),
        (
            [("a.npy", npy_header(PLAIN % (2**40,)))],
            "a: expected 4398046511104 bytes of data for shape [1099511627776], found 0",
        ),
        (
            [("a.npy", npy_header(PLAIN % ("1," * 9) + " " * 40) + bytes(4))],
            "a: expected at most 8 dimensions, found 9",
        ),
        (
            [("a.npy", npy_header("x", b"\x02\x00", 2**32 - 1))],
            "a: expected a header of 16 to 4096 bytes, found 4294967295",
        ),
        ([("a.npy", npy_header("x" * 9, length=1))], "a: expected a header of 16 to 4096 bytes, found 1"),
        (
            [("../../evil.npy", npy_header("__import__('os').getcwd()" + " " * 40))],
            "'../../evil': expected the header of a plain array, found \"__import__('os').getcwd()" + " " * 35 + '"',
        ),
    ],
)
def test_npz_refuses(tmp_path, members, message):
    assert refusal(read_npz, write_zip(tmp_path / "a.npz", members)) == message


@pytest.mark.parametrize("shape", ["-1,", "4L,", "4.0,", "4 if 1 else 5,", "1" * 16 + ",", "(4,),", "4,,"])
def test_npz_refuses_odd_shapes(tmp_path, shape):
    path = write_zip(tmp_path / "a.npz", [("a.npy", npy_header(PLAIN % shape) + bytes(16))])
    assert refusal(read_npz, path).startswith("a: expected the header of a plain array, found ")


def test_npz_never_unpickles(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([Bomb()], dtype=object))
    assert refusal(read_npz, path) == "a: expected float16, float32 or float64, found pickled objects"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_npz_refuses_structured_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3, [("x", "<f4"), ("y", "<f4")]))
    assert refusal(read_npz, tmp_path / "a.npz").startswith("a: expected the header of a plain array, found ")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_refuses_other_compressions(tmp_path, compression):
    path = write_zip(tmp_path / "a.npz", [("a.npy", GOOD)], compression)
    assert refusal(read_npz, path) == "a: expected stored or deflated data, found another method"


def test_npz_refuses_encryption(tmp_path):
    path = write_zip(tmp_path / "a.npz", [("a.npy", GOOD)])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert refusal(read_npz, path) == "a: expected stored or deflated data, found another method"


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip" * 100, b"PK\x05\x06" + bytes(17)])
def test_npz_refuses_what_is_no_zip(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    assert refusal(read_npz, path).startswith("expected a .npz file, found damage: ")


def test_npz_refuses_a_huge_directory(tmp_path):
    """Two hundred thousand members of no size: `zipfile` alone takes seconds for them."""
    count = 200_000
    record = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *[0] * 7, 5, *[0] * 6)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, count * (len(record) + 5), 0, 0)
    path = tmp_path / "a.npz"
    path.write_bytes((record + b"a.npy") * count + end)
    found = f"'a directory over {MAX_HEADER_BYTES} bytes'"
    assert refusal(read_npz, path) == f"expected a .npz file, found damage: {found}"


def test_npz_truncated_anywhere(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones((3, 2), "<f4"), b=np.ones(2, "<f4"))
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refusal(read_npz, path)


# ---- .safetensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_values_are_exact(tmp_path, dtype):
    path, expected = tmp_path / "a.safetensors", {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(expected | {"scalar": torch.tensor(2.5)}, path, metadata={"format": "pt"})
    read = read_safetensors(path)
    assert read.pop("scalar").item() == 2.5
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name])


def test_safetensors_tensors_outlive_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(5000)}, path)
    tensor = read_safetensors(path)["a"]
    os.truncate(path, 0)
    assert tensor.sum() == 5000


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        ({"a": entry()}, 7, "expected 8 bytes of data, found 7"),
        ({"a": entry()}, 9, "expected 8 bytes of data, found 9"),
        ({"a": entry(offsets=(1, 9))}, 9, "a: expected data at byte 0, found it at 1"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b: expected data at byte 8, found it at 4"),
        ({"a": entry(offsets=(0, 12))}, 12, "a: expected 8 bytes of data for shape [2], found 12"),
        ({"a": entry(offsets=(8, 0))}, 8, "a: expected 8 bytes of data for shape [2], found -8"),
        (
            {"a": entry(shape=(2**40, 2**40))},
            8,
            "a: expected 4835703278458516698824704 bytes of data for shape [1099511627776, 1099511627776], found 8",
        ),
        ({"a": entry(shape=(-2,))}, 8, "a: expected sizes and two offsets, found [-2] and [0, 8]"),
        ({"a": entry(shape=(True,))}, 8, "a: expected sizes and two offsets, found [True] and [0, 8]"),
        ({"a": entry(shape=(2.0,))}, 8, "a: expected sizes and two offsets, found [2.0] and [0, 8]"),
        ({"a": entry(offsets=(0, 8, 8))}, 8, "a: expected sizes and two offsets, found [2] and [0, 8, 8]"),
        ({"a": entry(shape=(1,) * 9, offsets=(0, 4))}, 4, "a: expected at most 8 dimensions, found 9"),
        ({"a": entry(dtype="I64")}, 8, "a: expected dtype F16, BF16, F32, F64, found 'I64'"),
        ({"a": entry(dtype=["F32"])}, 8, "a: expected dtype F16, BF16, F32, F64, found \"['F32']\""),
        ({"a": {"dtype": "F32"}}, 8, "a: expected dtype, shape and data_offsets, found \"{'dtype': 'F32'}\""),
        ({"a\n": 1}, 8, "'a\\n': expected dtype, shape and data_offsets, found '1'"),
        ({"__metadata__": {"a": 1}}, 0, "header: __metadata__: expected strings, found something else"),
        ([], 0, "header: expected an object, found list"),
        ({f"a{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(65)}, 0, "expected at most 64 tensors, found 65"),
        (b'{"a": 1, "a": 1}', 0, "header: expected JSON, found the key 'a' twice"),
        (b'{"a": NaN}', 0, "header: expected JSON, found the constant NaN"),
        (b"[" * 100_000, 0, "header: expected JSON, found nesting deeper than 64"),
        (b" " * (MAX_HEADER_BYTES + 1), 0, "expected a header of at most 1048576 bytes, found 1048577"),
    ],
)
def test_safetensors_refuses(tmp_path, header, payload, message):
    path = write_safetensors(tmp_path / "a.safetensors", header, bytes(payload))
    assert refusal(read_safetensors, path) == message


def test_safetensors_under_other_limits(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {str(i): torch.tensor([i], dtype=torch.int64) for i in range(65)}
    safetensors.torch.save_file(tensors, path)
    read = read_safetensors(path, dtypes=STORED_DTYPES, max_arrays=65)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {str(i): [i] for i in range(65)}
    with pytest.raises(BadFileError, match="expected at most 64 tensors, found 65"):
        read_safetensors(path, dtypes=STORED_DTYPES)
    with pytest.raises(BadFileError, match="expected dtype I8, found 'I64'"):
        read_safetensors(path, dtypes={"I8": torch.int8}, max_arrays=65)


@pytest.mark.parametrize(("content", "found"), [(b"", 0), (b"\x02\x00\x00", 0), (b"\xff" * 8 + b"{}", 2)])
def test_safetensors_refuses_a_header_longer_than_the_file(tmp_path, content, found):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    message = refusal(read_safetensors, path)
    assert message.startswith("expected a safetensors header of ")
    assert message.endswith(f"found {found} bytes")


def test_safetensors_truncated_anywhere(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refusal(read_safetensors, path)


# ---- bounded memory


@pytest.mark.parametrize(("dead", "fits"), [(5 / 6, True), (0.99, False)])
def test_compressed_weights_of_dead_latents_are_no_bomb(tmp_path, monkeypatch, dead, fits):
    """Some of Gemma Scope's own files are compressed to a sixth, their dead latents being rows of zeros."""
    monkeypatch.setattr(arrays, "SMALL_BYTES", 0)
    array = np.random.default_rng(0).standard_normal((1200, 500), "<f4")
    array[: int(dead * len(array))] = 0
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=array)
    assert array.nbytes > 6 * path.stat().st_size
    if fits:
        assert np.array_equal(read_npz(path)["a"].numpy(), array)
    else:
        assert refusal(read_npz, path).startswith(f"expected at most {MAX_INFLATION * path.stat().st_size} bytes in a ")


def test_refusals_take_little_memory(tmp_path):
    """A deflate bomb of 256 MiB, an array of 4 TiB, a header of 2^62 bytes: read with 64 MiB to spare."""
    bomb = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(npy_header((PLAIN % f"{2**26},").ljust(118)))
        for _ in range(1 << 8):
            file.write(bytes(1 << 20))
    write_zip(tmp_path / "large.npz", [("a.npy", npy_header(PLAIN % f"{2**40},"))])
    write_safetensors(tmp_path / "header.safetensors", b"{}", length=2**62)
    code = f"""
        import resource, sys
        from pathlib import Path
        from gemmascope.formats.arrays import read_npz, read_safetensors
        from gemmascope.errors import BadFileError
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        for name in ("bomb.npz", "large.npz", "header.safetensors"):
            try:
                (read_npz if name.endswith("npz") else read_safetensors)(Path({str(tmp_path)!r}) / name)
            except BadFileError as error:
                print(str(error).split(": ", 1)[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    size = bomb.stat().st_size
    assert done.stdout.splitlines() == [
        f"expected at most {64 << 20} bytes in a file of {size}, found {(256 << 20) + 128} announced",
        f"a: expected {4 * 2**40} bytes of data for shape [{2**40}], found 0",
        f"expected a safetensors header of {2**62} bytes, found 2 bytes",
    ], done.stderr


def test_more_arrays_only_where_the_reader_asks_for_them(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"a{i}": np.ones(2, np.float32) for i in range(70)})
    assert len(read_npz(tmp_path / "a.npz", max_arrays=70)) == 70
    with pytest.raises(BadFileError, match="expected at most 69 arrays, found 70"):
        read_npz(tmp_path / "a.npz", max_arrays=69)
    with pytest.raises(BadFileError, match="expected at most 64 arrays, found 70"):
        read_npz(tmp_path / "a.npz")
