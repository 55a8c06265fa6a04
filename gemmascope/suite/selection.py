"""Which sites patterns mean in a model, and what the SAEs trained at them are called."""

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..sites import Site
from ..sites.site import HOOK_POINTS
from ..training import TrainConfig
from ..training.config import TARGETED
from ..training.spec import SAESpec

_RANGE = re.compile(r"layer_([0-9]{1,6})-([0-9]{1,6})", re.ASCII)
_SHOWN = 12


def matching(key: str, patterns: Sequence[str], sites: Collection[Site]) -> tuple[Site, ...]:
    """The sites that any of ``patterns`` means, each once, by layer and then by kind.

    A pattern is LAYER/KIND with shell wildcards in both (``layer_12/*``, ``*/resid``, ``layer_1?/att``), LAYER perhaps
    a range (``layer_5-12/resid``, both ends included); or one of the two (``resid``, ``layer_9``); or DeepMind's name
    of a site. Raises ValueError, naming ``key``, for one that means no site of ``sites`` and for a range that goes
    beyond them.
    """
    found: set[Site] = set()
    for index, pattern in enumerate(patterns):
        meant = _meant(f"{key}[{index}]", pattern, sites)
        if not meant:
            raise ValueError(f"{key}[{index}]: expected sites among {listing(sites)}, got {pattern!r}")
        found |= meant
    return tuple(sorted(found))


def _meant(key: str, pattern: str, sites: Collection[Site]) -> set[Site]:
    if pattern.startswith("model.layers."):
        return {site for site in sites if site.name == pattern}
    layer, slash, kind = pattern.partition("/")
    if not slash:
        layers = pattern.startswith("layer_")
        layer, kind = (pattern, "*") if layers else ("*", pattern)
    if ends := _RANGE.fullmatch(layer):
        first, last = int(ends[1]), int(ends[2])
        deepest = max((site.layer for site in sites), default=-1)
        if not first <= last <= deepest:
            raise ValueError(f"{key}: expected a range of layers from 0 to {deepest}, got {pattern!r}")
        return {site for site in sites if first <= site.layer <= last and fnmatch.fnmatchcase(site.kind, kind)}
    return {
        site
        for site in sites
        if fnmatch.fnmatchcase(f"layer_{site.layer}", layer) and fnmatch.fnmatchcase(site.kind, kind)
    }


def listing(sites: Iterable[Site]) -> str:
    """The sites in few words: ``layer_0 … layer_25 / att, mlp, resid`` where they are complete."""
    ordered = sorted(sites)
    layers = sorted({site.layer for site in ordered})
    kinds = [kind for kind in HOOK_POINTS if any(site.kind == kind for site in ordered)]
    complete = len(ordered) == len(layers) * len(kinds) and layers == list(range(layers[0], layers[-1] + 1))
    if complete and len(layers) > 1:
        return f"layer_{layers[0]} … layer_{layers[-1]} / {', '.join(kinds)}"
    names = [str(site) for site in ordered]
    return ", ".join(names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], "…", names[-1]])


@dataclass(frozen=True)
class Candidate:
    """An SAE that has no name yet."""

    key: str
    """Where the user asked for it, such as ``suite.sae[1]``."""
    site: Site
    config: TrainConfig
    init_from: str | None
    label: str | None
    target: Site | None = None


def named(candidates: Sequence[Candidate]) -> tuple[SAESpec, ...]:
    """The candidates with names, in their order: ``layer_9/resid/width_2560/target_l0_40``, or with λ,
    ``…/l0_coefficient_0.001``, where none is aimed at; then what else they differ in from those of the same name
    (``/seed_1``), then the label. Those of another kind than jumprelu have it behind their site, and k where they have
    one: ``layer_9/resid/topk/width_2560/k_40``. Of transcoders, what they give stands behind the site:
    ``layer_9/mlp_in/to_mlp/width_2560/target_l0_40``.

    Raises ValueError for the same SAE twice and for two that only ``init_from`` tells apart.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(_base(candidate), []).append(candidate)
    differing = {base: _differing([each.config for each in group]) for base, group in groups.items()}
    specs: dict[str, tuple[SAESpec, Candidate]] = {}
    for each in candidates:
        base, settings = _base(each), _settings(each.config)
        parts = [base, *(f"{name}_{_text(settings[name])}" for name in differing[base])]
        name = "/".join([*parts, each.label] if each.label else parts)
        if name in specs:
            _refuse_twin(name, specs[name][1], each)
        specs[name] = SAESpec(name, each.site, each.config, each.init_from, each.target), each
    return tuple(spec for spec, _ in specs.values())


def _refuse_twin(name: str, first: Candidate, second: Candidate) -> None:
    if first.init_from != second.init_from:
        raise ValueError(f"{second.key}.label: expected one, since only init_from tells it from {first.key}: {name}")
    raise ValueError(f"{second.key}: expected another SAE than {first.key} gives already, got {name} twice")


def _base(candidate: Candidate) -> str:
    config = candidate.config
    kind = "" if config.kind == "jumprelu" else f"/{config.kind}"
    to = "" if candidate.target is None else f"/to_{candidate.target.kind}"
    aim = "target_l0" if config.loss.sparsity in TARGETED else "l0_coefficient" if config.k is None else "k"
    return f"{candidate.site}{to}{kind}/width_{config.d_sae}/{aim}_{_text(_settings(config)[aim])}"


def _settings(config: TrainConfig) -> dict[str, Any]:
    settings = config.to_dict()
    loss = settings.pop("loss")
    return loss | settings


def _differing(configs: Sequence[TrainConfig]) -> list[str]:
    """The settings in which they differ, λ first; without the schedules where those follow from the steps."""
    every = [_settings(config) for config in configs]

    def told_apart(names: Sequence[str]) -> int:
        return len({tuple(settings[name] for name in names) for settings in every})

    found = [name for name in every[0] if told_apart([name]) > 1]
    without_schedules = [name for name in found if name == "steps" or not name.endswith("_steps")]
    return without_schedules if told_apart(without_schedules) == told_apart(found) else found


def _text(value: Any) -> str:
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, tuple):
        return "-".join(map(_text, value))
    return str(value).lower()
