"""`Site`: one place of the model where SAEs read and write.

Three sites a layer (Gemma Scope, arXiv 2408.05147 §3.1), by DeepMind's hook names:

    att    model.layers.L.self_attn.o_proj.input              heads concatenated, before W_O    heads·head_dim wide
    mlp    model.layers.L.post_feedforward_layernorm.output   what the MLP adds to the stream   hidden_size wide
    resid  model.layers.L.output                              the stream after the layer        hidden_size wide

and two where transcoders read what goes into the MLP:

    mlp_in         model.layers.L.pre_feedforward_layernorm.output       with the norm's gain 1 + w     hidden_size wide
    mlp_in_normed  model.layers.L.pre_feedforward_layernorm.normalized   x/rms(x), before that gain     hidden_size wide

Gemma Scope 2's transcoders are trained on the first, Gemma Scope 1's on the second, for which the model has no module:
it is computed from the norm's input, x·(mean x² + eps)^−½ in fp32, never by dividing by the gain, which may be 0.

TransformerLens and nnsight have names of their own for the same places, which `Site.parse` takes too.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import check_int, check_type
from ..formats import hook_names

KINDS = ("att", "mlp", "resid")
# Where transcoders read and nothing is written: not among `all_sites`, nor meant by patterns of sites.
INPUT_KINDS = ("mlp_in", "mlp_in_normed")

HOOK_POINTS = {
    "att": hook_names.ATTENTION_OUT,
    "mlp": hook_names.MLP_OUT,
    "resid": "output",
    "mlp_in": hook_names.MLP_IN,
    "mlp_in_normed": hook_names.NORMALISED,
}
# TransformerLens's, behind blocks.L. Its hook_mlp_out of a Gemma comes after the norm, as ours does.
TRANSFORMER_LENS_HOOKS = {kind: hook_names.TRANSFORMER_LENS[point] for kind, point in HOOK_POINTS.items()}
# nnsight names places within a forward by the calls in its source.
NORMALISED_IN_NNSIGHT = "pre_feedforward_layernorm.source.self__norm_0.output"

_LAYER = "(0|[1-9][0-9]{0,5})"
# What the three classes of model call the stack, with and without the wrapper of nnsight around them, which writes
# layers[L] where PyTorch writes layers.L.
_MODULE = re.compile(rf"(?:model\.){{1,2}}(?:language_model\.)?layers(?:\.{_LAYER}|\[{_LAYER}\])\.([\w.]+)", re.ASCII)


@dataclass(frozen=True, order=True)
class Site:
    """One place in the model: ``layer`` (from 0) and ``kind``: "att", "mlp" or "resid", or "mlp_in" or "mlp_in_normed",
    where transcoders read."""

    layer: int
    kind: str

    def __post_init__(self):
        check_int("layer", self.layer, 0)
        check_type("kind", self.kind, str)
        if self.kind not in HOOK_POINTS:
            raise ValueError(f"kind: expected one of {', '.join(HOOK_POINTS)}, got {self.kind!r}")

    @property
    def name(self) -> str:
        """DeepMind's name of the hook point, the same for every class of model."""
        return f"model.layers.{self.layer}.{HOOK_POINTS[self.kind]}"

    @property
    def transformer_lens_name(self) -> str:
        """TransformerLens's name of it. Its hook_z has the heads in a dimension of their own: [batch, seq, heads,
        head_dim]."""
        return f"blocks.{self.layer}.{TRANSFORMER_LENS_HOOKS[self.kind]}"

    @property
    def nnsight_name(self) -> str:
        """The expression that reaches it in nnsight, within a trace; mlp_in_normed is a place in the source."""
        point = NORMALISED_IN_NNSIGHT if self.kind == "mlp_in_normed" else HOOK_POINTS[self.kind]
        return f"model.layers[{self.layer}].{point}"

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a short name ("layer_3/resid") or of a hook name: DeepMind's ("model.layers.3.output"),
        TransformerLens's ("blocks.3.hook_resid_post") or nnsight's ("model.layers[3].output").

        Raises ValueError for other names, those of other places of a layer included; TypeError for what is no str.
        """
        if not isinstance(name, str):
            raise TypeError(f"site: expected a Site or a str, got {type(name).__name__}")
        layer, kind = _layer_and_kind(name)
        if kind is None:
            raise ValueError(
                f"site: expected layer_L/KIND with KIND one of {', '.join(HOOK_POINTS)}, or model.layers.L.POINT (or "
                f"model.layers[L].POINT) with POINT one of {', '.join(HOOK_POINTS.values())}, or blocks.L.HOOK with "
                f"HOOK one of {', '.join(TRANSFORMER_LENS_HOOKS.values())}, got {name!r}"
            )
        return cls(layer, kind)

    def __str__(self) -> str:
        return f"layer_{self.layer}/{self.kind}"


def _layer_and_kind(name: str) -> tuple[int, str | None]:
    """Of a name; without a kind where it is no name of a site."""
    if match := re.fullmatch(rf"layer_{_LAYER}/(\w+)", name, re.ASCII):
        return int(match[1]), match[2] if match[2] in HOOK_POINTS else None
    if match := re.fullmatch(rf"blocks\.{_LAYER}\.([\w.]+)", name, re.ASCII):
        return int(match[1]), _kind_of(match[2], TRANSFORMER_LENS_HOOKS)
    if match := _MODULE.fullmatch(name):
        point = HOOK_POINTS["mlp_in_normed"] if match[3] == NORMALISED_IN_NNSIGHT else match[3]
        return int(match[1] or match[2]), _kind_of(point, HOOK_POINTS)
    return 0, None


def _kind_of(point: str, points: dict[str, str]) -> str | None:
    return next((kind for kind, each in points.items() if each == point), None)


def as_site(site: Site | str) -> Site:
    return site if isinstance(site, Site) else Site.parse(site)


def as_sites(sites: Iterable[Site | str]) -> list[Site]:
    if isinstance(sites, (Site, str, Tensor)) or not isinstance(sites, Iterable):
        raise TypeError(f"sites: expected a list of sites, got {type(sites).__name__}")
    return list(map(as_site, sites))


def by_site(name: str, values: Mapping[Any, Any]) -> dict[Site, Any]:
    """The argument ``name``, a dict by Site or name of one. Raises TypeError or ValueError for what is none."""
    if not isinstance(values, Mapping):
        what = "from Site to SAE" if name == "saes" else "by Site"
        raise TypeError(f"{name}: expected a dict {what}, got {type(values).__name__}")
    found = {}
    for key, value in values.items():
        if (site := as_site(key)) in found:
            raise ValueError(f"{name}: expected each site once, got {site} under several names")
        found[site] = value
    if name == "saes" and not found:
        raise ValueError("saes: expected at least one site, got none")
    return found
