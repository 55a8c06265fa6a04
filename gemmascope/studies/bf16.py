"""Less precision: all in fp32, SAEs in bfloat16, SAEs and the language model in bfloat16 (arXiv 2408.05147 §4.7).

Behind the SAE's weights the threshold and all sums stay fp32. Every variant is judged on the same tokens, against the
model of its own precision without SAEs.
"""

import torch

from .common import (
    DELTA_LOSS,
    FVU,
    FVU_AXIS,
    L0_AXIS,
    LOSS_AXIS,
    Finding,
    Interval,
    Plot,
    Row,
    Study,
    TextSums,
    Work,
    between,
    short,
)

NAME = "bf16"
FP32, SAE, BOTH = "all fp32", "SAE bf16", "SAE and model bf16"


def run(work: Work) -> Finding:
    variants = {
        FP32: work.sums(f"{NAME}/fp32", on="float32", sae_dtype=torch.float32),
        SAE: work.sums(f"{NAME}/sae", on="float32", sae_dtype=torch.bfloat16),
        BOTH: work.sums(f"{NAME}/both", on="bfloat16", sae_dtype=torch.bfloat16),
    }
    documents = len(variants[FP32]["documents"])
    drawn = work.bootstrap(documents)
    rows: list[Row] = []
    shifts: dict[str, dict[str, dict[str, float | Interval]]] = {SAE: {}, BOTH: {}}
    for sae in work.saes:
        found = {name: TextSums.of(sums, sae) for name, sums in variants.items()}
        for name, each in found.items():
            rows += each.rows(NAME, work, sae, name, drawn)
        for name in shifts:
            shifted = found[name].rise - found[FP32].rise
            shifts[name][sae.name] = {
                "delta_loss": found[name].delta_loss - found[FP32].delta_loss,
                "delta_loss_interval": drawn.ratio(shifted, found[FP32].predictions),
                "fvu": found[name].fvu - found[FP32].fvu,
            }
    return Finding(rows, _conclusion(work, rows, shifts), {"shifts": shifts})


def _conclusion(work: Work, rows: list[Row], shifts) -> str:
    def largest(name: str, key: str) -> str:
        return short(max((abs(each[key]) for each in shifts[name].values()), default=float("nan")), 2)

    halves = [
        (row["high"] - row["low"]) / 2
        for row in rows
        if (row["series"], row["figure"]) == (FP32, DELTA_LOSS) and row["low"] is not None
    ]
    parts = [
        f"{name} shifts ΔLM loss by at most {largest(name, 'delta_loss')} and FVU by at most {largest(name, 'fvu')}"
        for name in (SAE, BOTH)
    ]
    return f"{'; '.join(parts)} (half of the interval of ΔLM loss over documents in fp32: {between(halves)})"


STUDY = Study(
    NAME,
    "Does bfloat16 cost anything: all in fp32, SAEs in bfloat16, SAEs and the model in bfloat16?",
    "arXiv 2408.05147 §4.7, figure 10",
    Plot("Precision", L0_AXIS, {DELTA_LOSS: LOSS_AXIS, FVU: FVU_AXIS}, colours="series", nested=True),
    run,
)
