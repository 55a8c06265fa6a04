"""Text that is at hand wherever Python is: its own documentation, as documents. Nothing is downloaded."""

import ast
import gc
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .documents import Document


def python_documentation() -> list[Document]:
    """The language reference's help topics and, module by module, the docstrings of the standard library: 2 MB."""
    with _no_garbage_collection():
        return [
            Document(name, text.encode("utf-8", "replace").decode(), source)
            for source, name, text in _documentation()
            if text
        ]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are many objects without cycles, among which looking for cycles is time lost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documentation() -> Iterator[tuple[str, str, str]]:
    try:
        import pydoc_data.topics as documented

        topics = documented.topics
    except ImportError:  # some Linux packages leave the topics out
        topics = {}
    for name in sorted(topics):
        yield "help topics", name, topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = []
    for folder, inner, names in os.walk(library):
        inner[:] = [name for name in inner if name not in skipped]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(files):
        yield "standard library", path.relative_to(library).as_posix(), "\n\n".join(docstrings(path))


def docstrings(path: Path) -> Iterator[str]:
    """Every docstring of a Python file; nothing from a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    # As ast.walk, but not into expressions, where no definition can be.
    queue = deque([tree])
    while queue:
        node = queue.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, block, ()))
