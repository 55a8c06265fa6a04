"""A wrong argument of any public function of `sites`, `activations` and the language-model metrics is named.

pytest tests/activations/test_wrong_arguments.py
"""

import math
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gemmascope import sites
from gemmascope.activations import batches, harvest, stream
from gemmascope.evaluation import delta_loss, evaluate_splice, language_model_loss, loss_recovered, mean_ablation_loss
from gemmascope.sites import Capture, Site, attach
from tests import tiny_models as tiny

pytest.importorskip("transformers")

RESID = Site(1, "resid")


@cache
def model():
    return tiny.gemma2()


def entering(context):
    def call(**arguments):
        with context(**arguments):
            pass

    return call


def reading(site):
    return Capture(model(), [RESID])[site]


def streaming(**arguments):
    return list(stream(**arguments))


def shuffling(**arguments):
    return list(batches(**arguments))


def cases():
    """{name: (function, good arguments)}."""
    m, tokens, mean, identity = {"model": model()}, {"tokens": tiny.tokens()}, {"mean": torch.ones(16)}, nn.Identity()
    options = {"skip_token_ids": None, "batch_size": None, "attention_mask": None}
    harvesting = {"sites": [RESID], "attention_mask": None, "batch_size": 2, "dtype": torch.float32}
    harvesting |= {"max_norm_ratio": None, "median_norms": None}
    activations = {"activations": {RESID: torch.ones(8, 2)}}
    return {
        "Site": (Site, {"layer": 0, "kind": "att"}),
        "parse": (Site.parse, {"name": "layer_0/att"}),
        "all_sites": (sites.all_sites, m),
        "special_token_ids": (sites.special_token_ids, m),
        "site_width": (sites.site_width, m | {"site": RESID}),
        "probe": (sites.probe, m),
        "evaluating": (entering(sites.evaluating), m),
        "detach_all": (sites.detach_all, m),
        "Capture": (entering(Capture), m | {"sites": [RESID]}),
        "reading": (reading, {"site": RESID}),
        "attach": (entering(attach), m | {"saes": {RESID: identity}, "skip_token_ids": None}),
        "harvest": (harvest, m | tokens | harvesting | {"progress": None}),
        "stream": (
            streaming,
            m | {"rows_of_tokens": tiny.tokens()} | harvesting | {"skip_token_ids": None, "device": "cpu"},
        ),
        "batches": (shuffling, activations | {"batch_size": 2, "steps": 3, "seed": 0, "first_step": 0}),
        "loss": (language_model_loss, m | tokens | options),
        "delta": (delta_loss, m | tokens | {"saes": {RESID: identity}, "clean_loss": None} | options),
        "ablation": (mean_ablation_loss, m | tokens | {"site": RESID} | mean | options),
        "splice": (
            evaluate_splice,
            m | tokens | {"site": RESID, "sae": identity, "clean_loss": None} | mean | options,
        ),
        "recovered": (loss_recovered, {"delta": 0.5, "ablation_delta": 1.0}),
    }


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value, low=-math.inf, high=math.inf):
    return is_number(value) and isinstance(value, int) and low <= value <= high


def is_empty(value):
    return isinstance(value, (list, dict)) and not value


def is_ids(value):
    """Among the junk, what is a list of token ids after all."""
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    return isinstance(value, (list, dict)) and all(type(token) is int and token >= 0 for token in value)


OPTIONAL = {"skip_token_ids", "attention_mask", "max_norm_ratio", "median_norms", "progress", "clean_loss"}
GOOD = {
    "layer": lambda v: is_int(v, 0),
    "name": lambda v: isinstance(v, str) and v.startswith(("layer_", "model.")),
    "skip_token_ids": is_ids,
    "dtype": lambda v: v is torch.float32,
    "max_norm_ratio": lambda v: is_number(v) and math.isfinite(v) and v >= 1,
    "progress": callable,
    "clean_loss": lambda v: is_number(v) and math.isfinite(v),
    "delta": is_number,
    "ablation_delta": is_number,
    "steps": lambda v: is_int(v, 0),
    "seed": lambda v: is_int(v, 0, 2**64 - 1),
    "first_step": lambda v: is_int(v, 0, 3),
    "sae": callable,
}


def is_good(function, name, value):
    if value is None and (
        name in OPTIONAL or (name == "batch_size" and function not in ("harvest", "stream", "batches"))
    ):
        return True
    if function in ("detach_all", "evaluating"):
        return isinstance(value, nn.Module)
    if name == "sites" and isinstance(value, dict):
        return "layer_0/att" in value or (function == "Capture" and not value)
    if function == "Capture" and name == "sites":
        return is_empty(value)
    if function == "stream" and name == "rows_of_tokens":
        return is_empty(value)
    if name == "batch_size":
        return is_int(value, 1, 8 if function == "batches" else math.inf)
    return name in GOOD and GOOD[name](value)


NAMES = {"site": ("site",), "sites": ("sites", "site"), "saes": ("saes", "site"), "sae": ("site",), "name": ("site",)}
KINDS_OF_JUNK = [
    *(None, True, 0, -1, 2**65, 1.5, math.nan, math.inf, "", "nonsense", "layer_9/resid", b"x", object(), [], {}),
    *([object()], {"layer_0/att": 3}, {3: nn.Identity()}, nn.Linear(2, 2), len, torch.float32, Site),
    *(torch.ones(2, 9), torch.ones(2, 9).to(torch.complex64), torch.ones(2, 9).bool(), torch.ones(2, 9).byte()),
    *(torch.ones(3).long(), torch.full((2, 9), 61), torch.full((2, 9), -1), torch.full((16,), math.nan)),
    *(torch.ones(17), torch.tensor(1.0), torch.zeros(0, 9).long()),
]
BATCH_OF_IDS = {"tokens", "rows_of_tokens", "attention_mask"}
junk = st.sampled_from(range(len(KINDS_OF_JUNK))).map(lambda index: KINDS_OF_JUNK[index])
junk |= st.integers() | st.floats() | st.text(max_size=5)


@pytest.mark.parametrize("function", list(cases()))
def test_good_arguments_pass(function):
    call, arguments = cases()[function]
    if function == "reading":
        with pytest.raises(ValueError, match="found none completed"):
            call(**arguments)
    else:
        call(**arguments)


@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_a_wrong_argument_is_named(data):
    function = data.draw(st.sampled_from(list(cases())))
    call, arguments = cases()[function]
    name = data.draw(st.sampled_from(list(arguments)))
    value = data.draw(junk)
    assume(not is_good(function, name, value))
    if name in BATCH_OF_IDS and isinstance(value, torch.Tensor):
        assume(not (name == "attention_mask" and value.dtype == torch.bool))  # all of them tokens
        assume(not (function == "stream" and value.ndim > 0 and len(value) == 0))  # nothing to read
    with pytest.raises((TypeError, ValueError)) as error:
        call(**(arguments | {name: value}))
    assert str(error.value).startswith(NAMES.get(name, (name,))), error.value
    assert "\n" not in str(error.value)
