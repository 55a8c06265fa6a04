"""Every study against plain hooks and loops in fp64, in parts that add up, and where the answer is known."""

import copy
import csv
import dataclasses
import io
import math

import pytest
import torch

from gemmascope import JumpReLUSAE, Transcoder
from gemmascope.evaluation.bootstrap import Bootstrap
from gemmascope.evaluation.protocol import TERMS, Subject
from gemmascope.sites import Site
from gemmascope.studies import COLUMNS, STUDIES, Listed, csv_of
from gemmascope.studies.common import Conversations, TextSums, between, ratio, row_of, short
from gemmascope.studies.frequency import histogram
from gemmascope.studies.position import ABLATED, EVERY, MEAN, bins_of, owners_of
from gemmascope.studies.subsets import OTHERS, groups_of
from gemmascope.studies.uniformity import attribution_sums, columns_of, uniformity
from gemmascope.studies.width_ladder import common_l0, interpolated
from tests import tiny_models as tiny
from tests.evaluation import plain as by_hand
from tests.evaluation.test_protocol import ATT, MLP, RESID, dense, random_sae, text_of, transcoder_tensors
from tests.studies.work import GivenWork, PlainWork

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return tiny.gemma2(dtype=torch.float64)


def identity_sae(site: Site) -> JumpReLUSAE:
    """f = (max(x, 0), max(−x, 0)), x̂ = x."""
    d = tiny.width(site)
    sae = JumpReLUSAE(d, 2 * d, pre_encoder_bias=False, threshold_init=0.0).double()
    both = torch.cat([torch.eye(d), -torch.eye(d)]).double()
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
        sae.threshold.zero_()
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    return sae


@pytest.fixture(scope="module")
def work(model):
    text, _ = text_of(model)
    subjects = [
        Subject(name, site, site, sae)
        for name, site, sae in (
            ("att", ATT, random_sae(ATT)),
            ("a", RESID, random_sae(RESID)),
            ("b", RESID, random_sae(RESID, seed=1, d_sae=32)),
            ("identity", RESID, identity_sae(RESID)),
        )
    ]
    return PlainWork(model, text, subjects, sources={4: "books", 7: "code", 9: "code"})


def rows_of(finding, **wanted):
    return [row for row in finding.rows if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def in_detail(work):
    """Of "a", by token: mask of the text, ‖x − x̂‖², ‖x − x̄‖²; and its rise of the loss by predicted token."""
    text, sae = work.text, work.subjects[1].sae
    x = by_hand.activation(work.models["model"], RESID, text.tokens)
    mask = text.is_text
    x_hat = dense(sae, x)[1]
    mean = work.moments()[RESID].means["text"]
    clean = by_hand.run(work.models["model"], text.tokens)
    with by_hand.changed(work.models["model"], RESID, lambda y: torch.where(mask[..., None], x_hat, y)):
        spliced = by_hand.run(work.models["model"], text.tokens)
    rise = torch.zeros(text.tokens.shape, dtype=torch.float64)
    scored = torch.zeros_like(mask)
    for row, column in by_hand.scored(text.tokens, text.documents):
        target = text.tokens[row, column + 1]
        before, after = (each[row, column].log_softmax(-1)[target] for each in (clean, spliced))
        rise[row, column + 1] = before - after
        scored[row, column + 1] = True
    error, spread = (x - x_hat).square().sum(-1), (x - mean).square().sum(-1)
    return {
        "mask": mask,
        "scored": scored,
        "error": error,
        "spread": spread,
        "square": x.square().sum(-1),
        "rise": rise,
    }


# ---- position


def test_position_by_hand(work, in_detail):
    """Of 11 tokens every position has a bin of its own."""
    found = STUDIES["position"].run(work)
    mask, scored = in_detail["mask"], in_detail["scored"]
    square = in_detail["square"][mask].mean()
    for row in rows_of(found, sae="a", figure="reconstruction error", series="SAE"):
        column = int(row["x"])
        here = mask[:, column]
        assert row["n"] == int(here.sum())
        assert row["y"] == pytest.approx((in_detail["error"][:, column][here].mean() / square).item(), rel=1e-9)
        assert (row["low"], row["high"]) == interval_of(work, column, mask, in_detail["error"] / square)
    losses = rows_of(found, sae="a", figure="ΔLM loss", series="SAE")
    assert [row["x"] for row in losses] == [each for each in range(11) if scored[:, each].any()]
    for row in losses:
        here = scored[:, int(row["x"])]
        assert row["y"] == pytest.approx(in_detail["rise"][:, int(row["x"])][here].mean().item(), rel=1e-7, abs=1e-9)
        assert (row["low"], row["high"]) == interval_of(work, int(row["x"]), scored, in_detail["rise"])
    assert any(row["low"] is not None for row in losses)


def interval_of(work, column: int, mask: torch.Tensor, values: torch.Tensor):
    """Of the mean of ``values`` in a column of the rows, of three documents drawn anew."""
    here = [mask[:, column] & (work.text.documents[:, column] == number) for number in (4, 7, 9)]
    sums, counts = (torch.stack([each[rows].sum() for rows in here]) for each in (values[:, column], mask[:, column]))
    found = Bootstrap(3, draws=20).ratio(sums.double(), counts.double())
    return (None, None) if found is None else pytest.approx(found, rel=1e-7, abs=1e-9)


def test_neighbours_beyond_the_first_positions_are_taken_together(model):
    """From 32 on two at a time, whose place is their middle; the last is alone."""
    text, _ = text_of(model, length=43)
    found = STUDIES["position"].run(PlainWork(model, text, [Subject("a", RESID, RESID, random_sae(RESID))]))
    errors = rows_of(found, figure="reconstruction error", series="SAE")
    assert [row["x"] for row in errors] == [*range(1, 32), 32.5, 34.5, 36.5, 38.5, 40.5, 42]
    n = text.is_text.sum(0)
    assert [row["n"] for row in errors[31:]] == [int(n[each : each + 2].sum()) for each in range(32, 43, 2)]


def test_what_is_said_of_positions(work):
    """Of the first tokens and of the last half of the row, each token weighing the same."""
    found = STUDIES["position"].run(PlainWork(work.models["model"], work.text, work.subjects[1:2]))

    def mean(series: str, figure: str, least: float, most: float) -> str:
        rows = [row for row in rows_of(found, series=series, figure=figure) if least <= row["x"] <= most]
        return short(sum(row["y"] * row["n"] for row in rows) / sum(row["n"] for row in rows))

    assert found.conclusion == (
        "tokens 1–10 → the last half of the row: "
        + ", ".join(
            f"{name} {mean('SAE', figure, 0, 10)} → {mean('SAE', figure, 5, 10)} ({control} "
            f"{mean(control, figure, 0, 10)} → {mean(control, figure, 5, 10)})"
            for name, figure, control in (
                ("reconstruction error", "reconstruction error", MEAN),
                ("ΔLM loss", "ΔLM loss", ABLATED),
            )
        )
    )


def test_positions_add_up_to_the_whole(work):
    found, whole = STUDIES["position"].run(work), work.evaluation()

    def total(**wanted):
        return math.fsum(row["y"] * row["n"] for row in rows_of(found, **wanted))

    for name in ("a", "b", "att"):
        figures = whole[name]
        errors = rows_of(found, sae=name, figure="reconstruction error", series="SAE")
        assert sum(row["n"] for row in errors) == figures["tokens"]
        losses = rows_of(found, sae=name, figure="ΔLM loss", series="SAE")
        assert sum(row["n"] for row in losses) == figures["predictions"]
        loss = total(sae=name, figure="ΔLM loss", series="SAE") / figures["predictions"]
        assert loss == pytest.approx(figures["delta_loss"], rel=1e-9)
    spread = total(series=MEAN, site="resid")
    for name in ("a", "b"):
        error = total(sae=name, figure="reconstruction error", series="SAE")
        assert error / spread == pytest.approx(whole[name]["fvu"], rel=1e-9)
    ablated = total(series=ABLATED, site="resid") / whole["a"]["predictions"]
    assert ablated == pytest.approx(whole["a"]["ablation_delta_loss"], rel=1e-9)
    assert len(rows_of(found, series=MEAN, site="resid")) == 10, "once a site, without the position of BOS"


def test_bins_of_positions():
    bins = bins_of(1024)
    assert torch.equal(bins[:EVERY], torch.arange(EVERY))
    assert set(bins.diff().tolist()) == {0, 1}
    assert [int((bins == bins[start]).sum()) for start in (40, 100, 200, 600)] == [2, 4, 8, 32]
    assert int(bins.max()) + 1 == EVERY + 5 * 16


def test_owners_of_positions(work):
    owners, groups, bins = owners_of(work.text)
    assert (groups, bins) == (3, 11)
    assert owners[0, 3] == 3
    assert owners[1, 6] == bins + 6
    assert owners[3, 2] == 2 * bins + 2


# ---- nothing lost


@pytest.mark.parametrize("name", ["position", "subsets", "transfer", "bf16"])
def test_an_identity_costs_nothing(work, name):
    rows = rows_of(STUDIES[name].run(work), sae="identity")
    of_sae = [row for row in rows if "mean" not in row["series"]]
    assert of_sae
    assert all(abs(row["y"]) < 1e-12 for row in of_sae)


# ---- subsets


def test_subsets_by_hand_and_together(work, in_detail):
    found, documents = STUDIES["subsets"].run(work), work.text.documents
    mask, scored = in_detail["mask"], in_detail["scored"]
    parts = {"books": documents == 4, "code": (documents == 7) | (documents == 9), "all": documents >= 0}
    for source, of_source in parts.items():
        here, predicted = mask & of_source, scored & of_source
        (fvu,) = rows_of(found, sae="a", figure="FVU", series=source)
        assert fvu["n"] == int(here.sum())
        assert fvu["y"] == pytest.approx((in_detail["error"][here].sum() / in_detail["spread"][here].sum()).item())
        (loss,) = rows_of(found, sae="a", figure="ΔLM loss", series=source)
        assert loss["n"] == int(predicted.sum())
        assert loss["y"] == pytest.approx(in_detail["rise"][predicted].mean().item(), rel=1e-7)
    whole = work.evaluation()["a"]
    (fvu,), (loss,) = (rows_of(found, sae="a", figure=figure, series="all") for figure in ("FVU", "ΔLM loss"))
    assert (fvu["y"], loss["y"]) == (pytest.approx(whole["fvu"]), pytest.approx(whole["delta_loss"]))
    losses = [row for source in ("books", "code") for row in rows_of(found, sae="a", figure="ΔLM loss", series=source)]
    assert sum(row["y"] * row["n"] for row in losses) / loss["n"] == pytest.approx(loss["y"], rel=1e-9)
    assert (loss["low"], loss["high"]) == pytest.approx(tuple(whole["delta_loss_interval"]))


def test_sources_that_are_many_are_taken_together():
    sources = {number: f"file {number % 5}" for number in range(20)}
    found = groups_of(sources, {number: 1.0 + (number % 5 == 3) for number in range(20)}, most=3)
    assert list(found) == ["file 3", "file 0", OTHERS]
    assert sorted(each for group in found.values() for each in group) == list(range(20))
    assert found["file 3"] == [3, 8, 13, 18]


def test_what_is_said_of_sources(work):
    """Those of the least and of the most ΔLM loss, the mean of the SAEs."""
    three = PlainWork(work.models["model"], work.text, work.subjects, sources={4: "books", 7: "code", 9: "web"})
    found = STUDIES["subsets"].run(three)

    def mean(source: str, figure: str = "ΔLM loss") -> float:
        values = [row["y"] for row in rows_of(found, series=source, figure=figure)]
        assert len(values) == 4
        return math.fsum(values) / 4

    ordered = sorted(("books", "code", "web"), key=mean)
    words = [
        f"{each} {short(mean(each))} (mean ablation {short(mean(f'{each}: mean ablation'))}), FVU "
        f"{short(mean(each, 'FVU'))}"
        for each in (ordered[0], ordered[-1])
    ]
    assert found.conclusion.endswith(f"least and most of 3 sources: {'; '.join(words)}")


def test_one_source_is_no_subset(work):
    alone = PlainWork(work.models["model"], work.text, work.subjects, sources=dict.fromkeys((4, 7, 9), "one"))
    assert STUDIES["subsets"].lacks(work) is None
    assert str(STUDIES["subsets"].lacks(alone)).startswith("text: expected documents of several sources, got 1")


# ---- transfer


def test_transfer_by_hand(work):
    """Another model, whose roles alternate."""
    second, text = tiny.gemma2(seed=3, dtype=torch.float64), work.text
    roles = torch.arange(text.tokens.shape[1]).expand(text.tokens.shape) // 4 % 3
    spoken = Conversations(text, roles, ("user", "model"))
    other = PlainWork(work.models["model"], text, work.subjects, second=second, spoken=spoken)
    found, sae = STUDIES["transfer"].run(other), work.subjects[1].sae
    x, clean = by_hand.activation(second, RESID, text.tokens), by_hand.run(second, text.tokens)
    x_hat = dense(sae, x)[1]
    mean = x[text.is_text].mean(0)
    with by_hand.changed(second, RESID, lambda y: torch.where(text.is_text[..., None], x_hat, y)):
        spliced = by_hand.run(second, text.tokens)
    for role, name in enumerate(("user", "model")):
        here = text.is_text & (roles == role)
        (fvu,) = rows_of(found, sae="a", figure="FVU", series=f"second: {name}")
        expected = (x - x_hat)[here].square().sum() / (x - mean)[here].square().sum()
        assert fvu["y"] == pytest.approx(expected.item(), rel=1e-6)  # the mean is harvested in fp32
        assert fvu["n"] == int(here.sum())
        rises = []
        for row, column in by_hand.scored(text.tokens, text.documents):
            if roles[row, column + 1] == role:
                at = (row, column, text.tokens[row, column + 1])
                rises.append((clean.log_softmax(-1)[at] - spliced.log_softmax(-1)[at]).item())
        (loss,) = rows_of(found, sae="a", figure="ΔLM loss", series=f"second: {name}")
        assert (loss["n"], loss["y"]) == (len(rises), pytest.approx(math.fsum(rises) / len(rises), rel=1e-7))
        assert fvu["y"] != rows_of(found, sae="a", figure="FVU", series=f"own: {name}")[0]["y"]

        def said(series: str, figure: str = "ΔLM loss") -> str:
            return between([row["y"] for row in rows_of(found, series=series, figure=figure)])

        assert (
            f"{name}: ΔLM loss {said(f'second: {name}')} (own {said(f'own: {name}')}; mean ablation "
            f"{said(f'second: {name}, mean ablation')}), FVU {said(f'second: {name}', 'FVU')} (own "
            f"{said(f'own: {name}', 'FVU')})"
        ) in found.conclusion


def test_the_same_model_is_no_other(work):
    found, whole = STUDIES["transfer"].run(work), work.evaluation()["a"]
    for series in ("own: text", "second: text"):
        (loss,), (fvu,) = (rows_of(found, sae="a", figure=figure, series=series) for figure in ("ΔLM loss", "FVU"))
        assert (loss["y"], fvu["y"]) == (pytest.approx(whole["delta_loss"]), pytest.approx(whole["fvu"]))


# ---- precision


class RoundedWork(PlainWork):
    """One whose sums are moved by so much a prediction and a token, by the precisions asked for."""

    def sums(self, name, text=None, *, on="model", sae_dtype=None):
        found = super().sums(name, text)
        shift = {("float32", torch.float32): 0.0, ("float32", torch.bfloat16): -0.25, ("bfloat16", torch.bfloat16): 0.5}
        moved = {key: values.clone() for key, values in found.items()}
        by_document = shift[on, sae_dtype] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        moved["a/losses"][:, 0, 0] += by_document
        moved["a/tokens"][:, 0, TERMS.index("error")] *= 1 + shift[on, sae_dtype]
        return moved


def test_what_precision_costs_by_hand(work):
    """The shift is that of the variant against fp32, with an interval of its own."""
    rounded = RoundedWork(work.models["model"], work.text, work.subjects[1:2])
    found, whole = STUDIES["bf16"].run(rounded), work.evaluation()["a"]
    n = work.sums("a")["clean"][:, 0]
    moved = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for name, shift in (("SAE bf16", -0.25), ("SAE and model bf16", 0.5)):
        shifts = found.facts["shifts"][name]["a"]
        assert shifts["delta_loss"] == pytest.approx((shift * moved.sum() / n.sum()).item(), rel=1e-9)
        assert shifts["fvu"] == pytest.approx(shift * whole["fvu"], rel=1e-9)
        assert shifts["delta_loss_interval"] == pytest.approx(Bootstrap(3, draws=20).ratio(shift * moved, n), rel=1e-9)
        (row,) = rows_of(found, series=name, figure="FVU")
        assert row["y"] == pytest.approx((1 + shift) * whole["fvu"], rel=1e-9)
    (row,) = rows_of(found, series="all fp32", figure="ΔLM loss")
    assert row["y"] == pytest.approx(whole["delta_loss"], rel=1e-9)
    sizes = [short((shift * moved.sum() / n.sum()).item(), 2) for shift in (0.25, 0.5)]
    of_fvu = [short(shift * whole["fvu"], 2) for shift in (0.25, 0.5)]
    assert found.conclusion == (
        f"SAE bf16 shifts ΔLM loss by at most {sizes[0]} and FVU by at most {of_fvu[0]}; SAE and model bf16 shifts "
        f"ΔLM loss by at most {sizes[1]} and FVU by at most {of_fvu[1]} (half of the interval of ΔLM loss over "
        f"documents in fp32: {short((row['high'] - row['low']) / 2)})"
    )


# ---- uniformity


def transcoder():
    """It reads before the MLP, and has a skip connection."""
    return Transcoder(transcoder_tensors(), metadata={"site": Site(0, "mlp_in").name})


SUBJECTS = {
    **{str(site): Subject("s", site, site, random_sae(site, threshold=0.1)) for site in (ATT, MLP, RESID)},
    "transcoder": Subject("s", Site(0, "mlp_in"), MLP, transcoder()),
    "silent at some tokens": Subject("s", RESID, RESID, random_sae(RESID, d_sae=3, threshold=1.0)),
}


@pytest.mark.parametrize("which", SUBJECTS)
def test_uniformity_against_dense_autograd(model, which):
    """Of each drawn token alone, through all latents, by a forward of its own."""
    text, _ = text_of(model)
    subject = SUBJECTS[which]
    columns = columns_of(text, 3, seed=5)
    columns[0, 2] = -1  # one fewer of the first row
    found = attribution_sums(model, text, columns, [subject])
    silent = 0
    expected: dict[int, list[float]] = {}
    W = subject.sae.W_dec.detach()
    random = torch.randn(W.shape, generator=torch.Generator().manual_seed(0)).double()
    random *= (W.norm(dim=1) / random.norm(dim=1))[:, None]
    for row, column in [(r, int(c)) for r in range(len(columns)) for c in columns[r] if c >= 0]:
        ids = text.tokens[row : row + 1]
        x, before = (by_hand.activation(model, site, ids)[0, column] for site in (subject.reads, subject.writes))
        z = x @ subject.sae.W_enc.detach() + subject.sae.b_enc.detach()
        f = (z * (z > subject.sae.threshold.detach())).requires_grad_()
        rest = (before - f @ W).detach().requires_grad_()

        def moved(y, f=f, rest=rest, column=column):
            return torch.cat([y[:, :column], (rest + f @ W).expand(1, 1, -1), y[:, column + 1 :]], 1)

        with by_hand.changed(model, subject.writes, moved):
            logits = model(input_ids=ids, use_cache=False).logits[0, column]
        (logits[ids[0, column + 1]] - logits.mean()).backward()
        assert f.grad is not None
        assert rest.grad is not None
        y = f.detach() * f.grad
        l0 = int((f > 0).sum())
        if l0 == 0:
            silent += 1
            continue
        terms = expected.setdefault(int(text.documents[row, column]), [0.0] * 4)
        terms[0] += 1
        for place, effects in ((1, y), (2, f.detach() * (random @ rest.grad))):
            p = effects.abs() / effects.abs().sum()
            p = p[p > 0]
            terms[place] += (-(p * p.log()).sum()).exp().item() / l0
        terms[3] += l0
    assert len(expected) == 3
    assert (silent > 0) == (which == "silent at some tokens")
    for number, got in zip(found["documents"].tolist(), found["s/uniformity"].tolist(), strict=True):
        assert got == pytest.approx(expected[int(number)], rel=1e-7)


def test_one_pass_for_saes_of_many_sites(model):
    """Together, each has the sums that it has alone; the model's parameters have no gradient."""
    text, _ = text_of(model)
    columns = columns_of(text, 3, seed=5)
    named = [dataclasses.replace(each, name=name) for name, each in SUBJECTS.items()]
    frozen = copy.deepcopy(model).requires_grad_(False)  # as a model is loaded
    together = attribution_sums(frozen, text, columns, named)
    model.zero_grad()
    for each in named:
        alone = attribution_sums(model, text, columns, [each])
        assert together[f"{each.name}/uniformity"] == pytest.approx(alone[f"{each.name}/uniformity"], rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_uniformity_by_hand():
    tokens = torch.tensor([0, 0, 1, 1, 1, 1, 3, 3])
    effects = torch.tensor([2.0, -2.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    r, l0 = uniformity(tokens, effects, 4)
    assert l0.tolist() == [2, 4, 0, 2]
    assert r[:2].tolist() == pytest.approx([1.0, 0.25])
    assert r[2:].isnan().all()


def test_tokens_are_drawn_among_those_that_count(model):
    text, _ = text_of(model)
    found = columns_of(text, 20, seed=1)
    for row, columns in enumerate(found):
        drawn = [each for each in columns.tolist() if each >= 0]
        assert drawn == text.is_scored[row].nonzero()[:, 0].tolist()
    few = columns_of(text, 2, seed=1)
    assert (few >= 0).all()
    assert torch.equal(few, columns_of(text, 2, seed=1))
    assert not torch.equal(few, columns_of(text, 2, seed=2))
    assert (few[:, 0] < few[:, 1]).all()


def test_uniformity_of_one_latent_is_one(model):
    text, _ = text_of(model)
    sae = random_sae(RESID, d_sae=1)
    with torch.no_grad():
        sae.b_enc.fill_(100.0)
    work = PlainWork(model, text, [Subject("one", RESID, RESID, sae)])
    found = STUDIES["uniformity"].run(work)
    assert [row["y"] for row in found.rows] == pytest.approx([1.0, 1.0])
    assert [row["L0"] for row in found.rows] == [1.0, 1.0]


# ---- frequency


def test_frequencies_are_counts(work):
    found = STUDIES["frequency"].run(work)
    x = by_hand.activation(work.models["model"], RESID, work.text.tokens)[work.text.is_text]
    share = (dense(work.subjects[1].sae, x)[0] != 0).double().mean(0)
    rows = rows_of(found, sae="a", series="SAE")
    assert rows
    for row in rows:
        inside = [each for each in share.tolist() if each > 0 and abs(math.log10(each) - row["x"]) <= 0.1 + 1e-6]
        assert row["y"] == len(inside), row["x"]
    assert sum(row["y"] for row in rows) == int((share > 0).sum())
    assert found.facts["saes"]["a"]["never"] == int((share == 0).sum())
    (alike,) = rows_of(found, sae="a", series="if all fired alike")
    assert alike["x"] == pytest.approx(math.log10(work.evaluation()["a"]["l0"] / 20))


def test_frequencies_by_hand():
    """Of four latents one is silent, one fires on just a tenth, which is not above a tenth."""
    given = GivenWork({"a": {"l0": 1.6}}, {"a": torch.tensor([0.0, 1.0, 0.1, 0.5])})
    found = STUDIES["frequency"].run(given)
    assert found.facts["saes"]["a"] == {
        "never": 1,
        "median_log10": pytest.approx(math.log10(0.5)),
        "alike_log10": pytest.approx(math.log10(1.6 / 4)),
        "above_a_tenth": 2,
    }
    (alike,) = rows_of(found, series="if all fired alike")
    assert (alike["x"], alike["y"]) == (pytest.approx(math.log10(0.4)), 4)
    assert found.conclusion == (
        "median of log10 frequency -0.301 (if all latents fired alike -0.398); share that never fired 0.25, on more "
        "than a tenth of the tokens 0.5"
    )


def test_bins_of_frequency():
    found = histogram(torch.tensor([0.0, 1.0, 0.9, 0.5, 0.011, 0.0, 0.0101]))
    assert found[0] == (pytest.approx(-1.9), 2)
    assert found[-1] == (pytest.approx(-0.1), 2)
    assert found[-2] == (pytest.approx(-0.3), 1)
    assert len(found) == 10
    assert histogram(torch.zeros(3)) == []


# ---- those of an evaluation


def test_sparsity_and_fidelity_are_those_of_the_evaluation(work):
    found, whole = STUDIES["sparsity-fidelity"].run(work), work.evaluation()
    for sae in work.saes:
        (fvu,) = rows_of(found, sae=sae.name, figure="FVU", series="SAE")
        figures = whole[sae.name]
        assert (fvu["x"], fvu["y"], fvu["n"]) == (figures["l0"], figures["fvu"], figures["tokens"])
        assert [fvu["low"], fvu["high"]] == figures["fvu_interval"]
        (control,) = rows_of(found, sae=sae.name, figure="FVU", series="PCA of rank L0")
        assert control["y"] == 0.5
    assert "4 SAEs" in found.conclusion


EVALUATED = {
    "l0": 10.0,
    "delta_loss": 0.1,
    "delta_loss_interval": [0.05, 0.15],
    "fvu": 0.2,
    "fvu_interval": [0.19, 0.21],
    "ablation_delta_loss": 2.0,
    "pca_fvu": 0.3,
    "random_fvu": 0.5,
    "pair_table_fvu": 0.6,
    "linear_fvu": None,
    "predictions": 100,
    "tokens": 120,
    "control_tokens": 50,
}


def test_sparsity_and_fidelity_by_hand():
    worse = EVALUATED | {"fvu": 0.4, "l0": 20.0}
    given = GivenWork({"a": EVALUATED, "b": worse, "c": worse, "d": EVALUATED | {"pca_fvu": None}})
    found = STUDIES["sparsity-fidelity"].run(given)
    points = [(row["figure"], row["series"], row["y"], row["n"]) for row in rows_of(found, sae="a")]
    assert sorted(points) == [
        ("FVU", "PCA of rank L0", 0.3, 50),
        ("FVU", "SAE", 0.2, 120),
        ("FVU", "random dictionary", 0.5, 50),
        ("FVU", "token pairs", 0.6, 50),
        ("ΔLM loss", "SAE", 0.1, 100),
        ("ΔLM loss", "mean ablation", 2.0, 100),
    ]
    ends = {row["figure"]: (row["low"], row["high"]) for row in rows_of(found, sae="a", series="SAE")}
    assert ends == {"ΔLM loss": (0.05, 0.15), "FVU": (0.19, 0.21)}
    assert found.conclusion == (
        "4 SAEs of L0 10–20: ΔLM loss 0.1 (mean ablation 2), FVU 0.2–0.4 (PCA 0.3; 1 of 3 below it)"
    )


def test_a_ladder_has_several_widths_at_one_site(work):
    ladder = STUDIES["width-ladder"]
    assert ladder.lacks(work) is None
    found = ladder.run(work)
    assert {row["sae"] for row in found.rows} == {"a", "b", "identity"}
    alone = PlainWork(work.models["model"], work.text, work.subjects[:2])
    assert "got each of them at another site or of another kind" in str(ladder.lacks(alone)) or ladder.lacks(alone)
    one = PlainWork(work.models["model"], work.text, work.subjects[:1])
    assert ladder.lacks(one) == "saes: expected several widths of one kind at one site, got width 20 alone"


def test_a_ladder_by_hand():
    """Two widths at L0 10 and 40, between which everything is linear in logarithms; another kind is another ladder."""
    figures = {
        f"{width} {l0}": EVALUATED
        | {"l0": l0, "width": width, "fvu": fvu, "delta_loss": fvu / 10, "pca_fvu": fvu + 0.1}
        for width, l0, fvu in ((8, 10.0, 0.4), (8, 40.0, 0.1), (16, 10.0, 0.2), (16, 40.0, 0.05))
    }
    other = {"of one width": EVALUATED | {"width": 8, "kind": "topk"}}
    found = STUDIES["width-ladder"].run(GivenWork(figures | other))
    assert {row["sae"] for row in found.rows} == set(figures)
    pca = [short(math.sqrt(low * high)) for low, high in ((0.5, 0.2), (0.3, 0.15))]
    assert found.conclusion == (
        f"layer_1/resid, jumprelu: at L0 20 FVU and ΔLM loss of width 8: 0.2, 0.02 (PCA {pca[0]}); 16: 0.1, 0.01 (PCA "
        f"{pca[1]})"
    )


def test_between_points_of_a_ladder():
    points = [(10.0, 1.0), (1000.0, 0.01)]
    assert interpolated(points, 100.0) == pytest.approx(0.1)
    assert (interpolated(points, 1.0), interpolated(points, 1e6)) == (1.0, 0.01)
    assert interpolated([], 1.0) is None
    assert common_l0([points, [(20.0, 1.0), (200.0, 0.5)]]) == pytest.approx(math.sqrt(20 * 200))
    assert common_l0([[(10.0, 1.0)], [(20.0, 1.0)]]) is None
    assert common_l0([[(20.0, 1.0)], [(21.0, 1.0)]]) == pytest.approx(math.sqrt(20 * 21))


# ---- rows


def test_ratios_by_hand(work):
    """Of sums; where nothing was measured there is no figure, and none is drawn."""
    one = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert ratio(one, torch.tensor([1.0, 1.0])) == 2.5
    assert math.isnan(ratio(one, torch.zeros(2)))
    found = TextSums.of(work.sums("a"), work.saes[1])
    nobody = found.where(torch.zeros(3, dtype=torch.bool))
    assert nobody.tokens == 0
    assert all(math.isnan(each) for each in (nobody.l0, nobody.fvu, nobody.delta_loss, nobody.ablation_delta_loss))
    row = row_of("x", work, work.saes[1], l0=1.0, x=1.0, y=nobody.fvu, n=0, figure="FVU")
    assert row["y"] is None


def test_csv(work):
    found = STUDIES["frequency"].run(work)
    read = list(csv.DictReader(io.StringIO(csv_of(found.rows))))
    assert tuple(read[0]) == COLUMNS
    assert COLUMNS[:12] == tuple(
        ["study", "model", "site", "layer", "width", "kind", "L0", "x", "y", "n", "low", "high"]
    )
    assert [float(row["x"]) for row in read] == [row["x"] for row in found.rows]
    assert {row["low"] for row in read} == {""}


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "width-ladder"])
def test_every_study_has_rows_of_every_sae_and_a_conclusion_with_a_control(work, name):
    found = STUDIES[name].run(work)
    assert {row["sae"] for row in found.rows} == {sae.name for sae in work.saes}
    assert {row["study"] for row in found.rows} == {name}
    assert {row["figure"] for row in found.rows} == set(STUDIES[name].plot.figures)
    assert "(" in found.conclusion
    assert "\n" not in found.conclusion
    for row in found.rows:
        assert set(row) == set(COLUMNS)
        if row["low"] is not None:
            assert row["low"] <= row["y"] + 1e-12
            assert row["y"] <= row["high"] + 1e-12


def test_a_listed_sae_is_known_by_its_site():
    assert Listed("a", "resid", 3, 8, "topk", Site(3, "resid")).writes == Site(3, "resid")


# ---- sums of some sets, by others than documents


def test_owners_in_the_place_of_documents(work):
    text = work.text
    doubled = text.owned_by(text.documents.clamp(min=0) * 2)
    assert torch.equal(doubled.documents, torch.where(text.documents < 0, -1, 2 * text.documents))
    whole, found = work.sums("a"), work.sums("b", doubled)
    assert torch.equal(found["documents"], 2 * whole["documents"])
    assert all(torch.equal(found[key], whole[key]) for key in whole if key != "documents")
    with pytest.raises(ValueError, match=r"^owners: expected shape \[4, 11\], got \[4, 3\]"):
        text.owned_by(text.documents[:, :3])
    with pytest.raises(ValueError, match=r"^owners: expected numbers from 0, got -2"):
        text.owned_by(torch.full_like(text.documents, -2))


def test_sums_of_one_set_are_those_of_all(work):
    from gemmascope.evaluation.protocol import measure

    every = measure(work.models["model"], work.text, work.subjects, work.moments())
    found = work.sums("a")
    for key in found:
        expected = every[key][:, :1] if key.split("/")[-1] in ("tokens", "losses", "zero", "mean") else every[key]
        assert torch.equal(found[key], expected), key
