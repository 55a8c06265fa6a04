"""`collect`: the sparse codes of SAEs at many sites, from one pass of the model."""

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..checks import check_int
from ..errors import EnvironmentProblemError
from ..kernels import SparseCode
from .decoder import evaluating, find_decoder, input_device
from .scales import LatentScales, ScaleSums
from .site import Site, by_site
from .tap import Tap
from .tokens import TokenInput, forward_arguments, skipped_ids

BATCH_ROWS = 8


class Codes(dict[Site, SparseCode]):
    """{site: code} on the CPU, as `collect` returns it: row i of every site is the same token."""

    def __init__(self, codes: Mapping[Site, SparseCode], kept: Tensor, latent_scales: dict[Site, LatentScales]):
        super().__init__(codes)
        self.kept = kept
        """Which tokens the rows are of, in order: bool [rows, context]. What `Patch` takes as ``of``."""
        self.latent_scales = latent_scales
        """Of each latent of each site, over all the tokens that were collected."""

    @property
    def nbytes(self) -> int:
        """What the codes hold."""
        return sum(code_bytes(code) for code in self.values())


def code_bytes(code: SparseCode) -> int:
    return code.values.nbytes + code.indices.nbytes + code.offsets.nbytes


def collect(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[Site, Any] | Mapping[str, Any] | Mapping[Site | str, Any],
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = BATCH_ROWS,
    skip_token_ids: Iterable[int] | None = None,
    max_bytes: int = 4 << 30,
    progress: Callable[[int], Any] | None = None,
) -> Codes:
    """What the SAE at each site of ``saes`` makes of the model's own activations on ``tokens`` [rows, context].

        codes = collect(model, tokens, {Site(3, "resid"): sae})
        codes[Site(3, "resid")]  # SparseCode of the tokens where codes.kept, in order

    The text model alone runs, in evaluation mode and without gradients, ``batch_size`` rows at a time and no further
    than the deepest site; no activation is kept. While SAEs are attached, their effect is in what is collected; none
    may be at a deeper layer than all of ``saes``. attention_mask: 1 at tokens, 0 at padding; without it, padding must
    come after the text. skip_token_ids: tokens that are left out, by default BOS, EOS and PAD of the model's config.

    max_bytes: bound on what the codes hold on the CPU, the joining of the batches included: 8 bytes an entry (12 of an
    fp64 SAE), 8 a token and 8 a batch at each site, and those of the largest site twice. Beside them there are one
    forward, the codes of one batch, and 20 bytes a latent. progress: called with the number of rows done.

    An SAE is a module with ``d_sae`` and ``encode``; with ``encode_sparse``, nothing dense is made. Raises ValueError
    for no sites, sites that the model does not have, an SAE of another width, tokens of which none is kept, padding
    before text without a mask, and codes beyond ``max_bytes``; TypeError for an argument of another kind;
    EnvironmentProblemError for activations of an SAE that are not finite, and as `Capture` does.
    """
    check_int("max_bytes", max_bytes, 1)
    pass_ = Pass(model, tokens, saes, attention_mask, batch_size, skip_token_ids, progress)
    parts, joined = _gathered(pass_, max_bytes), {}
    for site in list(parts):
        joined[site] = _joined(parts.pop(site))
    return Codes(joined, pass_.kept, pass_.latent_scales())


def _gathered(pass_: "Pass", max_bytes: int) -> dict[Site, list[SparseCode]]:
    """The codes of each site, batch by batch."""
    parts: dict[Site, list[SparseCode]] = {site: [] for site in pass_.saes}
    held = dict.fromkeys(parts, 0)
    for rows, batch in pass_.batches():
        for site, code in batch.items():
            held[site] += code_bytes(code)
        if (needed := sum(held.values()) + max(held.values())) > max_bytes:
            raise ValueError(
                f"max_bytes: expected room for the codes, at least {needed} bytes for {rows.stop} of "
                f"{len(pass_.kept)} rows, got {max_bytes}; give more, or use collect_to_store"
            )
        for site, code in batch.items():
            parts[site].append(code)
    return parts


class Pass:
    """One pass of the model: arguments and errors of `collect`, checked now."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        saes: Any,
        attention_mask: Tensor | None,
        batch_size: int,
        skip_token_ids: Iterable[int] | None,
        progress: Callable[[int], Any] | None,
    ):
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a function, got {type(progress).__name__}")
        check_int("batch_size", batch_size, 1)
        self.saes = checked_saes(model, saes)
        self.kept = kept_tokens(model, tokens, attention_mask, skip_token_ids)
        self._model, self._tokens, self._mask = model, tokens, attention_mask
        self._batch_size, self._progress = batch_size, progress
        self._sums = {site: ScaleSums(sae.d_sae) for site, sae in self.saes.items()}

    def latent_scales(self) -> dict[Site, LatentScales]:
        return {site: sums.scales() for site, sums in self._sums.items()}

    def batches(self) -> Generator[tuple[slice, dict[Site, SparseCode]], None, None]:
        """Rows of tokens and their codes, on the CPU."""
        for start in range(0, len(self._tokens), self._batch_size):
            rows = slice(start, min(start + self._batch_size, len(self._tokens)))
            codes = self._codes(rows)
            for site, code in codes.items():
                self._sums[site].add(code)
            yield rows, codes
            if self._progress is not None:
                self._progress(rows.stop)

    @without_autocast
    @torch.no_grad()
    def _codes(self, rows: slice) -> dict[Site, SparseCode]:
        kept, found = self.kept[rows].flatten(), {}

        def take(site: Site, x: Tensor) -> None:
            code = encoded(self.saes[site], x.flatten(0, 1)[kept.to(x.device)]).to("cpu")
            if not code.values.isfinite().all():
                raise EnvironmentProblemError(
                    f"site {site}: expected finite activations, found NaN or Inf in rows {rows.start} to "
                    f"{rows.stop - 1}"
                )
            found[site] = code

        mask = None if self._mask is None else self._mask[rows]
        with evaluating(self._model), Tap(self._model, self.saes, take) as tap:
            tap.text_model(**forward_arguments(self._tokens[rows], mask, input_device(self._model)))
        return found


def checked_saes(model: nn.Module, saes: Any) -> dict[Site, Any]:
    """``saes`` by Site. Raises as `collect` does."""
    sae_at, decoder = by_site("saes", saes), find_decoder(model)
    for site, sae in sae_at.items():
        if not hasattr(sae, "encode") or not hasattr(sae, "d_sae"):
            raise TypeError(f"site {site}: expected an SAE with encode and d_sae, got {type(sae).__name__}")
        decoder.check_fits(site, sae)
    return sae_at


def kept_tokens(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor | None, skip_token_ids: Iterable[int] | None
) -> Tensor:
    """Which tokens have a row in a code: bool [rows, context] on the CPU. Raises as `collect` does."""
    given = TokenInput(model, skipped_ids(model, skip_token_ids))
    given.check("tokens", tokens, attention_mask)
    kept = given.counted(tokens, attention_mask).cpu()
    if not kept.any():
        raise ValueError("tokens: expected some that are kept, found none but those of skip_token_ids and padding")
    return kept


def encoded(sae: Any, rows: Tensor) -> SparseCode:
    """The code of rows [n, width]."""
    return sae.encode_sparse(rows) if hasattr(sae, "encode_sparse") else SparseCode.from_dense(sae.encode(rows))


def _joined(parts: list[SparseCode]) -> SparseCode:
    """Their rows, one after another."""
    values, indices, offsets = map(torch.cat, pieces_of(parts))
    return SparseCode(values, indices, offsets, parts[0].d_sae)


def pieces_of(parts: list[SparseCode]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Values, indices and offsets of ``parts`` as one code, each in pieces that are to be joined."""
    starts, total = [torch.zeros(1, dtype=torch.int64, device="cpu")], 0
    for part in parts:
        starts.append(part.offsets[1:] + total)
        total += part.nnz
    return [part.values for part in parts], [part.indices for part in parts], starts
