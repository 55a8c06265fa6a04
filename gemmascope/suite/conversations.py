"""Conversations as rows of tokens, with a role for each: what the chat template of a tokenizer tells."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import Document
from ..activations.packing import as_encoder

ROLES = ("user", "model")
TEMPLATE = len(ROLES)
"""The role of the template's own tokens, of BOS and of padding."""


@dataclass(frozen=True)
class Markers:
    """What a chat template writes before the words of the user and of the model, and behind both."""

    user: str
    model: str
    end: str

    @classmethod
    def of(cls, tokenizer: Any) -> "Markers | None":
        """None of a tokenizer without a chat template, or with one that does not mark turns."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        words = [f"words{number}words" for number in range(4)]
        turns = [{"role": ("user", "assistant")[number % 2], "content": each} for number, each in enumerate(words)]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # whatever a template in the language of Jinja raises
            return None
        if not isinstance(text, str) or any(text.count(each) != 1 for each in words):
            return None
        _, to_model, to_user, again, end = re.split("|".join(words), text)
        same = [len(set(letters)) == 1 for letters in zip(to_model, to_user, end, strict=False)]
        shared = end[: [*same, False].index(False)]
        found = cls(to_user.removeprefix(shared), to_model.removeprefix(shared), shared)
        distinct = found.user != found.model and again == to_model
        return found if found.user and found.model and found.end.strip() and distinct else None

    def turns(self, text: str) -> list[tuple[int, str]]:
        """The text in pieces with the role of each, markers among them; one that names no speaker is of `TEMPLATE`."""
        end = self.end.strip()
        marks = {self.user: 0, self.model: 1, self.end: TEMPLATE, end: TEMPLATE}
        pattern = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
        found: list[tuple[int, str]] = []
        role = TEMPLATE
        for piece in re.split(f"({pattern})", text):
            if piece in marks:
                found.append((TEMPLATE, piece))
                role = marks[piece]
            elif piece:
                found.append((role, piece))
        return found

    def tell(self, text: str) -> bool:
        """Whether someone speaks in the text."""
        return self.user in text or self.model in text


def conversation_rows(
    documents: Iterable[tuple[int, Document]], tokenizer: Any, markers: Markers, context: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, documents (−1 at BOS and padding) and roles, each int64 [rows, context], of the documents in which
    someone speaks: a row each, which begins with BOS; what is longer is cut.

    documents: their numbers with them. Special tokens that the words of a turn name stay words.
    """
    encoder = as_encoder(tokenizer)
    rows: list[list[int]] = []
    owners: list[int] = []
    roles: list[list[int]] = []
    for number, document in documents:
        if len(rows) == most:
            break
        if not markers.tell(document.text):
            continue
        ids, of_ids = [encoder.bos], [TEMPLATE]
        for role, piece in markers.turns(document.text):
            found = _ids(tokenizer, piece) if role == TEMPLATE else encoder.encode([piece])[0][0].tolist()
            ids += found
            of_ids += [role] * len(found)
            if len(ids) >= context:
                break
        missing = max(0, context - len(ids))
        rows.append([*ids[:context], *[encoder.pad] * missing])
        roles.append([*of_ids[:context], *[-1] * missing])
        owners.append(number)
    tokens, of_tokens = _tensor(rows, context), _tensor(roles, context)
    documents_of = torch.tensor(owners, dtype=torch.int64, device="cpu")[:, None].expand(tokens.shape)
    first = torch.arange(context, dtype=torch.int64, device="cpu") == 0
    return tokens, torch.where((of_tokens < 0) | first, -1, documents_of), of_tokens.clamp(min=-1)


def _ids(tokenizer: Any, marker: str) -> list[int]:
    return list(tokenizer(marker, add_special_tokens=False, verbose=False)["input_ids"])


def _tensor(rows: Sequence[Sequence[int]], context: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), context)
