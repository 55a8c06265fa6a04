"""What the figures of `fit` say: whether an SAE fits a model here, a line for each thing that is often wrong.

A finding is ``ok``, a ``note`` (worth knowing, and no reason to doubt), or ``wrong``. The SAE fits where none is wrong.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.outliers import OUTLIER_RATIO, are_outliers, norms_of
from ..activations.statistics import LARGE_VARIANCE_SHARE
from ..checks import check_choice, check_number, check_type, dtype_name
from ..saes import SparseAutoencoder
from ..sites import Site
from .fit import Beginnings, Fit, Rounding, Survey, coarse_dtype, measure_fit

STATUSES = ("ok", "note", "wrong")
# The first of these that is wrong is the verdict: those behind it may follow from it.
ORDER = ("width", "site", "scale", "bos", "dtype", "fvu", "l0", "model", "tokenizer", "norm", "errors")

HALF = 0.5
# L0 over what is stated, either way.
L0_NOTE, L0_WRONG = 1.25, 2.0
# With and without BOS: a difference that chance does not make (t), and that matters (ratio of FVU).
BOS_T, BOS_RATIO, BOS_HARMS = 4.0, 1.05, 2.0
ROUNDING_RATIO = 1.25
# Two scales are the same within 10 %.
SCALE_RATIO = 1.1


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: what was looked at, how it is, and in words."""

    name: str
    status: str
    text: str

    def __post_init__(self):
        check_choice("name", self.name, ORDER)
        check_choice("status", self.status, STATUSES)
        check_type("text", self.text, str)


@dataclass(frozen=True)
class Diagnosis:
    """Whether an SAE fits. findings: in the order in which they are read. figures: values of JSON."""

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any]

    @property
    def fits(self) -> bool:
        return not any(finding.status == "wrong" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line: that it fits, or the first reason why not."""
        wrong = [finding for finding in self.findings if finding.status == "wrong"]
        if not wrong:
            return "fits"
        return f"does not fit: {min(wrong, key=lambda finding: ORDER.index(finding.name)).text}"

    def lines(self) -> list[str]:
        """A line for each finding, the verdict last."""
        names = [*(finding.name for finding in self.findings), "verdict"]
        width, status = max(map(len, names)), max(map(len, STATUSES))
        lines = [f"{each.name:<{width}}  {each.status:<{status}}  {each.text}" for each in self.findings]
        return [*lines, f"{'verdict':<{width}}  {self.verdict}"]

    def to_dict(self) -> dict[str, Any]:
        """Values of JSON; a figure that is not finite is None."""
        return {
            "fits": self.fits,
            "verdict": self.verdict,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "figures": _plain(self.figures),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def diagnose(
    sae: SparseAutoencoder,
    found: Survey,
    activations: Tensor,
    *,
    average_l0: float | None = None,
    bos: bool = True,
    beginnings: Beginnings | None = None,
    rounding: Rounding | None = None,
    dtype: torch.dtype | None = None,
) -> Diagnosis:
    """What is right and wrong about ``sae`` on ``activations`` [n, d_model] of the site ``found.site``.

    found: from `fit.survey`. average_l0: the L0 that the SAE states. bos: whether the activations are of
    rows that begin with a BOS; beginnings: from `fit.compare_beginnings`, at ``found.best``. dtype: in which the model
    ran; rounding: from `fit.measure_rounding`. What is not given is left out.

    Raises TypeError or ValueError as `fit.measure_fit`, and for an ``average_l0`` that is no number > 0.
    """
    check_type("found", found, Survey)
    check_type("bos", bos, bool)
    if average_l0 is not None:
        check_number("average_l0", average_l0, 0, open_low=True)
    fit = measure_fit(sae, activations)
    norms = norms_of(activations)
    rms = norms.double().square().mean().sqrt().item()
    findings = [
        _site(found),
        _norm(activations, norms),
        _scale(found, rms, sae.d_model),
        *([] if beginnings is None else [_bos(beginnings, bos, found)]),
        _dtype(sae, activations, dtype, rounding),
        _fvu(fit),
        *([] if average_l0 is None else [_l0(fit, average_l0)]),
        _errors(fit),
    ]
    best_site, factor = found.best
    figures = dataclasses.asdict(fit) | {
        "explained_variance": fit.explained_variance,
        "explained_variance_zero": fit.explained_variance_zero,
        "average_l0_stated": average_l0,
        "median_norm": norms.nanmedian().item(),
        "root_mean_square_norm": rms,
        "site": str(found.site),
        "stated_site": None if found.stated is None else str(found.stated),
        "best_site": str(best_site),
        "best_factor": factor,
        "best_fvu": found.best_fit.fvu,
        "fvu_by_site": {str(site): found.fits[site].fvu for site in found.ranking},
        "beginnings": None if beginnings is None else dataclasses.asdict(beginnings),
        "rounding": None if rounding is None else dataclasses.asdict(rounding),
    }
    return Diagnosis(tuple(findings), figures)


# ---- one line each


def _site(found: Survey) -> Finding:
    ranking, (best, factor) = found.ranking, found.best
    only = "the only site of its width"
    fits_best = f"of {len(ranking)} sites it fits"
    here = found.fits[found.site]
    if found.stated is not None and best != found.stated:
        kind = "layer" if best.kind == found.stated.kind else "site"
        return Finding(
            "site",
            "wrong",
            f"the wrong {kind}: at {found.stated} FVU is {_number(here.fvu)}, at {best} {_number(found.best_fit.fvu)}",
        )
    if found.stated is None:
        scale = "" if factor == 1 else " at another scale"
        where = f"{fits_best} {best} best" if len(ranking) > 1 else f"{only} is {best}, which it fits best"
        return Finding("site", "note", f"stated nowhere; {where}{scale}{_next(found)}")
    if ranking[0] == best:
        where = f"{fits_best} best there" if len(ranking) > 1 else only
        return Finding("site", "ok", f"{best}, as stated; {where}{_next(found)}")
    return Finding(
        "site", "note", f"{best}, as stated; nothing fits it much better, {_listed(found, ranking[0])} is least"
    )


def _next(found: Survey) -> str:
    """What is known of the runner-up."""
    ranking = found.ranking
    return f", then {_listed(found, ranking[1])}" if len(ranking) > 1 and ranking[0] == found.best[0] else ""


def _listed(found: Survey, site: Site) -> str:
    return f"{site} (FVU {_number(found.fits[site].fvu)})"


def _norm(activations: Tensor, norms: Tensor) -> Finding:
    median = norms.nanmedian().item()
    outliers = int(are_outliers(norms, median, OUTLIER_RATIO).sum())
    text = f"median ‖x‖ {_number(median)}; {outliers:,} of {len(norms):,} tokens above {OUTLIER_RATIO:g} times that"
    if outliers:
        text += ", which decide sums of squares: read the median token's FVU too"
    return Finding("norm", "note" if outliers else "ok", text)


def _scale(found: Survey, rms: float, d_model: int) -> Finding:
    site, factor = found.best
    if site != found.site:
        return Finding("scale", "note", f"not tried at {site}, where it fits as it is")
    if factor == 1:
        return Finding("scale", "ok", "no factor on the inputs fits much better than 1")
    fvu = f"FVU {_number(found.best_fit.fvu)} against {_number(found.fits[site].fvu)}"
    known = _known_scale(factor, rms, d_model)
    return Finding(
        "scale",
        "wrong",
        f"the wrong scale: it fits inputs times {_number(factor)}, {fvu}{f'; {known}' if known else ''}",
    )


def _known_scale(factor: float, rms: float, d_model: int) -> str:
    """What makes inputs of that scale; "" for what is none of the usual ways."""
    root = math.sqrt(d_model)
    known = {
        "about what makes their mean squared norm 1: perhaps the scale of its training was not folded in": 1 / rms,
        "about what makes their mean squared norm d_model: perhaps it was trained on inputs normalised so": root / rms,
        "about √d_model, Gemma's scale of embeddings": root,
        "about 1/√d_model, Gemma's scale of embeddings": 1 / root,
    }
    text = min(known, key=lambda text: abs(math.log(factor / known[text])))
    return text if abs(math.log(factor / known[text])) < math.log(SCALE_RATIO) else ""


def _bos(found: Beginnings, bos: bool, survey: Survey) -> Finding:
    here, other = (found.fvu_with, found.fvu_without) if bos else (found.fvu_without, found.fvu_with)
    names = ("with BOS", "without") if bos else ("without BOS", "with it")
    figures = f"in the first tokens of a text FVU is {_number(here)} {names[0]}, {_number(other)} {names[1]}"
    if not survey.best_fit.fvu < 1:
        return Finding("bos", "note", f"cannot be told while nothing fits: {figures}")
    if math.isnan(found.t):
        return Finding("bos", "note", f"cannot be told without figures: {figures}")
    if abs(found.t) <= BOS_T or max(here, other) <= BOS_RATIO * min(here, other):
        return Finding("bos", "note", f"makes no difference that can be told at {survey.best[0]}: {figures}")
    if here < other:
        return Finding("bos", "ok", figures)
    if not bos:
        return Finding("bos", "wrong", f"BOS is missing, put it before every text: {figures}")
    # Without BOS the first tokens attend to nothing, which may be easier whatever the SAE was trained on.
    status = "wrong" if here > BOS_HARMS * other else "note"
    return Finding("bos", status, f"perhaps it was trained without BOS: {figures}")


def _dtype(
    sae: SparseAutoencoder, activations: Tensor, dtype: torch.dtype | None, rounding: Rounding | None
) -> Finding:
    status, parts = "ok", []
    if dtype is not None:
        status = "note" if dtype.itemsize < 4 else "ok"
        parts.append(f"the model ran in {dtype_name(dtype)}")
    coarse = coarse_dtype(activations)
    if coarse is not None and coarse != dtype:
        status = "note"
        parts.append(f"the activations were rounded to {dtype_name(coarse)}")
    if rounding is not None:
        status = "wrong" if rounding.fvu > ROUNDING_RATIO * rounding.fvu_exact else "note"
        parts.append(
            f"rounding is {rounding.share:.2g} of the variance, FVU {_number(rounding.fvu, 4)}, in float32 "
            f"{_number(rounding.fvu_exact, 4)}"
        )
    weights, rounded = sae.W_dec.dtype, coarse_dtype(sae.W_dec.detach())
    text = f"weights of the SAE in {dtype_name(weights)}"
    if rounded is not None and rounded != weights:
        status = "note" if status == "ok" else status
        text += f", once rounded to {dtype_name(rounded)}"
    return Finding("dtype", status, "; ".join([*parts, text]))


def _fvu(fit: Fit) -> Finding:
    text = (
        f"{_number(fit.fvu)} about the mean (explained variance {_number(fit.explained_variance)}), "
        f"{_number(fit.fvu_zero)} about zero ({_number(fit.explained_variance_zero)}); median token "
        f"{_number(fit.median_fvu)}; {fit.tokens:,} tokens"
    )
    if not fit.fvu < 1:
        return Finding("fvu", "wrong", f"no better than predicting the mean: {text}")
    return Finding("fvu", "ok" if fit.fvu < HALF else "note", text)


def _l0(fit: Fit, stated: float) -> Finding:
    ratio = fit.l0 / stated
    apart = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    status = "ok" if apart <= L0_NOTE else "note" if apart <= L0_WRONG else "wrong"
    return Finding("l0", status, f"{_number(fit.l0)} latents a token, where {_number(stated)} are stated")


def _errors(fit: Fit) -> Finding:
    text = f"the .1 % of tokens where it is largest hold {fit.top_error_share:.1%} of the squared error"
    return Finding("errors", "note" if fit.top_error_share > LARGE_VARIANCE_SHARE else "ok", text)


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}"
