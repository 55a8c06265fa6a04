"""The keys of another project's config, checked as they are taken."""

from typing import Any

from ..errors import BadFileError
from .arrays import printable


class Fields:
    """The JSON object of the file ``name``. What a method does not know of it raises BadFileError naming the key.

    null counts as missing.
    """

    def __init__(self, config: Any, name: str):
        if not isinstance(config, dict):
            raise BadFileError(f"{name}: expected an object, found {type(config).__name__}")
        self.config, self.name = config, name

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``key``, of a ``kind``; ``default`` where it is missing."""
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) is not kind:
            raise self.wrong(key, kind.__name__, type(value).__name__)
        return value

    def size(self, key: str) -> int | None:
        """A positive integer."""
        value = self.take(key, int)
        if value is not None and value < 1:
            raise self.wrong(key, "at least 1", str(value))
        return value

    def inner(self, key: str) -> "Fields":
        """The object under ``key``; an empty one where it is missing."""
        return Fields(self.take(key, dict, {}), f"{self.name}: {key}")

    def wrong(self, key: str, expected: str, found: str) -> BadFileError:
        return BadFileError(f"{self.name}: {printable(key)}: expected {expected}, found {found}")
