"""What a suite on the real model must reach, and what of it a run has reached."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

TARGET_L0 = 40
# FVU at each site. Of a run of `--quick`: QUICK_FVU.
FVU = {
    "layer_5/resid": 0.068,
    "layer_9/resid": 0.118,
    "layer_9/mlp": 0.148,
    "layer_9/att": 0.32,
    "layer_12/resid": 0.214,
}
QUICK_FVU = {"layer_9/resid": 0.14, "layer_9/mlp": 0.18, "layer_9/att": 0.36}
# The other bars: in full, of `--quick`.
L0_WITHIN = (0.10, 0.15)
DEAD_RESID, DEAD = (0.05, 0.10), (0.10, 0.20)
RECOVERED = ("layer_9/resid", (0.88, 0.86))


class Verdict(NamedTuple):
    site: str
    what: str
    found: float | None
    least: float
    most: float

    @property
    def met(self) -> bool:
        """A figure that is missing or NaN meets nothing."""
        return self.found is not None and self.least <= self.found <= self.most

    def line(self) -> str:
        found = "–" if self.found is None else f"{self.found:.4g}"
        bounds = [f"at least {self.least:.4g}"] * (self.least > 0) + [f"at most {self.most:.4g}"] * (self.most < 1e9)
        return (
            f"{self.site:16s} {self.what:22s} {found:>8s}   {', '.join(bounds):34s} {'met' if self.met else 'MISSED'}"
        )


def site_of(row: Row) -> str:
    return f"layer_{row['layer']}/{row['site']}"


def verdicts(rows: Sequence[Row], quick: bool = False) -> list[Verdict]:
    """Every bar of every site, on held-out tokens that were kept. rows: the SAEs of `results.json`.

    Each of several SAEs at a site must meet its bars. A site without an SAE has missed them.
    """
    found: list[Verdict] = []
    for site in QUICK_FVU if quick else FVU:
        for row in [row for row in rows if site_of(row) == site] or [{}]:
            found += of_sae(site, row, quick)
    return found


def of_sae(site: str, row: Row, quick: bool = False) -> list[Verdict]:
    """Those of one SAE at ``site``."""
    fvu, off = row.get("fvu"), L0_WITHIN[quick]
    dead = (DEAD_RESID if site.endswith("/resid") else DEAD)[quick]
    bars = [
        Verdict(site, "L0", row.get("l0"), TARGET_L0 * (1 - off), TARGET_L0 * (1 + off)),
        Verdict(site, "FVU", fvu, 0, (QUICK_FVU if quick else FVU)[site]),
        *(_below(site, fvu, name, row.get(key)) for name, key in (("PCA", "pca_fvu"), ("random", "random_fvu"))),
        Verdict(site, "dead", row.get("dead_fraction"), 0, dead),
    ]
    if site == RECOVERED[0]:
        bars.append(Verdict(site, "loss recovered", row.get("loss_recovered"), RECOVERED[1][quick], 1e9))
    return bars


def _below(site: str, fvu: float | None, name: str, baseline: float | None) -> Verdict:
    ratio = None if fvu is None or not baseline else fvu / baseline
    return Verdict(site, f"FVU / {name}'s", ratio, 0, 1)


def table(judged: Sequence[Verdict]) -> list[str]:
    missed = sum(not verdict.met for verdict in judged)
    return [*(verdict.line() for verdict in judged), f"{len(judged) - missed} of {len(judged)} bars met"]
