"""Trees of JSON compared item by item."""

import pytest

from gemmascope.formats.differences import differences


@pytest.mark.parametrize(
    ("found", "expected", "lines"),
    [
        ({}, {}, []),
        ({"a": 1, "b": [1, {"c": None}]}, {"b": (1.0, {"c": None}), "a": 1}, []),
        ({"a": 1}, {"a": True}, ["a: the checkpoint has 1, this run True"]),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, ["a.b: the checkpoint has 'x', this run 'y'"]),
        (
            {"a": 1},
            {"b": None},
            ["b: the checkpoint has nothing, this run None", "a: the checkpoint has 1, this run nothing"],
        ),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1]: the checkpoint has 2, this run 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: the checkpoint has 1 entries, this run 2 entries"]),
        ({"a": {}}, {"a": []}, ["a: the checkpoint has {}, this run []"]),
        ({"a": "x" * 100}, {"a": ""}, [f"a: the checkpoint has '{'x' * 76}..., this run ''"]),
    ],
)
def test_a_line_for_each(found, expected, lines):
    assert differences(found, expected, "the checkpoint", "this run") == lines


def test_what_is_no_dict():
    with pytest.raises(TypeError, match="expected: expected a Mapping, got list"):
        differences({}, [], "the checkpoint", "this run")
