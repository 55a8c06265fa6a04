"""Does an SAE fit activations? Its figures at each candidate site, at other scales, without BOS, and after rounding.

FVU is a ratio of sums, and two conventions of it are in use:

    about the mean   Σ‖x − x̂‖² / Σ‖x − x̄‖²    1 is no better than predicting the mean; ours everywhere
    about zero       Σ‖x − x̂‖² / Σ‖x‖²        smaller where the mean is large, whatever the SAE does

Explained variance is 1 − FVU. What the figures mean in words is in `diagnosis`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.moments import check_activations, mean_row, moments
from ..checks import check_floating, check_number, check_tensor, check_type
from ..saes import SparseAutoencoder
from ..sites import Site
from ..sites.site import as_site
from .fidelity import evaluate_sae

# Tokens on which the candidates are compared, and those on which many scales are tried.
SURVEY_TOKENS = 512
SCAN_TOKENS, SCAN_TOKENS_OF_MANY = 256, 32
# Another explanation displaces what is stated when it leaves less than this share of the FVU.
MUCH_LESS = 0.8
# …unless it takes L0 so many times farther from the one that is stated.
FARTHER_L0 = 2.0
# Above, no site is taken to fit as it is, and scales are tried over `OCTAVES` instead of one.
POOR = 0.4
# An SAE reconstructs at no scale but a narrow range around its own, so that the steps must be small.
STEPS_PER_OCTAVE, FINE_STEPS = 4, 32
OCTAVES = 16


@dataclass(frozen=True)
class Fit:
    """How an SAE does on some activations."""

    tokens: int
    l0: float
    """Mean number of active latents."""
    fvu: float
    """About the mean; NaN where the activations do not vary, NaN or Inf where x̂ is not finite."""
    fvu_zero: float
    """About zero."""
    median_fvu: float
    """Of the median token, about the mean."""
    top_error_share: float
    """Share of the squared error held by the 0.1 % of the tokens where it is largest, at least one."""
    top_variance_share: float
    """Share of the variance held by the 0.1 % of the tokens farthest from the mean, at least one."""

    @property
    def explained_variance(self) -> float:
        """1 − FVU about the mean."""
        return 1 - self.fvu

    @property
    def explained_variance_zero(self) -> float:
        """1 − FVU about zero."""
        return 1 - self.fvu_zero


def measure_fit(sae: SparseAutoencoder, activations: Tensor, factor: float = 1.0) -> Fit:
    """The figures of ``sae`` on ``activations`` [n, d_model], or where it is given ``factor`` times them and its
    reconstruction is divided by that again.

    Raises as `evaluate_sae`, and TypeError or ValueError for a factor that is no number > 0.
    """
    check_number("factor", factor, 0, open_low=True)
    metrics = evaluate_sae(_at_scale(sae, factor), activations)
    mean, variance = moments("activations", activations)
    square = variance + mean.square().sum().item()
    return Fit(
        tokens=metrics.tokens,
        l0=metrics.l0,
        fvu=metrics.fvu,
        fvu_zero=metrics.fvu * (variance / square) if variance > 0 else math.nan,
        median_fvu=metrics.median_fvu,
        top_error_share=metrics.top_error_share,
        top_variance_share=metrics.top_variance_share,
    )


def _at_scale(sae: SparseAutoencoder, factor: float) -> SparseAutoencoder:
    return sae if factor == 1 else _Rescaled(sae, factor)


class _Rescaled:
    """``sae`` between a factor on its input and its inverse on its output."""

    def __init__(self, sae: Any, factor: float):
        self._sae, self._factor = sae, factor
        self.W_dec, self.d_model, self.d_sae = sae.W_dec, sae.d_model, sae.d_sae
        if hasattr(sae, "encode_sparse"):
            self.encode_sparse = lambda x: sae.encode_sparse(x * factor)

    def encode(self, x: Tensor) -> Tensor:
        return self._sae.encode(x * self._factor)

    def decode(self, f: Any) -> Tensor:
        return self._sae.decode(f) / self._factor

    def __call__(self, x: Tensor) -> Tensor:
        return self._sae(x * self._factor) / self._factor


# ---- where, and at which scale


@dataclass(frozen=True)
class Survey:
    """Where, and at which scale of its input, an SAE fits best."""

    stated: Site | None
    fits: Mapping[Site, Fit]
    """As the activations are, by site."""
    site: Site
    """The one stated, else that of ``best``: where the SAE is judged."""
    best: tuple[Site, float]
    """The site and the factor on its activations that explain the SAE: ``(site, 1)`` unless another leaves much less
    FVU."""
    best_fit: Fit
    """There."""

    @property
    def ranking(self) -> list[Site]:
        """The sites, that of least FVU first."""
        return sorted(self.fits, key=lambda site: _order(self.fits[site]))


def survey(
    sae: SparseAutoencoder,
    activations: Mapping[Site, Tensor] | Mapping[str, Tensor],
    site: Site | str | None = None,
    average_l0: float | None = None,
) -> Survey:
    """Compare the candidates of ``activations`` {site: [n, d_model]}, of which row i is the same token at every site.

    The first `SURVEY_TOKENS` rows that all have are used. site: the one stated, among them. average_l0: the L0 stated.
    Another site explains the SAE when it leaves less than 0.8 of the FVU there and the median token is better off;
    another scale, tried at the stated site (at every one where none is stated and none fits), when it leaves less than
    0.8 of that. An explanation that takes L0 much farther from ``average_l0`` is none: more latents leave less FVU.

    Raises TypeError or ValueError for no activations, a ``site`` that is not among them, an ``average_l0`` that is no
    number > 0 and as `measure_fit`.
    """
    check_type("activations", activations, Mapping)
    by_site = {as_site(name): x for name, x in activations.items()}
    if not by_site:
        raise ValueError("activations: expected those of at least one site, got none")
    if average_l0 is not None:
        check_number("average_l0", average_l0, 0, open_low=True)
    stated = None if site is None else as_site(site)
    if stated is not None and stated not in by_site:
        raise ValueError(f"site: expected one of {', '.join(map(str, sorted(by_site)))}, got {stated}")
    for name, x in by_site.items():
        check_activations(f"activations[{name}]", x, sae.d_model)
    n = min(SURVEY_TOKENS, *(len(x) for x in by_site.values()))
    by_site = {name: x[:n] for name, x in sorted(by_site.items())}
    fits = {name: measure_fit(sae, x) for name, x in by_site.items()}
    first = min(fits, key=lambda name: _order(fits[name]))
    judged = first if stated is None else stated
    best, best_fit = (judged, 1.0), fits[judged]
    if _explains(fits[first], best_fit, average_l0):
        best, best_fit = (first, 1.0), fits[first]

    is_poor = not best_fit.fvu < POOR
    tried = list(by_site) if stated is None and is_poor else [judged]
    rows = SCAN_TOKENS_OF_MANY if len(tried) > 1 else SCAN_TOKENS
    scales = {name: _best_factor(sae, by_site[name][:rows], OCTAVES if is_poor else 1) for name in tried}
    name = min(scales, key=lambda name: scales[name][0])
    factor = scales[name][1]
    if factor != 1:
        there = measure_fit(sae, by_site[name], factor)
        if _explains(there, best_fit, average_l0):
            best, best_fit = (name, factor), there
            judged = name if stated is None else judged
    return Survey(stated, fits, judged, best, best_fit)


def _order(fit: Fit) -> float:
    return fit.fvu if math.isfinite(fit.fvu) else math.inf


def _explains(there: Fit, here: Fit, average_l0: float | None) -> bool:
    """Whether the SAE is so much better ``there`` that it belongs there. What is not finite is worse than all else."""
    if not there.fvu < MUCH_LESS * _order(here) or there.median_fvu > here.median_fvu:
        return False
    return average_l0 is None or _apart(there.l0, average_l0) <= FARTHER_L0 * _apart(here.l0, average_l0)


def _apart(l0: float, stated: float) -> float:
    """The ratio, at least 1."""
    return max(l0 / stated, stated / l0) if l0 > 0 else math.inf


@torch.no_grad()
def _best_factor(sae: SparseAutoencoder, x: Tensor, octaves: int) -> tuple[float, float]:
    """The least FVU over factors of up to ``octaves`` doublings either way, and the factor."""
    given = x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    exact = given.double()
    variance = (exact - exact.mean(0)).square().sum()

    def fvu(exponent: float) -> float:
        x_hat = _at_scale(sae, 2.0**exponent)(given).double()
        found = ((exact - x_hat).square().sum() / variance).item()
        return found if math.isfinite(found) else math.inf

    def least(exponents: Iterable[float]) -> tuple[float, float]:
        found, _, exponent = min((fvu(exponent), abs(exponent), exponent) for exponent in exponents)
        return found, exponent

    end = octaves * STEPS_PER_OCTAVE
    _, near = least(step / STEPS_PER_OCTAVE for step in range(-end, end + 1))
    between = FINE_STEPS // STEPS_PER_OCTAVE
    found, exponent = least(near + step / FINE_STEPS for step in range(-between, between + 1))
    return found, 2.0**exponent


# ---- how a text begins


@dataclass(frozen=True)
class Beginnings:
    """The same short texts with and without a BOS before them."""

    rows: int
    fvu_with: float
    fvu_without: float
    t: float
    """The rise of FVU without BOS over its standard error, of paired texts: above 0 where BOS helps. NaN where an FVU
    is."""


@torch.no_grad()
def compare_beginnings(
    sae: SparseAutoencoder, with_bos: Tensor, without_bos: Tensor, factor: float = 1.0
) -> Beginnings:
    """Figures of ``sae`` on the first tokens of texts, after a BOS and without: both [rows ≥ 2, tokens, d_model], of
    the same tokens, that of BOS left out. factor: as in `measure_fit`.

    A BOS changes most in the first tokens of a row, which a mean over long rows hides. Raises TypeError or ValueError
    for tensors of another shape, and as `measure_fit`.
    """
    check_tensor("with_bos", with_bos, ("rows", "tokens", sae.d_model))
    check_tensor("without_bos", without_bos, tuple(with_bos.shape))
    if len(with_bos) < 2:
        raise ValueError(f"with_bos: expected at least 2 rows, got {len(with_bos)}")
    fvu, deviations = [], []
    for name, x in (("with_bos", with_bos), ("without_bos", without_bos)):
        fvu.append(measure_fit(sae, x.flatten(0, 1), factor).fvu)
        given = x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        x_hat = _at_scale(sae, factor)(given).to(x.device)
        errors = (x.double() - x_hat.double()).square().sum((1, 2))
        spread = (x.double() - mean_row(name, x.flatten(0, 1))).square().sum((1, 2))
        deviations.append((errors - fvu[-1] * spread) / spread.mean())  # of each text's part in the ratio of sums
    deviation = (deviations[1] - deviations[0]).std().item() / math.sqrt(len(with_bos))
    rise = fvu[1] - fvu[0]
    if deviation > 0:
        t = rise / deviation
    else:  # copysign would make an infinity of NaN
        t = rise if rise == 0 or math.isnan(rise) else math.copysign(math.inf, rise)
    return Beginnings(len(with_bos), fvu[0], fvu[1], t)


# ---- rounding


@dataclass(frozen=True)
class Rounding:
    """What it costs that a model computes in few bits."""

    share: float
    """Σ‖x − x₃₂‖² / Σ‖x₃₂ − x̄₃₂‖², of the activations x and those of float32 x₃₂: an FVU that no SAE goes below."""
    fvu: float
    """Of the SAE on x."""
    fvu_exact: float
    """On x₃₂."""


def measure_rounding(sae: SparseAutoencoder, activations: Tensor, exact: Tensor) -> Rounding:
    """The cost of rounding, from ``activations`` [n, d_model] and ``exact``, those of the same tokens in float32.

    Raises TypeError or ValueError for tensors of another shape and as `measure_fit`.
    """
    check_activations("activations", activations, sae.d_model)
    check_tensor("exact", exact, tuple(activations.shape))
    _, variance = moments("exact", exact)
    difference = (activations.double() - exact.double()).square().sum(1).mean().item()
    share = difference / variance if variance > 0 else math.nan
    return Rounding(share, measure_fit(sae, activations).fvu, measure_fit(sae, exact).fvu)


_COARSE = (torch.bfloat16, torch.float16)
_DISTINCT = 16


def coarse_dtype(values: Tensor) -> torch.dtype | None:
    """bfloat16 or float16 where it can hold every one of ``values``: that is what they were rounded to, whatever dtype
    they have now. None where neither does, or where they are too few different ones to tell."""
    check_floating("values", values)
    for dtype in _COARSE:
        if values.dtype == dtype or torch.equal(values.to(dtype).to(values.dtype), values):
            few = values.flatten()[:4096].unique().numel() < _DISTINCT
            return None if few and values.dtype != dtype else dtype
    return None
