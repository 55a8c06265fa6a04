"""Cause, isolation and their intervals by plain loops over pairs that are made up."""

import pytest
import torch

from gemmascope.evaluation import Bootstrap
from gemmascope.ravel import Entities, Prompt, figures, floors, mean_figures
from gemmascope.ravel.continuation import Tokens
from gemmascope.ravel.pairs import Pair
from gemmascope.ravel.prompts import Answer, Asked

# The attribute that is moved is the land; two others are asked about, one of them by fewer pairs.
PROMPTS = [("Ulm", "land"), ("Oslo", "land"), ("Ulm", "tongue"), ("Oslo", "tongue"), ("Rome", "sea"), ("Bonn", "land")]
ASKED = [Asked(Prompt(*each, "%s"), Tokens((1, 2), 1), Answer("x", 7, 1)) for each in PROMPTS]
# base, source, cause, right
PAIRS = [(0, 1, True, 1), (1, 0, True, 0), (5, 0, True, 1), (0, 5, True, 1), (2, 1, False, 1), (3, 0, False, 0)]
PAIRS += [(3, 5, False, 0), (2, 5, False, 1), (2, 1, False, 0), (4, 5, False, 1)]
MADE = [Pair(base, source, cause, "x", 7, 7, 8) for base, source, cause, _ in PAIRS]
RIGHT = torch.tensor([right for *_, right in PAIRS], dtype=torch.bool)


def mean(rows) -> float:
    values = [right for *_, right in rows]
    return sum(values) / len(values)


def by_loops(pairs) -> tuple[float, float]:
    cause = [each for each in pairs if each[2]]
    others = [[each for each in pairs if PROMPTS[each[0]][1] == name] for name in ("tongue", "sea")]
    return mean(cause), sum(map(mean, others)) / 2


def test_by_hand():
    """Each other attribute counts the same, however many pairs ask about it."""
    entities = [PROMPTS[base][0] for base, *_ in PAIRS]
    found = figures(MADE, RIGHT, ASKED, Entities(entities, 200, 3))
    assert found["cause"][0] == 3 / 4
    assert found["isolation"][0] == pytest.approx((2 / 5 + 1) / 2)
    assert found["disentangle"][0] == pytest.approx((3 / 4 + 0.7) / 2)
    assert by_loops(PAIRS) == pytest.approx((3 / 4, 0.7))


def test_draws_are_of_the_entities_of_bases():
    """All pairs of an entity's prompts as bases are drawn together."""
    names = list(dict.fromkeys(PROMPTS[base][0] for base, *_ in PAIRS))
    entities = Entities([PROMPTS[base][0] for base, *_ in PAIRS], 200, 3)
    found, several = figures(MADE, RIGHT, ASKED, entities), 0
    for draw, times in enumerate(Bootstrap(len(names), draws=200, seed=3).times.tolist(), start=1):
        drawn = [each for each in PAIRS for _ in range(times[names.index(PROMPTS[each[0]][0])])]
        if not all(any(PROMPTS[each[0]][1] == name for each in drawn) for name in ("land", "tongue", "sea")):
            assert found["disentangle"][draw].isnan()
            continue
        several += 1
        cause, isolation = by_loops(drawn)
        assert found["cause"][draw].item() == pytest.approx(cause)
        assert found["isolation"][draw].item() == pytest.approx(isolation)
        assert found["disentangle"][draw].item() == pytest.approx((cause + isolation) / 2)
    assert several > 20


def test_an_interval_is_of_the_draws_alone():
    entities = Entities(["a", "b"], 4, 0)
    given = {"cause": torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)}
    found = entities.described(given)
    assert found["cause"] == 9.0
    assert found["cause_interval"] == pytest.approx([1.075, 3.925])


def test_attributes_count_the_same():
    one, two = ({name: torch.tensor([v, v]) for name in ("cause", "isolation", "disentangle")} for v in (0.25, 0.75))
    assert all(each.tolist() == [0.5, 0.5] for each in mean_figures([one, two]).values())


def test_two_answers_that_know_nothing():
    pairs = [Pair(0, 1, True, "y", 8, 7, 8), Pair(0, 1, False, "x", 7, 7, 8), Pair(0, 1, True, "x", 7, 7, 7)]
    found = floors(pairs)
    assert found["always base"].tolist() == [False, True, True]
    assert found["always source"].tolist() == [True, False, True]
