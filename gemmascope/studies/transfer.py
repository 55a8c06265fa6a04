"""SAEs of one model in a second one: ΔLM loss and FVU there and here, on the same tokens (arXiv 2408.05147 §4.5).

The second model has the shape and the vocabulary of the first, as an instruction-tuned model has those of its base.
Where the text is of conversations, the tokens of the user and those of the model are told apart.
"""

from .common import (
    DELTA_LOSS,
    FVU,
    FVU_AXIS,
    L0_AXIS,
    Axis,
    Finding,
    Listed,
    Plot,
    Row,
    Study,
    TextSums,
    Work,
    between,
    row_of,
)

NAME = "transfer"
MEAN = "mean ablation"


def lacks(work: Work) -> str | None:
    return "second_model: expected --second-model, got none" if work.second_model is None else None


def run(work: Work) -> Finding:
    spoken = work.conversations()
    roles = len(spoken.names) + 1
    of_role = spoken.roles.where((spoken.roles >= 0) & (spoken.roles < roles), roles - 1)
    text = spoken.text.owned_by(spoken.text.documents.clamp(min=0) * roles + of_role)
    models = {"own": work.sums(f"{NAME}/own", text), "second": work.sums(f"{NAME}/second", text, on="second")}
    rows: list[Row] = []
    for sae in work.saes:
        for which, sums in models.items():
            whole, role = TextSums.of(sums, sae), sums["documents"].long() % roles
            for index, name in enumerate(spoken.names):
                series = f"{which}: {name}"
                part = whole.where(role == index)
                if part.tokens:
                    rows += part.rows(NAME, work, sae, series, work.bootstrap(int((role == index).sum())))
                    rows.append(_ablation(work, sae, part, series))
    return Finding(
        rows, _conclusion(work, rows, spoken.names), {"second_model": work.second_model, "roles": spoken.names}
    )


def _ablation(work: Work, sae: Listed, part: TextSums, series: str) -> Row:
    at = {"l0": part.l0, "x": part.l0, "y": part.ablation_delta_loss, "n": int(part.predictions.sum())}
    return row_of(NAME, work, sae, figure=DELTA_LOSS, series=f"{series}, {MEAN}", **at)


def _conclusion(work: Work, rows: list[Row], names: tuple[str, ...]) -> str:
    def of(series: str, figure: str) -> str:
        return between([row["y"] for row in rows if (row["series"], row["figure"]) == (series, figure)])

    def words(name: str) -> str:
        own, second = f"own: {name}", f"second: {name}"
        losses = f"ΔLM loss {of(second, DELTA_LOSS)} (own {of(own, DELTA_LOSS)}"
        ablated = f"; mean ablation {of(f'{second}, {MEAN}', DELTA_LOSS)})"
        return f"{name}: {losses}{ablated}, FVU {of(second, FVU)} (own {of(own, FVU)})"

    present = [name for name in names if any(row["series"].endswith(f": {name}") for row in rows)]
    return f"in {work.second_model}, {'; '.join(words(name) for name in present)}"


STUDY = Study(
    NAME,
    "Do SAEs of a base model serve its fine-tuned one? Needs --second-model; conversations by its chat template.",
    "arXiv 2408.05147 §4.5, figures 8 and 21",
    Plot(
        "The same SAEs in another model",
        L0_AXIS,
        {DELTA_LOSS: Axis("ΔLM loss, nats a token", range=(0, 0.8)), FVU: FVU_AXIS},
        colours="series",
        left_out=(MEAN,),
    ),
    run,
    lacks,
    needs_second=True,
)
