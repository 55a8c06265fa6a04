"""Starting points by name: the rows of Gemma Scope's Table 1, and a recipe for millions of tokens."""

import copy
from dataclasses import dataclass
from typing import Any

from ..checks import check_choice
from ..training import TrainConfig

RECIPES = ("small", "gemma-scope")
BATCH_SIZES = {"small": 1024, "gemma-scope": 4096}

_BILLION = 10**9
_ALL = ("att", "mlp", "resid")


@dataclass(frozen=True)
class PublishedRow:
    """A row of Table 1 of Gemma Scope (arXiv 2408.05147): which SAEs were trained on which model."""

    model: str
    """On the Hugging Face hub."""
    d_sae: int
    sites: tuple[str, ...]
    tokens: int
    """Of each SAE."""


def _at(*layers: int) -> tuple[str, ...]:
    return tuple(f"layer_{layer}/resid" for layer in layers)


# Without the transcoders on the MLPs of 2B: they are no SAEs.
TABLE_1 = {
    "gemma-scope-2b-16k": PublishedRow("google/gemma-2-2b", 2**14, _ALL, 4 * _BILLION),
    "gemma-scope-2b-32k": PublishedRow("google/gemma-2-2b", 2**15, _at(12), 8 * _BILLION),
    "gemma-scope-2b-65k": PublishedRow("google/gemma-2-2b", 2**16, _ALL, 8 * _BILLION),
    "gemma-scope-2b-131k": PublishedRow("google/gemma-2-2b", 2**17, _at(12), 8 * _BILLION),
    "gemma-scope-2b-262k": PublishedRow("google/gemma-2-2b", 2**18, _at(12), 8 * _BILLION),
    "gemma-scope-2b-524k": PublishedRow("google/gemma-2-2b", 2**19, _at(12), 8 * _BILLION),
    "gemma-scope-2b-1m": PublishedRow("google/gemma-2-2b", 2**20, _at(5, 12, 19), 16 * _BILLION),
    "gemma-scope-9b-16k": PublishedRow("google/gemma-2-9b", 2**14, _ALL, 4 * _BILLION),
    "gemma-scope-9b-32k": PublishedRow("google/gemma-2-9b", 2**15, _at(20), 8 * _BILLION),
    "gemma-scope-9b-65k": PublishedRow("google/gemma-2-9b", 2**16, _at(20), 8 * _BILLION),
    "gemma-scope-9b-131k": PublishedRow("google/gemma-2-9b", 2**17, _ALL, 8 * _BILLION),
    "gemma-scope-9b-262k": PublishedRow("google/gemma-2-9b", 2**18, _at(20), 8 * _BILLION),
    "gemma-scope-9b-524k": PublishedRow("google/gemma-2-9b", 2**19, _at(20), 8 * _BILLION),
    "gemma-scope-9b-1m": PublishedRow("google/gemma-2-9b", 2**20, _at(9, 20, 31), 16 * _BILLION),
    "gemma-scope-27b-131k": PublishedRow("google/gemma-2-27b", 2**17, _at(10, 22, 34), 8 * _BILLION),
    "gemma-scope-9b-it-16k": PublishedRow("google/gemma-2-9b-it", 2**14, _at(9, 20, 31), 4 * _BILLION),
    "gemma-scope-9b-it-131k": PublishedRow("google/gemma-2-9b-it", 2**17, _at(9, 20, 31), 8 * _BILLION),
}

# Quadratic L0 of the batch and a wide window: L0 comes out near its target at every site, and few latents die.
SMALL = {"suite": {"recipe": "small"}, "activations": {"drop_norm": 3.0}}

PRESETS = ("small", *TABLE_1)


def preset_tables(name: str) -> dict[str, Any]:
    """The tables of a config that the preset gives, for a file or overrides to refine.

    Those of Table 1 give model, sites, width, tokens, the recipe of §3.2 and the evaluation of §3.4; text is the user's
    to name. The paper does not tabulate its five or six λ a site: an SAE has the recipe's 6e-4, the one that the paper
    names with an L0 (about 50, residual of layer 20 of 9B), until ``l0_coefficient`` or ``target_l0`` is given. Gemma
    runs in bfloat16 here and its activations are held so, without loss; the SAEs are fp32 as in the paper. The ring
    holds 2¹⁷ tokens where all layers are trained and 2²⁰, the paper's bucket, where few are.

    Raises ValueError for another name.
    """
    check_choice("preset", name, PRESETS)
    if name == "small":
        return copy.deepcopy(SMALL)
    row = TABLE_1[name]
    return {
        "model": {"name": row.model, "dtype": "bfloat16"},
        "text": {"context": 1024},
        "activations": {"dtype": "bfloat16", "ring_tokens": 2**17 if row.sites == _ALL else 2**20},
        "suite": {
            "sites": list(row.sites),
            "tokens": row.tokens,
            "batch_size": 4096,
            "recipe": "gemma-scope",
            "sae": [{"d_sae": row.d_sae}],
        },
        "evaluate": {"rows": 2048},
    }


def recipe(name: str, **changes: Any) -> TrainConfig:
    """The numbers of a recipe for one SAE, with ``changes`` as of `TrainConfig.changed`.

    small: `TrainConfig.small`; without a ``target_l0`` its penalty is λ·L0.
    gemma-scope: arXiv 2408.05147 §3.2; with a ``target_l0``, the quadratic L0 of each token of Gemma Scope 2.
    Another ``kind`` than jumprelu has the schedules, rates and units of either, and the penalty of its kind.
    """
    check_choice("recipe", name, RECIPES)
    of_recipe = TrainConfig.gemma_scope if name == "gemma-scope" else TrainConfig.small
    if changes.get("kind", "jumprelu") != "jumprelu":
        return of_recipe(**changes)
    aimed = changes.get("target_l0") is not None
    if name == "gemma-scope":
        return of_recipe(**({"sparsity": "quadratic_l0"} if aimed else {}) | changes)
    return of_recipe(**({} if aimed else {"sparsity": "l0"}) | changes)
