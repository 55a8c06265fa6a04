"""`says`: whether a text that a model went on with is a label, by the rule that SAEBench's RAVEL goes by."""

import re

_WITHIN = 2  # degrees
_NUMBER = re.compile(r"-?\d+")


def says(text: str, label: str) -> bool:
    """Of ``text`` what is before the first double quote, and ``label``, without case and outer space: the longer must
    begin with the shorter, "the" at the beginning counting in neither. A label with commas is right by any of its
    parts, a whole number by the first one of the text within 2.

    Nothing is made of an empty text.
    """
    said = _plain(text.partition('"')[0])
    if _NUMBER.fullmatch(label.strip()):
        number = _NUMBER.search(said)
        return number is not None and abs(int(number[0]) - int(label)) <= _WITHIN
    return bool(said) and any(
        said.startswith(part) or part.startswith(said) for part in map(_plain, label.split(",")) if part
    )


def _plain(text: str) -> str:
    return text.strip().lower().removeprefix("the ").strip()
