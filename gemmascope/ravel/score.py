"""How an intervention does on a test: cause, isolation, and disentangle, their mean, with intervals over entities."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.bootstrap import Bootstrap
from .knowledge import ANSWER_TOKENS, is_right
from .pairs import Pair
from .presets import Protocol
from .prompts import Asked, Reader
from .train import Exchange, Interchange, Tick

ROWS = 64
FIGURES = ("cause", "isolation", "disentangle")


@torch.no_grad()
def right_pairs(
    on: Interchange,
    reader: Reader,
    asked: Sequence[Asked],
    pairs: Sequence[Pair],
    exchange: Exchange,
    protocol: Protocol,
    tick: Tick,
) -> Tensor:
    """Which pairs are answered as they should be with ``exchange`` made: bool [n], on the CPU."""
    found = torch.zeros(len(pairs), dtype=torch.bool, device="cpu")
    for start in range(0, len(pairs), ROWS):
        part = pairs[start : start + ROWS]
        for place, answer in _answers(on, part, asked, exchange, protocol):
            pair = part[place]
            found[start + place] = is_right(reader, protocol.score, answer, pair.label, pair.token)
        tick(start + len(part))
    return found


def _answers(
    on: Interchange, pairs: Sequence[Pair], asked: Sequence[Asked], exchange: Exchange, protocol: Protocol
) -> Iterator[tuple[int, Any]]:
    """Places in ``pairs`` with the token that is said there, or, where strings are compared, the tokens."""
    if protocol.score == "first-token":
        logits, order = on.logits(pairs, exchange)
        yield from zip(order.tolist(), logits.argmax(1).tolist(), strict=True)
        return
    for places, template, _ in on.groups(pairs):
        prompts = [asked[pairs[place].base].tokens for place in places]
        new = exchange(*on.ends(pairs, places))
        said = on.model.generated(template, prompts, ANSWER_TOKENS, on.activations.site, new)
        yield from zip(places, said.tolist(), strict=True)


def figures(pairs: Sequence[Pair], right: Tensor, asked: Sequence[Asked], bootstrap: "Entities") -> dict[str, Tensor]:
    """`FIGURES` of the pairs: the share of cause pairs that are right, of isolation pairs, and the mean of both; each
    with its value first, then those of the draws, fp64 [1 + draws].

    right: bool, or the mean over several seeds, [n]. Isolation is the mean over the other attributes, each of which
    counts the same.
    """
    parts: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        name = "cause" if pair.is_cause else f"isolation {asked[pair.base].prompt.attribute}"
        parts.setdefault(name, []).append(place)
    values = right.double().cpu()
    of_part = {}
    for name, places in parts.items():
        entities = [asked[pairs[place].base].prompt.entity for place in places]
        of_part[name] = bootstrap.ratios(entities, values[places])
    cause = of_part.pop("cause")
    isolation = torch.stack(list(of_part.values())).mean(0)
    return {"cause": cause, "isolation": isolation, "disentangle": (cause + isolation) / 2}


def mean_figures(several: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of several attributes, each of which counts the same."""
    return {name: torch.stack([each[name] for each in several]).mean(0) for name in FIGURES}


class Entities:
    """A `Bootstrap` over the entities of bases: a figure has its own value first, then one for each draw."""

    def __init__(self, entities: Sequence[str], draws: int, seed: int):
        self._number = {entity: number for number, entity in enumerate(dict.fromkeys(entities))}
        self._bootstrap = Bootstrap(len(self._number), draws=draws, seed=seed)

    def ratios(self, entities: Sequence[str], values: Tensor) -> Tensor:
        """The mean of ``values`` [n], the pairs of these entities, and its draws: fp64 [1 + draws]."""
        numbers = torch.tensor([self._number[entity] for entity in entities], dtype=torch.int64, device="cpu")
        sums = torch.zeros(2, len(self._number), dtype=torch.float64, device="cpu")
        sums[0].index_add_(0, numbers, values)
        sums[1] = torch.bincount(numbers, minlength=len(self._number)).double()
        return torch.cat([values.mean()[None], self._bootstrap.drawn(sums[0], sums[1])])

    def described(self, figures: dict[str, Tensor]) -> dict[str, Any]:
        """As values of JSON: each figure, and its interval as ``cause_interval`` and so on, or None."""
        found: dict[str, Any] = {}
        for name, values in figures.items():
            ends = self._bootstrap.interval(values[1:])
            found |= {name: values[0].item(), f"{name}_interval": None if ends is None else list(ends)}
        return found
