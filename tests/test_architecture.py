"""Who imports whom: no circle, and arrows between the rooms of the package point downwards only.

Imports inside functions count; those under ``if TYPE_CHECKING`` do not. A package's ``__init__`` may gather the names
of its modules, which import their siblings directly, so that it closes no circle.
"""

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gemmascope": ROOT / "gemmascope", "gemmascope.kernels": ROOT / "kernels"}
# Bottom to top; a room or file imports only from those before it. "" is gemmascope/__init__.py.
LAYERS = (
    *("kernels", "errors", "version", "process", "checks", "autocast"),
    *(
        "formats",
        "runs",
        "saes",
        "sites",
        "activations",
        "training",
        "evaluation",
        "probing",
        "studies",
        "dashboards",
        "ravel",
        "reporting",
        "suite",
        "demo",
    ),
    *("", "commands", "cli", "__main__"),
)


def modules_in(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Files by dotted name; a package is its ``__init__.py``."""
    found = {}
    for root, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((root, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that may be carried out, at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(ast.Module([other], []))
        else:
            yield from imports(node)


def imported_by(name: str, path: Path, modules: Mapping[str, Path]) -> set[str]:
    """The modules among ``modules`` that the file ``path`` of module ``name`` imports."""
    targets = set()
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            dotted = {alias.name for alias in node.names}
        else:
            above = name.split(".")[: None if path.name == "__init__.py" else -1]
            above = above[: len(above) - node.level + 1] if node.level else []
            base = ".".join((*above, *([node.module] if node.module else [])))
            dotted = {f"{base}.{alias.name}" for alias in node.names}
            dotted = {target if target in modules else base for target in dotted}
        targets |= dotted & modules.keys()
    return targets - {name}


def graph_of(folders: Mapping[str, Path]) -> dict[str, set[str]]:
    modules = modules_in(folders)
    return {name: imported_by(name, path, modules) for name, path in modules.items()}


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first of them also last; empty when there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.fixture(scope="module")
def graph():
    return graph_of(FOLDERS)


def test_no_circle(graph):
    assert circle_in(graph) == []


def test_every_room_has_its_place(graph):
    assert {room(module) for module in graph} <= set(LAYERS)


def test_arrows_point_downwards(graph):
    upwards = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if LAYERS.index(room(target)) > LAYERS.index(room(module))
    ]
    assert upwards == []


def test_rooms_are_one_level_deep():
    for root, folder in FOLDERS.items():
        for path in folder.rglob("__init__.py"):
            assert len(path.relative_to(folder).parts) <= 2, f"{root}: {path}"


def test_each_room_says_what_it_is_for():
    for path in (path for folder in FOLDERS.values() for path in folder.rglob("__init__.py")):
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        assert first.endswith("."), path


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("def f():\n    from . import b", "from .a import f", True),
        ("from .b import g", "def g():\n    import p.a", True),
        ("from p import b", "from p.a import f", True),
        ("from . import f", "", True),  # the package's own __init__, which imports a
        ("from .b import g", "import os", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b", "from .a import f", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from . import b", "from .a import f", True),
    ],
)
def test_circles_are_found(tmp_path, a, b, circle):
    for name, source in (("__init__", "from .a import f\nfrom .b import g"), ("a", a), ("b", b)):
        (tmp_path / f"{name}.py").write_text(source)
    assert bool(circle_in(graph_of({"p": tmp_path}))) == circle


def test_names_are_resolved_across_rooms(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    sources = {
        "__init__": "",
        "top": "from . import x\nfrom .x import inner",
        "x/__init__": "",
        "x/inner": "from ..y import thing",
        "y/__init__": "from .thing import Thing",
        "y/thing": "from .. import top, torch",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert graph_of({"p": tmp_path}) == {
        "p": set(),
        "p.top": {"p.x", "p.x.inner"},
        "p.x": set(),
        "p.x.inner": {"p.y.thing"},
        "p.y": {"p.y.thing"},
        "p.y.thing": {"p.top", "p"},
    }
