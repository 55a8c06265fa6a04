"""Edits of a code: ablate latents, steer by one, patch in what they were in another run.

Each is written twice: on dense activations, which is the specification and differentiable, and on the entries of a
`SparseCode`, which gives the same activations and is what runs without gradients.
"""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_int, check_number, check_type, is_integer
from ..kernels import SparseCode
from .scales import UNITS, LatentScales
from .window import Window, check_mask


@dataclass(frozen=True, eq=False)
class Edit:
    """What edits have in common.

    positions: bool [columns] or [rows, columns], where to edit; None: everywhere. A column counts from the beginning of
    the sequence as the model was given it, padding included, and whatever a cache holds of it; columns past the last
    one of the mask, such as those that are generated, are not edited. A mask of one row is that of every row.
    """

    _: KW_ONLY
    positions: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.positions is not None:
            check_mask("positions", self.positions)

    @property
    def depends_on_columns(self) -> bool:
        return self.positions is not None

    def resolved(self, d_sae: int, scales: LatentScales | None) -> "Edit":
        """The edit of an SAE of ``d_sae`` latents, its amount as a number. Raises ValueError as `attach` does."""
        raise NotImplementedError

    def dense(self, f: Tensor, window: Window) -> Tensor:
        """f [N, d_sae], the activations of the tokens of ``window``, row after row; differentiable."""
        raise NotImplementedError

    def sparse(self, code: SparseCode, window: Window) -> SparseCode:
        """The same of a code."""
        raise NotImplementedError

    def _rows(self, window: Window, device: torch.device) -> Tensor:
        """Which tokens: bool [N]."""
        if self.positions is None:
            return torch.ones(window.batch * window.seq, dtype=torch.bool, device=device)
        return window.cut("positions", self.positions, False).flatten().to(device)


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """f_j = 0 for each j of ``latents``: an int or several."""

    latents: "int | Iterable[int]"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "latents", _latents(self.latents))

    def resolved(self, d_sae: int, scales: LatentScales | None) -> Edit:
        _check_within(_latents(self.latents), d_sae)
        return self

    def dense(self, f: Tensor, window: Window) -> Tensor:
        ablated = f.index_fill(1, _tensor(self.latents, f), 0)
        return torch.where(self._rows(window, f.device)[:, None], ablated, f)

    def sparse(self, code: SparseCode, window: Window) -> SparseCode:
        tokens = code.token_indices()
        hit = torch.isin(code.indices, _tensor(self.latents, code.indices))
        return _rebuilt(code, tokens, ~(hit & self._rows(window, tokens.device)[tokens]))


@dataclass(frozen=True, eq=False)
class _OneLatent(Edit):
    latent: int
    amount: float
    unit: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_int("latent", self.latent, 0)
        check_number("amount", self.amount)
        if self.unit is not None:
            check_choice("unit", self.unit, UNITS)

    def resolved(self, d_sae: int, scales: LatentScales | None) -> Edit:
        _check_within((self.latent,), d_sae)
        if self.unit is None:
            return self
        if scales is None:
            raise ValueError(f"latent_scales: expected those of the site, for the unit {self.unit!r}, got none")
        if (n := len(scales.firing_count)) != d_sae:
            raise ValueError(f"latent_scales: expected those of {d_sae} latents, as the SAE has, got {n}")
        return replace(self, amount=self.amount * scales.unit(self.unit, self.latent), unit=None)

    def _edited(self, column: Tensor) -> Tensor:
        """What becomes of the activations [N] of the latent."""
        raise NotImplementedError

    def dense(self, f: Tensor, window: Window) -> Tensor:
        column, edited = f[:, self.latent], f.clone()
        edited[:, self.latent] = torch.where(self._rows(window, f.device), self._edited(column), column)
        return edited

    def sparse(self, code: SparseCode, window: Window) -> SparseCode:
        tokens = code.token_indices()
        rows = self._rows(window, tokens.device)
        hit = (code.indices == self.latent) & rows[tokens]
        column = code.values.new_zeros(code.n_tokens).index_put((tokens[hit],), code.values[hit])
        edited = self._edited(column)
        at = (rows & (edited != 0)).nonzero()[:, 0]
        return _rebuilt(code, tokens, ~hit, (at, torch.full_like(at, self.latent), edited[at]))


@dataclass(frozen=True, eq=False)
class Add(_OneLatent):
    """f_j + ``amount`` for j = ``latent``, whether it fires or not: x̂ moves by ``amount``·W_dec[j].

    amount: a number of either sign, in units of the latent's largest activation ("max"), of its mean one ("mean"), or
    of none. f_j may come out below 0.
    """

    def _edited(self, column: Tensor) -> Tensor:
        return column + self.amount


@dataclass(frozen=True, eq=False)
class Clamp(_OneLatent):
    """f_j = ``amount`` for j = ``latent``, whether it fires or not; the unit as of `Add`."""

    def _edited(self, column: Tensor) -> Tensor:
        return torch.full_like(column, self.amount)


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """The activations of another run, ``code``, in the place of those here.

    of: bool [rows, columns], which tokens the rows of ``code`` are of, in order, such as `Codes.kept`; it must be True
    code.n_tokens times. Of one row (or one dimension), it is patched into every row. None: every token of a forward
    from the first column on, which must be as many. Where it is False or at an end, nothing is patched; ``positions``
    may leave out more. latents: those to patch; None: all of them.
    """

    code: SparseCode
    of: Tensor | None = field(default=None, repr=False)
    latents: "int | Iterable[int] | None" = None

    def __post_init__(self):
        super().__post_init__()
        check_type("code", self.code, SparseCode)
        self.code.check()
        if self.of is not None:
            check_mask("of", self.of)
            if (n := int(self.of.sum())) != self.code.n_tokens:
                raise ValueError(f"of: expected True {self.code.n_tokens} times, as code has tokens, got {n}")
        if self.latents is not None:
            object.__setattr__(self, "latents", _latents(self.latents))

    @property
    def depends_on_columns(self) -> bool:
        return True

    def resolved(self, d_sae: int, scales: LatentScales | None) -> Edit:
        if self.code.d_sae != d_sae:
            raise ValueError(f"code: expected one of {d_sae} latents, as the SAE has, got {self.code.d_sae}")
        _check_within(_latents(self.latents) if self.latents is not None else (), d_sae)
        return self

    def _sources(self, window: Window, device: torch.device) -> Tensor:
        """The row of ``code`` for each token, −1 for none: int64 [N]."""
        n_tokens = window.batch * window.seq
        if self.of is None:
            if window.start > 0:
                return torch.full((n_tokens,), -1, dtype=torch.int64, device=device)
            if n_tokens != self.code.n_tokens:
                raise ValueError(
                    f"code: expected {n_tokens} tokens, as the model runs on, got {self.code.n_tokens}; say by `of` "
                    "which tokens they are of"
                )
            sources = torch.arange(n_tokens, dtype=torch.int64, device=device)
        else:
            numbers = (self.of.long().flatten().cumsum(0) - 1).reshape(self.of.shape)
            sources = window.cut("of", numbers.where(self.of, -1), -1).flatten().to(device)
        return sources.where(self._rows(window, device), -1)

    def _is_patched(self, like: Tensor) -> Tensor:
        """By latent: bool [d_sae]."""
        if self.latents is None:
            return torch.ones(self.code.d_sae, dtype=torch.bool, device=like.device)
        table = torch.zeros(self.code.d_sae, dtype=torch.bool, device=like.device)
        return table.index_fill(0, _tensor(self.latents, like), True)

    def dense(self, f: Tensor, window: Window) -> Tensor:
        sources = self._sources(window, f.device)
        given = self.code.to(f.device).to_dense().to(f.dtype)
        if len(given) == 0:
            return f
        there = (sources >= 0)[:, None] & self._is_patched(f)
        return torch.where(there, given.index_select(0, sources.clamp(min=0)), f)

    def sparse(self, code: SparseCode, window: Window) -> SparseCode:
        tokens, device = code.token_indices(), code.indices.device
        sources, patched, given = self._sources(window, device), self._is_patched(code.indices), self.code.to(device)
        kept = (sources[tokens] < 0) | ~patched[code.indices.long()]
        into = (sources >= 0).nonzero()[:, 0]
        first, lengths = given.offsets[sources[into]], given.l0()[sources[into]]
        ends = lengths.cumsum(0)
        within = torch.arange(int(lengths.sum()), device=device) - torch.repeat_interleave(ends - lengths, lengths)
        entries = torch.repeat_interleave(first, lengths) + within
        into, latents = torch.repeat_interleave(into, lengths), given.indices[entries].long()
        there = patched[latents] & (given.values[entries] != 0)
        values = given.values[entries].to(code.values.dtype)
        return _rebuilt(code, tokens, kept, (into[there], latents[there], values[there]))


def as_edits(site: Any, edits: Any) -> tuple[Edit, ...]:
    """Those of one site. Raises TypeError for what is none."""
    found = (edits,) if isinstance(edits, Edit) else edits
    if isinstance(found, (str, bytes)) or not isinstance(found, Iterable):
        raise TypeError(f"edits: expected an edit or a list of them at {site}, got {type(edits).__name__}")
    found = tuple(found)
    for each in found:
        if not isinstance(each, Edit) or type(each) in (Edit, _OneLatent):
            raise TypeError(f"edits: expected Ablate, Add, Clamp or Patch at {site}, got {type(each).__name__}")
    return found


def _latents(latents: Any) -> tuple[int, ...]:
    if is_integer(latents):
        latents = latents.flatten().tolist()
    if isinstance(latents, int) and not isinstance(latents, bool):
        latents = (latents,)
    if isinstance(latents, (str, bytes, bool, Tensor)) or not isinstance(latents, Iterable):
        raise TypeError(f"latents: expected an int or several, got {type(latents).__name__}")
    latents = tuple(latents)
    if not latents:
        raise ValueError("latents: expected at least one, got none")
    for latent in latents:
        check_int("latents", latent, 0)
    return latents


def _check_within(latents: tuple[int, ...], d_sae: int) -> None:
    for latent in latents:
        check_int("latent", latent, 0, d_sae - 1)


def _tensor(latents: Any, like: Tensor) -> Tensor:
    return torch.tensor(latents, dtype=torch.int64, device=like.device)


def _rebuilt(
    code: SparseCode, tokens: Tensor, kept: Tensor, new: tuple[Tensor, Tensor, Tensor] | None = None
) -> SparseCode:
    """The entries of ``code``, whose tokens are ``tokens``, where ``kept``, and ``new`` ones (tokens, latents, values)
    in places that are free."""
    tokens, latents, values = tokens[kept], code.indices[kept].long(), code.values[kept]
    if new is not None:
        tokens, latents, values = (torch.cat(pair) for pair in zip((tokens, latents, values), new, strict=True))
        order = torch.argsort(tokens * code.d_sae + latents)
        tokens, latents, values = tokens[order], latents[order], values[order]
    offsets = torch.zeros_like(code.offsets)
    offsets[1:] = torch.bincount(tokens, minlength=code.n_tokens).cumsum(0)
    return SparseCode(values, latents.to(torch.int32), offsets, code.d_sae)
