"""What the studies share: what they are given, the tidy rows that they leave, and sums by document turned into figures.

A study asks a `Work` for sums or figures, which measures them or has them already, and makes a `Finding` of them.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..evaluation.bootstrap import Bootstrap
from ..evaluation.protocol import LOSSES, TERMS, Sums
from ..evaluation.token_sets import MarkedText
from ..sites import Site

# Of a row, in this order in the CSV. x, y: the point; n: of how many tokens, predictions or latents it is; low, high:
# the interval of y, empty where there is none. figure: what y is. series: "SAE", a part of it, or a control. sae: its
# name.
COLUMNS = ("study", "model", "site", "layer", "width", "kind", "L0", "x", "y", "n", "low", "high")
COLUMNS += ("figure", "series", "sae")

Row = dict[str, Any]
Scale = Literal["linear", "log", "symlog"]
Interval = tuple[float, float] | None

DELTA_LOSS, FVU = "ΔLM loss", "FVU"


@dataclass(frozen=True)
class Axis:
    """label; the scale; and the range of the paper's figure, which is kept where everything lies in it."""

    label: str
    scale: Scale = "linear"
    range: tuple[float, float] | None = None


L0_AXIS = Axis("L0", "log", (10, 1000))
LOSS_AXIS = Axis("ΔLM loss, nats a token", "log", (5e-4, 1))
FVU_AXIS = Axis("FVU", "log", (0.1, 0.8))


@dataclass(frozen=True)
class Plot:
    """How rows are drawn: a panel for each figure and site, in it a curve of each SAE or of those that belong together.

    figures: the y axis of each figure. mark: "points" of many SAEs, or a line ("lines") or a histogram ("steps") of
    each. colours: by which column. controls: series that are drawn hollow or grey. left_out: ends of the names of
    series that are in the rows alone. nested: marks of one series within those of another, since they coincide.
    """

    title: str
    x: Axis
    figures: Mapping[str, Axis]
    mark: Literal["points", "lines", "steps"] = "points"
    colours: Literal["layer", "series", "width", "sae"] = "layer"
    controls: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    nested: bool = False


@dataclass(frozen=True)
class Listed:
    """An SAE or transcoder as a study knows it. kind: see `gemmascope.training.config.KINDS`."""

    name: str
    site: str
    layer: int
    width: int
    kind: str
    writes: Site


@dataclass(frozen=True)
class Conversations:
    """Rows of which each token has a role: 0, 1, … in the order of ``names``; another number counts nowhere."""

    text: MarkedText
    roles: Tensor
    names: tuple[str, ...]


class Work(Protocol):
    """What a study is given: the SAEs, the text, and what is measured on demand or read where it was measured."""

    @property
    def model(self) -> str: ...

    @property
    def saes(self) -> Sequence[Listed]: ...

    @property
    def text(self) -> MarkedText:
        """The rows that SAEs are judged on."""
        ...

    @property
    def second_model(self) -> str | None: ...

    def sources(self) -> Mapping[int, str]:
        """Of each document of the text, by number, where it comes from."""
        ...

    def bootstrap(self, documents: int) -> Bootstrap: ...

    def evaluation(self) -> Mapping[str, Mapping[str, Any]]:
        """The rows of an evaluation of the same SAEs on the same text, by name: their figures without an ending are of
        the set of tokens that is asked about."""
        ...

    def frequencies(self) -> Mapping[str, Tensor]:
        """Of the same evaluation, by name, the share of the tokens that each latent fires on, fp32 [width]."""
        ...

    def sums(
        self,
        name: str,
        text: MarkedText | None = None,
        *,
        on: Literal["model", "second", "float32", "bfloat16"] = "model",
        sae_dtype: torch.dtype | None = None,
    ) -> Sums:
        """`evaluation.protocol.measure` on one set of tokens, ``text`` or ``inliers``, in pieces called ``name``.

        text: by default the one that SAEs are judged on. on: the model, the second one, or the model in a dtype.
        sae_dtype: of the weights of SAEs, by default that of the files.
        """
        ...

    def attributions(self, name: str, columns: Tensor) -> Sums:
        """`studies.uniformity.attribution_sums` of the text, in pieces."""
        ...

    def conversations(self) -> Conversations:
        """The text with the roles of its tokens, where the second model's chat template tells them."""
        ...


@dataclass(frozen=True)
class Finding:
    """What a study found. conclusion: one line, with its control. facts: what else is worth a word."""

    rows: list[Row]
    conclusion: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """source: where the paper has it. run: measure, and say what was found. lacks: what is missing for it, or None.
    needs_second: whether it depends on the second model. of_all_tokens: whether it counts outliers in any case."""

    name: str
    question: str
    source: str
    plot: Plot
    run: Callable[[Work], Finding]
    lacks: Callable[[Work], str | None] = lambda work: None
    needs_second: bool = False
    of_all_tokens: bool = False


# ---- rows


def row_of(
    study: str,
    work: Work,
    sae: Listed,
    *,
    l0: float,
    x: float,
    y: float,
    n: int,
    figure: str,
    series: str = "SAE",
    interval: Interval = None,
) -> Row:
    """A row; numbers that are not finite become None."""
    low, high = (None, None) if interval is None else interval
    found = (
        study,
        work.model,
        sae.site,
        sae.layer,
        sae.width,
        sae.kind,
        l0,
        x,
        y,
        n,
        low,
        high,
        figure,
        series,
        sae.name,
    )
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in zip(COLUMNS, found, strict=True)
    }


def csv_of(rows: Sequence[Row]) -> str:
    """The rows as CSV with a head; what is None is empty."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["" if row[key] is None else row[key] for key in COLUMNS] for row in rows)
    return out.getvalue()


# ---- sums by document of one set of tokens


@dataclass(frozen=True, eq=False)
class TextSums:
    """The sums of one SAE by owner, of the tokens of the set alone: each fp64 [owners]."""

    terms: Mapping[str, Tensor]
    predictions: Tensor
    rise: Tensor
    """Σ of the loss with the reconstruction in place, less that without."""
    ablated: Tensor
    """Likewise with the mean."""

    @classmethod
    def of(cls, sums: Sums, sae: Listed) -> "TextSums":
        clean = sums["clean"]
        loss = LOSSES.index("loss")
        return cls(
            dict(zip(TERMS, sums[f"{sae.name}/tokens"][:, 0].T, strict=True)),
            clean[:, 0],
            sums[f"{sae.name}/losses"][:, 0, loss] - clean[:, 1],
            sums[f"{sae.writes}/mean"][:, 0, loss] - clean[:, 1],
        )

    def where(self, owners: Tensor) -> "TextSums":
        """Those of some owners: bool [owners]."""
        terms = {name: values[owners] for name, values in self.terms.items()}
        return TextSums(terms, self.predictions[owners], self.rise[owners], self.ablated[owners])

    @property
    def tokens(self) -> int:
        return int(self.terms["tokens"].sum())

    @property
    def l0(self) -> float:
        return ratio(self.terms["l0"], self.terms["tokens"])

    @property
    def fvu(self) -> float:
        """About the mean of the set in the whole text."""
        return ratio(self.terms["error"], self.terms["spread"])

    @property
    def delta_loss(self) -> float:
        return ratio(self.rise, self.predictions)

    @property
    def ablation_delta_loss(self) -> float:
        return ratio(self.ablated, self.predictions)

    def rows(self, study: str, work: Work, sae: Listed, series: str, bootstrap: Bootstrap) -> list[Row]:
        """ΔLM loss and FVU at the L0 of these sums, the owners being documents."""
        shared = {"l0": self.l0, "x": self.l0, "series": series}
        losses = bootstrap.ratio(self.rise, self.predictions)
        fvu = bootstrap.ratio(self.terms["error"], self.terms["spread"])
        predictions = int(self.predictions.sum())
        return [
            row_of(study, work, sae, y=self.delta_loss, n=predictions, figure=DELTA_LOSS, interval=losses, **shared),
            row_of(study, work, sae, y=self.fvu, n=self.tokens, figure=FVU, interval=fvu, **shared),
        ]


def ratio(numerators: Tensor, denominators: Tensor) -> float:
    """Σ over Σ; NaN where the latter is 0."""
    below = denominators.sum()
    return (numerators.sum() / below).item() if below != 0 else math.nan


# ---- words


def short(value: float | None, digits: int = 3) -> str:
    """A number of so many digits for a sentence."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}"


def between(values: Sequence[float | None]) -> str:
    """The least and the largest, or the only one, for a sentence."""
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    if not known:
        return "–"
    low, high = short(known[0]), short(known[-1])
    return low if low == high else f"{low} to {high}" if known[0] < 0 else f"{low}–{high}"


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
