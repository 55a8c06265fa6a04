"""How often latents fire: a histogram of log₁₀ of the firing frequency of each SAE (arXiv 2408.05147 §4.3)."""

import math

import torch

from ..evaluation.fidelity import HIGH_FREQUENCY
from .common import Axis, Finding, Plot, Row, Study, Work, between, row_of

NAME = "frequency"
FIGURE, ALIKE = "latents", "if all fired alike"
# Of a decade of frequency.
BINS = 5
# What is rarer has no bin: of 20 million tokens one is more.
LOWEST = -8


def run(work: Work) -> Finding:
    evaluated, frequencies = work.evaluation(), work.frequencies()
    rows: list[Row] = []
    facts = {}
    for sae in work.saes:
        l0, frequency = evaluated[sae.name]["l0"], frequencies[sae.name]
        fires = frequency > 0
        for centre, latents in histogram(frequency):
            rows.append(row_of(NAME, work, sae, l0=l0, x=centre, y=latents, n=sae.width, figure=FIGURE))
        if l0:
            alike = math.log10(l0 / sae.width)
            rows.append(row_of(NAME, work, sae, l0=l0, x=alike, y=sae.width, n=sae.width, figure=FIGURE, series=ALIKE))
        facts[sae.name] = {
            "never": int((~fires).sum()),
            "median_log10": frequency[fires].double().log10().median().item() if fires.any() else None,
            "alike_log10": math.log10(l0 / sae.width) if l0 else None,
            "above_a_tenth": int((frequency > HIGH_FREQUENCY).sum()),
        }
    medians = [each["median_log10"] for each in facts.values()]
    dead = [facts[sae.name]["never"] / sae.width for sae in work.saes]
    frequent = [facts[sae.name]["above_a_tenth"] / sae.width for sae in work.saes]
    return Finding(
        rows,
        f"median of log10 frequency {between(medians)} (if all latents fired alike "
        f"{between([each['alike_log10'] for each in facts.values()])}); share that never fired {between(dead)}, on "
        f"more than a tenth of the tokens {between(frequent)}",
        {"saes": facts},
    )


def histogram(frequency: torch.Tensor) -> list[tuple[float, int]]:
    """The middle of each bin of log₁₀ frequency [latents], from the rarest that fires to 1, and the latents in it.

    A bin has its lower end, the last one both. Latents that never fire are in none.
    """
    wide = frequency.double()
    exponents = wide[wide > 0].log10()
    if not len(exponents):
        return []
    bins = (exponents * BINS).floor().long().clamp(LOWEST * BINS, -1)
    first = int(bins.min())
    counts = torch.bincount(bins - first, minlength=-first)
    return [((first + index + 0.5) / BINS, int(count)) for index, count in enumerate(counts.tolist())]


STUDY = Study(
    NAME,
    "How often do latents fire: a histogram of log10 of the firing frequency of each SAE.",
    "arXiv 2408.05147 §4.3, figure 5",
    Plot(
        "How often latents fire",
        Axis("log10 of the share of tokens that a latent fires on"),
        {FIGURE: Axis("latents")},
        mark="steps",
        colours="sae",
        controls=(ALIKE,),
    ),
    run,
    of_all_tokens=True,
)
