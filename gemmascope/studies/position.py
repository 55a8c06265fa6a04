"""Where in a row SAEs err: reconstruction error and ΔLM loss by the position of the token (arXiv 2408.05147 §4.2).

One pass: sums and counts by position and group of documents. A position is the number of tokens before one in its row,
the BOS with which it begins included; ΔLM loss is that of predicting the token there. Beyond `EVERY` neighbours are
taken together, `OF_OCTAVE` bins an octave.
"""

import torch
from torch import Tensor

from ..evaluation.token_sets import MarkedText
from .common import DELTA_LOSS, Axis, Finding, Interval, Listed, Plot, Row, Study, TextSums, Work, between, row_of

NAME = "position"
ERROR, MEAN, ABLATED = "reconstruction error", "predicting the mean", "mean ablation"
EVERY, OF_OCTAVE = 32, 16
# Documents are drawn anew in so many groups.
MOST_GROUPS = 32
EARLY = 10


def bins_of(context: int) -> Tensor:
    """The bin of each position of a row: int64 [context], from 0, without gaps."""
    positions = torch.arange(context, dtype=torch.int64, device="cpu")
    octave = (positions // EVERY).clamp(min=1).double().log2().floor().long()
    width = EVERY // OF_OCTAVE * 2**octave
    beyond = EVERY + OF_OCTAVE * octave + positions // width - OF_OCTAVE
    return torch.where(positions < EVERY, positions, beyond)


def owners_of(text: MarkedText) -> tuple[Tensor, int, int]:
    """Of each token the number group · bins + bin, where documents in turn are of one of the groups; groups; bins."""
    numbers = text.documents[text.documents >= 0].unique()
    groups = min(len(numbers), MOST_GROUPS)
    bins = bins_of(text.tokens.shape[1])
    group = torch.searchsorted(numbers, text.documents.clamp(min=0)) % groups
    n = int(bins.max()) + 1
    return group * n + bins, groups, n


def run(work: Work) -> Finding:
    text = work.text
    owners, groups, n_bins = owners_of(text)
    sums = work.sums(NAME, text.owned_by(owners))
    place = sums["documents"].long()
    bins = bins_of(text.tokens.shape[1])
    positions = torch.arange(len(bins), dtype=torch.float64, device="cpu")
    x = positions.new_zeros(n_bins).scatter_reduce(0, bins, positions, "mean", include_self=False)

    def table(values: Tensor) -> Tensor:
        """[groups, bins] of [owners], 0 where there are none."""
        return values.new_zeros(groups * n_bins).index_copy(0, place, values).view(groups, n_bins)

    rows: list[Row] = []
    drawn = work.bootstrap(groups)
    site_done: set[str] = set()
    for sae in work.saes:
        of_sae = TextSums.of(sums, sae)
        square = of_sae.terms["about_zero"].sum() / of_sae.terms["tokens"].sum()
        tokens, predictions = table(of_sae.terms["tokens"]), table(of_sae.predictions)
        error, spread = (table(of_sae.terms[name]) / square for name in ("error", "spread"))
        rise, ablated = table(of_sae.rise), table(of_sae.ablated)
        rows += _points(work, sae, of_sae.l0, x, error, tokens, ERROR, "SAE", drawn.ratios(error, tokens))
        rows += _points(work, sae, of_sae.l0, x, rise, predictions, DELTA_LOSS, "SAE", drawn.ratios(rise, predictions))
        if str(sae.writes) not in site_done:  # the same for all SAEs there
            site_done.add(str(sae.writes))
            rows += _points(work, sae, of_sae.l0, x, spread, tokens, ERROR, MEAN, None)
            rows += _points(work, sae, of_sae.l0, x, ablated, predictions, DELTA_LOSS, ABLATED, None)
    return Finding(rows, _conclusion(rows), {"groups_of_documents": groups})


def _points(
    work: Work,
    sae: Listed,
    l0: float,
    x: Tensor,
    values: Tensor,
    counts: Tensor,
    figure: str,
    series: str,
    intervals: list[Interval] | None,
) -> list[Row]:
    """A row for each bin with tokens, of [groups, bins]."""
    total, n = values.sum(0), counts.sum(0)
    return [
        row_of(
            NAME,
            work,
            sae,
            l0=l0,
            x=x[each].item(),
            y=(total[each] / n[each]).item(),
            n=int(n[each]),
            figure=figure,
            series=series,
            interval=None if intervals is None else intervals[each],
        )
        for each in range(len(n))
        if n[each] > 0
    ]


def _conclusion(rows: list[Row]) -> str:
    """The first tokens against the last half of the row."""
    last = max((row["x"] for row in rows), default=0.0) / 2

    def mean(series: str, figure: str, early: bool) -> list[float | None]:
        sums: dict[tuple, list[float]] = {}
        for row in rows:
            inside = row["x"] <= EARLY if early else row["x"] >= last
            if (row["series"], row["figure"]) == (series, figure) and inside and row["y"] is not None:
                each = sums.setdefault((row["sae"], row["site"]), [0.0, 0.0])
                each[0] += row["y"] * row["n"]
                each[1] += row["n"]
        return [total / n for total, n in sums.values() if n]

    def words(series: str, figure: str) -> str:
        return f"{between(mean(series, figure, True))} → {between(mean(series, figure, False))}"

    return (
        f"tokens 1–{EARLY} → the last half of the row: {ERROR} {words('SAE', ERROR)} (predicting the mean "
        f"{words(MEAN, ERROR)}), ΔLM loss {words('SAE', DELTA_LOSS)} (mean ablation {words(ABLATED, DELTA_LOSS)})"
    )


STUDY = Study(
    NAME,
    "Where in a row do SAEs err: reconstruction error and ΔLM loss by the position of the token?",
    "arXiv 2408.05147 §4.2, figures 3 and 15",
    Plot(
        "Position in the row",
        Axis("tokens before it in the row", "log"),
        {
            ERROR: Axis("squared error / mean square", "log"),
            DELTA_LOSS: Axis("ΔLM loss, nats a token", range=(0, 0.01)),
        },
        mark="lines",
        colours="sae",
        controls=(MEAN,),
        left_out=(ABLATED,),
    ),
    run,
)
