"""What an SAE says of itself: the site, the L0 and the model, out of its metadata and of the names of its folders."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..sites import Site

# As the parts of names of folders and repositories have them: "resid", "resid_post", "gemma-scope-2b-pt-res".
_KINDS = {"res": "resid", "resid": "resid", "att": "att", "attn": "att", "mlp": "mlp"}
_LAYER = re.compile(r"(?<![a-z])layer[_-]?([0-9]{1,6})(?![0-9])", re.IGNORECASE | re.ASCII)
_L0 = re.compile(r"average_l0_([0-9]{1,9})(?:_[0-9]{1,4})?", re.ASCII)
# No name says more; a config may, up to infinity.
_LARGEST_L0 = 10**9
# So many folders above that of the layer may name the kind: …/gemma-scope-2b-pt-res/snapshots/COMMIT/layer_20.
_ABOVE = 3


@dataclass(frozen=True)
class Stated:
    """None where nothing says it."""

    site: Site | None = None
    average_l0: float | None = None
    model: str | None = None


def stated_of(path: str, metadata: Mapping[str, Any]) -> Stated:
    """What the metadata of an SAE say, else the names in ``path``; of its L0 the name comes first.

    path: of its file, its repository included. A site that no site is called is as good as none.
    """
    parts = PurePath(path).parts
    return Stated(
        _site_of(metadata.get("site")) or _site_named(parts),
        _l0_named(parts) or _l0_of(metadata),
        _text(metadata.get("model")),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _site_of(name: Any) -> Site | None:
    try:
        return Site.parse(name)
    except (TypeError, ValueError):
        return None


def _site_named(parts: Sequence[str]) -> Site | None:
    for index in reversed(range(len(parts))):
        layer = _LAYER.search(parts[index])
        if layer is None:
            continue
        for part in reversed(parts[max(0, index - _ABOVE) : index + 1]):
            kinds = {_KINDS[word] for word in re.split(r"[-_.\s]", part.lower()) if word in _KINDS}
            if len(kinds) == 1:
                return Site(int(layer[1]), kinds.pop())
        return None
    return None


def _l0_named(parts: Sequence[str]) -> float | None:
    found = (_L0.fullmatch(part) for part in reversed(parts))
    return next((float(match[1]) for match in found if match is not None and int(match[1]) > 0), None)


def _l0_of(metadata: Mapping[str, Any]) -> float | None:
    values: list[Any] = [metadata.get(name) for name in ("average_l0", "l0")]
    return next((float(value) for value in values if type(value) in (int, float) and 0 < value < _LARGEST_L0), None)
