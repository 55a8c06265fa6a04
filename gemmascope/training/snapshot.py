"""What a trainer's snapshot says beside its tensors: facts of JSON, checked before anything is taken from them."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checks import check_choice, check_int, check_number, check_type, dtype_name
from ..formats.differences import unequal

Checked = dict[str, Any]


def packed(figures: Mapping[str, float]) -> dict[str, float | str]:
    """Figures as strict JSON, which has no NaN and no infinity: those as the words `nan`, `inf` and `-inf`."""
    return {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}


def unpacked(name: str, figures: Any) -> dict[str, float]:
    """What `packed` made."""
    check_type(name, figures, Mapping)
    found = {}
    for key, value in figures.items():
        if value in ("nan", "inf", "-inf"):
            value = float(value)
        else:
            check_number(f"{name}[{key!r}]", value, -math.inf)
        found[key] = value
    return found


def check_keys(name: str, found: Any, expected: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a mapping of exactly the keys ``expected``."""
    check_type(name, found, Mapping)
    if found.keys() != set(expected):
        missing, unknown = sorted(set(expected) - found.keys()), sorted(map(str, found.keys() - set(expected)))
        problem = f"{missing[0]!r} is missing" if missing else f"found also {unknown[0]!r}"
        raise ValueError(f"{name}: expected the keys {', '.join(map(repr, expected))}; {problem}")


def check_same(name: str, found: Any, expected: Any) -> None:
    """Raise ValueError naming the first value in which two trees of mappings differ."""
    check_type(name, found, Mapping)
    for where, one, other in unequal(found, expected, name):
        raise ValueError(f"{where}: expected {other!r}, got {one!r}")


def check_tensors(found: Any, expected: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError unless these are tensors of those names, shapes and dtypes, on whatever device."""
    check_keys("tensors", found, expected)
    for name, like in expected.items():
        tensor = found[name]
        check_type(f"tensors[{name!r}]", tensor, Tensor)
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(
                f"tensors[{name!r}]: expected {dtype_name(like.dtype)} {list(like.shape)}, "
                f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )


def check_decision(name: str, found: Any) -> Checked:
    check_keys(name, found, ("step", "density", "n_entries", "skipped_in_a_row"))
    check_int(f"{name}.step", found["step"], -1)
    check_number(f"{name}.density", found["density"], 0)
    check_number(f"{name}.n_entries", found["n_entries"], 0)
    check_int(f"{name}.skipped_in_a_row", found["skipped_in_a_row"], 0)
    return dict(found)


def check_facts(facts: Mapping[str, Any], routes: tuple[str, ...]) -> Checked:
    """The facts of `SAETrainer.snapshot` but its config, as values to be set; ValueError or TypeError for others."""
    for name in ("input_scale", "output_scale"):
        check_number(f"facts.{name}", facts[name], 0, open_low=True)
    check_type("facts.pre_encoder_bias", facts["pre_encoder_bias"], bool)
    check_type("facts.copies_seen", facts["copies_seen"], bool)
    for name in ("step", "turn", "skipped_in_a_row"):
        check_int(f"facts.{name}", facts[name], 0)
    check_choice("facts.route", facts["route"], routes)
    if facts["capacity"] is not None:
        check_int("facts.capacity", facts["capacity"], 1)
    check_type("facts.due", facts["due"], list)
    return dict(facts) | {
        "figures": unpacked("facts.figures", facts["figures"]),
        "decided": check_decision("facts.decided", facts["decided"]),
        "due": [check_decision(f"facts.due[{i}]", each) for i, each in enumerate(facts["due"])],
    }
