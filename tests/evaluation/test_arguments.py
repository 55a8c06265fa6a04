"""Every public function with one argument replaced by anything: a result, or an error that names an argument."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope import JumpReLUSAE
from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation import evaluate_sae, loss_recovered, pair_table_fvu, pca_fvu, random_dictionary_fvu

N, D = 6, 3
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int32, torch.int64, torch.complex64),
)
PLAIN = st.sampled_from(
    [None, True, 0, -1, 3, 2**70, 2.5, math.nan, math.inf, "", "x", b"x", (), [], [1], {}, {"a": 1}, object(), int]
)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.sampled_from([0, 1, 2, D, N]), max_size=3))
    kind = draw(st.sampled_from(["plain", "nan", "inf", "huge", "sparse", "meta"]))
    tensor = torch.ones(shape, dtype=torch.float32) * draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if kind in ("nan", "inf", "huge"):
        tensor = tensor * {"nan": math.nan, "inf": math.inf, "huge": 3e38}[kind]
    tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    if kind == "meta":
        return tensor.to("meta")
    sparse = kind == "sparse" and tensor.ndim and tensor.dtype in (torch.float32, torch.int64, torch.bool)
    return tensor.to_sparse() if sparse else tensor


def base():
    generator = torch.Generator().manual_seed(0)
    x, pairs = torch.randn(N, D, generator=generator), torch.randint(0, 4, (N, 2), generator=generator)
    keep = torch.tensor([True] * (N - 1) + [False])
    sae = JumpReLUSAE(D, 5, impl="reference", generator=generator)
    return {
        evaluate_sae: {"sae": sae, "activations": x, "train_activations": x, "keep": keep},
        pca_fvu: {"train_activations": x, "heldout_activations": x, "rank": 2},
        random_dictionary_fvu: {"train_activations": x, "heldout_activations": x, "k": 2, "d_sae": 7, "seed": 1},
        pair_table_fvu: {
            "train_activations": x,
            "train_pairs": pairs,
            "heldout_activations": x,
            "heldout_pairs": pairs,
        },
        loss_recovered: {"delta": 0.1, "ablation_delta": 1.0},
    }


FUNCTIONS = base()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_wrong_argument_is_named(function, data):
    arguments = FUNCTIONS[function]
    assert set(arguments) == set(inspect.signature(function).parameters)
    name = data.draw(st.sampled_from(sorted(arguments)))
    value = data.draw(PLAIN | tensors())
    try:
        function(**(arguments | {name: value}))
        return
    except (TypeError, ValueError, EnvironmentProblemError) as error:
        message = str(error)
    named, _, expected = message.partition(": ")
    assert named in arguments, message  # that one, or one it does not fit
    assert expected.startswith("expected "), message
