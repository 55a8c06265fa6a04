"""On a model whose directions are known: the true dictionary and learnt directions move one fact, controls both."""

import functools
from dataclasses import replace

import pytest
import torch

from gemmascope.ravel import (
    Entities,
    Interchange,
    PairSet,
    Reader,
    activations,
    answers,
    entity_fvu,
    figures,
    floors,
    known,
    make_pairs,
    mean_figures,
    protocol_of,
    right_pairs,
    train_control,
    train_rotation,
    train_sae,
)
from gemmascope.ravel.train import Trained, final_mask, mask_at, steps_of
from gemmascope.sites import Site

from .known import COLOURS, SHAPES, WIDTH, small_model

SITE = Site(0, "resid")
PROTOCOL = protocol_of("ravel", pairs=256, test_pairs=64, epochs=3, rotation_epochs=6, rotation_lr=0.02, directions=4)


@functools.cache
def task():
    model = small_model()
    on, reader = model.continuation(), Reader(model.tokenizer, True)
    asked, _ = reader.asked(model.data)
    asked, facts = known(asked, answers(on, reader, asked, "first-token"), PROTOCOL)
    pairs = {name: make_pairs(model.data, asked, name, PROTOCOL, 0) for name in model.data.attributes}
    return model, reader, asked, facts, pairs, Interchange(on, activations(on, asked, [SITE])[SITE])


def tick(step: int) -> None:
    pass


@functools.cache
def judged(method: str, attribute: str) -> tuple[Trained, dict[str, dict[str, float]]]:
    model, reader, asked, _, pairs, on = task()
    sets: PairSet = pairs[attribute]
    if method == "dictionary":
        trained = train_sae(model.dictionary(), on, sets, PROTOCOL, 0, tick)
    else:
        trained = train_control(method, on, sets, PROTOCOL, 0, tick)
    found = {}
    for name, part in sets.tests.items():
        right = right_pairs(on, reader, asked, part, trained.exchange, PROTOCOL, tick)
        bootstrap = Entities([asked[pair.base].prompt.entity for pair in part], 50, 0)
        found[name] = {key: values[0].item() for key, values in figures(part, right, asked, bootstrap).items()}
    return trained, found


def test_it_knows_its_facts():
    _, _, _, facts, _, _ = task()
    assert facts["right"] == {"colour": 1.0, "shape": 1.0}
    assert facts["known_entities"] == 60


def test_it_knows_the_same_in_any_batches(monkeypatch):
    """Some answers wrong, rows of several forwards, and prompts in an order that mixes the templates."""
    model, reader, asked, _, _, on = task()
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [asked[each] for each in order]
    token = asked[0].answer.token
    wrong = [replace(each, answer=replace(each.answer, token=token)) if n % 3 == 0 else each
             for n, each in enumerate(mixed)]  # fmt: skip
    expected = [each.answer.token == asked[order[n]].answer.token for n, each in enumerate(wrong)]
    assert 0 < sum(expected) < len(expected)
    continuation = model.continuation()
    monkeypatch.setattr("gemmascope.ravel.knowledge.ROWS", 7)
    for score in ("first-token", "string"):
        asks = wrong if score == "first-token" else mixed
        found = answers(continuation, reader, asks, score)
        assert found == (expected if score == "first-token" else [True] * len(mixed))
    vectors = activations(continuation, mixed, [SITE])[SITE].vectors
    torch.testing.assert_close(vectors, on.activations.vectors[order], rtol=1e-5, atol=1e-5)


def test_pairs_are_judged_in_their_order(monkeypatch):
    """A few at a time, by tokens and by strings, with bases of all templates mixed."""
    _, reader, asked, _, pairs, on = task()
    part = [each for both in zip(*pairs["colour"].tests.values(), strict=True) for each in both][108:148]
    swap = Trained(lambda base, source: on.activations.vectors[source], 1, {}).exchange
    town = {each: asked[each].prompt.entity for pair in part for each in (pair.base, pair.source)}
    labels = small_model().data.labels
    # All of the source is in the place of the base: every answer is the source's.
    expected = [labels[asked[pair.base].prompt.attribute][town[pair.source]] == pair.label for pair in part]
    assert 0 < sum(expected) < len(expected)
    monkeypatch.setattr("gemmascope.ravel.score.ROWS", 9)
    for protocol in (PROTOCOL, protocol_of("ravel", score="string")):
        found = right_pairs(on, reader, asked, part, swap, protocol, tick)
        assert sum(a == b for a, b in zip(found.tolist(), expected, strict=True)) >= 38


@pytest.mark.parametrize("attribute", ["colour", "shape"])
def test_the_true_dictionary_and_the_skyline_are_right(attribute):
    for method, least in (("dictionary", 0.95), ("mdas", 0.95), ("das", 0.95)):
        for part, found in judged(method, attribute)[1].items():
            assert found["disentangle"] >= least, (method, part, found)


def test_the_mask_is_the_latents_of_the_attribute():
    of_colour = judged("dictionary", "colour")[0].tensors["mask"] > 0
    of_shape = judged("dictionary", "shape")[0].tensors["mask"] > 0
    assert of_colour.tolist() == [True] * len(COLOURS) + [False] * len(SHAPES)
    assert (~of_colour).tolist() == of_shape.tolist()


def test_directions_that_know_nothing_are_far_below():
    for method in ("neurons", "random", "pca"):
        mean = sum(judged(method, name)[1]["entities"]["disentangle"] for name in ("colour", "shape")) / 2
        assert mean < 0.85, (method, mean)
    mean = sum(judged("random", name)[1]["entities"]["disentangle"] for name in ("colour", "shape")) / 2
    assert mean < 0.75


def test_the_learnt_directions_are_orthonormal_and_those_of_the_attribute():
    rotation = judged("das", "colour")[0].tensors["rotation"]
    assert rotation.shape == (WIDTH, 4)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(4), rtol=1e-5, atol=1e-5)
    directions = small_model().directions
    # Differences of colours lie in three dimensions, most of which the four learnt ones hold.
    differences = directions[1:4] - directions[:1]
    held = (differences @ rotation).norm() / differences.norm()
    assert held > 0.85


def test_the_same_seed_gives_the_same_bits():
    _, _, _, _, pairs, on = task()
    few = PROTOCOL.__class__(**(PROTOCOL.to_dict() | {"epochs": 1, "rotation_epochs": 1}))
    one, two = (train_rotation(on, pairs["shape"].train, few, 5, tick) for _ in range(2))
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in ("mask", "rotation"))
    other = train_rotation(on, pairs["shape"].train, few, 6, tick)
    assert not torch.equal(one.tensors["rotation"], other.tensors["rotation"])


def test_a_string_is_judged_as_its_first_token_where_labels_are_words():
    _, reader, asked, _, pairs, on = task()
    part = pairs["colour"].tests["entities"][40:88]
    trained = judged("neurons", "colour")[0]
    first = right_pairs(on, reader, asked, part, trained.exchange, PROTOCOL, tick)
    strings = protocol_of("ravel", score="string")
    assert torch.equal(right_pairs(on, reader, asked, part, trained.exchange, strings, tick), first)
    assert 0 < first.sum() < len(part)


def test_floors_and_their_figures():
    _, _, asked, _, pairs, _ = task()
    part = pairs["colour"].tests["entities"]
    bootstrap = Entities([asked[pair.base].prompt.entity for pair in part], 50, 0)
    found = figures(part, floors(part)["always base"], asked, bootstrap)
    assert {name: values[0].item() for name, values in found.items()} == {
        "cause": 0.0,
        "isolation": 1.0,
        "disentangle": 0.5,
    }
    described = bootstrap.described(mean_figures([found, found]))
    assert described["cause_interval"] == [0.0, 0.0]
    assert described["disentangle"] == 0.5


def test_intervals_hold_the_figure():
    _, reader, asked, _, pairs, on = task()
    part = pairs["colour"].tests["entities"]
    right = right_pairs(on, reader, asked, part, judged("neurons", "colour")[0].exchange, PROTOCOL, tick)
    bootstrap = Entities([asked[pair.base].prompt.entity for pair in part], 400, 0)
    described = bootstrap.described(figures(part, right, asked, bootstrap))
    for name in ("cause", "isolation", "disentangle"):
        low, high = described[f"{name}_interval"]
        assert low <= described[name] <= high
        assert low < high
    cause = [bool(each) for each, pair in zip(right, part, strict=True) if pair.is_cause]
    assert described["cause"] == pytest.approx(sum(cause) / len(cause))


def test_masks():
    m = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(mask_at(m, 0.5), torch.sigmoid(torch.tensor([-2.0, 0.0, 4.0])))
    assert final_mask(m, protocol_of("ravel")).tolist() == [0.0, 0.0, 1.0]
    soft = final_mask(m, protocol_of("sae-ravel"))
    torch.testing.assert_close(soft, torch.sigmoid(m / 0.1))
    assert steps_of(33, protocol_of("ravel", batch_size=16), 2) == 6


def test_what_an_sae_leaves_of_the_variance_among_the_entities():
    model, *_, on = task()
    x = on.activations.vectors
    prompts = sorted(on.activations.row)
    on.activations.vectors = torch.cat([x, 100 * torch.ones_like(x[:3])])  # of prompts that are no part of it
    try:
        sae = model.dictionary()
        found = entity_fvu(sae, on)
        rows = x[prompts].double()
        left = (sae(x[prompts]).double() - rows).square().sum()
        assert found == pytest.approx((left / (rows - rows.mean(0)).square().sum()).item(), rel=1e-6)
        assert 0 < found < 0.6
        with torch.no_grad():
            sae.threshold.fill_(1e9)
            sae.b_dec.copy_(rows.mean(0))
        assert entity_fvu(sae, on) == pytest.approx(1, abs=1e-4), "the mean alone"
        on.activations.vectors = x[:1].expand_as(x)
        assert entity_fvu(sae, on) is None, "nothing varies"
    finally:
        on.activations.vectors = x


def test_a_penalty_empties_the_mask():
    model, _, _, _, pairs, on = task()
    heavy = protocol_of("ravel", epochs=1, rotation_epochs=1, l1=100.0)
    trained = train_sae(model.dictionary(), on, pairs["colour"], heavy, 0, tick)
    assert trained.count == 0
    rows = torch.tensor([0, 1])
    assert torch.equal(trained.exchange(rows, rows.flip(0)), on.activations.vectors[rows])
    assert train_rotation(on, pairs["colour"].train[:32], heavy, 0, tick).count == 0
    assert train_rotation(on, pairs["colour"].train[:32], heavy, 0, tick, 2).count == 2  # of no mask


def test_a_loss_that_is_not_finite_is_refused():
    model, _, _, _, pairs, on = task()
    broken = model.dictionary()
    with torch.no_grad():
        broken.W_dec[0, 0] = float("nan")
    with pytest.raises(ValueError, match="pairs: expected a finite loss of the model, got nan"):
        train_sae(broken, on, pairs["colour"], PROTOCOL, 0, tick)
