"""One training step, encode to updated weights, beside the steps people run today: python -m bench.step [--save]

Contenders: our routes `sparse` and `dense`; `saelens` (JumpReLUTrainingSAE with its defaults) and `saelens_autocast`,
where sae_lens is installed; `eager`, dense PyTorch under bf16 autocast with fused Adam, and `compiled`, the same by
torch.compile. All begin with x on the device. --dtype is that of our routes.

Nothing is trained beforehand: x is synthetic (normal deviates of a decaying spectrum, mean squared norm 1, fixed seed)
and θ the quantile of each latent's z at which --l0 latents a token fire, from the mean and standard deviation of a
sample. --skew s lets latent j fire in proportion to (j+1)^-s. The learning rate is too small to move L0.

First the gate: a step by each of our routes against `reference_step` in fp64; only on a green gate is anything timed.
Times are medians over steps launched one after another, between CUDA events. Operators of the sparse step are timed in
a step of their own, the device kept busy until the host is done launching. On a CPU, which serves to test this script,
our routes run on the reference implementation. --determinism: 50 steps from one state, compared bit for bit. The last
line of standard output is one JSON document; --save appends its rows to bench/results/step.jsonl.
"""

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.kernels import provenance
from bench.peers import plain_parameters, plain_step, saelens_step
from bench.step_gate import GATE_TOKENS, gate, spread_of_z, take, threshold_at
from gemmascope import step as step_module
from gemmascope.kernels.training import Rule, training_operators
from gemmascope.losses import Loss
from gemmascope.memory import GIB, training_memory
from gemmascope.sae import JumpReLUSAE
from gemmascope.step import COMPUTE_DTYPES, StepFigures, TrainState, sparse_step
from gemmascope.trainer import CAPACITY_MARGIN, CAPACITY_UNIT

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
SHAPES = ("2304x16384", "2304x65536", "3584x131072", "2304x1048576")
OURS = ("sparse", "dense")
CONTENDERS = (*OURS, "saelens", "saelens_autocast", "eager", "compiled")
# Dense matrix rates in 10^12 FLOP/s and memory rate in 10^9 byte/s [NVIDIA's data sheets, SXM modules].
PEAKS = {
    "NVIDIA H100 80GB HBM3": {"bf16": 989, "tf32": 494, "fp32": 67, "gbps": 3350},
    "NVIDIA H200": {"bf16": 989, "tf32": 494, "fp32": 67, "gbps": 4800},
}
LOSS = Loss(coefficient=6e-4, bandwidth=1e-3)
RULE = Rule(learning_rate=1e-7, beta2=0.999, eps=1e-8, log_threshold=True)
WARM_UP = 5


def activations(n: int, d: int, device: torch.device, seed: int) -> Tensor:
    """[n, d] fp32, of one distribution whatever the seed."""
    mixing, fresh = (torch.Generator(device).manual_seed(s) for s in (0, 1 + seed))
    spectrum = torch.arange(1, d + 1, device=device) ** -0.5
    mix = torch.randn(d, d, generator=mixing, device=device) * (spectrum / (d**0.5 * spectrum.norm()))[:, None]
    return torch.randn(n, d, generator=fresh, device=device) @ mix


class Size(NamedTuple):
    """What a sparse step worked on. active and entries: of the batch; touched: latents; itemsize: of an operand."""

    n: int
    d: int
    f: int
    active: int
    entries: int
    capacity: int
    touched: int
    itemsize: int


def work(operator: str, size: Size) -> tuple[int, int]:
    """(FLOPs, bytes) that an operator of the sparse step cannot do without.

    encode_entries: one [N, d]·[d, F] product; x and W_enc read once, a bit per (token, latent) and fp32 z of each entry
    written and read, entries (z, latent, token) written. residual_pass: 2d FLOPs an active entry for x̂ and 2d an entry
    for u, each gathering a row of W_dec; x read and the residual written. by_latent: keys read, int64 order and
    offsets written. latent_pass: 36 bytes an entry, 28 a latent. encoder_times: W_enc read. update_from_entries: 4d
    FLOPs an entry, gathering a row of x and of the residual; of each touched latent two rows of weights and two of
    second moments read and written, 15 FLOPs an element, and the bf16 copies written. L2 serves gathers when the rows
    fit: more than 100 % of the memory rate is possible.
    """
    n, d, f, active, entries, capacity, touched, b = size
    return {
        "encode_entries": (2 * n * d * f, b * (n * d + d * f) + n * f // 4 + 20 * entries),
        "residual_pass": (2 * d * (active + entries), b * d * (active + entries + n) + 4 * n * d + 12 * entries),
        "by_latent": (0, 12 * capacity + 8 * f),
        "latent_pass": (20 * entries, 36 * entries + 28 * f),
        "encoder_times": (2 * d * f, b * d * f + 4 * f),
        "update_from_entries": (
            4 * d * entries + 30 * d * touched,
            2 * b * d * entries + 12 * entries + (32 + 4 * (b == 2)) * d * touched,
        ),
    }[operator]


def mark(device: torch.device) -> "float | torch.cuda.Event":
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(step: Callable[[], object], device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each step, launched one after another without waiting."""
    for _ in range(WARM_UP):
        step()
    synchronise(device)
    marks = [mark(device)]
    for _ in range(steps):
        step()
        marks.append(mark(device))
    synchronise(device)
    return [milliseconds(*pair) for pair in itertools.pairwise(marks)]


class TimedOperators:
    """An implementation of the training operators that keeps the time of each call."""

    def __init__(self, impl: str, device: torch.device):
        self.operators, self.device, self.calls = training_operators(impl), device, []

    def __getattr__(self, name: str) -> Callable:
        operator = getattr(self.operators, name)

        def timed(*arguments, **named):
            start = mark(self.device)
            result = operator(*arguments, **named)
            self.calls.append((name, start, mark(self.device)))
            return result

        return timed


def time_operators(step: Callable[[], object], impl: str, device: torch.device, steps: int) -> dict[str, float]:
    """Median milliseconds of each operator, in the order of their calls."""
    found: dict[str, list[float]] = {}
    for _ in range(steps):
        operators = TimedOperators(impl, device)
        if device.type == "cuda":
            torch.cuda._sleep(
                20_000_000
            )  # clock cycles, about 10 ms: without it, events would time the host's launches
        with mock.patch.object(step_module, "training_operators", lambda impl, operators=operators: operators):
            step()
        synchronise(device)
        for name, start, end in operators.calls:
            found.setdefault(name, []).append(milliseconds(start, end))
    return {name: statistics.median(times) for name, times in found.items()}


def our_state(base: JumpReLUSAE, dtype: str, device: torch.device) -> TrainState:
    return TrainState.start(copy.deepcopy(base).to(device), dtype)


def room_for(state: TrainState, x: Tensor) -> int:
    """Room for the entries of x, with the trainer's margin."""
    seen = sparse_step(state, x, LOSS, RULE, CAPACITY_UNIT).n_entries.item()
    state.stalled.zero_()
    return CAPACITY_UNIT * math.ceil(CAPACITY_MARGIN * max(1, seen) / CAPACITY_UNIT)


def changed_bits(state: TrainState, step: Callable[[], object], repeats: int) -> int:
    """Of ``repeats`` steps from one state, how many end in other bits than the first."""
    tensors = [t for t in state.latents if t is not None]
    tensors += [state.sae.b_dec.data, state.b_dec_v, state.updates, state.tokens_since_fired]
    start = [t.clone() for t in tensors]

    def result() -> list[Tensor]:
        for tensor, value in zip(tensors, start, strict=True):
            tensor.copy_(value)
        step()
        return tensors

    first = [t.clone() for t in result()]
    return sum(not all(map(torch.equal, result(), first)) for _ in range(repeats - 1))


def operator_rows(state: TrainState, x: Tensor, capacity: int, step: Callable, options, peaks) -> Iterator[dict]:
    """A row for each operator of the sparse step."""
    times = time_operators(step, state.impl, x.device, options.steps)
    figures = step()
    size = Size(
        *x.shape,
        state.sae.d_sae,
        active=round(figures.l0.item() * len(x)),
        entries=int(figures.n_entries),
        capacity=capacity,
        touched=int((state.latents.last == state.updates).sum()),
        itemsize=2 if options.dtype == "bf16" else 4,
    )
    for name, time_ms in times.items():
        flops, n_bytes = work(name, size)
        row = {"kind": "operator", "name": name, "p50_ms": time_ms, "flops": flops, "bytes": n_bytes}
        if peaks:
            least = max(flops / peaks[options.dtype] / 1e9, n_bytes / peaks["gbps"] / 1e6)
            row |= {"floor_ms": least, "pct_roofline": 100 * least / time_ms}
        yield row | size._asdict()


def contender_rows(name: str, base: JumpReLUSAE, x: Tensor, options, peaks) -> Iterator[dict]:
    device = x.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    row: dict[str, object] = {"kind": "step", "name": name}
    if name in OURS:
        state = our_state(base, options.dtype, device)
        capacity = room_for(state, x) if name == "sparse" else 0

        def step() -> StepFigures:
            return take(name, state, x, LOSS, RULE, capacity)

        row |= {"dtype": options.dtype, "impl": state.impl, "l0_first": step().l0.item()}
        if name == "sparse":
            counted = training_memory(base.d_model, base.d_sae, len(x), options.dtype, l0=capacity / len(x))
            row["counted_gib"] = counted.total / GIB
    elif name.startswith("saelens"):
        row["dtype"] = "bf16 autocast" if name == "saelens_autocast" else "fp32"
        step = saelens_step(base, x, RULE, autocast=name == "saelens_autocast")
    else:
        row["dtype"] = "bf16 autocast"
        parameters = plain_parameters(copy.deepcopy(base).to(device))
        step = plain_step(parameters, x, LOSS, RULE, compiled=name == "compiled")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = sorted(time_steps(step, device, options.steps))
    row |= {"p50_ms": statistics.median(times), "min_ms": times[0], "max_ms": times[-1]}
    if device.type == "cuda":
        row["peak_gib"] = (torch.cuda.max_memory_allocated(device) - held) / GIB
    if name in OURS:
        figures = step()
        if figures.stalled or figures.skipped:
            raise SystemExit(f"{name}: updates were withheld; the times are not those of a step")
        row["l0"] = figures.l0.item()
    yield row
    if name == "sparse":
        yield from operator_rows(state, x, capacity, step, options, peaks)
    if options.determinism and name in OURS:
        yield {"kind": "determinism", "name": name, "runs": 50, "different": changed_bits(state, step, 50)}


def shape_rows(d: int, f: int, options, device: torch.device, peaks) -> Iterator[dict]:
    """Every row of one shape, or one that says why there is none."""
    impl = "triton" if device.type == "cuda" else "reference"
    base = JumpReLUSAE(d, f, impl=impl, generator=torch.Generator().manual_seed(0))
    ours = [name for name in options.only if name in OURS]
    try:
        shares = gate(ours, base, activations(GATE_TOKENS, d, device, seed=0), options.dtype)
    except torch.OutOfMemoryError as error:
        yield {"kind": "gate", "skipped": f"OutOfMemoryError: {error}"}
        return
    yield from ({"kind": "gate", "name": name, "share_of_budget": share} for name, share in shares.items())
    x = activations(options.tokens, d, device, seed=1)
    spread = spread_of_z(base, activations(options.tokens, d, device, seed=2))
    for l0 in options.l0:
        base.threshold.data = threshold_at(*spread, l0, options.skew)
        for name in options.only:
            if name.startswith("saelens") and importlib.util.find_spec("sae_lens") is None:
                yield {"kind": "step", "name": name, "target_l0": l0, "skipped": "sae_lens is not installed"}
                continue
            try:
                for row in contender_rows(name, base, x, options, peaks):
                    yield row | {"target_l0": l0}
            except Exception as error:  # what a peer cannot do is reported, and the others go on
                if name in OURS and not isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = f"{type(error).__name__}: {error}"
                yield {"kind": "step", "name": name, "target_l0": l0, "skipped": reason}
            gc.collect()
            torch.cuda.empty_cache()


def line(row: dict, base_ms: dict[str, float]) -> str:
    if "skipped" in row:
        return f"  {row.get('name', ''):22s} {row['skipped'].splitlines()[0]}"
    if row["kind"] == "gate":
        return f"  {row['name']:22s} gate green, {row['share_of_budget']:.2f} of the budget"
    if row["kind"] == "determinism":
        return f"  {row['name']:22s} {row['different']} of {row['runs']} runs differ from the first"
    text = f"  {row['name']:22s} {row['p50_ms']:10.3f} ms"
    if row["kind"] == "operator":
        return "  " + text + (f"  {row['pct_roofline']:5.1f} % of the roofline" if "pct_roofline" in row else "")
    text += f"  L0 {row['l0']:.1f}" if "l0" in row else ""
    text += f"  {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    text += f" ({row['counted_gib']:.1f} counted)" if "counted_gib" in row else ""
    return text + "".join(f"  {row['p50_ms'] / ms:.2f} x {name}" for name, ms in base_ms.items() if name != row["name"])


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="d_model x d_sae, as 2304x16384")
    parser.add_argument("--l0", nargs="+", type=float, default=[20, 64, 200])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--skew", type=float, default=0.0, help="how unequally the latents fire; 0: equally")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="bf16", help="compute_dtype of our routes")
    parser.add_argument("--device", default="cuda", help="cpu only to test this script")
    parser.add_argument("--determinism", action="store_true", help="also repeat one step 50 times")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = provenance(device)
    if device.type == "cpu":
        facts["device"] = platform.machine()
    peaks = PEAKS.get(facts["device"])
    shared = {"tokens": options.tokens, "steps": options.steps, "activations": "synthetic", "skew": options.skew}
    rows = []
    for shape in options.shapes:
        d, f = map(int, shape.split("x"))
        print(f"{shape}, {options.tokens} tokens, {options.dtype}, {facts['device']}")
        target, base_ms = None, {}
        for row in shape_rows(d, f, options, device, peaks):
            if row.get("target_l0") != target:
                target, base_ms = row["target_l0"], {}
                print(f" L0 {target:g}")
            if row["kind"] == "step" and row["name"] in OURS and "skipped" not in row:
                base_ms[row["name"]] = row["p50_ms"]
            print(line(row, base_ms), flush=True)
            rows.append(row | {"d_model": d, "d_sae": f} | shared | facts)
            if options.save:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main()
