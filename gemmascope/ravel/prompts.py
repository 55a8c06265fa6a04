"""Prompts and labels as tokens: where an entity ends, and which token begins its label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .continuation import Tokens
from .data import PLACE, EntityData, Prompt, before_label


@dataclass(frozen=True)
class Answer:
    """A label behind a template. token: the first, of ``tokens``."""

    label: str
    token: int
    tokens: int


@dataclass(frozen=True)
class Asked:
    """A prompt as tokens, with the label that its entity has."""

    prompt: Prompt
    tokens: Tokens
    answer: Answer


class Reader:
    """A tokenizer of transformers, and whether a prompt begins with its BOS.

    Raises ValueError for a tokenizer without BOS where one is asked for.
    """

    def __init__(self, tokenizer: Any, bos: bool):
        if bos and getattr(tokenizer, "bos_token_id", None) is None:
            raise ValueError("bos: expected a tokenizer with a BOS token, got one without; use --no-bos")
        self.tokenizer = tokenizer
        self._before = (int(tokenizer.bos_token_id),) if bos else ()

    def ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [(*self._before, *map(int, ids)) for ids in found]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def asked(self, data: EntityData, entity_tokens: int | None = None) -> tuple[list[Asked], dict[str, int]]:
        """The prompts of ``data`` in order, and how many of them were left out for which reason.

        The entity's last token is the last one of the template up to it, whose tokens must begin those of the whole
        prompt; the label's first is the one behind the prompt's, in the same way.
        """
        kept: list[Asked] = []
        left_out = {"the entity has no tokens of its own": 0, "the label has no tokens of its own": 0}
        left_out |= {} if entity_tokens is None else {f"the entity is not {entity_tokens} long": 0}
        for attribute, templates in data.templates.items():
            for template in templates:
                prompts = [Prompt(entity, attribute, template) for entity in data.entities]
                answers = self._answers(template, prompts, data)
                before = template.partition(PLACE)[0]
                length = len(self.ids([before.rstrip()])[0]) if before.rstrip() else len(self._before)
                wholes = self.ids([prompt.text for prompt in prompts])
                parts = self.ids([before + prompt.entity for prompt in prompts])
                for prompt, whole, part in zip(prompts, wholes, parts, strict=True):
                    answer = answers[data.labels[attribute][prompt.entity]]
                    if not len(part) > len(self._before) or whole[: len(part)] != part:
                        left_out["the entity has no tokens of its own"] += 1
                    elif entity_tokens is not None and len(part) - length != entity_tokens:
                        left_out[f"the entity is not {entity_tokens} long"] += 1
                    elif answer is None:
                        left_out["the label has no tokens of its own"] += 1
                    else:
                        kept.append(Asked(prompt, Tokens(whole, len(part) - 1), answer))
        return kept, left_out

    def _answers(self, template: str, prompts: Sequence[Prompt], data: EntityData) -> dict[str, Answer | None]:
        """Of each label of the template's attribute."""
        labels = list(dict.fromkeys(data.labels[prompts[0].attribute][prompt.entity] for prompt in prompts))
        [bare] = self.ids([prompts[0].text])
        wholes = self.ids([prompts[0].text + before_label(template) + label for label in labels])
        found: dict[str, Answer | None] = {}
        for label, whole in zip(labels, wholes, strict=True):
            behind = whole[len(bare) :] if whole[: len(bare)] == bare else ()
            found[label] = Answer(label, behind[0], len(behind)) if behind else None
        return found
