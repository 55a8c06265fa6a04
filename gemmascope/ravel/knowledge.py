"""What the model knows: the prompts that it answers rightly by itself, and the entities that are left."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..sites import Site
from .answers import says
from .continuation import Continuation, Streams, Template
from .presets import Protocol
from .prompts import Asked, Reader

ROWS = 64
# Tokens that an answer is given to be the label.
ANSWER_TOKENS = 6


def by_template(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """Indices of the prompts of each template, in order."""
    found: dict[str, list[int]] = {}
    for index, each in enumerate(asked):
        found.setdefault(each.prompt.template, []).append(index)
    return found


def is_right(reader: Reader, score: str, answer: Any, label: str, token: int) -> bool:
    """answer: the token said, or, where strings are compared, the tokens."""
    return says(reader.text(answer), label) if score == "string" else answer == token


def answers(
    model: Continuation, reader: Reader, asked: Sequence[Asked], score: str, tick: Callable[[int], Any] = lambda _: None
) -> list[bool]:
    """Whether the model answers each prompt with its label. tick: called with the number of prompts done."""
    found = [False] * len(asked)
    done = 0
    for indices in by_template(asked).values():
        template = model.template([asked[index].tokens for index in indices])
        for start in range(0, len(indices), ROWS):
            rows = indices[start : start + ROWS]
            prompts = [asked[index].tokens for index in rows]
            if score == "string":
                said: list[Any] = model.generated(template, prompts, ANSWER_TOKENS).tolist()
            else:
                said = model.streams(template, prompts, ())[0].argmax(1).tolist()
            for index, answer in zip(rows, said, strict=True):
                found[index] = is_right(reader, score, answer, asked[index].answer.label, asked[index].answer.token)
            done += len(rows)
            tick(done)
    return found


def known(asked: Sequence[Asked], right: Sequence[bool], protocol: Protocol) -> tuple[list[Asked], dict[str, Any]]:
    """The prompts that pairs are made of, and what is said of the filter: prompts, right answers of each attribute and
    entities left.

    Raises ValueError when fewer than two entities are left.
    """
    attributes = list(dict.fromkeys(each.prompt.attribute for each in asked))
    usable = [protocol.labels == "first" or each.answer.tokens == 1 for each in asked]
    good: dict[str, dict[str, list[bool]]] = {}
    for each, is_known, is_usable in zip(asked, right, usable, strict=True):
        good.setdefault(each.prompt.entity, {}).setdefault(each.prompt.attribute, []).append(is_known and is_usable)
    enough = any if protocol.known == "any" else all
    kept = [
        entity
        for entity, of_entity in good.items()
        if all(attribute in of_entity and enough(of_entity[attribute]) for attribute in attributes)
    ]
    if protocol.entities is not None:
        count = {entity: sum(map(sum, good[entity].values())) for entity in kept}
        best = set(sorted(kept, key=lambda entity: (-count[entity], kept.index(entity)))[: protocol.entities])
        kept = [entity for entity in kept if entity in best]
    facts = {
        "prompts": len(asked),
        "right": {
            attribute: round(sum(of) / len(of), 4)
            for attribute in attributes
            for of in [[ok for each, ok in zip(asked, right, strict=True) if each.prompt.attribute == attribute]]
        },
        "entities": len(good),
        "known_entities": len(kept),
    }
    if len(kept) < 2:
        raise ValueError(
            f"entities: expected at least two whose {' and '.join(attributes)} the model knows, found {len(kept)} of "
            f"{len(good)}; right answers: {facts['right']}"
        )
    entities = set(kept)
    chosen = [
        each
        for each, is_known, is_usable in zip(asked, right, usable, strict=True)
        if is_known and is_usable and each.prompt.entity in entities
    ]
    return chosen, facts | {"known_prompts": len(chosen)}


class Activations:
    """Clean activations at a site of the prompts that pairs are made of, template by template."""

    def __init__(self, site: Site, templates: dict[str, tuple[Template, list[int], Streams]]):
        self.site = site
        self.templates = templates
        self.row = {index: row for _, indices, _ in templates.values() for row, index in enumerate(indices)}
        first = next(iter(templates.values()))[2].vectors
        self.prompts = torch.tensor(sorted(self.row), device=first.device)
        """Those that there are activations of: int64."""
        count = 1 + max(self.row)
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.vectors = torch.zeros(count, first.shape[1], dtype=dtype, device=first.device)
        """[prompts, width]: of each prompt, at its entity's last token; fp32, or fp64 of such a model."""
        for _, indices, streams in templates.values():
            self.vectors[torch.tensor(indices, device=first.device)] = streams.vectors.to(dtype)


def activations(
    model: Continuation,
    asked: Sequence[Asked],
    sites: Sequence[Site],
    tick: Callable[[int], Any] = lambda _: None,
) -> dict[Site, Activations]:
    """Of ``asked`` at every site, from one forward of each prompt."""
    found: dict[Site, dict[str, tuple[Template, list[int], Streams]]] = {site: {} for site in sites}
    done = 0
    for name, indices in by_template(asked).items():
        template = model.template([asked[index].tokens for index in indices])
        parts: dict[Site, list[Streams]] = {site: [] for site in sites}
        longest = max(len(asked[index].tokens.ids) for index in indices) - template.start
        for start in range(0, len(indices), ROWS):
            rows = indices[start : start + ROWS]
            _, streams = model.streams(template, [asked[index].tokens for index in rows], sites)
            for site in sites:
                parts[site].append(streams[site]._replace(stream=_padded(streams[site].stream, longest)))
            done += len(rows)
            tick(done)
        for site in sites:
            joined = Streams(*(torch.cat(each) for each in zip(*parts[site], strict=True)))
            found[site][name] = (template, indices, joined)
    return {site: Activations(site, templates) for site, templates in found.items()}


def _padded(stream: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(stream, (0, 0, 0, length - stream.shape[1]))
