"""What pyproject.toml cannot say: the folder kernels/ is imported as gemmascope.kernels, and GEMMASCOPE_NATIVE=1 builds
the native CPU backend with the package. A build that fails leaves an installation without it and says why in a line.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE_DIR = {"gemmascope": "gemmascope", "gemmascope.kernels": "kernels"}


def packages() -> list[str]:
    """Every package in the folders of `PACKAGE_DIR`."""
    return [
        f"{root}.{package}".rstrip(".")
        for root, folder in PACKAGE_DIR.items()
        for package in ("", *find_packages(folder))
    ]


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What this process and the compilers it starts say meanwhile, in lines; it is passed on when that ends."""
    lines = []
    with tempfile.TemporaryFile() as record:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        before = os.dup(1), os.dup(2)
        os.dup2(record.fileno(), 1)
        os.dup2(record.fileno(), 2)
        try:
            yield lines
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            record.seek(0)
            text = record.read()
            with os.fdopen(os.dup(1), "wb") as out:
                out.write(text)
            lines += text.decode("utf-8", "replace").splitlines()


def native_backend() -> dict:
    if os.environ.get("GEMMASCOPE_NATIVE", "").lower() not in ("1", "true", "on", "yes"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("gemmascope: no torch to build the native CPU backend with; add --no-build-isolation", file=sys.stderr)
        return {}
    spec = importlib.util.spec_from_file_location("native", "kernels/cpu/build.py")
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)

    class Build(BuildExtension):
        def run(self):
            library = Path(self.get_ext_fullpath("gemmascope.kernels.cpu._csrc"))
            failure = native.failure_file(library)
            for left in (library, failure):  # an earlier build's is not what these sources make
                left.unlink(missing_ok=True)
            try:
                with said() as lines:
                    super().run()
            except Exception as error:
                why = native.first_complaint(error, "\n".join(lines))
                print(f"gemmascope: the native CPU backend could not be built: {why}", file=sys.stderr)
                failure.parent.mkdir(parents=True, exist_ok=True)
                failure.write_text(why + "\n", encoding="utf-8")
                self.extensions = []
                return
            native.stamp_file(library).write_text(native.stamp() + "\n", encoding="utf-8")

    return {
        "ext_modules": [
            CppExtension(
                "gemmascope.kernels.cpu._csrc",
                [str(Path(path).relative_to(Path.cwd())) for path in native.sources()],
                extra_compile_args=list(native.COMPILER_FLAGS),
                extra_link_args=list(native.LINKER_FLAGS),
            )
        ],
        "cmdclass": {"build_ext": Build},
    }


setup(package_dir=PACKAGE_DIR, packages=packages(), **native_backend())
