"""Sparsity against fidelity: ΔLM loss and FVU against L0, with controls beside (arXiv 2408.05147 §4.1)."""

from .common import DELTA_LOSS, FVU, FVU_AXIS, L0_AXIS, LOSS_AXIS, Finding, Plot, Row, Study, Work, between, counted
from .common import row_of as row

NAME = "sparsity-fidelity"
MEAN, PCA, RANDOM, PAIRS, LINEAR = "mean ablation", "PCA of rank L0", "random dictionary", "token pairs", "linear map"
CONTROLS = {"pca_fvu": PCA, "random_fvu": RANDOM, "pair_table_fvu": PAIRS, "linear_fvu": LINEAR}


def run(work: Work) -> Finding:
    found = work.evaluation()
    rows: list[Row] = []
    for sae in work.saes:
        figures = found[sae.name]
        at = {"l0": figures["l0"], "x": figures["l0"]}
        of_loss = {"n": figures["predictions"], "figure": DELTA_LOSS}
        of_fvu = {"n": figures["tokens"], "figure": FVU}
        loss, fvu = figures["delta_loss"], figures["fvu"]
        if loss is not None:
            rows.append(row(NAME, work, sae, y=loss, interval=figures["delta_loss_interval"], **at, **of_loss))
        if fvu is not None:
            rows.append(row(NAME, work, sae, y=fvu, interval=figures["fvu_interval"], **at, **of_fvu))
        if figures["ablation_delta_loss"] is not None:
            rows.append(row(NAME, work, sae, y=figures["ablation_delta_loss"], series=MEAN, **at, **of_loss))
        of_control = of_fvu | {"n": figures["control_tokens"]}
        for key, series in CONTROLS.items():
            if figures.get(key) is not None:
                rows.append(row(NAME, work, sae, y=figures[key], series=series, **at, **of_control))
    return Finding(rows, _conclusion(work))


def _conclusion(work: Work) -> str:
    every = list(work.evaluation().values())
    compared = [each for each in every if each["fvu"] is not None and each["pca_fvu"] is not None]
    below = sum(each["fvu"] < each["pca_fvu"] for each in compared)
    return (
        f"{counted(len(every), 'SAE')} of L0 {between([each['l0'] for each in every])}: ΔLM loss "
        f"{between([each['delta_loss'] for each in every])} (mean ablation "
        f"{between([each['ablation_delta_loss'] for each in every])}), FVU {between([each['fvu'] for each in every])} "
        f"(PCA {between([each['pca_fvu'] for each in every])}; {below} of {len(compared)} below it)"
    )


STUDY = Study(
    NAME,
    "What does sparsity cost: ΔLM loss and FVU against L0, beside PCA, a random dictionary and mean ablation?",
    "arXiv 2408.05147 §4.1, figures 2 and 13",
    Plot(
        "Sparsity against fidelity",
        L0_AXIS,
        {DELTA_LOSS: LOSS_AXIS, FVU: FVU_AXIS},
        controls=(PCA, RANDOM, PAIRS, LINEAR, MEAN),
    ),
    run,
)
