"""Small configs that the tests of a suite start from."""

from typing import Any

from gemmascope.sites import KINDS, Site
from gemmascope.suite import SuiteConfig
from gemmascope.suite.settings import merged

MINIMAL: dict[str, Any] = {
    "model": {"name": "google/gemma-2-2b"},
    "text": {"files": ["corpus/*.txt"]},
    "suite": {"sites": ["resid"], "tokens": "20M", "sae": [{"d_sae": 512, "target_l0": 20}]},
}


def tables(**sections: Any) -> dict[str, Any]:
    """`MINIMAL` with other values in some sections."""
    return merged(MINIMAL, sections)


def config(**sections: Any) -> SuiteConfig:
    return SuiteConfig.from_dict(tables(**sections))


def blocks(*each: dict[str, Any], **suite: Any) -> SuiteConfig:
    """A config of these [[suite.sae]] blocks and nothing else in them."""
    return SuiteConfig.from_dict({**MINIMAL, "suite": {"tokens": "20M", **suite, "sae": list(each)}})


def sites_of(layers: int) -> list[Site]:
    return [Site(layer, kind) for layer in range(layers) for kind in KINDS]
