"""Activations of a language model at many sites, from one forward per batch: streamed, or all of them at once."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_device, check_int, check_type, dtype_name, found
from ..sites import Capture, Site, evaluating, probe, site_width
from ..sites.decoder import find_decoder, input_device
from ..sites.tokens import TokenInput, forward_arguments, skipped_ids
from .outliers import OutlierCounts, OutlierFilter


class Activations(dict[Site, Tensor]):
    """{site: [n, width]}, as `harvest` returns it, and where they come from."""

    def __init__(self, activations: Mapping[Site, Tensor], kept: Tensor, outliers: OutlierCounts):
        super().__init__(activations)
        self.kept = kept
        """Which tokens they are of, in order: bool [rows, context], True n times."""
        self.outliers = outliers


class Stream(Iterator[dict[Site, Tensor]]):
    """The batches of `stream`."""

    def __init__(self, batches: "_Batches", outliers: OutlierCounts):
        self._batches = batches
        self.outliers = outliers
        """Counted so far."""
        self.kept: Tensor | None = None
        """Which tokens the latest batch is of, in order: bool [rows, context]."""

    def __next__(self) -> dict[Site, Tensor]:
        for batch, kept in self._batches:
            self.kept = kept
            if batch is not None:
                return batch
        raise StopIteration

    def close(self) -> None:
        """End it."""
        self._batches.close()


_Batches = Generator[tuple[dict[Site, Tensor] | None, Tensor], None, None]


def stream(
    model: nn.Module,
    rows_of_tokens: Tensor | Iterable[Tensor],
    sites: Iterable[Site | str],
    *,
    attention_mask: Tensor | Iterable[Tensor] | None = None,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    skip_token_ids: Iterable[int] | None = None,
    max_norm_ratio: float | None = None,
    median_norms: Mapping[Site, float] | None = None,
    device: torch.device | str = "cpu",
) -> Stream:
    """What flows through each of ``sites``, batch by batch: {site: [n, width]} of ``dtype`` on ``device``.

    rows_of_tokens: ids [rows, context] of int64 or int32, or an iterable of such tensors, all of one context, read when
    they are needed and not before. However the rows are divided among them, a batch is the next ``batch_size`` rows,
    the last one what is left. skip_token_ids: tokens to leave out at every site alike, so that row i of all sites is
    the same token; by default BOS, EOS and PAD of the model's config, as in Gemma Scope (arXiv 2408.05147 §3.1). A
    batch of nothing else is passed over. attention_mask: 1 at tokens, 0 at padding, which the model does not read and
    which is left out; a tensor beside a tensor, an iterable beside an iterable. Without it, padding must come after the
    text.

    max_norm_ratio: leave out, at every site alike, each token whose norm at one of them is above so many times the
    median norm there. ``.outliers`` of what is returned counts them in any case, without it those above
    `OUTLIER_RATIO` times. The median is that of ``median_norms`` {site: norm}, so that held-out text is filtered as
    the training text was, else that of the first batch that is not passed over.

    The text model alone runs, without gradients: no logits are formed. It is probed now, when `stream` is called, and
    runs when a batch is asked for. Between batches it is as it was, without hooks and in its own mode, and no
    activation is held, so that a stream may be left at any point.

    Raises ValueError for no sites, sites that the model does not have, a number out of range and, from the iterator,
    rows that are not [rows, context], hold other ids than the vocabulary's or are of another context, padding before
    text without a mask, a mask that does not fit, and activations beyond the range of ``dtype``; TypeError for an
    argument of another kind; EnvironmentProblemError as `sites.probe` and `sites.Capture` do, and for weights on the
    device meta.
    """
    sites = Capture(model, sites).sites
    if not sites:
        raise ValueError("sites: expected at least one, got none")
    check_int("batch_size", batch_size, 1)
    check_type("dtype", dtype, torch.dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype_name(dtype)}")
    device = check_device("device", device)
    given = TokenInput(model, skipped_ids(model, skip_token_ids))
    outliers = OutlierFilter(sites, max_norm_ratio, median_norms)
    pieces = _pieces(given, rows_of_tokens, attention_mask)
    probe(model)

    def run(tokens: Tensor, mask: Tensor | None) -> tuple[dict[Site, Tensor] | None, Tensor]:
        kept = given.counted(tokens, mask)
        if not kept.any():
            return None, kept
        batch = _activations(model, tokens, mask, kept, sites)
        if (keep := outliers.keep(batch)) is not None:
            batch = {site: rows[keep.to(rows.device)] for site, rows in batch.items()}
            kept[kept.clone()] = keep.to(kept.device)
            if not keep.any():
                return None, kept
        return {site: _converted(site, rows, dtype, device) for site, rows in batch.items()}, kept

    batches = (run(tokens, mask) for tokens, mask in _batches_of_rows(pieces, batch_size))
    return Stream(batches, outliers.counts)


def harvest(
    model: nn.Module,
    tokens: Tensor,
    sites: Iterable[Site | str],
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    max_norm_ratio: float | None = None,
    median_norms: Mapping[Site, float] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Activations:
    """`stream` of ``tokens`` [rows, context] to its end: {site: [n, width]} on the CPU, rows in order.

    Its ``kept`` says which tokens the rows are of, its ``outliers`` how many were, or would have been, left out.
    progress: called with the number of rows done. Raises ValueError for tokens of which none is kept; else as `stream`.
    """
    check_int("batch_size", batch_size, 1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function, got {type(progress).__name__}")
    given = TokenInput(model, skipped_ids(model, None))
    given.check("tokens", tokens, attention_mask)
    n_counted = int(given.counted(tokens, attention_mask).sum())
    if n_counted == 0:
        raise ValueError("tokens: expected some that are not BOS, EOS or PAD, found none")
    report = (lambda rows_done: None) if progress is None else progress

    def rows() -> Iterator[Tensor]:
        for start in range(0, len(tokens), batch_size):
            if start:
                report(start)  # the rows before have been harvested when the next are asked for
            yield tokens[start : start + batch_size]

    sites = Capture(model, sites).sites
    batches = stream(
        model,
        rows(),
        sites,
        attention_mask=None if attention_mask is None else attention_mask.split(batch_size),
        batch_size=batch_size,
        dtype=dtype,
        max_norm_ratio=max_norm_ratio,
        median_norms=median_norms,
    )
    kept_of_batches, done = [], 0
    harvested = {site: torch.empty(n_counted, site_width(model, site), dtype=dtype, device="cpu") for site in sites}
    for batch, kept in batches._batches:
        kept_of_batches.append(kept)
        if batch is None:
            continue
        n = len(batch[sites[0]])
        for site in sites:
            harvested[site][done : done + n] = batch[site]
        done += n
        del batch  # else it would live until after the next forward
    report(len(tokens))
    if done < n_counted:
        harvested = {site: rows[:done].clone() for site, rows in harvested.items()}
    return Activations(harvested, torch.cat(kept_of_batches), batches.outliers)


def _pieces(given: TokenInput, rows_of_tokens: Any, attention_mask: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tensors of tokens, each with its mask; checked now where they are there, else when they are read."""
    if isinstance(rows_of_tokens, Tensor):
        given.check("rows_of_tokens", rows_of_tokens, attention_mask)
        return iter([(rows_of_tokens, attention_mask)])
    if isinstance(rows_of_tokens, (str, bytes)) or not isinstance(rows_of_tokens, Iterable):
        raise TypeError(f"rows_of_tokens: expected a torch.Tensor or an iterable of them, got {found(rows_of_tokens)}")
    if attention_mask is not None and (isinstance(attention_mask, Tensor) or not isinstance(attention_mask, Iterable)):
        raise TypeError(f"attention_mask: expected an iterable like rows_of_tokens, got {found(attention_mask)}")

    def checked() -> Iterator[tuple[Tensor, Tensor | None]]:
        masks = None if attention_mask is None else iter(attention_mask)
        for tokens in rows_of_tokens:
            mask = None
            if masks is not None and (mask := next(masks, None)) is None:
                raise ValueError("attention_mask: expected as many tensors as in rows_of_tokens, got fewer")
            given.check("rows_of_tokens", tokens, mask)
            yield tokens, mask
        if masks is not None and next(masks, None) is not None:
            raise ValueError("attention_mask: expected as many tensors as in rows_of_tokens, got more")

    return checked()


def _batches_of_rows(
    pieces: Iterable[tuple[Tensor, Tensor | None]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The rows of all ``pieces``, ``batch_size`` at a time; a piece is read when those before it are used up."""
    left: tuple[Tensor, Tensor | None] | None = None
    for tokens, mask in pieces:
        if left is not None:
            before, mask_before = left
            if tokens.shape[1] != before.shape[1]:
                raise ValueError(
                    f"rows_of_tokens: expected rows of {before.shape[1]} tokens like those before, got "
                    f"{tokens.shape[1]}; pad them on the right, or stream each length on its own"
                )
            if len(before):
                tokens = torch.cat([before, tokens])
                mask = None if mask is None or mask_before is None else torch.cat([mask_before, mask])
        end = len(tokens) // batch_size * batch_size
        for start in range(0, end, batch_size):
            rows = slice(start, start + batch_size)
            yield tokens[rows], None if mask is None else mask[rows]
        left = tokens[end:], None if mask is None else mask[end:]
    if left is not None and len(left[0]):
        yield left


@torch.no_grad()
def _activations(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor | None, counted: Tensor, sites: Iterable[Site]
) -> dict[Site, Tensor]:
    """One forward on ``tokens``, and what flowed through the sites where ``counted``: {site: [n, width]}."""
    text_model = find_decoder(model).text_model
    with evaluating(model), Capture(model, sites) as capture:
        text_model(**forward_arguments(tokens, attention_mask, input_device(model)))
    return {site: capture[site][counted.to(capture[site].device)] for site in sites}


def _converted(site: Site, rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    converted = rows.to(device=device, dtype=dtype)
    if dtype == torch.float16 and not bool(torch.equal(converted.isfinite(), rows.isfinite().to(device))):
        raise ValueError(
            f"dtype: expected one that holds the activations of {site}, got float16, whose range they leave"
        )
    return converted
