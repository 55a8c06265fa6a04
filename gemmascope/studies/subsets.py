"""Kinds of text: ΔLM loss and FVU of each source of documents against L0 (arXiv 2408.05147 §4.6)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .common import (
    DELTA_LOSS,
    FVU,
    FVU_AXIS,
    L0_AXIS,
    LOSS_AXIS,
    Finding,
    Listed,
    Plot,
    Row,
    Study,
    TextSums,
    Work,
    counted,
    row_of,
    short,
)

NAME = "subsets"
MOST_SOURCES = 12
OTHERS = "other sources"
MEAN = "mean ablation"


def lacks(work: Work) -> str | None:
    found = set(work.sources().values())
    if len(found) > 1:
        return None
    return f"text: expected documents of several sources, got {len(found)} (of .jsonl the field source, else the file)"


def groups_of(
    sources: Mapping[int, str], tokens: Mapping[int, float], most: int = MOST_SOURCES
) -> dict[str, list[int]]:
    """The documents by source, those with the most ``tokens`` first; beyond ``most`` sources the rest together."""
    found: dict[str, list[int]] = {}
    for document, source in sorted(sources.items()):
        found.setdefault(source, []).append(document)
    size = {source: sum(tokens.get(each, 0.0) for each in documents) for source, documents in found.items()}
    ordered = sorted(found, key=lambda source: (-size[source], source))
    if len(ordered) <= most:
        return {source: found[source] for source in ordered}
    kept = {source: found[source] for source in ordered[: most - 1]}
    rest = [document for source in ordered[most - 1 :] for document in found[source]]
    return kept | {OTHERS if OTHERS not in kept else f"{OTHERS} (rest)": sorted(rest)}


def run(work: Work) -> Finding:
    sums = work.sums(NAME)
    numbers = sums["documents"].long()
    tokens = dict(zip(numbers.tolist(), sums["clean"][:, 0].tolist(), strict=True))
    groups = groups_of({number: work.sources()[number] for number in numbers.tolist()}, tokens)
    where = {source: torch.isin(numbers, _tensor(documents)) for source, documents in groups.items()}
    rows: list[Row] = []
    for sae in work.saes:
        whole = TextSums.of(sums, sae)
        for source, mask in where.items():
            rows += _rows(work, sae, whole.where(mask), source, mask)
        rows += whole.rows(NAME, work, sae, "all", work.bootstrap(len(numbers)))
    facts = {"documents": {source: len(documents) for source, documents in groups.items()}}
    return Finding(rows, _conclusion(work, rows, where), facts)


def _tensor(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _rows(work: Work, sae: Listed, part: TextSums, source: str, mask: Tensor) -> list[Row]:
    if not part.tokens:
        return []
    l0 = part.l0
    ablated = {"y": part.ablation_delta_loss, "n": int(part.predictions.sum()), "figure": DELTA_LOSS}
    return [
        *part.rows(NAME, work, sae, source, work.bootstrap(int(mask.sum()))),
        row_of(NAME, work, sae, l0=l0, x=l0, series=f"{source}: {MEAN}", **ablated),
    ]


def _conclusion(work: Work, rows: list[Row], where: Mapping[str, Tensor]) -> str:
    """Of the sources in the order of their ΔLM loss, on average over the SAEs."""

    def mean(series: str, figure: str) -> float:
        values = [row["y"] for row in rows if (row["series"], row["figure"]) == (series, figure)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.nan

    known = [source for source in where if not math.isnan(mean(source, DELTA_LOSS))]
    ordered = sorted(known, key=lambda source: mean(source, DELTA_LOSS))

    def words(source: str) -> str:
        ablated = short(mean(f"{source}: {MEAN}", DELTA_LOSS))
        return f"{source} {short(mean(source, DELTA_LOSS))} (mean ablation {ablated}), FVU {short(mean(source, FVU))}"

    ends = dict.fromkeys([*ordered[:1], *ordered[-1:]])
    extremes = "; ".join(map(words, ends))
    return f"ΔLM loss, mean of {counted(len(work.saes), 'SAE')}, least and most of {len(known)} sources: {extremes}"


STUDY = Study(
    NAME,
    "On which texts do SAEs do worse: ΔLM loss and FVU of each source of documents? Needs several sources.",
    "arXiv 2408.05147 §4.6, figure 9",
    Plot("Kinds of text", L0_AXIS, {DELTA_LOSS: LOSS_AXIS, FVU: FVU_AXIS}, colours="series", left_out=(MEAN,)),
    run,
    lacks,
)
