"""Names of SAEs as other projects' folders and identifiers can have them."""

import re

from .overview import Overview, TableOf


def plain_name(name: str) -> str:
    """The name with letters, digits, ``_`` and ``-`` alone, others as ``-``; never empty."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "sae"


def plain_names(names: list[str]) -> list[str]:
    """Those of different names, which stay different, whatever case a file system ignores."""
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        plain, number = plain_name(name), 2
        while plain.lower() in taken:
            plain, number = f"{plain_name(name)}_{number}", number + 1
        taken.add(plain.lower())
        found.append(plain)
    return found


def rounded(values: list[float], digits: int = 5) -> list[float]:
    """As Neuronpedia and circuit-tracer have numbers in JSON."""
    return [round(value, digits) for value in values]


def source_sets(overview: Overview) -> list[str]:
    """The set that each SAE belongs to: its name without its layer, so that those of all layers are one set; with it,
    where a layer has several of that name."""
    short = [without_layer(of) for of in overview.saes]
    each = {(of.reads.layer, name) for of, name in zip(overview.saes, short, strict=True)}
    names = short if len(each) == len(short) else [of.name for of in overview.saes]
    different = sorted(set(names))
    plain = dict(zip(different, plain_names(different), strict=True))
    return [plain[name] for name in names]


def without_layer(of: TableOf) -> str:
    """The name of an SAE without the part that says its layer."""
    parts = [part for part in of.name.split("/") if part != f"layer_{of.reads.layer}"]
    return "/".join(parts) or of.name
