"""Within bench, imports point downwards."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import bench

ROOT = Path(bench.__file__).parent


def imported(path: Path, modules: set[str]) -> set[str]:
    """Modules of bench that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports within bench are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules


def test_no_module_imports_itself_by_way_of_another():
    paths = {
        ".".join(("bench", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: imported(path, set(paths)) for name, path in paths.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("bench.contenders") < order.index("bench.ours") < order.index("bench.timing.run")
    rooms = {}
    for name, others in graph.items():
        if not name.endswith("__main__"):
            rooms.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    list(TopologicalSorter(rooms).static_order())


def room(module: str) -> str:
    """bench.timing of bench.timing.run; a module at the top is a room by itself."""
    return ".".join(module.split(".")[:2])
