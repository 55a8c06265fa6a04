"""The library of the CUDA road: how it is built, where it is, whether it is asked for.

Nothing is compiled and nothing is taken unasked. `make native-cuda`, or ``python -m gemmascope.kernels.cuda``, builds
it next to this file with the nvcc of ``NVCC``, ``CUDA_HOME`` or ``PATH`` (CUDA 12 or newer). That needs no GPU; what it
makes needs a driver, but no toolkit and no certain PyTorch. ``GEMMASCOPE_CUDA=1`` in the environment of a process then
takes it. The library's name holds a digest of its sources, so that one of other sources is never loaded.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
FOLDER = Path(__file__).resolve().parent
TARGET = ("-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a")
SHARED = ("-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wno-unknown-pragmas")

HOW_TO_BUILD = "make native-cuda in a checkout, or python -m gemmascope.kernels.cuda; it needs CUDA's nvcc"


def asked() -> bool:
    """Whether this process wants the CUDA road."""
    return os.environ.get("GEMMASCOPE_CUDA", "").lower() in ("1", "true", "on", "yes")


def digest() -> str:
    """What a library is made from."""
    total = hashlib.sha256("\n".join(TARGET + SHARED).encode())
    for path in sorted(SOURCES.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:12]


def library() -> Path:
    """Where the library of these sources is, or would be."""
    return FOLDER / f"_encode_{digest()}.so"


def compiler() -> str:
    """The nvcc to build with; RuntimeError where there is none."""
    home = os.environ.get("CUDA_HOME")
    for candidate in (os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise RuntimeError("the CUDA road needs nvcc of CUDA 12 or newer: set NVCC or CUDA_HOME, or put it on the PATH")


def build() -> Path:
    """Compiles the library unless it is there; RuntimeError with what the compiler says."""
    path = library()
    if path.is_file():
        return path
    nvcc = compiler()
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="_encode_") as folder:  # complete before it has its name
        new = Path(folder) / path.name
        command = [nvcc, *TARGET, *SHARED, "-o", str(new), str(SOURCES / "encode.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{nvcc} cannot build the CUDA road: {(done.stderr or done.stdout).strip()}")
        os.replace(new, path)
    for old in FOLDER.glob("_encode_*.so"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


@functools.cache
def loaded() -> ctypes.CDLL:
    """The library of these sources; RuntimeError where it was not built."""
    path = library()
    if not path.is_file():
        raise RuntimeError(f"GEMMASCOPE_CUDA is set but its library is not built ({HOW_TO_BUILD})")
    found = ctypes.CDLL(str(path))
    pointer, rows, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = found.gemmascope_encode_entries
    function.argtypes = [pointer, rows, pointer, rows, pointer, pointer, ctypes.c_float, pointer, pointer]
    function.argtypes += [size, size, size, pointer]
    function.restype = ctypes.c_char_p
    return found
