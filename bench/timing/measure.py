"""Clocks, ceilings and memory."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bench.arithmetic import allowing_tf32

MIB = 1 << 20
CLEARED_BYTES = COPIED_BYTES = 256 * MIB  # more than any GPU's L2, and than any cache
HEAD_START = 20_000_000  # clock cycles, about 10 ms: the host is done launching before the device begins
MEMORY_TIMEOUT = 300


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


class Clock:
    """Milliseconds of one call. On a GPU between events, with the L2 cleared and the launches queued beforehand, so
    that what is timed is the device; `latency` is what a caller waits, launches included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.other = torch.empty(CLEARED_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def head_start(self) -> None:
        """Keep a GPU busy until the host has launched what follows, and what was in its L2 out of it."""
        if self.cuda:
            torch.cuda._sleep(HEAD_START)
            self.other.zero_()

    def mark(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        """Milliseconds between two marks, after `synchronise`."""
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def time(self, call: Callable[[], object]) -> float:
        self.head_start()
        start = self.mark()
        result = call()
        end = self.mark()
        self.synchronise()
        del result  # not within the time: the caller would still be using it
        return self.between(start, end)

    def latency(self, call: Callable[[], object]) -> float:
        self.synchronise()
        start = time.perf_counter()
        result = call()
        self.synchronise()
        elapsed = 1e3 * (time.perf_counter() - start)
        del result
        return elapsed


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50, p80 and the least, in milliseconds."""
    if len(times) == 1:
        low = middle = high = times[0]
    else:
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        low, middle, high = cuts[1], cuts[4], cuts[7]
    return {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "min_ms": min(times), "repeats": len(times)}


def copy_rate(clock: Clock) -> float:
    """10^9 bytes a second of a large copy, read and written, at its best."""
    source = torch.zeros(COPIED_BYTES // 4, device=clock.device)
    target = torch.empty_like(source).copy_(source)
    return 2 * COPIED_BYTES / min(clock.time(lambda: target.copy_(source)) for _ in range(5)) / 1e6


def products(a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
    """The ways PyTorch has to multiply a [n, k] by b [m, k] transposed."""
    ways = [lambda: torch.mm(a, b.T)]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return ways


def product_rate(clock: Clock, n: int, k: int, m: int, dtype: str) -> float:
    """10^12 FLOP a second of the best dense product of [n, k] by [k, m], tf32 only when it is asked for; on a CPU for
    "bf16" also in fp32, which is the faster one where the processor has no instructions for bf16."""
    operands = [torch.bfloat16] if dtype == "bf16" else [torch.float32]
    if dtype == "bf16" and not clock.cuda:
        operands.append(torch.float32)
    best = float("inf")
    for operand in operands:
        a, b = (torch.randn(rows, k, device=clock.device).to(operand) for rows in (n, m))
        with allowing_tf32(dtype == "tf32"):
            for way in products(a, b):
                try:
                    best = min(best, *(clock.time(way) for _ in range(4)))
                except RuntimeError as error:  # oneDNN has no product of this dtype on this machine
                    if is_out_of_memory(error):
                        raise
    return 2 * n * k * m / best / 1e9


def ceilings(clock: Clock, n: int, d: int, f: int, dtype: str) -> dict[str, float]:
    """What this machine does at its best, now: the roofline of the rows of one case."""
    return {"copy_gbps": copy_rate(clock), "product_tflops": product_rate(clock, n, d, min(f, 16384), dtype)}


def floor_ms(work: tuple[int, int], ceiling: dict[str, float]) -> float:
    """The least time for (FLOPs, bytes) under the ceilings."""
    flops, n_bytes = work
    return max(flops / ceiling["product_tflops"] / 1e9, n_bytes / ceiling["copy_gbps"] / 1e6)


def available_bytes() -> int | None:
    """Main memory that can be had without swapping, where the system says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def resident_mib() -> float:
    """Main memory this process holds; 0 where the system does not say."""
    try:
        return _status_kib("VmRSS") / 1024
    except OSError:
        return 0.0


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status: no {field}")


def host_peak_mib(call: Callable[[], object]) -> float:
    """Resident memory at the peak of a call, over that before it. Linux: the high-water mark is reset first."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_kib("VmRSS")
        result = call()
        peak = _status_kib("VmHWM")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 1024
        result = call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 1024
    del result
    return (peak - before) / 1024


def device_peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """The allocator's peak during a call, over what was held before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def peaks_in_fresh_process(arguments: list[str], threads: int) -> dict[str, dict[str, float]]:
    """What `python -m bench memory ARGUMENTS` prints, by part. Raises RuntimeError when that fails.

    Large blocks go back to the system when they are freed, so that the baseline of one part is not what another left.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "bench", "memory", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=MEMORY_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {MEMORY_TIMEOUT} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended with status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def interleaved(
    clock: Clock,
    calls: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
    rounds: int,
    on_error: Callable[[str, Exception], None],
    done: Callable[[str], None],
) -> dict[str, dict[str, list[float]]]:
    """Times of every call, A B C A B C …, so that what drifts hits all alike.

    calls: name: (what comes before a call and is not timed, the call). One that raises is reported once, by
    ``on_error``, and dropped with all its times. done: told after every call.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"ms": [], "latency_ms": []} for name in calls}
    for _, name in itertools.product(range(rounds), calls):
        if name not in times:
            continue
        before, call = calls[name]
        try:
            before()
            times[name]["ms"].append(clock.time(call))
            if clock.cuda:
                before()
                times[name]["latency_ms"].append(clock.latency(call))
        except Exception as error:
            del times[name]
            on_error(name, error)
        done(name)
    return times
