"""Wrong arguments of every public function of training and of the SAEs: an error that names one, or it works."""

import math
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gemmascope import training
from gemmascope.errors import EnvironmentProblemError, TrainingFailedError
from gemmascope.saes import BatchTopKSAE, GatedSAE, JumpReLUSAE
from gemmascope.sites import Site
from gemmascope.training import (
    Loss,
    SAESpec,
    SAETrainer,
    Suite,
    TrainConfig,
    calibrate_threshold,
    gated_loss_and_gradients,
    loss_and_gradients,
    sparse_loss,
    train,
)
from tests.training.test_trainer import config, sample, statistics_of

A = Site(0, "resid")
D, F = 8, 24
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.complex64, torch.bool, torch.uint8, torch.int64),
)
SHAPES = ((), (D,), (F,), (0, D), (4, D), (4, 1), (1, 1), (2, 4, D), (4, F))

tensors = st.builds(
    lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(["cpu", "meta"]),
)
numbers = st.integers(-3, 30) | st.floats(-2, 2) | st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 1e-300])
others = st.none() | st.booleans() | st.binary(max_size=3) | st.builds(object) | st.sampled_from([1j, torch])
texts = st.text("ab/:01", max_size=4) | st.sampled_from(["auto", "cpu", "meta", "cuda", "float32", "l0", "tanh", "raw"])
containers = st.sampled_from([[], [0.0], (), {}, {"d_sae": 4}, {A: 1}, {A: None}, [{}], [A], {"layer_0/resid": 2}])
things = st.sampled_from([Loss(), config(), sample(), A, torch.device("cpu"), torch.float16])
anything = tensors | numbers | others | texts | containers | things


def make_sae():
    return JumpReLUSAE(D, F, threshold_init=0.1, generator=torch.Generator().manual_seed(0))


def make_trainer(route="auto"):
    return SAETrainer(config(route=route), sample())


def report_after(x_raw):
    trainer = make_trainer("reference")
    trainer.update(x_raw)
    return trainer.report()


def make_suite(specs, statistics=None, **others):
    statistics = {A: statistics_of(sample())} if statistics is None else statistics
    Suite(specs, statistics, **{"model_name": "a model"} | others).close()


make_suite.__name__ = "Suite"
X = torch.ones(4, D) / 3
FRESH = object()  # a trainer of its own for every call
WHOLE = {
    "Loss": (Loss, dict.fromkeys(Loss.__dataclass_fields__)),
    "TrainConfig": (TrainConfig, dict.fromkeys(TrainConfig.__dataclass_fields__)),
    "short": (TrainConfig.short, dict.fromkeys([*TrainConfig.__dataclass_fields__, *Loss.__dataclass_fields__])),
    "gemma_scope": (TrainConfig.gemma_scope, dict.fromkeys(Loss.__dataclass_fields__)),
    "learning_rate_at": (config().learning_rate_at, {"step": 3}),
    "l0_coefficient_at": (config().l0_coefficient_at, {"step": 3}),
    "loss_at": (config().loss_at, {"step": 3}),
    "JumpReLUSAE": (
        JumpReLUSAE,
        {"d_model": D, "d_sae": F} | dict.fromkeys(("pre_encoder_bias", "input_scale", "threshold_init", "impl"))
        | dict.fromkeys(("metadata", "generator", "device", "dtype")),
    ),
    "encode": (lambda x: make_sae().encode(x), {"x": X}),
    "encode_sparse": (lambda x: make_sae().encode_sparse(x), {"x": X}),
    "forward": (lambda x: make_sae()(x), {"x": X}),
    "jumprelu": (lambda x, bandwidth: make_sae().jumprelu(x, bandwidth), {"x": X, "bandwidth": 0.1}),
    "decode": (lambda f: make_sae().decode(f), {"f": torch.ones(4, F)}),
    "sparse_loss": (sparse_loss, {"sae": make_sae(), "x": X, "loss": Loss()}),
    "gated_loss_and_gradients": (
        gated_loss_and_gradients,
        {"sae": GatedSAE(D, F), "x": X, "loss": Loss(sparsity="l1")},
    ),
    "loss_and_gradients": (loss_and_gradients, {"sae": make_sae(), "x": X, "loss": Loss(), "dead": None}),
    "calibrate_threshold": (calibrate_threshold, {"sae": BatchTopKSAE(D, F, 2), "batches": lambda: [X], "k": 2}),
    "SAETrainer": (
        SAETrainer,
        {"config": config(), "sample": sample()} | dict.fromkeys(("impl", "metadata", "device", "dtype")),
    ),
    "SAESpec": (SAESpec, {"name": "a", "site": A, "config": config(), "init_from": "nowhere"}),
    "Suite": (
        make_suite,
        {"specs": [SAESpec("a", A, config())], "threads": 1}
        | dict.fromkeys(("statistics", "model_name", "impl", "device")),
    ),
    "update": (report_after, {"x_raw": X}),
    "memory": (SAETrainer.memory, {"config": config(), "d_model": D}),
    "train": (
        lambda trainers=FRESH, **others: train({A: make_trainer()} if trainers is FRESH else trainers, **others),
        {"trainers": FRESH, "stream": [{A: X}], "log_every": 1, "log": lambda step, rows: None},
    ),
}  # fmt: skip
ARGUMENTS = [(call, argument) for call, (_, given) in WHOLE.items() for argument in given]
# What a message may call an argument, other than by its name.
ALIASES = {
    ("update", "x_raw"): "x",
    ("train", "stream"): "x",
    ("sparse_loss", "loss"): r"target_l0|loss\.pre_act_coefficient",
    ("loss_and_gradients", "loss"): "target_l0",
    ("gated_loss_and_gradients", "loss"): "target_l0",
}
# Those that only make sense together.
TOGETHER = "target_l0|l0_warmup_steps|lr_warmup_steps|route|compute_dtype|threshold_init|l0_coefficient"
KINDS = (ValueError, TypeError, EnvironmentProblemError, TrainingFailedError)


def test_every_public_name_is_called():
    called = {function.__name__ for function, _ in WHOLE.values()}
    assert {name for name in training.__all__ if name not in called} == {
        *("Calibration", "GatedLossAndGradients", "LossAndGradients", "train"),
        *("CLTLossAndGradients", "CLTTrainer", "clt_loss_and_gradients"),  # in test_clt
    }


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(ARGUMENTS), value=anything)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_argument_is_named(place, value):
    (call, argument), (function, arguments) = place, WHOLE[place[0]]
    assume(not (argument == "log" and callable(value)))  # called with other arguments than ours, it is its own affair
    named = {name: given for name, given in arguments.items() if given is not None} | {argument: value}
    names = "|".join([argument, ALIASES.get((call, argument), argument), TOGETHER])
    message = ""
    try:
        function(**named)
    except KINDS as error:
        message = str(error)
    assert not message or re.match(rf"({names})\b.*: ", message), f"{call}({argument}={value!r}): {message}"
