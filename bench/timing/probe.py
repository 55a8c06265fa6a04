"""Inside our own step: its operators one by one, and whether it repeats bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from bench.ours import Ours
from bench.timing import measure
from bench.timing.measure import Clock
from bench.timing.work import Size, operator_work
from gemmascope import step as step_module
from gemmascope.kernels.training import training_operators


class TimedOperators:
    """An implementation of the training operators that keeps the time of each call."""

    def __init__(self, impl: str, clock: Clock):
        self.operators, self.clock, self.calls = training_operators(impl), clock, []

    def __getattr__(self, name: str) -> Callable:
        operator = getattr(self.operators, name)

        def measured(*arguments, **named):
            start = self.clock.mark()
            result = operator(*arguments, **named)
            self.calls.append((name, start, self.clock.mark()))
            return result

        return measured


def operator_rows(
    ours: Ours, size: Size, clock: Clock, rounds: int, ceiling: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """A row for each operator of the sparse step, timed within it."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        operators = TimedOperators(ours.state.impl, clock)
        clock.head_start()
        with mock.patch.object(step_module, "training_operators", lambda impl, operators=operators: operators):
            ours.step()
        clock.synchronise()
        for name, start, end in operators.calls:
            found.setdefault(name, []).append(clock.between(start, end))
    for name, times in found.items():
        flops, n_bytes = operator_work(name, size)
        least = measure.floor_ms((flops, n_bytes), ceiling)
        row = {"kind": "operator", "contender": ours.name, "ours": True, "operator": name, "floor_ms": least}
        row |= measure.percentiles(times) | {"flops": flops, "bytes": n_bytes} | size._asdict()
        yield row | {"pct_roofline": 100 * least / row["p50_ms"]}


def changed_bits(ours: Ours, repeats: int) -> int:
    """Of ``repeats`` steps from one state, how many end in other bits than the first."""
    state = ours.state
    tensors = [t for t in state.latents if t is not None]
    tensors += [state.sae.b_dec.data, state.b_dec_v, state.updates, state.tokens_since_fired]
    start = [t.clone() for t in tensors]

    def result() -> list[torch.Tensor]:
        for tensor, value in zip(tensors, start, strict=True):
            tensor.copy_(value)
        ours.step()
        return tensors

    first = [t.clone() for t in result()]
    return sum(not all(map(torch.equal, result(), first)) for _ in range(repeats - 1))
