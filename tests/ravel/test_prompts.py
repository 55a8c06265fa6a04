"""Where an entity ends and a label begins, with tokenizers of words and of letters."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from gemmascope.ravel import EntityData, Reader

DATA = EntityData(
    "town",
    {"land": {"Ulm": "Xu", "Bad Ems": "Xu Yu", "Oslo": "Zet"}},
    {"land": ("%s is in", "map : %s ; land :")},
    {},
    {},
)


def tokenizer(pattern: str | None, bos: bool = True):
    """Of words, without a pattern; else of what it cuts a text into."""
    from transformers import PreTrainedTokenizerFast

    letters = list(" :;ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    words = ["Ulm", "Bad", "Ems", "Oslo", "Xu", "Yu", "Zet", "is", "in", "map", ":", ";", "land"]
    vocabulary = ["<bos>", "<unk>", *(words if pattern is None else letters)]
    made = Tokenizer(models.WordLevel({each: number for number, each in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit() if pattern is None else pre_tokenizers.Split(Regex(pattern), "isolated")
    )
    options = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **options)


def test_words():
    words = tokenizer(None)
    asked, left_out = Reader(words, True).asked(DATA)
    assert not any(left_out.values())
    assert len(asked) == 6
    found = {each.prompt.text: each for each in asked}
    # BOS, Bad, Ems, is, in
    ems = found["Bad Ems is in"]
    assert ems.tokens.position == 2
    assert len(ems.tokens.ids) == 5
    assert ems.tokens.ids[0] == words.bos_token_id
    assert words.convert_ids_to_tokens([ems.tokens.ids[2], ems.answer.token]) == ["Ems", "Xu"]
    assert (ems.answer.label, ems.answer.tokens) == ("Xu Yu", 2)
    assert found["map : Oslo ; land :"].tokens.position == 3
    assert found["Ulm is in"].answer.tokens == 1
    without, _ = Reader(words, False).asked(DATA)
    assert without[0].tokens.ids == asked[0].tokens.ids[1:]
    assert without[0].tokens.position == 0


def test_letters():
    letters = tokenizer(".")
    asked, _ = Reader(letters, True).asked(DATA)
    first = asked[0]
    assert first.prompt.text == "Ulm is in"
    assert first.tokens.position == 3
    # The label follows behind a space, which is a token here.
    assert letters.convert_ids_to_tokens([first.answer.token]) == [" "]
    assert first.answer.tokens == 3


def test_entities_of_one_token_alone():
    asked, left_out = Reader(tokenizer(None), True).asked(DATA, entity_tokens=1)
    assert {each.prompt.entity for each in asked} == {"Ulm", "Oslo"}
    assert left_out["the entity is not 1 long"] == 2


def test_tokens_that_reach_beyond():
    """A tokenizer that joins the end of the entity with what follows, and one that joins the label with the prompt."""
    asked, left_out = Reader(tokenizer("m is|."), True).asked(DATA)
    assert "Ulm is in" not in {each.prompt.text for each in asked}
    assert left_out["the entity has no tokens of its own"] == 1
    asked, left_out = Reader(tokenizer("n Xu|n Zet|."), True).asked(DATA)
    assert {each.prompt.template for each in asked} == {"map : %s ; land :"}
    assert left_out["the label has no tokens of its own"] == 3


def test_no_bos():
    with pytest.raises(ValueError, match="bos: expected a tokenizer with a BOS token"):
        Reader(tokenizer(None, bos=False), True)
