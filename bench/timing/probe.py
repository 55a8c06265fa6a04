"""Inside our own step: its operators one by one, and whether it repeats bit for bit."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from bench.ours import Ours
from bench.timing import measure
from bench.timing.measure import Clock
from bench.timing.work import Size, operator_work
from gemmascope import kernels
from gemmascope.kernels import implementations

# The public ones, in the order of the sparse step.
OPERATORS = ("encode_entries", "residual_pass", "by_latent", "latent_pass", "update_from_entries")


def timed(name: str, operator: Callable, clock: Clock, calls: list) -> Callable:
    """The operator, which also keeps the times of each call."""

    def measured(*arguments, **named):
        start = clock.mark()
        result = operator(*arguments, **named)
        calls.append((name, start, clock.mark()))
        return result

    return measured


@contextlib.contextmanager
def watched(clock: Clock, calls: list) -> Iterator[None]:
    """Every operator keeps its times. A step takes W_enc·db_enc in parts, by an operator that is not public."""
    find, public = implementations.operator, {name: getattr(kernels, name) for name in OPERATORS}

    def found(name: str, impl: str) -> Callable:
        operator = find(name, impl)
        return timed("encoder_times", operator, clock, calls) if name == "encoder_parts" else operator

    changed = {name: timed(name, operator, clock, calls) for name, operator in public.items()}
    with mock.patch.multiple(kernels, **changed), mock.patch.object(implementations, "operator", found):
        yield


def operator_rows(
    ours: Ours, size: Size, clock: Clock, rounds: int, ceiling: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """A row for each operator of the sparse step, timed within it."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        calls: list[tuple] = []
        clock.head_start()
        with watched(clock, calls):
            ours.step()
        clock.synchronise()
        for name, start, end in calls:
            found.setdefault(name, []).append(clock.between(start, end))
    for name, times in found.items():
        flops, n_bytes = operator_work(name, size)
        least = measure.floor_ms((flops, n_bytes), ceiling)
        row = {"kind": "operator", "contender": ours.name, "ours": True, "operator": name, "floor_ms": least}
        row |= measure.percentiles(times) | {"flops": flops, "bytes": n_bytes} | size._asdict()
        yield row | {"pct_roofline": 100 * least / row["p50_ms"]}


def changed_bits(ours: Ours, repeats: int) -> int:
    """Of ``repeats`` steps from one state, how many end in other bits than the first."""
    tensors = list(ours.state.tensors().values())
    start = [t.clone() for t in tensors]

    def result() -> list[torch.Tensor]:
        for tensor, value in zip(tensors, start, strict=True):
            tensor.copy_(value)
        ours.step()
        return tensors

    first = [t.clone() for t in result()]
    return sum(not all(map(torch.equal, result(), first)) for _ in range(repeats - 1))
