"""Where two trees of JSON differ: what a file says of a run, and what this one is."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..checks import check_type

LONGEST = 80


class _Words(str):
    """Shown as they are, in the place of a value."""

    def __repr__(self) -> str:
        return str(self)


NOTHING = _Words("nothing")


def unequal(found: Any, expected: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(where, found, expected) of every value that differs, as in ``("model.layers[3]", 1, 2)``.

    Mappings and lists are compared item by item; what one of them lacks is `NOTHING`. 1 and 1.0 are equal, 1 and True
    are not.
    """
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inner = f"{where}.{key}" if where else str(key)
            yield from unequal(found.get(key, NOTHING), expected.get(key, NOTHING), inner)
    elif isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            yield where, _Words(f"{len(found)} entries"), _Words(f"{len(expected)} entries")
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from unequal(one, other, f"{where}[{number}]")
    elif found != expected or isinstance(found, bool) != isinstance(expected, bool):
        yield where, found, expected


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], theirs: str, ours: str) -> list[str]:
    """A line for each of `unequal`, with theirs = "the checkpoint" and ours = "this run":
    ``model.revision: the checkpoint has 'abc', this run 'def'``."""
    check_type("found", found, Mapping)
    check_type("expected", expected, Mapping)
    return [
        f"{where}: {theirs} has {_shown(one)}, {ours} {_shown(other)}" for where, one, other in unequal(found, expected)
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
