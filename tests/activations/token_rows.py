"""Documents and rows of tokens for tests: bytes as tokens, sides chosen by name."""

import torch

from gemmascope.activations import Document, packing, tokenise
from gemmascope.activations.packing import is_held_out

BOS, EOS, PAD = 256, 257, 258
PROSE = "The quick brown fox jumps over the lazy dog.\nThe dog does not mind;\n  the fox did it before.\n\n" * 3


def document(text, *, held_out=False, index=0, every=4, source="s"):
    """A document of that text on that side, by its name."""
    found = (Document(f"{index}.{k}", text, source) for k in range(1000))
    return next(document for document in found if is_held_out(document, every) == held_out)


def make(documents, tokenizer, out, *, context=8, every=4, **arguments):
    return tokenise(documents, tokenizer, out, context=context, held_out_every=every, **arguments)


def all_of(rows, part):
    return (rows.train if part == "train" else rows.held_out)(numbers(rows, part))


def numbers(rows, part):
    return torch.arange(rows.n_train if part == "train" else rows.n_held_out)


def everything(rows):
    """All that a folder holds."""
    names = rows.document_names(range(rows.n_documents))
    parts = [
        (all_of(rows, part).tolist(), rows.documents_of(part, numbers(rows, part)).tolist()) for part in packing.PARTS
    ]
    return names, parts
