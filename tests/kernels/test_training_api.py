"""The public operators of the training step: one step by them alone, what they refuse, room that grows by itself."""

import math

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels import api
from gemmascope.kernels.dispatch import triton_problem
from tests.helpers import assert_bitwise_equal, normal
from tests.kernels.native import needs_native

N, D, F = 5, 6, 7
OBJECTIVE = kernels.Objective(0.3)
RULE = kernels.Rule(1e-2, 0.9, 1e-8, False)
needs_triton = pytest.mark.skipif(triton_problem() is not None, reason=triton_problem() or "")


def state() -> kernels.LatentState:
    W = torch.nn.functional.normalize(normal(F, D, seed=1), dim=1)
    weights = (W.clone(), W, normal(F, seed=2), normal(F, seed=3).abs())
    return kernels.LatentState(
        *weights, *(torch.zeros_like(w) for w in weights), last=torch.zeros(F, dtype=torch.int64)
    )


class Step:
    """Every intermediate of one step, by the public operators."""

    def __init__(self, impl: str = "pytorch"):
        self.state, self.x, self.b_dec = state(), normal(N, D), torch.zeros(D)
        given = (self.x, self.state.W_enc.T, self.state.b_enc, self.state.threshold, 0.3)
        self.entries = kernels.encode_entries(*given, impl=impl)
        self.out = kernels.residual_pass(self.entries, self.x, self.state.W_dec, self.b_dec, impl=impl)
        self.transposed = kernels.by_latent(self.entries, F, impl=impl)
        self.s = torch.full((N,), 0.01)
        self.sums = kernels.latent_pass(
            self.entries, self.out.u, self.transposed, self.state.threshold, self.s, OBJECTIVE, impl=impl
        )
        self.code = kernels.dense_encode(*given, impl=impl)
        self.ok, self.step = torch.ones((), dtype=torch.int32), torch.zeros((), dtype=torch.int64)

    def arguments(self, name: str) -> list:
        given = (self.x, self.state.W_enc.T, self.state.b_enc, self.state.threshold, 0.3)
        after = (RULE, self.ok, self.step)
        return {
            "encode_entries": [*given, 40],
            "residual_pass": [self.entries, self.x, self.state.W_dec, self.b_dec],
            "by_latent": [self.entries, F],
            "latent_pass": [self.entries, self.out.u, self.transposed, self.state.threshold, self.s, OBJECTIVE],
            "weight_gradients": [self.transposed, self.sums, self.out.residual, self.x],
            "encoder_times": [self.state.W_enc, self.sums.db_enc],
            "update_from_entries": [self.state, self.transposed, self.sums, self.out.residual, self.x, *after],
            "settle": [self.state, self.step, 0.9],
            "dense_encode": list(given),
            "dense_backward": [torch.zeros(N, F), self.code, self.state.threshold, self.s, OBJECTIVE],
            "update_from_dense": [
                self.state, torch.zeros(F, D), torch.zeros(F, D), torch.zeros(F), torch.zeros(F),
                torch.ones(F, dtype=torch.int32), *after,
            ],
        }[name]  # fmt: skip


OPERATORS = (
    "encode_entries", "residual_pass", "by_latent", "latent_pass", "weight_gradients", "encoder_times",
    "update_from_entries", "settle", "dense_encode", "dense_backward", "update_from_dense",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_public_documented_and_runs(name):
    step = Step()
    assert name in kernels.__all__
    assert len(getattr(kernels, name).__doc__) > 60
    getattr(kernels, name)(*step.arguments(name), impl="pytorch")


BAD = [
    ("encode_entries", 0, torch.zeros(3), ValueError, r"x: expected shape \[N, d_model\], got \[3\]"),
    ("encode_entries", 1, torch.zeros(D, F, dtype=torch.bfloat16), TypeError, "W_enc: expected dtype float32, got bf"),
    ("encode_entries", 4, 0.0, ValueError, "bandwidth: expected a finite number > 0, got 0.0"),
    ("encode_entries", 5, -1, ValueError, "capacity: expected at least 0, got -1"),
    ("encode_entries", 5, 2.5, TypeError, "capacity: expected an int, got float"),
    ("residual_pass", 0, None, TypeError, "entries: expected an Entries, got NoneType"),
    ("residual_pass", 1, torch.zeros(N + 1, D), ValueError, r"x: expected shape \[5, 6\], got \[6, 6\]"),
    ("residual_pass", 1, torch.zeros(N, D, dtype=torch.bfloat16), TypeError, "x: expected dtype float32 or float64"),
    ("residual_pass", 3, torch.zeros(D + 1), ValueError, r"b_dec: expected shape \[6\], got \[7\]"),
    ("by_latent", 1, -1, ValueError, "d_sae: expected at least 0, got -1"),
    ("by_latent", 1, 2.0, TypeError, "d_sae: expected an int, got float"),
    ("latent_pass", 1, torch.zeros(3), ValueError, r"u: expected shape \[\d+\], got \[3\]"),
    ("latent_pass", 2, "x", TypeError, "transposed: expected a ByLatent, got str"),
    ("latent_pass", 4, torch.zeros(N - 1), ValueError, r"s: expected shape \[5\], got \[4\]"),
    ("latent_pass", 5, OBJECTIVE._replace(bandwidth=0.0), ValueError, "objective.bandwidth: expected a finite number"),
    (
        "latent_pass",
        5,
        OBJECTIVE._replace(tanh_slope=torch.zeros(1)),
        ValueError,
        r"objective.tanh_slope: expected shape \[\], got \[1\]",
    ),
    (
        "latent_pass",
        5,
        OBJECTIVE._replace(frequency_slope=torch.tensor(math.nan)),
        ValueError,
        "objective.frequency_slope: expected a finite number",
    ),
    ("latent_pass", 5, OBJECTIVE._replace(ste_to_z=1), TypeError, "objective.ste_to_z: expected a bool, got int"),
    ("weight_gradients", 1, (1, 2), TypeError, "sums: expected a LatentSums, got tuple"),
    ("weight_gradients", 3, torch.zeros(N + 1, D), ValueError, r"x_centred: expected shape \[5, d_in\], got \[6, 6\]"),
    ("encoder_times", 1, torch.zeros(F + 1), ValueError, r"db_enc: expected shape \[7\], got \[8\]"),
    ("update_from_entries", 0, state()._replace(last=None), TypeError, "state.last: expected a torch.Tensor, got None"),
    ("update_from_entries", 0, state()._replace(W_enc=torch.zeros(D, F).T), ValueError, "W_enc: expected a contiguous"),
    ("update_from_entries", 0, state()._replace(W_enc_low=torch.zeros(F, D)), TypeError, "W_enc_low: .* bfloat16"),
    (
        "update_from_entries",
        5,
        RULE._replace(beta2=1.5),
        ValueError,
        "rule.beta2: expected a finite number > 0 and ≤ 1",
    ),
    (
        "update_from_entries",
        5,
        RULE._replace(learning_rate=torch.ones((), dtype=torch.int64)),
        TypeError,
        "rule.learning_rate: expected dtype float32 or float64, got int64",
    ),
    (
        "update_from_entries",
        5,
        RULE._replace(learning_rate=torch.ones((), device="meta")),
        ValueError,
        "rule.learning_rate: expected device cpu, got meta",
    ),
    (
        "update_from_entries",
        5,
        RULE._replace(learning_rate=torch.tensor(-1.0)),
        ValueError,
        "rule.learning_rate: expected a finite number ≥ 0, got -1.0",
    ),
    ("update_from_entries", 6, torch.ones(()), TypeError, "ok: expected dtype int32, got float32"),
    ("update_from_entries", 7, torch.zeros(1, dtype=torch.int64), ValueError, r"step: expected shape \[\], got \[1\]"),
    ("settle", 2, 0.0, ValueError, "beta2: expected a finite number > 0 and ≤ 1, got 0.0"),
    ("dense_encode", 3, torch.zeros(F, dtype=torch.bfloat16), TypeError, "threshold: expected dtype float32, got bf"),
    ("dense_backward", 0, torch.zeros(N, F + 1), ValueError, r"code.f: expected shape \[5, 8\], got \[5, 7\]"),
    (
        "dense_backward",
        4,
        OBJECTIVE._replace(tanh_slope=torch.zeros(())),
        TypeError,
        "objective.tanh_slope: expected a number, got Tensor",
    ),
    ("dense_backward", 1, None, TypeError, "code: expected a DenseCode, got NoneType"),
    ("update_from_dense", 1, torch.zeros(F, D + 1), ValueError, r"dW_enc: expected shape \[7, 6\], got \[7, 7\]"),
    ("update_from_dense", 5, torch.ones(F), TypeError, "touched: expected dtype int32, got float32"),
]


@pytest.mark.parametrize(("name", "position", "value", "error", "message"), BAD, ids=lambda v: str(v)[:30])
def test_messages(name, position, value, error, message):
    arguments = Step().arguments(name)
    arguments[position] = value
    with pytest.raises(error, match=message):
        getattr(kernels, name)(*arguments, impl="pytorch")


@pytest.mark.parametrize("name", OPERATORS)
def test_unknown_implementations_are_refused(name):
    with pytest.raises(ValueError, match="impl: expected one of"):
        getattr(kernels, name)(*Step().arguments(name), impl="cuda")


@pytest.mark.parametrize("impl", ["reference", "pytorch", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_come_as_tensors_are_the_same_numbers(impl, dtype):
    """To the bit: rates and slopes that fp32 holds."""
    found = []
    for tensors in (False, True):
        step = Step()
        given = step.arguments("latent_pass"), step.arguments("update_from_entries")
        objective, rule = OBJECTIVE._replace(frequency_slope=0.125, tanh_slope=0.25, tanh_scale=2.0), given[1][5]
        rule = rule._replace(learning_rate=2.0**-7)
        if tensors:
            slopes = {name: torch.tensor(getattr(objective, name), dtype=dtype) for name in objective._fields[1:3]}
            objective = objective._replace(**slopes)
            rule = rule._replace(learning_rate=torch.tensor(rule.learning_rate, dtype=dtype))
        given[0][5], given[1][5] = objective, rule
        sums = kernels.latent_pass(*given[0], impl=impl)
        kernels.update_from_entries(*given[1], impl=impl)
        n = int(given[0][2].offsets[-1])
        found.append((sums.dz[:n], sums.dthreshold, given[1][0].W_dec, given[1][0].W_enc, given[1][0].threshold))
    for i, (number, tensor) in enumerate(zip(*found, strict=True)):
        assert_bitwise_equal(str(i), tensor, number)


@needs_triton
@pytest.mark.parametrize("first_room", [0, 1, 128])
def test_without_a_capacity_there_is_room_for_all(monkeypatch, first_room, device):
    """An implementation that must be told how much room to make is asked again when it was too little."""
    monkeypatch.setattr(api, "FIRST_ROOM", first_room)
    given = [t.to(device) if isinstance(t, torch.Tensor) else t for t in Step().arguments("encode_entries")[:-1]]
    expected = kernels.encode_entries(*given, impl="pytorch")
    entries = kernels.encode_entries(*given, impl="triton")
    stored = int(entries.offsets[-1])
    assert 0 < stored <= len(entries.z)
    assert_bitwise_equal("latents", entries.latents[:stored], expected.latents[:stored])
    assert_bitwise_equal("offsets", entries.offsets, expected.offsets)


def test_one_step_by_the_public_operators_is_the_trainers():
    from gemmascope.training.config import TrainConfig
    from gemmascope.training.trainer import SAETrainer

    x = normal(64, D, seed=9)
    trainer = SAETrainer(TrainConfig.short(d_sae=F, route="sparse", b_dec_init="zeros"), x, impl="pytorch")
    sae, latents, config = trainer.sae, trainer.state.latents, trainer.config
    mine = kernels.LatentState(*(None if t is None else t.clone() for t in latents))
    b_dec = sae.b_dec.detach().clone()
    trainer.update(x)

    scaled, bandwidth = x / sae.input_scale, config.loss.bandwidth
    entries = kernels.encode_entries(scaled - b_dec, mine.W_enc.T, mine.b_enc, mine.threshold, bandwidth)
    out = kernels.residual_pass(entries, scaled, mine.W_dec, b_dec)
    transposed = kernels.by_latent(entries, F)
    s = torch.full((len(x),), config.l0_coefficient_at(0) / len(x))
    sums = kernels.latent_pass(entries, out.u, transposed, mine.threshold, s, kernels.Objective(bandwidth))
    rule = kernels.Rule(config.learning_rate_at(0), config.adam_beta2, config.adam_eps, log_threshold=False)
    one, zero = torch.ones((), dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    kernels.update_from_entries(mine, transposed, sums, out.residual, scaled - b_dec, rule, one, zero)
    torch.testing.assert_close(mine.W_dec, sae.W_dec.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.W_enc, sae.W_enc.detach().T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.threshold, sae.threshold.detach(), rtol=1e-5, atol=1e-6)


def test_first_moments_are_there_where_beta1_is_above_0_and_all_of_them():
    latents, ok, step = state(), torch.tensor(1, dtype=torch.int32), torch.tensor(0)
    gradients = (latents.W_enc, latents.W_dec, latents.b_enc, latents.threshold, torch.ones(len(latents.last)).int())
    first = {f"{name}_m": getattr(latents, name).clone() for name in ("W_enc", "W_dec", "b_enc", "threshold")}
    for given, beta1, message in (
        (latents, 0.5, "expected first moments where rule.beta1 is above 0 alone, got none with 0.5"),
        (latents._replace(**first), 0.0, "expected first moments where rule.beta1 is above 0 alone, got some with 0.0"),
        (latents._replace(W_enc_m=first["W_enc_m"]), 0.5, "got None for W_dec_m, b_enc_m, threshold_m"),
        (latents._replace(**first | {"b_enc_m": first["W_enc_m"]}), 0.5, "state.b_enc_m"),
        (latents._replace(**first), 1.0, "rule.beta1: expected a number below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.update_from_dense(given, *gradients, RULE._replace(beta1=beta1), ok, step, impl="reference")
    with pytest.raises(ValueError, match="beta1 is above 0 alone, got some"):
        kernels.settle(latents._replace(**first), step, 0.9, impl="reference")
    kernels.settle(latents._replace(**first), step, 0.9, 0.5, impl="reference")
