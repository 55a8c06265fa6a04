"""Pairs of base and source: what an intervention is trained and tested on.

Cause: the base's prompt is about the attribute A, and with A's part of the source's activation in it the model must
answer with the source's A. Isolation: the base's prompt is about another attribute, and the answer must stay.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .data import EntityData
from .presets import Protocol
from .prompts import Asked

# Fewer of a task are no measurement.
LEAST = 4
_TRIES = 64


@dataclass(frozen=True)
class Pair:
    """base, source: indices of prompts. label, token: what must be answered. base_token, source_token: what the base
    and the source have for the attribute that the base's prompt is about."""

    base: int
    source: int
    is_cause: bool
    label: str
    token: int
    base_token: int
    source_token: int


@dataclass(frozen=True)
class PairSet:
    """Pairs for one attribute: to train on, and parts of the test by name. dropped: what clashed."""

    attribute: str
    train: tuple[Pair, ...]
    tests: dict[str, tuple[Pair, ...]]
    dropped: int

    def to_dict(self) -> dict[str, object]:
        """How many there are, as values of JSON."""

        def counted(pairs: Sequence[Pair]) -> dict[str, int]:
            cause = sum(pair.is_cause for pair in pairs)
            return {"cause": cause, "isolation": len(pairs) - cause}

        tests = {name: counted(pairs) for name, pairs in self.tests.items()}
        return {"train": counted(self.train), "test": tests, "dropped_clashes": self.dropped}


def make_pairs(data: EntityData, asked: Sequence[Asked], attribute: str, protocol: Protocol, seed: int) -> PairSet:
    """Pairs of the prompts ``asked``, all of them known, for ``attribute``, drawn by ``seed``.

    With ``split="entities"`` the test has a part of ``entities`` that the training has not, in its templates, and one
    of ``templates`` that it has not, with its entities, where there are several; else one of ``pairs``.

    Raises ValueError where a part has fewer than `LEAST` pairs of a task.
    """
    drawing = _Drawing(data, asked, attribute, protocol, random.Random(f"{seed} {attribute}"))
    if protocol.split == "pairs":
        every = drawing.pairs(lambda each: True, _together(protocol.pairs, protocol.test_pairs, protocol))
        train, test = _shared_out(every, protocol, random.Random(f"{seed} {attribute} split"))
        tests = {"pairs": test}
    else:
        entities, templates = data.entity_split, data.template_split

        def part(of_entities: str, of_templates: str) -> Callable[[Asked], bool]:
            return lambda each: (
                entities.get(each.prompt.entity) == of_entities and templates.get(each.prompt.template) == of_templates
            )

        train = drawing.pairs(part("train", "train"), protocol.pairs)
        tests = {"entities": drawing.pairs(part("test", "train"), protocol.test_pairs)}
        if any(part("train", "test")(each) for each in asked):
            tests["templates"] = drawing.pairs(part("train", "test"), protocol.test_pairs)
    for name, pairs in {"training": train, **tests}.items():
        for is_cause, task in ((True, "cause"), (False, "isolation")):
            if (count := sum(pair.is_cause == is_cause for pair in pairs)) < LEAST:
                raise ValueError(
                    f"pairs: expected at least {LEAST} of {task} for {attribute!r} ({name}), found {count}; give more "
                    "entities or templates that the model knows"
                )
    return PairSet(attribute, tuple(train), {name: tuple(pairs) for name, pairs in tests.items()}, drawing.dropped)


def _together(train: int | None, test: int | None, protocol: Protocol) -> int | None:
    return None if train is None or test is None else round((train + test) / (1 - protocol.validation_share))


def _shared_out(pairs: Sequence[Pair], protocol: Protocol, generator: random.Random) -> tuple[list[Pair], list[Pair]]:
    order = list(pairs)
    generator.shuffle(order)
    train = round(len(order) * (1 - protocol.test_share - protocol.validation_share))
    test = round(len(order) * protocol.test_share)
    return order[:train], order[len(order) - test :]


class _Drawing:
    """The pairs of one attribute; those of one call are distinct."""

    def __init__(
        self, data: EntityData, asked: Sequence[Asked], attribute: str, protocol: Protocol, generator: random.Random
    ):
        self.data, self.asked, self.attribute = data, asked, attribute
        self.protocol, self.generator = protocol, generator
        self.dropped = 0
        # What a source's label is worth behind a template: its first token.
        self.tokens = {(each.prompt.template, each.answer.label): each.answer.token for each in asked}

    def pairs(self, belongs: Callable[[Asked], bool], count: int | None) -> list[Pair]:
        """``count`` of either task, or all, of the prompts that belong."""
        indices = [index for index, each in enumerate(self.asked) if belongs(each)]
        of_attribute = {
            attribute: [index for index in indices if self.asked[index].prompt.attribute == attribute]
            for attribute in self.data.attributes
        }
        others = [attribute for attribute in self.data.attributes if attribute != self.attribute]
        sources = of_attribute[self.attribute]
        found = self._drawn(of_attribute[self.attribute], sources, count)
        for number, other in enumerate(others):
            share = None if count is None else (count + number) // len(others)
            found += self._drawn(of_attribute[other], sources, share)
        return found

    def _drawn(self, bases: Sequence[int], sources: Sequence[int], count: int | None) -> list[Pair]:
        if self.protocol.source == "same":  # of the base's own template
            same: dict[str, list[int]] = {}
            for index in bases:
                same.setdefault(self.asked[index].prompt.template, []).append(index)
            options = [same[self.asked[base].prompt.template] for base in bases]
        else:
            options = [list(sources)] * len(bases)
        total = sum(map(len, options))
        if count is None or total <= 4 * count:
            every = [(base, source) for base, of_base in zip(bases, options, strict=True) for source in of_base]
            if count is not None:
                self.generator.shuffle(every)
            made = [pair for each in every if (pair := self._pair(*each)) is not None]
            return made if count is None else made[:count]
        made, seen = [], set()
        for _ in range(_TRIES * count):
            at = self.generator.randrange(len(bases))
            both = (bases[at], self.generator.choice(options[at])) if options[at] else None
            if both is None or both in seen:
                continue
            seen.add(both)
            if (pair := self._pair(*both)) is not None:
                made.append(pair)
                if len(made) == count:
                    break
        return made

    def _pair(self, base: int, source: int) -> Pair | None:
        b, s = self.asked[base], self.asked[source].prompt.entity
        attribute, template = b.prompt.attribute, b.prompt.template
        label = self.data.labels[attribute][s]
        token = self.tokens.get((template, label))
        if token is None:  # the model knows nobody with that label there
            return None
        is_cause = attribute == self.attribute
        if label == b.answer.label:
            if self.protocol.equal == "none" or (is_cause and self.protocol.equal == "isolation"):
                return None
            if b.prompt.entity == s and self.protocol.equal != "all":
                return None
        own = Pair(base, source, is_cause, b.answer.label, b.answer.token, b.answer.token, token)
        if not is_cause:
            clashes = label != b.answer.label and token == b.answer.token
            return own if not clashes or self.protocol.clashes != "drop" else self._drop()
        caused = replace(own, label=label, token=token)
        if label != b.answer.label and token == b.answer.token:
            if self.protocol.clashes == "drop":
                return self._drop()
            return caused if self.protocol.clashes == "keep" else replace(caused, is_cause=False)
        return caused

    def _drop(self) -> None:
        self.dropped += 1


def floors(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Which pairs two answers get right that know of no intervention: the base's own and the source's; bool [n]."""
    return {
        "always base": torch.tensor([pair.base_token == pair.token for pair in pairs], device="cpu"),
        "always source": torch.tensor([pair.source_token == pair.token for pair in pairs], device="cpu"),
    }
