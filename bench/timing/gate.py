"""What must be right before anything is timed. Ours: a step of each route against `reference_step` in fp64, and every
operator against the fp64 reference, by budget. Peers: what they compute of the same, against fp64."""

import copy
import dataclasses
import math

import torch
from torch import Tensor

from bench.arithmetic import truncation
from bench.contenders import Contender, Inputs
from bench.ours import Ours
from bench.timing.inputs import construct
from gemmascope import kernels
from gemmascope.kernels import Rule
from gemmascope.kernels.dispatch import choose
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.losses import Loss, loss_and_gradients
from gemmascope.training.state import TrainState
from gemmascope.training.step import StepFigures, dense_step, reference_step, sparse_step

# eps far above every gradient: the step is then proportional to the gradient, so that an error in one shows in the
# other, where Adam's own first step would be ±learning_rate whatever the gradient.
GATE_RULE = Rule(learning_rate=1.0, beta2=0.999, eps=1.0, log_threshold=True)
# A window so wide that dθ is never the rounding error of one entry, and λ of the size of what it is added to.
GATE_LOSS = Loss(l0_coefficient=0.02, bandwidth=1e-2)
GATE_LATENTS, GATE_DENSITY = 1024, 0.01
AGREEMENT_LATENTS = 4096
GATE_UPDATES = 3  # before the gate's, where there are first moments
GATE_MARGIN = 1e-6  # no z of the gate is closer to a decision than this, and what tensor cores cut off
# Of a case with more tokens. A GPU encodes up to 16 and up to 128 tokens by other launches than more of them.
GATE_TOKENS = 136
ULPS = {"fp32": 0.0, "tf32": 4 * 2.0**-10, "bf16": 4 * torch.finfo(torch.bfloat16).eps}


class RedGateError(Exception):
    """A result is wrong, or not that of the same work; it must not be timed."""


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
def _gate_saes(
    base: JumpReLUSAE, x: Tensor, tokens: int, dtype: str
) -> tuple[JumpReLUSAE, JumpReLUSAE, Tensor, Tensor]:
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
    return wide, narrow, latents.to(x.device), decided(narrow, x, GATE_LOSS.bandwidth, tokens, dtype)


def _tensors(state: TrainState, latents: Tensor) -> dict[str, Tensor]:
    """Weights and moments of some latents, and of b_dec, in fp64."""
    names, kinds = ("W_enc", "W_dec", "b_enc", "threshold"), ("", "_v") if state.b_dec_m is None else ("", "_v", "_m")
    found = {name + kind: getattr(state.latents, name + kind)[latents].double() for name in names for kind in kinds}
    found |= {"b_dec": state.sae.b_dec.detach().double(), "b_dec_v": state.b_dec_v.double()}
    return found if state.b_dec_m is None else found | {"b_dec_m": state.b_dec_m.double()}


def _first_moments(narrow: JumpReLUSAE, x: Tensor, rule: Rule) -> dict[str, Tensor]:
    """Moments as of earlier updates, fp32: of the gradient's size, but those of other latents and columns."""
    state = TrainState.start(copy.deepcopy(narrow), first_moments=True)
    reference_step(state, x.double(), GATE_LOSS, rule)
    found = _tensors(state, torch.arange(narrow.d_sae, device=x.device))
    return {name: m.flip(*range(m.dim())).float() for name, m in found.items() if name.endswith("_m")}


@torch.no_grad()
def _go_on(state: TrainState, latents: Tensor, moments: dict[str, Tensor]) -> None:
    """Let earlier updates have been made, by latents touched at different times, and have left these first moments."""
    state.updates.fill_(GATE_UPDATES)
    state.last[latents] = torch.arange(len(latents), device=latents.device) % (GATE_UPDATES + 1)
    for name, m in moments.items():
        if name == "b_dec_m":
            state.b_dec_m.copy_(m)
        else:
            getattr(state, name)[latents] = m.to(state.W_dec_v.dtype)


def take(route: str, state: TrainState, x: Tensor, loss: Loss, rule: Rule, capacity: int) -> StepFigures:
    return sparse_step(state, x, loss, rule, capacity) if route == "sparse" else dense_step(state, x, loss, rule)


def step_gate(route: str, base: JumpReLUSAE, x: Tensor, dtype: str, tokens: int, beta1: float = 0.0) -> float:
    """The largest share of its budget that an error of one step takes; `RedGateError` above 1.

    base: an SAE on the CPU; x [n, d_model] on the device, of which the step is made on ``tokens``, so that n is larger.
    beta1: above 0 it is not the first step, so that first moments decay and are corrected.

    ‖found − exact‖ ≤ one fp32 ulp of the tensor, plus 2·‖eager − exact‖ in fp32, or plus 4 ulp of the operands' dtype,
    of what the step changed, in tf32 and bf16; twice that for second moments, which are squares.
    """
    wide, narrow, latents, x = _gate_saes(base, x, tokens, dtype)
    every = torch.arange(len(latents), device=x.device)
    rule, options = GATE_RULE._replace(beta1=beta1), {"first_moments": beta1 > 0}
    exact, eager = (
        TrainState.start(copy.deepcopy(narrow).to(precision), **options) for precision in (torch.float64, x.dtype)
    )
    ours = TrainState.start(copy.deepcopy(wide).to(x.device), dtype, **options)
    if beta1:
        moments = _first_moments(narrow, x, rule)
        for state, of_state in ((exact, every), (eager, every), (ours, latents)):
            _go_on(state, of_state, moments)
    before = {name: value.clone() for name, value in _tensors(exact, every).items()}
    for state in (exact, eager):
        reference_step(state, x.to(state.sae.W_dec.dtype), GATE_LOSS, rule)
    expected, plain = _tensors(exact, every), _tensors(eager, every)

    take(route, ours, x, GATE_LOSS, rule, len(x) * len(latents))
    touched = exact.latents.last == exact.updates
    worst, place = 0.0, ""
    if (ours.latents.last == exact.updates).count_nonzero() != touched.count_nonzero():
        worst, place = float("inf"), "latents without an entry"
    for name, value in _tensors(ours, latents).items():
        rows = touched if name == "W_dec" else slice(None)  # the others are not normalised anew
        value, goal, start = value[rows], expected[name][rows], before[name][rows]
        budget = torch.finfo(torch.float32).eps * goal.norm() + ULPS[dtype] * (goal - start).norm()
        if dtype == "fp32":
            budget += 2 * (plain[name][rows] - goal).norm()
        share = share_of((value - goal).norm().item(), budget.item() * (2 if name.endswith("_v") else 1))
        if share > worst:
            worst, place = share, name
    if not worst <= 1:
        raise RedGateError(f"{route} step, {dtype}: error of {place} is {worst:.3g} times its budget")
    return worst


def share_of(error: float, budget: float) -> float:
    """What an error takes of its budget: 0 where there is none, be the budget 0 too; infinite where it is NaN."""
    if error == 0:
        return 0.0
    return error / budget if budget > 0 and not math.isnan(error) else math.inf


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the Euclidean norm; infinite where the shapes differ, NaN where either is."""
    if found.shape != exact.shape:
        return float("inf")
    found, exact = found.detach().double(), exact.detach().double()
    return ((found - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


@torch.no_grad()
def operator_gate(impl: str, inputs: Inputs) -> float:
    """The same for the operators on ``inputs``: error ≤ 2·error of the reference in that dtype + one of its ulp.

    What holds sums over d_model terms is given √d_model roundings of fp32 more, as many as they leave when they are
    made one after another: PyTorch's own products differ by that much between libraries. On a GPU also the truncation
    of its tensor cores.
    """
    ours, eager, exact = Ours(impl), Ours("reference"), Ours("reference")
    for contender in (ours, eager, exact):
        contender.set_up(inputs)
    chosen = choose(impl, inputs.x.device, ours.operand_dtype).impl
    exact.x = ours.x.double()
    exact.weights = tuple(w.double() for w in ours.weights)
    exact.released = copy.deepcopy(ours.released).double()
    exact.released.impl = "reference"
    exact.upstream, exact.pre = tuple(t.double() for t in ours.upstream), ours.pre.double()
    eager.upstream, eager.pre, eager.code = ours.upstream, ours.pre, ours.code
    exact.code = kernels.SparseCode(ours.code.values.double(), *ours.code[1:])
    worst, place = 0.0, ""

    def judge(name: str, found: Tensor, plain: Tensor, goal: Tensor) -> None:
        nonlocal worst, place
        budget = 2 * relative_error(plain, goal) + torch.finfo(found.dtype).eps
        if name in ("encode", "infer", "module"):
            budget += torch.finfo(torch.float32).eps / 2 * inputs.sae.d_model**0.5
            if inputs.x.is_cuda and inputs.dtype == "bf16":  # inference never rounds to tf32
                budget += truncation(inputs.sae.d_model, "bf16")
        share = share_of(relative_error(found, goal), budget)
        if share > worst:
            worst, place = share, name

    for name in ("encode", "infer", "module", "decode", "decode_backward", "jumprelu", "jumprelu_backward"):
        results = [getattr(contender, name)() for contender in (ours, eager, exact)]
        if name == "encode":
            results = [code.to_dense() for code in results]
        for index, triple in enumerate(zip(*map(_floats, results), strict=True)):
            judge(f"{name}[{index}]" if index else name, *triple)
    if not worst <= 1:
        raise RedGateError(f"{chosen}, {inputs.dtype}: error of {place} is {worst:.3g} times its budget")
    return worst


def _floats(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    tensors = (result,) if isinstance(result, Tensor) else result
    return [t for t in tensors if t is not None and t.is_floating_point()]


def gate_tokens(case_tokens: int) -> int:
    """As many tokens as a gate of a case needs to launch what is timed."""
    return min(case_tokens, GATE_TOKENS)


def drawn(tokens: int) -> int:
    """Tokens to draw, so that enough of them are clear of every decision."""
    return 3 * tokens + 16


def agreement_inputs(
    d: int,
    f: int,
    l0: float,
    device: torch.device,
    dtype: str,
    skew: float,
    tokens: int = GATE_TOKENS,
    beta1: float = 0.0,
) -> Inputs:
    """Few tokens and latents, enough to tell whether two contenders do the same. Tokens with a z within rounding of a
    decision are left out: fp32 and fp64 may part there."""
    f = min(f, AGREEMENT_LATENTS)
    inputs = construct(d, f, drawn(tokens), min(l0, f / 8), device, dtype=dtype, skew=skew, beta1=beta1)
    return dataclasses.replace(inputs, x=decided(inputs.sae, inputs.x, inputs.loss.bandwidth, tokens, dtype))


@torch.no_grad()
def decided(sae: JumpReLUSAE, x: Tensor, bandwidth: float, tokens: int, dtype: str) -> Tensor:
    """The first ``tokens`` rows of x of which no latent is within rounding of its threshold or of an edge of its
    window. Raises `RedGateError` where there are fewer. Partial sums count as no larger than the token's largest z."""
    z = (x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    distance = (z - sae.threshold.double()).abs()
    margin = GATE_MARGIN + truncation(sae.d_model, dtype) * z.abs().amax(1)
    far = torch.minimum(distance, (distance - bandwidth / 2).abs()).amin(1) > margin
    if far.sum() < tokens:
        raise RedGateError(f"of {len(x)} tokens {int(far.sum())} are clear of every decision, {tokens} are needed")
    return x[far][:tokens]


@torch.no_grad()
def exact_outputs(inputs: Inputs) -> dict[str, Tensor]:
    """`Contender.outputs` of the JumpReLU SAE in fp64."""
    sae = copy.deepcopy(inputs.sae).double()
    sae.impl = "reference"
    x = inputs.x.double()
    out = loss_and_gradients(sae, x, inputs.loss)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    x_hat = sae(x)
    return {"x_hat": x_hat, "module": x_hat, "loss": out.loss} | {name: getattr(out.gradients, name) for name in names}


def agreement(contender: Contender, inputs: Inputs, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each of the contender's outputs; `RedGateError` beyond its tolerance. Sets the contender up."""
    contender.set_up(inputs)
    found = contender.outputs()
    exact = contender.exact(inputs) or exact
    errors = {name: relative_error(value, exact[name]) for name, value in found.items()}
    for name, error in errors.items():
        allowed = contender.module_tolerance if name == "module" else None
        allowed = allowed or contender.tolerance
        if not error <= allowed:
            raise RedGateError(f"{name} differs by {error:.3g} of its norm; {allowed:g} is allowed")
    return errors
