"""The strings of tokens, as a reader of text sees them."""

from typing import Any

from torch import Tensor

from .overview import Vocabulary

_LOST = "�"


def vocabulary_of(tokenizer: Any, tokens: Tensor) -> Vocabulary:
    """Of a tokenizer of transformers: what each of ``tokens`` [n] decodes to alone; the tokenizer's own name of it,
    such as ``<0xE2>`` or ``<bos>``, where that is nothing, or no character by itself."""
    ids: list[int] = tokens.tolist()
    decoded = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    names = tokenizer.convert_ids_to_tokens(ids)
    strings = {}
    for token, text, name in zip(ids, decoded, names, strict=True):
        plain = text if text and _LOST not in text else name
        strings[token] = _whole(plain if isinstance(plain, str) else f"<{token}>")
    return Vocabulary(strings)


def _whole(text: str) -> str:
    """The text with U+FFFD for what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
