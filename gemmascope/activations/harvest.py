"""Activations of a language model at many sites, from one forward per batch: streamed, or all of them at once."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checks import check_int, found, is_integer
from ..sites import Capture, Site, evaluating, probe, site_width, special_token_ids


def stream(
    model: nn.Module,
    rows_of_tokens: Tensor | Iterable[Tensor],
    sites: Iterable[Site],
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    skip_token_ids: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[dict[Site, Tensor]]:
    """What flows through each of ``sites``, batch by batch: {site: [n, width]} of ``dtype`` on ``device``.

    rows_of_tokens: ids [rows, context], or an iterable of such tensors, all of one context, read when they are needed
    and not before. However the rows are divided among them, a batch is the next ``batch_size`` rows, the last one what
    is left. skip_token_ids: tokens to leave out at every site alike, so that row i of all sites is the same token; by
    default BOS, EOS and PAD of the model's config, as in Gemma Scope (arXiv 2408.05147 §3.1). A batch of nothing else
    is passed over.

    The text model alone runs, without gradients: no logits are formed. It is probed now, when `stream` is called, and
    runs when a batch is asked for. Between batches it is as it was, without hooks and in its own mode, and no
    activation is held, so that a stream may be left at any point.

    Raises ValueError for no sites, sites that the model does not have, a batch_size below 1 and, from the iterator,
    rows that are not [rows, context] integers or are of another context; TypeError for what is no tensor;
    EnvironmentProblemError as `sites.probe` and `sites.Capture` do.
    """
    check_int("batch_size", batch_size, 1)
    if isinstance(rows_of_tokens, Tensor):
        _check_tokens("rows_of_tokens", rows_of_tokens)
        rows_of_tokens = [rows_of_tokens]
    elif not isinstance(rows_of_tokens, Iterable):
        raise TypeError(f"rows_of_tokens: expected a torch.Tensor or an iterable of them, got {found(rows_of_tokens)}")
    sites = Capture(model, sites).sites
    if not sites:
        raise ValueError("sites: expected at least one, got none")
    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    probe(model)

    def batches() -> Iterator[dict[Site, Tensor]]:
        for tokens in _batches_of_rows(rows_of_tokens, batch_size):
            keep = _kept(tokens, skipped)
            if keep.any():
                yield _activations(model, tokens, keep, sites, dtype, device)

    return batches()


def harvest(
    model: nn.Module,
    tokens: Tensor,
    sites: Iterable[Site],
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    progress: Any = None,
) -> dict[Site, Tensor]:
    """`stream` of ``tokens`` [rows, context] to its end: {site: [n, width]} on the CPU, rows in order.

    progress: called with the number of rows done. Raises ValueError for tokens that are not [rows, context] integers or
    hold nothing but special tokens; else as `stream`.
    """
    _check_tokens("tokens", tokens)
    n_kept = int(_kept(tokens, special_token_ids(model)).sum())
    if n_kept == 0:
        raise ValueError("tokens: expected some that are not BOS, EOS or PAD, found none")
    report = (lambda rows_done: None) if progress is None else progress

    def rows() -> Iterator[Tensor]:
        for start in range(0, len(tokens), batch_size):
            if start:
                report(start)  # the rows before have been harvested when the next are asked for
            yield tokens[start : start + batch_size]

    sites = Capture(model, sites).sites
    batches = stream(model, rows(), sites, batch_size=batch_size, dtype=dtype)
    harvested = {site: torch.empty(n_kept, site_width(model, site), dtype=dtype) for site in sites}
    done = 0
    for batch in batches:
        n = len(batch[sites[0]])
        for site in sites:
            harvested[site][done : done + n] = batch[site]
        done += n
        del batch  # else it would live until after the next forward
    report(len(tokens))
    return harvested


def _check_tokens(name: str, tokens: Any) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [rows, context], got {found(tokens)}")
    if tokens.ndim != 2 or not is_integer(tokens):
        raise ValueError(f"{name}: expected integers [rows, context], got {tokens.dtype} {list(tokens.shape)}")


def _kept(tokens: Tensor, skipped: tuple[int, ...]) -> Tensor:
    """Where ``tokens`` are not in ``skipped``: bool, of their shape."""
    return ~torch.isin(tokens, torch.tensor(skipped, dtype=tokens.dtype, device=tokens.device))


def _batches_of_rows(tensors: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """The rows of all ``tensors``, ``batch_size`` at a time; a tensor is read when those before it are used up."""
    left: Tensor | None = None
    for tokens in tensors:
        _check_tokens("rows_of_tokens", tokens)
        if left is not None:
            if tokens.shape[1] != left.shape[1]:
                raise ValueError(
                    f"rows_of_tokens: expected rows of {left.shape[1]} tokens like those before, got "
                    f"{tokens.shape[1]}; pad them on the right, or stream each length on its own"
                )
            tokens = torch.cat([left, tokens]) if len(left) else tokens
        end = len(tokens) // batch_size * batch_size
        for start in range(0, end, batch_size):
            yield tokens[start : start + batch_size]
        left = tokens[end:]
    if left is not None and len(left):
        yield left


@torch.no_grad()
def _activations(
    model: nn.Module,
    tokens: Tensor,
    keep: Tensor,
    sites: Iterable[Site],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[Site, Tensor]:
    """One forward on ``tokens``, and what flowed through the sites where ``keep``: {site: [n, width]}."""
    on = next(model.parameters()).device
    with evaluating(model), Capture(model, sites) as capture:
        cast(nn.Module, model.base_model)(tokens.to(on), use_cache=False)
    keep = keep.to(on)
    return {site: capture[site][keep].to(device=device, dtype=dtype) for site in sites}
