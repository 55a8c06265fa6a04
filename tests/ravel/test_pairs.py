import dataclasses

import pytest

from gemmascope.ravel import PRESETS, EntityData, floors, known, make_pairs, protocol_of
from gemmascope.ravel.continuation import Tokens
from gemmascope.ravel.prompts import Answer, Asked

# The 40 cities of arXiv 2409.04478 that GPT-2 knows, with the answers that give the paper's shares of equal labels.
NORTH_AMERICA = {
    "Canada": "Brandon Brooks Churchill Cornwall Dawson Edmonton Montreal Quebec Vernon Windsor",
    "United States": "Dayton Jasper Norfolk Providence Tampa Tulsa Wallace Wichita Wilmington",
}
ASIA = {
    **{"Turkey": "Ankara Istanbul", "China": "Beijing Shanghai", "India": "Delhi Mumbai", "Indonesia": "Jakarta"},
    **{"Israel": "Jerusalem", "Afghanistan": "Kabul", "Pakistan": "Karachi", "Japan": "Kyoto"},
    **{"Philippines": "Manila", "Saudi Arabia": "Medina"},
}
EUROPE = {"Ireland": "Cork Dublin", "Belgium": "Brussels", "France": "Calais", "Austria": "Vienna"}
EUROPE |= {"Switzerland": "Zurich"}
CONTINENTS = {"North America": NORTH_AMERICA, "Asia": ASIA, "Europe": EUROPE}
CONTINENTS |= {"South America": {"Brazil": "Santos"}, "Africa": {"Tunisia": "Tunis"}}


def forty() -> EntityData:
    rows = [
        (city, country, continent)
        for continent, countries in CONTINENTS.items()
        for country, cities in countries.items()
        for city in cities.split()
    ]
    labels = {
        "country": {city: country for city, country, _ in rows},
        "continent": {city: continent for city, _, continent in rows},
    }
    return EntityData("city", labels, {"country": ("%s: country",), "continent": ("%s: continent",)}, {}, {})


def asked_of(data: EntityData, tokens: dict[str, int] | None = None) -> list[Asked]:
    """Every prompt, with a token for each label."""
    numbers: dict[str, int] = dict(tokens or {})
    found = []
    for prompt in data.prompts():
        label = data.labels[prompt.attribute][prompt.entity]
        token = numbers.setdefault(label, 100 + len(numbers))
        found.append(Asked(prompt, Tokens((1, 2, 3), 1), Answer(label, token, 1)))
    return found


def grid(entities: int = 24, templates: int = 3) -> EntityData:
    """Towns of 4 colours and 3 shapes; every third is for the test, as the last template is."""
    towns = [f"town{number}" for number in range(entities)]
    every = {name: tuple(f"%s {name} {n}" for n in range(templates)) for name in ("colour", "shape")}
    return EntityData(
        "town",
        {
            "colour": {town: f"c{number % 4}" for number, town in enumerate(towns)},
            "shape": {town: f"s{number // 4 % 3}" for number, town in enumerate(towns)},
        },
        every,
        {town: "test" if number % 3 == 0 else "train" for number, town in enumerate(towns)},
        {each: "test" if each == of[-1] else "train" for of in every.values() for each in of},
    )


@pytest.mark.parametrize(("attribute", "floor"), [("country", 0.5656), ("continent", 0.6775)])
def test_the_floors_of_the_paper(attribute, floor):
    """All ordered pairs of the 40, those of a city with itself too: always the base's answer gets (1 + P[equal])/2."""
    data = forty()
    assert len(data.entities) == 40
    everything = dataclasses.replace(PRESETS["sae-ravel"], test_share=0.5, validation_share=0.0)
    pairs = make_pairs(data, asked_of(data), attribute, everything, 0)
    every = [*pairs.train, *pairs.tests["pairs"]]
    assert len(every) == 3200
    assert len(set(every)) == 3200
    base = floors(every)["always base"]
    cause = [bool(right) for right, pair in zip(base, every, strict=True) if pair.is_cause]
    isolation = [bool(right) for right, pair in zip(base, every, strict=True) if not pair.is_cause]
    assert len(cause) == 1600
    assert all(isolation)
    assert (sum(cause) / 1600 + 1) / 2 == pytest.approx(floor, abs=5e-5)
    # The other answer that knows nothing: always that of the source.
    source = floors(every)["always source"]
    assert all(bool(right) for right, pair in zip(source, every, strict=True) if pair.is_cause)


def test_what_pairs_ask():
    data = grid()
    asked = asked_of(data)
    pairs = make_pairs(data, asked, "colour", protocol_of("ravel", pairs=80, test_pairs=40), 0)
    for pair in [*pairs.train, *pairs.tests["entities"], *pairs.tests["templates"]]:
        base, source = asked[pair.base], asked[pair.source]
        attribute = base.prompt.attribute
        assert pair.is_cause == (attribute == "colour")
        assert source.prompt.attribute == "colour"
        wanted = source if pair.is_cause else base
        assert pair.label == data.labels[attribute][wanted.prompt.entity]
        assert data.labels[attribute][base.prompt.entity] != data.labels[attribute][source.prompt.entity]
        assert pair.base_token == base.answer.token != pair.source_token
        assert pair.token == (pair.source_token if pair.is_cause else pair.base_token)
    assert pairs.to_dict()["train"] == {"cause": 80, "isolation": 80}
    again = make_pairs(data, asked, "colour", protocol_of("ravel", pairs=80, test_pairs=40), 0)
    other = make_pairs(data, asked, "colour", protocol_of("ravel", pairs=80, test_pairs=40), 1)
    assert again == pairs != other


def test_nothing_of_the_test_is_in_the_training():
    data = grid()
    asked = asked_of(data)
    pairs = make_pairs(data, asked, "shape", protocol_of("ravel"), 0)

    def seen(part) -> tuple[set[str], set[str]]:
        prompts = [asked[each].prompt for pair in part for each in (pair.base, pair.source)]
        return {prompt.entity for prompt in prompts}, {prompt.template for prompt in prompts}

    (entities, templates), new_entities, new_templates = map(seen, (pairs.train, *pairs.tests.values()))
    assert not entities & new_entities[0]
    assert new_entities[1] <= templates
    assert not templates & new_templates[1]
    assert new_templates[0] <= entities
    for part in (pairs.train, *pairs.tests.values()):
        assert len(set(part)) == len(part)


def test_where_the_pairs_are_split():
    data = grid()
    pairs = make_pairs(data, asked_of(data), "shape", protocol_of("saebench", pairs=140, test_pairs=60), 0)
    assert (len(pairs.train), len(pairs.tests["pairs"])) == (280, 120)
    assert not set(pairs.train) & set(pairs.tests["pairs"])


def test_a_source_of_the_same_prompt():
    data = grid()
    asked = asked_of(data)
    pairs = make_pairs(data, asked, "shape", protocol_of("ravel", source="same"), 0)
    assert all(asked[pair.base].prompt.template == asked[pair.source].prompt.template for pair in pairs.train)


@pytest.mark.parametrize("clashes", ["drop", "keep", "isolate"])
def test_labels_of_one_first_token(clashes):
    """c0 and c1 begin alike: "United States", "United Kingdom"."""
    data = grid()
    asked = asked_of(data, {"c0": 7, "c1": 7})
    pairs = make_pairs(data, asked, "colour", protocol_of("ravel", clashes=clashes), 0)

    def labels(pair) -> set[str]:
        return {data.labels["colour"][asked[each].prompt.entity] for each in (pair.base, pair.source)}

    alike = [
        pair for pair in pairs.train if asked[pair.base].prompt.attribute == "colour" and labels(pair) == {"c0", "c1"}
    ]
    assert (pairs.dropped > 0) == (clashes == "drop") == (not alike)
    assert all(pair.is_cause == (clashes == "keep") for pair in alike)
    # What SAEBench does with them: to isolate means to answer with the source's label.
    for pair in alike:
        assert pair.label == data.labels["colour"][asked[pair.source].prompt.entity]


@pytest.mark.parametrize("clashes", ["drop", "keep"])
def test_an_answer_that_stays_for_the_wrong_reason(clashes):
    """To isolate shapes, the colour must stay: a source whose colour begins alike would hide that it does not."""
    data = grid()
    asked = asked_of(data, {"c0": 7, "c1": 7})
    pairs = make_pairs(data, asked, "shape", protocol_of("ravel", clashes=clashes), 0)
    alike = [
        pair
        for pair in pairs.train
        if not pair.is_cause
        and {data.labels["colour"][asked[each].prompt.entity] for each in (pair.base, pair.source)} == {"c0", "c1"}
    ]
    assert bool(alike) == (clashes == "keep")
    assert (pairs.dropped > 0) == (clashes == "drop")
    assert all(pair.token == asked[pair.base].answer.token for pair in alike)


def test_other_attributes_share_what_is_isolated():
    """Of three attributes two are to stay: as many pairs together as are to move one, and as many of either."""
    data = grid(entities=48)
    towns = data.entities
    sizes = {town: f"z{number % 5}" for number, town in enumerate(towns)}
    three = EntityData(
        "town",
        {**data.labels, "size": sizes},
        {**data.templates, "size": ("%s size 0", "%s size 1", "%s size 2")},
        data.entity_split,
        {**data.template_split, "%s size 0": "train", "%s size 1": "train", "%s size 2": "test"},
    )
    asked = asked_of(three)
    pairs = make_pairs(three, asked, "colour", protocol_of("ravel", pairs=61, test_pairs=20), 0)
    assert pairs.to_dict()["train"] == {"cause": 61, "isolation": 61}
    isolated = [asked[pair.base].prompt.attribute for pair in pairs.train if not pair.is_cause]
    assert sorted(isolated.count(name) for name in ("shape", "size")) == [30, 31]


def test_equal_labels_to_isolate_are_of_two_entities():
    """Where they may be equal in isolation alone, no town is exchanged with itself and no label with the same."""
    data = grid()
    asked = asked_of(data)
    pairs = make_pairs(data, asked, "colour", protocol_of("ravel", equal="isolation", pairs=200, test_pairs=50), 0)
    equal = 0
    for pair in pairs.train:
        base, source = (asked[each].prompt.entity for each in (pair.base, pair.source))
        assert base != source
        same = data.labels[asked[pair.base].prompt.attribute]
        assert not (pair.is_cause and same[base] == same[source])
        equal += same[base] == same[source]
    assert equal > 0


def test_just_enough_pairs():
    data = grid()
    pairs = make_pairs(data, asked_of(data), "colour", protocol_of("ravel", pairs=4, test_pairs=4), 0)
    assert len(pairs.train) == 8
    with pytest.raises(ValueError, match=r"pairs: expected at least 4 of cause for 'colour' \(training\), found 3"):
        make_pairs(data, asked_of(data), "colour", protocol_of("ravel", pairs=3, test_pairs=4), 0)


def test_pairs_that_are_too_few():
    data = grid(entities=12)
    few = [each for each in asked_of(data) if each.prompt.entity not in ("town0", "town3", "town6")]
    with pytest.raises(ValueError, match=r"pairs: expected at least 4 of cause for 'colour' \(entities\), found 0"):
        make_pairs(data, few, "colour", protocol_of("ravel"), 0)


def test_what_the_model_knows():
    data = grid(entities=6, templates=2)
    asked = asked_of(data)
    wrong = {"town1": 1, "town2": 2, "town3": 4}  # so many of its four prompts
    seen: dict[str, int] = {}
    right = []
    for each in asked:
        town = each.prompt.entity
        seen[town] = seen.get(town, 0) + 1
        right.append(seen[town] > wrong.get(town, 0))
    kept, facts = known(asked, right, protocol_of("ravel"))
    # Of town2 both prompts about the colour are wrong: it knows no colour.
    assert {each.prompt.entity for each in kept} == {"town0", "town1", "town4", "town5"}
    assert facts["known_entities"] == 4
    assert facts["known_prompts"] == len(kept) == 15
    assert facts["right"] == {"colour": round(1 - 5 / 12, 4), "shape": round(1 - 2 / 12, 4)}
    kept, _ = known(asked, right, protocol_of("ravel", known="every"))
    assert {each.prompt.entity for each in kept} == {"town0", "town4", "town5"}
    kept, _ = known(asked, right, protocol_of("ravel", entities=2))
    assert {each.prompt.entity for each in kept} == {"town0", "town4"}  # the first of those that are known best
    with pytest.raises(
        ValueError, match="entities: expected at least two whose colour and shape the model knows, found 0"
    ):
        known(asked, [False] * len(asked), protocol_of("ravel"))


def test_labels_of_several_tokens():
    data = grid(entities=6)
    asked = [
        dataclasses.replace(each, answer=dataclasses.replace(each.answer, tokens=2))
        if each.answer.label == "c0"
        else each
        for each in asked_of(data)
    ]
    right = [True] * len(asked)
    first, _ = known(asked, right, protocol_of("ravel"))
    single, _ = known(asked, right, protocol_of("ravel", labels="single"))
    gone = {each.prompt.entity for each in first} - {each.prompt.entity for each in single}
    assert gone == {"town0", "town4"}


def test_presets():
    paper = protocol_of("sae-ravel")
    assert (paper.temperature(0, 100), paper.temperature(99, 100)) == (10.0, pytest.approx(0.1))
    assert paper.temperature(1, 3) == pytest.approx(5.05)
    bench = protocol_of("saebench")
    assert bench.temperature(0, 5) == 1.0
    assert bench.temperature(2, 5) == pytest.approx(1e-2)
    assert bench.temperature(4, 5) == pytest.approx(1e-4)
    assert bench.temperature(0, 1) == 1.0
    assert (paper.mask, paper.error, paper.bos, paper.batch_size, paper.epochs) == ("soft", "drop", False, 16, 20)
    assert (bench.mask, bench.error, bench.bos, bench.batch_size, bench.epochs) == ("hard", "drop", True, 8, 2)
    assert protocol_of("saebench", lr=None, epochs=5) == dataclasses.replace(bench, epochs=5)
    for changes, message in (
        ({"mask": "firm"}, "mask: expected 'hard' or 'soft', got 'firm'"),
        ({"lr": 0.0}, "lr: expected"),
        ({"pairs": 0}, "pairs: expected"),
        ({"test_share": 0.95, "validation_share": 0.1}, "test_share: expected less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            protocol_of("ravel", **changes)
    with pytest.raises(ValueError, match="preset: expected 'ravel'"):
        protocol_of("raven")
