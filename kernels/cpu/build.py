"""The compiled CPU backend: where its library is, how it is built, whether it can be used.

Nothing is ever compiled unasked. Three ways to ask:

* ``GEMMASCOPE_NATIVE=1 pip install .`` (what `make native` does) builds the library with the package;
* ``GEMMASCOPE_NATIVE=1`` in the environment of a process builds it at its first use, once, into PyTorch's folder of
  extensions (``TORCH_EXTENSIONS_DIR``), where it was not installed or was built from other sources;
* `build` does so from Python.

``GEMMASCOPE_NATIVE_FLAGS`` adds flags for the compiler and the linker, and makes a process build a library of its own.
``GEMMASCOPE_NATIVE=0`` leaves a library that is there unused. Sources: ``csrc/``, one file for each instruction set,
the rest by subject; the best set that the processor has is taken at run time.
"""

import contextlib
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent / "csrc"
# Loops are vectorised by hand, so -O3 is enough; sums may use fused multiply-adds but are never reordered.
COMPILER_FLAGS = ("-O3", "-fopenmp", "-ffp-contract=fast")
LINKER_FLAGS = ("-fopenmp",)

HOW_TO_BUILD = "GEMMASCOPE_NATIVE=1, or make native in a checkout; it needs a C++ compiler"

_state: dict[str, str | None] = {}


def torch_version() -> str:
    """What a library is tied to: PyTorch keeps its C++ interface within a minor version."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


def stamp() -> str:
    """What a library is made from: the PyTorch it is for, and its sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"torch {torch_version()}, sources {digest.hexdigest()[:12]}"


def extra_flags() -> list[str]:
    return os.environ.get("GEMMASCOPE_NATIVE_FLAGS", "").split()


def sources() -> list[str]:
    return sorted(str(path) for path in SOURCES.glob("*.cpp"))


def installed_library() -> Path:
    """Where an installation puts the library."""
    return Path(__file__).parent / f"_csrc{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"


def stamp_file(library: Path) -> Path:
    """What says what a library was built from."""
    return library.with_name("_csrc_stamp.txt")


def failure_file(library: Path) -> Path:
    """What says why an installation that was to build the library has none."""
    return library.with_name("_csrc_failure.txt")


def _read(file: Path) -> str:
    """The one line of a record, whatever the locale and whatever it has become."""
    return file.read_text(encoding="utf-8", errors="replace").strip()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process builds in ``folder``, and say so.

    The lock is the operating system's, which opens it when its owner ends, however that comes about. PyTorch's own is a
    file that nobody removes when its owner is killed: whoever holds this one may.
    """
    import fcntl

    with open(folder / "owner", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            print(f"gemmascope: waiting for {owner} to build the native CPU backend in {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        (folder / "lock").unlink(missing_ok=True)
        yield


def build(verbose: bool = False) -> Path:
    """Compile the library with the compiler at hand (``CXX``) and ninja; returns its path.

    Raises RuntimeError, one line long, when that fails. What was built before from the same sources, for the same
    PyTorch, is not built again. Of several processes one builds and the others wait for it, and say so.
    """
    from torch.utils import cpp_extension

    made_from = " ".join((torch.__version__, stamp(), *COMPILER_FLAGS, *extra_flags()))
    name = f"gemmascope_native_{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    try:
        folder = Path(cpp_extension._get_build_directory(name, verbose))
        with _alone_in(folder):
            cpp_extension.load(
                name,
                sources(),
                extra_cflags=[*COMPILER_FLAGS, *extra_flags()],
                extra_ldflags=[*LINKER_FLAGS, *extra_flags()],
                is_python_module=False,
                verbose=verbose,
            )
    except Exception as error:
        raise RuntimeError(f"the native CPU backend could not be built: {first_complaint(error)}") from error
    return folder / f"{name}.so"


def first_complaint(error: BaseException, output: str = "") -> str:
    """The line that says what is wrong, of a compiler's output where it has one, else of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = (line.strip() for line in (*output.splitlines(), *lines))
    return next((line for line in said if "error:" in line or "not found" in line), lines[0])[:300]


def _load() -> str | None:
    wish = os.environ.get("GEMMASCOPE_NATIVE", "").lower()
    if wish in ("0", "false", "off", "no"):
        return f"GEMMASCOPE_NATIVE={wish} turns the native backend off"
    library = installed_library()
    if library.exists() and not extra_flags():
        file = stamp_file(library)
        made_from = _read(file) if file.exists() else "nothing known"
        problem = f"the native backend was built from {made_from}, not {stamp()}: build it again"
        if made_from == stamp():
            try:
                torch.ops.load_library(str(library))
                return None
            except OSError as error:
                problem = f"the native backend does not load: {str(error).splitlines()[0]}"
    elif failure_file(library).exists():
        problem = f"the native backend could not be built when installed: {_read(failure_file(library))}"
    else:
        problem = "the native backend is not built"
    if wish not in ("1", "true", "on", "yes"):
        return f"{problem} ({HOW_TO_BUILD})"
    try:
        build()
    except RuntimeError as error:
        return str(error)
    return None


def problem() -> str | None:
    """Why the native backend cannot be used in this process, or None. The first call loads it."""
    if "problem" not in _state:
        _state["problem"] = _load()
        if _state["problem"] is None:
            from .inference import register_fakes

            register_fakes()
    return _state["problem"]


def isa() -> str:
    """The instruction set whose kernels are used: "avx512vnni", "avx512", "avx2" or "portable"."""
    return torch.ops.gemmascope_cpu.isa()


# Constants to `torch.compile`. Its own `assume_constant_result` says the same, but would import Triton.
problem._dynamo_marked_constant = isa._dynamo_marked_constant = True
