"""The parity gate of `bench.step`: one step of each route against `reference_step` in fp64."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gemmascope.kernels.training import Rule
from gemmascope.losses import Loss
from gemmascope.sae import JumpReLUSAE
from gemmascope.step import StepFigures, TrainState, dense_step, reference_step, sparse_step

# eps far above every gradient: the step is then proportional to the gradient, so that an error in one shows in the
# other, where Adam's own first step would be ±learning_rate whatever the gradient.
GATE_RULE = Rule(learning_rate=1.0, beta2=0.999, eps=1.0, log_threshold=True)
# A window so wide that dθ is never the rounding error of one entry, and λ of the size of what it is added to.
GATE_LOSS = Loss(coefficient=0.02, bandwidth=1e-2)
GATE_TOKENS, GATE_LATENTS, GATE_DENSITY = 128, 4096, 0.01
GATE_MARGIN = 1e-6  # no z of the gate is closer to a decision than this
ULPS = {"fp32": 0.0, "tf32": 4 * 2.0**-10, "bf16": 4 * torch.finfo(torch.bfloat16).eps}


@torch.no_grad()
def spread_of_z(sae: JumpReLUSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent's z over a sample, [d_sae] fp32 on the CPU."""
    parts = []
    for rows in sae.W_enc.T.split(16384):
        z = (x - sae.b_dec.to(x)) @ rows.to(x).T
        parts.append(torch.stack([z.mean(0), z.std(0)]).cpu())
    mean, deviation = torch.cat(parts, dim=1)
    return mean + sae.b_enc, deviation


def threshold_at(mean: Tensor, deviation: Tensor, l0: float, skew: float = 0.0) -> Tensor:
    """θ at which ``l0`` latents a token fire, each on half of them at most, of normal z; at least 1e-6."""
    share = torch.arange(1, len(mean) + 1, dtype=torch.float64) ** -skew
    frequency = (l0 * share / share.sum()).clamp(max=0.5)
    quantile = -torch.special.ndtri(frequency).to(mean.dtype)
    return (mean + deviation * quantile).clamp(min=1e-6)


@torch.no_grad()
def _gate_saes(base: JumpReLUSAE, x: Tensor) -> tuple[JumpReLUSAE, JumpReLUSAE, Tensor, Tensor]:
    """The SAE at full width and the same in fp64, narrow; their common latents; activations.

    The narrow one has the first and the last latents; all others of the wide one never fire, so that both make the same
    step. Operands are numbers that bf16 holds, and no z is within rounding of a decision: every dtype decides alike.
    """
    generator = torch.Generator().manual_seed(2)
    wide, d, F = copy.deepcopy(base), base.d_model, base.d_sae
    latents = torch.arange(F)[(torch.arange(F) < GATE_LATENTS) | (torch.arange(F) >= F - GATE_LATENTS)]
    for weight in (wide.W_enc, wide.W_dec):
        weight.copy_(weight.bfloat16())
    wide.b_enc.copy_(0.01 * torch.randn(F, generator=generator))
    wide.b_dec.copy_(torch.randint(-1, 2, (d,), generator=generator) / 256)
    x = x.bfloat16().float() + wide.b_dec.to(x)
    narrow = JumpReLUSAE(d, len(latents), dtype=torch.float64, impl="reference")
    narrow.W_enc.copy_(wide.W_enc[:, latents])
    narrow.W_dec.copy_(wide.W_dec[latents])
    narrow.b_enc.copy_(wide.b_enc[latents])
    narrow.b_dec.copy_(wide.b_dec)
    theta = threshold_at(*spread_of_z(narrow, x.double()), GATE_DENSITY * len(latents)).float()
    narrow.threshold.copy_(theta)
    wide.threshold.fill_(1e3)
    wide.threshold[latents] = theta
    narrow.to(x.device)
    z = (x.double() - narrow.b_dec) @ narrow.W_enc + narrow.b_enc
    distance = (z - narrow.threshold).abs()
    clear = torch.minimum(distance, (distance - GATE_LOSS.bandwidth / 2).abs()).amin(1) > GATE_MARGIN
    return wide, narrow, latents.to(x.device), x[clear]


def _tensors(state: TrainState, latents: Tensor) -> dict[str, Tensor]:
    """Weights and second moments of some latents, and of b_dec, in fp64."""
    names = ("W_enc", "W_dec", "b_enc", "threshold")
    found = {name + v: getattr(state.latents, name + v)[latents].double() for name in names for v in ("", "_v")}
    return found | {"b_dec": state.sae.b_dec.detach().double(), "b_dec_v": state.b_dec_v.double()}


def take(route: str, state: TrainState, x: Tensor, loss: Loss, rule: Rule, capacity: int) -> StepFigures:
    return sparse_step(state, x, loss, rule, capacity) if route == "sparse" else dense_step(state, x, loss, rule)


def gate(routes: Sequence[str], base: JumpReLUSAE, x: Tensor, dtype: str) -> dict[str, float]:
    """Largest share of its budget that an error of each route takes; SystemExit above 1.

    base: an SAE on the CPU; x [N, d_model] on the device. ‖found − exact‖ ≤ one fp32 ulp of the tensor, plus
    2·‖eager − exact‖ in fp32, or plus 4 ulp of the operands' dtype, of what the step changed, in tf32 and bf16; twice
    that for second moments, which are squares.
    """
    wide, narrow, latents, x = _gate_saes(base, x)
    every = torch.arange(len(latents), device=x.device)
    exact, eager = (TrainState.start(copy.deepcopy(narrow).to(precision)) for precision in (torch.float64, x.dtype))
    before = {name: value.clone() for name, value in _tensors(exact, every).items()}
    for state in (exact, eager):
        reference_step(state, x.to(state.sae.W_dec.dtype), GATE_LOSS, GATE_RULE)
    expected, plain = _tensors(exact, every), _tensors(eager, every)

    shares = {}
    for route in routes:
        ours = TrainState.start(copy.deepcopy(wide).to(x.device), dtype)
        take(route, ours, x, GATE_LOSS, GATE_RULE, len(x) * len(latents))
        touched = ours.latents.last[latents] > 0
        worst, place = 0.0, ""
        if ours.latents.last.count_nonzero() != touched.count_nonzero():
            worst, place = float("inf"), "latents without an entry"
        for name, value in _tensors(ours, latents).items():
            rows = touched if name == "W_dec" else slice(None)  # the others are not normalised anew
            value, goal, start = value[rows], expected[name][rows], before[name][rows]
            budget = torch.finfo(torch.float32).eps * goal.norm() + ULPS[dtype] * (goal - start).norm()
            if dtype == "fp32":
                budget += 2 * (plain[name][rows] - goal).norm()
            share = ((value - goal).norm() / budget / (2 if name.endswith("_v") else 1)).item()
            if not share <= worst:
                worst, place = share, name
        if not worst <= 1:
            raise SystemExit(
                f"{route}, {dtype}: error of {place} is {worst:.3g} times its budget; nothing is timed on a red gate"
            )
        shares[route] = worst
    return shares
