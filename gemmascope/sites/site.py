"""`Site`: one place of the model where SAEs read and write.

Three sites a layer (Gemma Scope, arXiv 2408.05147 §3.1), by DeepMind's hook names:

    att    model.layers.L.self_attn.o_proj.input              heads concatenated, before W_O    heads·head_dim wide
    mlp    model.layers.L.post_feedforward_layernorm.output   what the MLP adds to the stream   hidden_size wide
    resid  model.layers.L.output                              the stream after the layer        hidden_size wide
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..checks import check_int, check_type

KINDS = ("att", "mlp", "resid")

HOOK_POINTS = {
    "att": "self_attn.o_proj.input",
    "mlp": "post_feedforward_layernorm.output",
    "resid": "output",
}


@dataclass(frozen=True, order=True)
class Site:
    """One place in the model: ``layer`` (from 0) and ``kind`` ("att", "mlp" or "resid")."""

    layer: int
    kind: str

    def __post_init__(self):
        check_int("layer", self.layer, 0)
        check_type("kind", self.kind, str)
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def name(self) -> str:
        """DeepMind's name of the hook point, the same for every class of model."""
        return f"model.layers.{self.layer}.{HOOK_POINTS[self.kind]}"

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a hook name ("model.layers.3.output") or of a short name ("layer_3/resid")."""
        if not isinstance(name, str):
            raise TypeError(f"site: expected a Site or a str, got {type(name).__name__}")
        if match := re.fullmatch(r"layer_(0|[1-9][0-9]{0,5})/(\w+)", name, re.ASCII):
            layer, kind = match.groups()
            if kind in KINDS:
                return cls(int(layer), kind)
        elif match := re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,5})\.([\w.]+)", name, re.ASCII):
            layer, point = match.groups()
            for kind, hook_point in HOOK_POINTS.items():
                if point == hook_point:
                    return cls(int(layer), kind)
        raise ValueError(
            f"site: expected layer_L/KIND with KIND one of {', '.join(KINDS)}, or model.layers.L.POINT with POINT "
            f"one of {', '.join(HOOK_POINTS.values())}, got {name!r}"
        )

    def __str__(self) -> str:
        return f"layer_{self.layer}/{self.kind}"


def as_site(site: Site | str) -> Site:
    return site if isinstance(site, Site) else Site.parse(site)


def as_sites(sites: Iterable[Site | str]) -> list[Site]:
    if isinstance(sites, (Site, str, Tensor)) or not isinstance(sites, Iterable):
        raise TypeError(f"sites: expected a list of sites, got {type(sites).__name__}")
    return list(map(as_site, sites))
