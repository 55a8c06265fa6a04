"""Token ids on their way into a model: which count, which are padding, at which positions they are."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import found
from .decoder import embedding_weight, find_decoder


def special_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The BOS, EOS and PAD ids of the model's config, sorted: tokens that SAEs are neither trained nor scored on."""
    return tuple(sorted(_ids(model, "bos_token_id", "eos_token_id", "pad_token_id")))


def _ids(model: nn.Module, *names: str) -> set[int]:
    ids: set[int] = set()
    for module in find_decoder(model).callers:
        config = getattr(module, "config", None)
        for name in names:
            value = getattr(config, name, None)
            ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ids


def skipped_ids(model: nn.Module, skip_token_ids: Iterable[int] | None) -> tuple[int, ...]:
    """``skip_token_ids``, by default `special_token_ids`. Raises TypeError or ValueError for what is no id."""
    if skip_token_ids is None:
        return special_token_ids(model)
    if isinstance(skip_token_ids, Tensor):
        skip_token_ids = skip_token_ids.tolist()
    if isinstance(skip_token_ids, (str, bytes)) or not isinstance(skip_token_ids, Iterable):
        raise TypeError(f"skip_token_ids: expected an iterable of ints, got {type(skip_token_ids).__name__}")
    ids = tuple(skip_token_ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"skip_token_ids: expected an iterable of ints, got {type(token).__name__} in it")
        if not 0 <= token < 2**31:
            raise ValueError(f"skip_token_ids: expected token ids, got {token}")
    return ids


def check_tokens(name: str, tokens: Any, vocabulary: int) -> None:
    """Raise TypeError or ValueError unless ``tokens`` are ids [rows, context] of the vocabulary."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected a torch.Tensor of int64 or int32, got {found(tokens)}")
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected shape [rows, context], got {list(tokens.shape)}")
    if tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{name}: expected ids from 0 to {vocabulary - 1}, got {low if low < 0 else high}")


def vocabulary_size(model: nn.Module) -> int:
    return embedding_weight(model).shape[0]


class TokenInput:
    """How rows of tokens are given to ``model``, and which of them count: neither padding nor among ``skipped``."""

    def __init__(self, model: nn.Module, skipped: tuple[int, ...]):
        self.skipped = skipped
        self._vocabulary = vocabulary_size(model)
        pads = _ids(model, "pad_token_id")
        self._pads = tuple(pads)
        # A token that also separates or begins texts may stand before one; only a run of them is padding.
        self._ambiguous = bool(pads & _ids(model, "bos_token_id", "eos_token_id"))

    def check(self, name: str, tokens: Any, attention_mask: Any) -> None:
        """Raise TypeError or ValueError for tokens or a mask of the wrong kind, and for padding before text."""
        check_tokens(name, tokens, self._vocabulary)
        if attention_mask is None:
            self._refuse_padding_before_text(name, tokens)
            return
        if not isinstance(attention_mask, Tensor) or attention_mask.dtype not in (torch.bool, torch.int64, torch.int32):
            raise TypeError(
                f"attention_mask: expected a torch.Tensor of bool, int64 or int32, got {found(attention_mask)}"
            )
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask: expected shape {list(tokens.shape)} like {name}, got {list(attention_mask.shape)}"
            )
        if not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError("attention_mask: expected 1 at tokens and 0 at padding, got other values")

    def _refuse_padding_before_text(self, name: str, tokens: Tensor) -> None:
        is_pad = isin(tokens, self._pads)
        is_text_later = (~is_pad).long().flip(1).cumsum(1).flip(1) > 0
        padding = is_pad & is_text_later
        if self._ambiguous:
            padding = padding[:, :2].sum(1) == 2
        if padding.any():
            raise ValueError(
                f"{name}: expected padding only after the text, found PAD before it, where the model would read it as "
                "text; pass attention_mask, or pad on the right"
            )

    def counted(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Bool, of the shape of ``tokens``."""
        counted = ~isin(tokens, self.skipped)
        return counted if attention_mask is None else counted & attention_mask.to(tokens.device).bool()


def isin(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Which tokens are among ``ids``: bool, of the shape of ``tokens``."""
    return torch.isin(tokens.long(), torch.tensor(ids, dtype=torch.int64, device=tokens.device))


def forward_arguments(tokens: Tensor, attention_mask: Tensor | None, device: torch.device) -> dict[str, Tensor | bool]:
    """Arguments of a forward without cache on ``device``; positions count the tokens that the mask lets through."""
    arguments: dict[str, Tensor | bool] = {"input_ids": tokens.to(device), "use_cache": False}
    if attention_mask is not None:
        mask = attention_mask.to(device).long()
        arguments |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return arguments
