"""`Excerpts`: a little text as tokens in memory, spread over its documents, with or without BOS."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..activations import Document, sample_rows
from ..activations.held_out import HELD_OUT_EVERY
from ..activations.packing import Encoder, is_held_out

# Of a text that may be huge, no more is looked at: in all, and of each document.
MAX_CHARACTERS = 8 << 20
DOCUMENT_CHARACTERS = 1 << 15


@dataclass(frozen=True, eq=False)
class Excerpts:
    """Tokens of text, int64 [n] for each document; BOS is none of them."""

    texts: tuple[Tensor, ...]
    bos: int

    @classmethod
    def of(cls, documents: Iterable[Document], encoder: Encoder, skipped: Collection[int], tokens: int) -> "Excerpts":
        """The beginnings of ``documents``: of those that `tokenise` holds out, where they have ``tokens`` tokens
        together, else of all. Once `MAX_CHARACTERS` are together no more is read. skipped: ids that are no text to the
        model."""
        held_out: list[str] = []
        others: list[str] = []
        characters = 0
        for document in documents:
            text = document.text[:DOCUMENT_CHARACTERS].encode("utf-8", "replace").decode()
            (held_out if is_held_out(document, HELD_OUT_EVERY) else others).append(text)
            characters += len(text)
            if characters >= MAX_CHARACTERS:
                break
        texts = _encoded(held_out, encoder, skipped)
        if sum(map(len, texts)) < tokens:
            texts += _encoded(others, encoder, skipped)
        return cls(tuple(texts), encoder.bos)

    def rows(self, context: int, tokens: int, *, bos: bool) -> Tensor:
        """Rows of about ``tokens`` tokens in all, spread over the documents: int64 [rows, context], each of which
        begins with a BOS, as does each document in it; without ``bos`` there is none, and a row is one shorter.

        Raises ValueError for text that fills no row.
        """
        mark, length = torch.tensor([self.bos], dtype=torch.int64, device="cpu"), context - 1
        pieces = [piece for text in self.texts for piece in ((mark, text) if bos else (text,))]
        stream = torch.cat(pieces[bos:]) if pieces else mark[:0]
        if len(stream) < length:
            raise ValueError(f"text: expected at least {length} tokens for a row of {context}, got {len(stream)}")
        picked = sample_rows(stream[: len(stream) // length * length].view(-1, length), -(-tokens // length))
        return torch.cat([mark.expand(len(picked), 1), picked], 1) if bos else picked

    def beginnings(self, n: int, length: int) -> Tensor:
        """Up to ``n`` pieces of ``length`` tokens, int64 [rows, length], spread over the documents; none where every
        document is shorter."""
        pieces = [text[: len(text) // length * length].view(-1, length) for text in self.texts]
        return sample_rows(torch.cat(pieces), n)


def _encoded(texts: list[str], encoder: Encoder, skipped: Collection[int]) -> list[Tensor]:
    found = encoder.encode(texts) if texts else []
    kept = (ids[~np.isin(ids, list(skipped))] for ids, _ in found)
    return [torch.from_numpy(ids) for ids in kept if len(ids)]
