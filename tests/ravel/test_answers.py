import pytest

from gemmascope.ravel.answers import says


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        (" France and", "France", True),
        (" Fra", "France", True),  # cut off
        (" franconia", "France", False),
        (' France", "city', "France", True),
        ('"France', "France", False),  # nothing before the quote
        ("", "France", False),
        (" the United States of", "United States", True),
        (" United", "United Kingdom", True),  # the shorter decides
        (" Urdu", "English, Urdu", True),
        (" Hindi", "English, Urdu", False),
        (" 47.3", "49", True),
        (" 46", "49", False),
        ("about", "49", False),
        (" -3", "-2", True),
    ],
)
def test_answers(text, label, right):
    assert says(text, label) is right
