"""Every public operator with arguments that go together, by name, and what it makes of them."""

from typing import Any

import torch
from torch import Tensor

from gemmascope import kernels
from tests.helpers import normal

N, D, F = 5, 6, 40
BANDWIDTH = 0.3
OBJECTIVE = kernels.Objective(BANDWIDTH, frequency_slope=0.001, tanh_slope=0.1, tanh_scale=0.5)
RULE = kernels.Rule(1e-2, 0.9, 1e-8, False)
FP32, INT64 = {"dtype": torch.float32, "device": "cpu"}, {"dtype": torch.int64, "device": "cpu"}


def state() -> kernels.LatentState:
    W = torch.nn.functional.normalize(normal(F, D, seed=1), dim=1)
    weights = (W.clone(), W, normal(F, seed=2), normal(F, seed=3).abs())
    moments = (torch.full_like(w, 0.1) for w in weights)
    return kernels.LatentState(*weights, *moments, last=torch.zeros(F, **INT64))


def arguments(impl: str) -> dict[str, dict[str, Any]]:
    """operator → its arguments by name; those of the training step are of one step by ``impl``."""
    x, latents, b_dec, s = normal(N, D), state(), normal(D, seed=4), torch.full((N,), 0.01, **FP32)
    ok, step = torch.ones((), dtype=torch.int32, device="cpu"), torch.tensor(3, **INT64)
    encoder = {"x": x, "W_enc": latents.W_enc.T, "b_enc": latents.b_enc, "threshold": latents.threshold}
    training = {**encoder, "bandwidth": BANDWIDTH}
    code = kernels.encode(**encoder, impl=impl)
    entries = kernels.encode_entries(**training, impl=impl)
    nnz = int(entries.offsets[-1])  # what lies beyond is undefined
    entries = kernels.Entries(*(t[:nnz] for t in entries[:3]), entries.offsets)
    out = kernels.residual_pass(entries, x, latents.W_dec, b_dec, impl=impl)
    lists = kernels.by_latent(entries, F, impl=impl)
    sums = kernels.latent_pass(entries, out.u, lists, latents.threshold, s, OBJECTIVE, impl=impl)
    rows = {"residual": out.residual, "x_centred": x}
    update = {"rule": RULE, "ok": ok, "step": step}
    dense = kernels.dense_encode(**training, impl=impl)
    gradients = {"db_enc": sums.db_enc, "dthreshold": sums.dthreshold}
    return {
        "jumprelu": {"pre": normal(N, F), "b_enc": latents.b_enc, "threshold": latents.threshold, "bandwidth": 0.5},
        "preactivations": {name: encoder[name] for name in ("x", "W_enc", "b_enc")},
        "encode": encoder,
        "decode": {"code": code, "W_dec": latents.W_dec, "b_dec": b_dec},
        "encode_entries": {**training, "capacity": N * F, "tf32": False},
        "encode_topk": {
            **{name: encoder[name] for name in ("x", "W_enc", "b_enc")}, "k": 3, "of": "batch",
            "among": normal(F, seed=8) > -0.5, "tf32": False,
        },
        "residual_pass": {"entries": entries, "x": x, "W_dec": latents.W_dec, "b_dec": b_dec},
        "by_latent": {"entries": entries, "d_sae": F},
        "latent_pass": {
            "entries": entries, "u": out.u, "transposed": lists, "threshold": latents.threshold, "s": s,
            "objective": OBJECTIVE,
        },
        "weight_gradients": {"transposed": lists, "sums": sums, **rows},
        "encoder_times": {"W_enc": latents.W_enc, "db_enc": sums.db_enc},
        "update_from_entries": {"state": latents, "transposed": lists, "sums": sums, **rows, **update},
        "settle": {"state": latents, "step": step, "beta2": 0.9},
        "dense_encode": {**training, "tf32": False},
        "dense_backward": {
            "u": normal(N, F, seed=5), "code": dense, "threshold": latents.threshold, "s": s, "objective": OBJECTIVE,
        },
        "update_from_dense": {
            "state": latents, "dW_enc": normal(F, D, seed=6), "dW_dec": normal(F, D, seed=7), **gradients,
            "touched": dense.touched, **update,
        },
    }  # fmt: skip


OPERATORS = (
    "jumprelu", "preactivations", "encode", "decode", "encode_entries", "encode_topk", "residual_pass", "by_latent",
    "latent_pass", "weight_gradients", "encoder_times", "update_from_entries", "settle", "dense_encode",
    "dense_backward", "update_from_dense",
)  # fmt: skip


def copied(value: Any) -> Any:
    """The same with tensors of its own, which an operator may change."""
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.preserve_format)
    if isinstance(value, tuple):
        parts = map(copied, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
