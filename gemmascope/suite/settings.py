"""What a user writes, before it is a config: TOML files, ``KEY=VALUE`` overrides, numbers of tokens."""

import copy
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..checks import check_int, check_type
from ..errors import EnvironmentProblemError
from ..formats.files import as_path, shown

MAX_CONFIG_BYTES = 1 << 20
LARGEST_COUNT = 10**15

_COUNT = re.compile(r"([0-9][0-9_]{0,20}(?:\.[0-9]{1,9})?)\s?([kKMB]?)", re.ASCII)
_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_STEP = r"[A-Za-z0-9_-]+(?:\[[0-9]{1,4}\])?"
_KEY = re.compile(rf"{_STEP}(?:\.{_STEP})*", re.ASCII)

Table = dict[str, Any]


def as_count(name: str, value: Any, low: int = 1, high: int = LARGEST_COUNT) -> int:
    """A number of tokens: an int, or a str such as "500M", "1.5B" or "20k" (thousands, millions, billions).

    Raises ValueError or TypeError for anything else, a fraction of a token included, and outside of [low, high].
    """
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        number = Fraction(match[1].replace("_", "")) * _SUFFIXES[match[2]] if match else None
        if number is None or number.denominator != 1:
            raise ValueError(f'{name}: expected a whole number, or one such as "500M", "1.5B" or "20k", got {value!r}')
        value = int(number)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name}: expected an int, or a str such as "500M", got {type(value).__name__}')
    check_int(name, value, low, high)
    return value


def read_toml(path: str | os.PathLike) -> Table:
    """The tables of a config file.

    A wrong config is wrong usage: ValueError for a file that is missing, too large, not UTF-8 or not TOML, duplicate
    keys included. EnvironmentProblemError for one that cannot be read.
    """
    path = as_path("config", path)
    name = shown(path)
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "something else" if path.exists() else "none"
            raise ValueError(f"config: expected a file, found {found}: {name}")
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise EnvironmentProblemError(f"{name}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_CONFIG_BYTES} bytes of TOML, found more")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: expected UTF-8, found the byte 0x{data[error.start]:02x} at {error.start}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{name}: expected TOML, found arrays or tables nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name}: expected TOML, found: {error}") from error


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Table:
    """``base`` with ``changes``: tables are merged, other values replaced; each ``[[suite.sae]]`` of ``changes``
    completes the one that a preset has."""
    return _merged(copy.deepcopy(dict(base)), changes, "")


def _merged(base: Table, changes: Mapping[str, Any], key: str) -> Table:
    for name, value in changes.items():
        old, full = base.get(name), f"{key}{name}"
        if isinstance(old, dict) and isinstance(value, Mapping):
            base[name] = _merged(old, value, full + ".")
        elif full == "suite.sae" and isinstance(old, list) and len(old) == 1 and _are_tables(value):
            base[name] = [_merged(dict(old[0]), block, full + ".") for block in value]
        else:
            base[name] = copy.deepcopy(value)
    return base


def _are_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, Mapping) for each in value)


def overridden(tables: Mapping[str, Any], overrides: Sequence[str]) -> Table:
    """``tables`` with each ``KEY=VALUE`` set: ``suite.tokens=20M``, ``suite.sae.d_sae=4096`` in every block,
    ``suite.sae[0].d_sae=4096`` in one.

    VALUE is one of TOML, or a bare word, which is taken as text. Raises ValueError for what is neither, a KEY that is
    none, an index that there is not, and a KEY below something that is no table.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise TypeError(f"overrides: expected a list of KEY=VALUE, got {type(overrides).__name__}")
    result = copy.deepcopy(dict(tables))
    for text in overrides:
        check_type("overrides", text, str)
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            raise ValueError(f"--set: expected KEY=VALUE such as suite.sae.d_sae=4096, got {text!r}")
        _set(result, key, _value(key, value.strip()))
    return result


def _value(key: str, text: str) -> Any:
    """The value of a line of TOML, or ``text`` itself where it is a bare word."""
    if not text.isprintable():
        raise ValueError(f"{key}: expected a value of one line, got {text!r}")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except RecursionError as error:
        raise ValueError(f"{key}: expected a value, found arrays nested too deeply") from error
    except ValueError as error:
        if not text or text[0] in "[{\"'":
            raise ValueError(f"{key}: expected a value of TOML or a bare word, got {text!r}: {error}") from error
        return text


def _set(tables: Table, key: str, value: Any) -> None:
    *above, last = re.findall(r"([^.\[\]]+)(?:\[([0-9]+)\])?", key)
    holders, path = [tables], ""
    for name, index in above:
        path += f".{name}" if path else name
        holders = [inner for holder in holders for inner in _below(holder, name, index, path)]
        path += f"[{index}]" if index else ""
    name, index = last
    for holder in holders:
        if not index:
            holder[name] = value
            continue
        items = _indexed(holder.get(name), index, key.rpartition("[")[0])
        items[int(index)] = value


def _below(holder: Table, name: str, index: str, path: str) -> list[Table]:
    """The tables that ``name`` holds; a new one where there is none yet."""
    if name not in holder:
        holder[name] = [{}] if path == "suite.sae" else {}
    inner = holder[name]
    if index:
        inner = [_indexed(inner, index, path)[int(index)]]
    found = inner if isinstance(inner, list) else [inner]
    if not all(isinstance(table, dict) for table in found):
        raise ValueError(f"{path}: expected a table, got {inner!r}")
    return found


def _indexed(items: Any, index: str, path: str) -> list[Any]:
    """``items``, a list that has the index."""
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list, got {type(items).__name__}")
    if int(index) >= len(items):
        raise ValueError(f"{path}: expected an index below {len(items)}, got [{index}]")
    return items


def check_keys(key: str, found: Any, known: Collection[str]) -> None:
    """Raise TypeError for what is no table, ValueError for a key that there is not, naming the nearest there is."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{key or 'config'}: expected a table, got {type(found).__name__}")
    for name in found:
        if name in known:
            continue
        full = f"{key}.{name}" if key else str(name)
        near = difflib.get_close_matches(str(name), known, n=1)
        if near:
            raise ValueError(f"{full}: expected a known key, perhaps {near[0]}, got {name!r}")
        raise ValueError(f"{full}: expected one of {', '.join(sorted(known))}, got {name!r}")
