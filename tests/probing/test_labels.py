"""Labels of a text by itself."""

import torch

from gemmascope.demo.byte_tokenizer import byte_tokenizer
from gemmascope.probing import document_tasks, labelled_tasks, pieces_of, token_tasks
from gemmascope.probing.labels import script_of

PIECES = ["The", " cat", "s", " NATO", ",", "42", " x1", "\n", "Iron", "y", "é", " A", "'", "t", " X1"]


def flags(tokens, first=()):
    begins = torch.zeros(len(tokens), dtype=torch.bool)
    begins[list(first)] = True
    ids = torch.tensor([PIECES.index(token) for token in tokens])
    return {task.name: [token for token, on in zip(tokens, task.labels.tolist(), strict=True) if on]
            for task in token_tasks(ids, PIECES, begins)}  # fmt: skip


def test_of_tokens():
    found = flags(["The", " cat", "s", ",", " NATO", "42", " x1", "\n", "Iron", "y", " A", "'", "t"], first=[0])
    assert found["capital"] == ["The", " NATO", "Iron", " A"]
    assert found["all capitals"] == [" NATO"]
    assert found["digits"] == ["42"]
    assert found["punctuation"] == [",", "'"]
    assert found["starts a word"] == ["The", " cat", " NATO", " x1", "Iron", " A", "t"]


def test_a_token_that_follows_nothing_starts_a_word():
    assert flags(["The", "s"])["starts a word"] == ["The"]
    assert flags(["The", "s"], first=[0, 1])["starts a word"] == ["The", "s"]


def test_of_documents():
    names = [("a.py", "a.py"), ("b.md", "b.md"), ("wiki", "1"), ("wiki", "2"), ("c.txt.gz", "c"), ("d.py", "note.md")]
    texts = ["x", "Ein Satz, der lang genug ist", "Это предложение достаточно длинное", "a" * 19, "一" * 30, ""]
    found = {task.name: (task.labels.tolist(), task.known.tolist()) for task in document_tasks(names, texts)}
    everywhere = [True] * 6
    assert found["source: wiki"] == ([False, False, True, True, False, False], everywhere)
    assert {name for name in found if name.startswith("source")} == {"source: wiki"}
    labels, known = found["code"]
    assert known == [True, True, False, False, True, False]  # a program by its source, prose by its name: not known
    assert [label for label, told in zip(labels, known, strict=True) if told] == [True, False, False]
    told = [False, True, True, False, True, False]
    assert found["script: cyrillic"] == ([False, False, True, False, False, False], told)
    assert {name for name in found if name.startswith("script")} == {"script: cjk", "script: cyrillic", "script: latin"}


def test_a_number_is_no_capital_letter():
    found = flags([" X1", " NATO"])
    assert (found["capital"], found["all capitals"]) == ([" X1", " NATO"], [" NATO"])


def test_the_sources_with_the_most_documents():
    """Of seven sources with two documents and more five have a task."""
    names = [(f"s{number}", str(each)) for number in range(7) for each in range(2 + number)]
    tasks = document_tasks(names, ["x" * 30] * len(names))
    assert [task.name for task in tasks if task.name.startswith("source")] == [f"source: s{6 - n}" for n in range(5)]


def test_of_two_sources_there_is_one_task():
    """The other asks the opposite."""
    tasks = document_tasks([("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")], ["x" * 30] * 4)
    assert [task.name for task in tasks] == ["source: a", "code", "script: latin"]


def test_of_two_labels_there_is_one_task():
    assert [task.name for task in labelled_tasks(["b", "a", "b"])] == ["label: b"]
    three = labelled_tasks(["b", "a", "c"])
    assert [task.name for task in three] == ["label: a", "label: b", "label: c"]
    assert three[1].labels.tolist() == [True, False, False]


def test_scripts():
    assert script_of("abcdefghij" * 2) == "latin"
    assert script_of("abcdefghi " * 2) is None
    assert script_of("a" * 10 + "я" * 10) == "cyrillic"  # of equals the first of the alphabet
    assert script_of("1234567890" * 9) is None
    assert script_of("a" * 15 + "яюэйц") == "latin"  # letters count, not which


class Sentencepiece:
    """As Gemma's tokenizer writes blanks, and loses them in `decode`."""

    def convert_ids_to_tokens(self, ids):
        return [["▁cat", "s", "▁", "▁▁x"][number] for number in ids]

    def decode(self, ids):
        return ["cat", "s", "", "  x"][ids[0]]


def test_pieces_keep_their_blanks():
    assert pieces_of(Sentencepiece(), torch.arange(4)) == [" cat", "s", " ", " x"]
    assert pieces_of(byte_tokenizer(), torch.tensor(list(b"a B"))) == ["a", " ", "B"]
