"""What a first GPU is asked besides the tests and the suites, and what is predicted of it: `gpu_first_contact.sh` runs
this. Every command but `verdict` ends in one JSON line.

The predictions are those of notes/gpu-queue.md and of the instruction counts there; none comes from a GPU.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.ours import Ours
from bench.timing.inputs import construct
from bench.timing.measure import Clock
from gemmascope.kernels import encode_entries, entries
from gemmascope.training.step import Scheduled, sparse_step

REHEARSAL = bool(os.environ.get("FIRST_CONTACT_REHEARSAL"))
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
IMPL = "triton"
# d_model, d_sae, tokens, L0
COMMON = (16, 64, 6, 4.0) if REHEARSAL else (2304, 16384, 4096, 64.0)
WIDE = (16, 96, 6, 4.0) if REHEARSAL else (2304, 1 << 20, 4096, 64.0)
SMALL = (16, 64, 6, 4.0) if REHEARSAL else (256, 1024, 256, 16.0)
ENCODE_WIDE = f"encode {WIDE[1]} latents, "
ROUNDS = 1 if REHEARSAL else 10
DTYPE = "fp32" if REHEARSAL else "bf16"  # the interpreter by itself computes bf16 wrongly

METRICS = {
    "time_ns": "gpu__time_duration.sum",
    "issue_active": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hits": "lts__t_sector_hit_rate.pct",
}


def ours(sizes: tuple[int, int, int, float], dtype: str = DTYPE) -> Ours:
    d, f, tokens, l0 = sizes
    contender = Ours(IMPL)
    contender.set_up(construct(d, f, tokens, l0, DEVICE, dtype=dtype))
    contender.before("step")
    return contender


def median_ms(call: Callable[[], object], clock: Clock) -> float:
    for _ in range(1 if REHEARSAL else 3):
        call()
    return statistics.median(clock.time(call) for _ in range(ROUNDS))


# ---- commands: each prints what it found


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "host": platform.platform()}
    for name in ("torch", "triton", "numpy", "safetensors", "pytest"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found |= {name: shutil.which(name) for name in ("gcc", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi")}
    found["cuda"] = torch.cuda.is_available()
    if found["cuda"]:
        found |= {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
        found["memory_gib"] = torch.cuda.mem_get_info()[1] / 2**30
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
    return found


def one_step() -> dict[str, Any]:
    """For a profiler: the second step is the one that is launched warm."""
    contender = ours(COMMON)
    contender.step()
    contender.check_made()
    return {"steps": 1}


def small_step() -> dict[str, Any]:
    """For a memory checker: a step by each route, forward and backward."""
    contender = ours(SMALL)
    contender.step()
    dense = Ours(IMPL, "dense")
    dense.set_up(contender.inputs)
    for one in (contender, dense):
        one.step()
        one.check_made()
    contender.infer()
    contender.decode_backward()
    return {"steps": 3}


def encode_variants(clock: Clock) -> Iterator[tuple[str, float]]:
    from gemmascope.kernels.gpu import encode_gemm

    encode, operands = encoding(COMMON)
    config = encode_gemm.launch_config(*operands[:2])
    for stages in (3, 4):
        changed = dataclasses.replace(config, num_stages=stages)
        with mock.patch.object(encode_gemm, "encode_config", lambda *_, changed=changed: changed):
            yield f"encode, {stages} stages", median_ms(encode, clock)


def update_variants(clock: Clock) -> Iterator[tuple[str, float]]:
    from gemmascope.kernels.gpu import update

    contender = ours(COMMON)
    shipped = update.CONFIG
    for changes in ({}, {"long": 32}, {"long": 128}, {"unroll": 2}, {"long_warps": 4, "lanes": 4}):
        contender.forward()
        with mock.patch.object(update, "CONFIG", dataclasses.replace(shipped, **changes)):
            said = ", ".join(f"{name} {value}" for name, value in changes.items()) or "as shipped"
            yield f"backward and update, {said}", median_ms(contender.backward, clock)


def graph_variants(clock: Clock) -> Iterator[tuple[str, float]]:
    """A step as it is launched, and the same captured in a CUDA graph and replayed; a CPU calls it in both places."""
    contender = ours(COMMON)
    state, x, loss, rule = contender.state, contender.inputs.x, contender.inputs.loss, contender.inputs.rule
    scheduled = Scheduled.of(loss, rule, len(x), None if state.W_enc_low is None else 0)
    memory = scheduled.values().to(DEVICE)
    given, capacity = scheduled.like(memory), contender.capacity

    def step() -> object:
        return sparse_step(state, x, loss, rule, capacity, given)

    yield "step, launched", median_ms(step, clock)
    replay: Callable[[], object] = step
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    before = int(state.updates)
    yield "step, replayed", median_ms(replay, clock)
    contender.check_made()
    if int(state.updates) <= before:
        raise RuntimeError("the replayed steps made no update")


def scratch_variants(clock: Clock) -> Iterator[tuple[str, float]]:
    encode, _ = encoding(WIDE)
    for gib, room in ((1, entries.SCRATCH_BYTES), (4, entries.WIDE_SCRATCH_BYTES)):
        with mock.patch.object(entries, "WIDE_SCRATCH_BYTES", room):
            yield f"{ENCODE_WIDE}{gib} GiB of scratch", median_ms(encode, clock)


def encoding(sizes: tuple[int, int, int, float]) -> tuple[Callable[[], object], tuple]:
    """The encoder of a training step, ready to be called, and its operands."""
    contender = ours(sizes)
    state, inputs = contender.state, contender.inputs
    x = (inputs.x - state.sae.b_dec).detach().to(state.encoder_rows.dtype)
    operands = x, state.encoder_rows.T, state.sae.b_enc.detach(), state.sae.threshold.detach()
    arguments = (*operands, inputs.loss.bandwidth, contender.capacity)
    return lambda: encode_entries(*arguments, impl=IMPL), operands


def variants() -> dict[str, Any]:
    clock, found = Clock(DEVICE), {}
    for group in (encode_variants, update_variants, graph_variants, scratch_variants):
        try:
            for name, ms in group(clock):
                found[name] = ms
                print(f"{name}: {ms:.3f} ms", flush=True)
        except Exception as error:  # a variant that does not fit is a finding, the others are still wanted
            found[f"{group.__name__} failed"] = f"{type(error).__name__}: {error}"[:300]
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return found


def wide() -> dict[str, Any]:
    """The widest SAE, without the gate, whose fp64 state would take longer than the rest."""
    contender = ours(WIDE)
    ms = median_ms(contender.step, Clock(DEVICE))
    contender.check_made()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return {"step_ms": ms, "peak_gib": peak}


# ---- predictions

Found = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    says: str
    figure: Callable[[Found], float | None]
    """None where the sections it needs have no such figure."""
    holds: Callable[[float], bool]


def between(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


def over(low: float) -> Callable[[float], bool]:
    return lambda value: value > low


def zero(value: float) -> bool:
    return value == 0


def step_ms(section: str, contender: str = "ours", part: str = "step") -> Callable[[Found], float | None]:
    def figure(found: Found) -> float | None:
        for row in found.get(section, {}).get("rows", ()):
            if row["kind"] == "time" and (row["contender"], row["part"]) == (contender, part):
                return row["p50_ms"]
        return None

    return figure


def difference(first, second) -> Callable[[Found], float | None]:
    def figure(found: Found) -> float | None:
        a, b = first(found), second(found)
        return None if a is None or b is None else a - b

    return figure


def quotient(section: str, above: str, below: str) -> Callable[[Found], float | None]:
    def figure(found: Found) -> float | None:
        values = found.get(section, {})
        return values[above] / values[below] if above in values and below in values else None

    return figure


def value(section: str, key: str) -> Callable[[Found], float | None]:
    return lambda found: found.get(section, {}).get(key)


def status(section: str) -> Callable[[Found], float | None]:
    return lambda found: found.get("statuses", {}).get(section)


def changed_runs(found: Found) -> float | None:
    counts = [row["different"] for row in found.get("step", {}).get("rows", ()) if row["kind"] == "determinism"]
    return counts[0] if counts else None


def counter(kernel: str, metric: str) -> Callable[[Found], float | None]:
    """The last launch's, which is the warm one."""

    def figure(found: Found) -> float | None:
        launches = [one for one in found.get("counters", {}).get("launches", ()) if kernel in one["kernel"]]
        return launches[-1].get(metric) if launches else None

    return figure


PREDICTIONS = (
    Prediction("entries, dense, encode, step, sparse_loss are right (status 0)", status("correctness"), zero),
    Prediction("residual, latents, update are right (status 0)", status("units"), zero),
    Prediction("the other kinds of SAE are right (status 0)", status("kinds"), zero),
    Prediction("TopK at 16k selects in .45 to .75 ms", step_ms("topk", "ours_topk", "encode"), between(0.45, 0.75)),
    Prediction("BatchTopK in .55 to .9 ms", step_ms("topk", "ours_batchtopk", "encode"), between(0.55, 0.9)),
    Prediction("none of 50 repeated steps differs", changed_runs, zero),
    Prediction("a step at 16k, L0 64, takes 1.2 to 1.8 ms", step_ms("step"), between(1.2, 1.8)),
    Prediction("with a first moment, β1 = .7, 1.3 to 2 ms", step_ms("beta1"), between(1.3, 2.0)),
    Prediction(
        "which costs .03 to .3 ms more than without",
        difference(step_ms("beta1"), step_ms("step")),
        between(0.03, 0.3),
    ),
    Prediction("compiled dense PyTorch: 2.5 to 3.3 ms", step_ms("compiled", "dense_compiled"), between(2.5, 3.3)),
    Prediction(
        "skew 0.7 costs at most 0.15 ms more than skew 0",
        difference(step_ms("step"), step_ms("skew0")),
        between(-1, 0.15),
    ),
    Prediction(
        "update is not bound by issue: less than 60 % active", counter("_update", "issue_active"), between(0, 60)
    ),
    Prediction("update is bound by memory: DRAM 55 % busy and more", counter("_update", "dram"), between(55, 100)),
    Prediction(
        "residual is not bound by issue alone: less than 75 % active",
        counter("_residual", "issue_active"),
        between(0, 75),
    ),
    Prediction(
        "four stages make encode at least 3 % faster",
        quotient("variants", "encode, 3 stages", "encode, 4 stages"),
        over(1.03),
    ),
    Prediction(
        "a captured step is faster, by less than a fifth",
        quotient("variants", "step, launched", "step, replayed"),
        between(1, 1.2),
    ),
    Prediction("encode at 1M takes over 36 ms", value("variants", ENCODE_WIDE + "1 GiB of scratch"), over(36)),
    Prediction(
        "4 GiB of scratch make it at least 8 % faster",
        quotient("variants", ENCODE_WIDE + "1 GiB of scratch", ENCODE_WIDE + "4 GiB of scratch"),
        over(1.08),
    ),
    Prediction("the memory checker finds nothing (status 0)", status("memcheck"), zero),
    Prediction("a step at 131k takes 7.5 to 10.5 ms", step_ms("wide131k"), between(7.5, 10.5)),
    Prediction("a step at 1M takes 29 to 40 ms", value("wide1m", "step_ms"), between(29, 40)),
    Prediction("the step at 1M peaks at 45 to 60 GiB", value("wide1m", "peak_gib"), between(45, 60)),
)


def last_json(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
    return {}


def launches(text: str) -> list[dict[str, Any]]:
    """What the profiler's table says of each launch, by the names of `METRICS`."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    names, found = {metric: name for name, metric in METRICS.items()}, {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") in names:
            with contextlib.suppress(ValueError, TypeError):
                launch = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
                launch[names[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def collect(out: Path) -> Found:
    """What the sections said: {section: its JSON}, and "statuses"."""
    table = out / "sections.tsv"
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    statuses = {name: int(code) for name, code, _ in (line.split("\t") for line in lines)}
    found: Found = {"statuses": statuses}
    for name in statuses:
        text = (out / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
        found[name] = {"launches": launches(text)} if name == "counters" else last_json(text)
    # A tool that is not there has not been asked.
    found["statuses"] = {name: code for name, code in statuses.items() if code != 127}
    return found


def verdict(out: Path) -> int:
    """Prints each prediction with what was found; exit status 1 when one fell."""
    found, fell = collect(out), 0
    for prediction in PREDICTIONS:
        figure = prediction.figure(found)
        held = None if figure is None else prediction.holds(figure)
        fell += held is False
        word = {None: "no figure", True: "held", False: "fell"}[held]
        print(f"{word:<9}  {prediction.says}" + ("" if figure is None else f": {figure:.4g}"))
    return int(fell > 0)


def main(arguments: list[str]) -> int:
    commands = {f.__name__: f for f in (machine, one_step, small_step, variants, wide)}
    if arguments[:1] == ["metrics"]:
        print(",".join(METRICS.values()))
        return 0
    if arguments[:1] == ["verdict"] and len(arguments) == 2:
        return verdict(Path(arguments[1]))
    if len(arguments) != 1 or arguments[0] not in commands:
        print(f"expected {', '.join(commands)}, metrics or verdict OUT", file=sys.stderr)
        return 2
    print(json.dumps(commands[arguments[0]]()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
