"""Text in, documents out: what they are, what is held out, the baseline, and one test per message."""

import json
import math
import os

import pytest
import torch

from gemmascope.activations import Document, read_documents, tokenise
from gemmascope.activations.held_out import HELD_OUT_EVERY
from gemmascope.activations.packing import is_held_out
from gemmascope.demo import text
from gemmascope.demo.byte_tokenizer import byte_tokenizer
from gemmascope.demo.text import BOS


def held_out(documents):
    return [document for document in documents if is_held_out(document, HELD_OUT_EVERY)]


def test_python_documentation_is_real_text():
    documents = text.read((), 128)
    whole = "\n\n".join(document.text for document in documents)
    assert 1_000_000 < len(whole.encode()) < 10_000_000
    assert "Evaluates" in whole or "Return" in whole
    names = [(document.source, document.name) for document in documents]
    assert len(set(names)) == len(names) > 200
    assert ("standard library", "argparse.py") in names
    assert 0.02 < len(held_out(documents)) / len(documents) < 0.12


PARAGRAPHS = "\n\n".join(f"{number} " + "words of a paragraph " * 20 for number in range(200))


def test_a_file_becomes_documents_that_end_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text(PARAGRAPHS)
    documents = text.read([tmp_path / "a.txt"], 128)
    assert "".join(document.text for document in documents) == PARAGRAPHS
    assert all(2048 <= len(document.text) <= 4096 for document in documents[:-1])
    assert all(document.text.endswith("\n\n") for document in documents[:-1])
    start = 0
    for document in documents:
        assert (document.name, document.source) == (f"a.txt:{start}", "a.txt")
        start += len(document.text)


def test_more_text_at_the_end_moves_no_document_to_the_other_side(tmp_path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(PARAGRAPHS * (1 + (name == "after")))
    before, after = (set(held_out(text.read([tmp_path / name / "a.txt"], 128))) for name in ("before", "after"))
    assert len(before) < len(after)
    assert len(before - after) <= 1  # the last document of the shorter text


@pytest.mark.parametrize("piece", ["a line\n", "word ", "x", "ß€\U0001f600", "a\n\n"])
def test_any_text_is_cut_into_pieces_that_are_it_together(piece):
    whole = piece * 3000
    documents = list(text.cut("a", whole, 1000))
    assert "".join(document.text for document in documents) == whole
    assert all(500 <= len(document.text) <= 1000 for document in documents[:-1])


@pytest.mark.parametrize("seed", range(8))
def test_of_the_shortest_text_some_is_held_out(tmp_path, seed):
    (tmp_path / f"{seed}").write_text("short text" * 204)
    documents = text.read([tmp_path / f"{seed}"], 128)
    rows = tokenise(documents, byte_tokenizer(), tmp_path / "rows", context=128)
    assert min(rows.n_train, rows.n_held_out) > 0


def test_lines_are_read_again_as_the_same_documents(tmp_path):
    documents = [Document("a:0", 'one "two"\n\x85\u2028ß\0', "a"), Document("b:3", "", "b")]
    (tmp_path / "text.jsonl").write_bytes(text.lines(documents))
    assert list(read_documents([tmp_path / "text.jsonl"])) == documents
    assert len(text.lines(documents).splitlines()) == 2
    assert json.loads(text.lines(documents).splitlines()[1]) == {"name": "b:3", "source": "b", "text": ""}


def rows(data, context):
    """A BOS and ``context`` − 1 bytes each."""
    body = torch.tensor(list(data[: len(data) // (context - 1) * (context - 1)])).view(-1, context - 1)
    return torch.cat([torch.full((len(body), 1), BOS), body], 1)


def test_bigram_loss_of_a_certain_text_is_near_zero_and_of_noise_is_that_of_unigrams():
    certain = rows(b"ab" * 5000, 21)
    assert text.bigram_loss(certain, certain[:50]) < 0.1
    noise = torch.randint(0, 4, (2000, 20), generator=torch.Generator().manual_seed(0))
    assert text.bigram_loss(noise, noise[:500]) == pytest.approx(math.log(4), abs=0.01)


def test_bigram_loss_by_hand():
    # Seen: 0→1 three times, 0→2 once. With vanishing smoothing p(1|0) = 3/4; the grid's least is 0.1.
    train = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2]])
    unigram = (3 + 1) / (4 + text.VOCAB_SIZE)
    losses = [-math.log((3 + a * unigram) / (4 + a)) for a in (0.1, 0.3, 1, 3, 10, 30, 100, 300)]
    assert text.bigram_loss(train, torch.tensor([[0, 1]])) == pytest.approx(min(losses))


def test_bigram_loss_leaves_bos_out():
    train = torch.tensor([[BOS, 0, 1, BOS], [BOS, BOS, 0, 1]])
    plain = torch.tensor([[0, 1], [0, 1]])
    assert text.bigram_loss(train, torch.tensor([[BOS, 0, 1, BOS]])) == text.bigram_loss(plain, torch.tensor([[0, 1]]))


def test_read_files(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_text("zwei ß")
    assert text.read_files([tmp_path / "a", tmp_path / "b"]) == [("a", "one"), ("b", "zwei ß")]


@pytest.mark.parametrize(
    ("name", "found"),
    [("nothing", "none"), ("", "a folder"), ("pipe", "a device, pipe or socket")],
)
def test_what_is_no_file(tmp_path, name, found):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"text: cannot read .*{name}: expected a file, found {found}"):
        text.read_files([tmp_path / name])


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_files_without_an_end():
    with pytest.raises(ValueError, match="text: cannot read /dev/zero: expected a file, found a device"):
        text.read_files(["/dev/zero"])
    for path in ("/proc/kmsg", "/proc/self/status"):  # regular files of no size; the first makes its reader wait
        if os.path.exists(path):
            with pytest.raises(ValueError, match=f"text: (expected some text in|cannot read) {path}"):
                text.read_files([path])


def test_text_is_bounded(tmp_path, monkeypatch):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(10**12)  # takes no space
    with pytest.raises(ValueError, match=f"text: expected at most 67108864 bytes in all, found {10**12} in .*large: "):
        text.read_files([large])
    monkeypatch.setattr(text, "MAX_TEXT_BYTES", 10)
    (tmp_path / "a").write_bytes(b"five5")
    assert text.read_files([tmp_path / "a", tmp_path / "a"]) == [("a", "five5"), ("a", "five5")]
    with pytest.raises(ValueError, match=r"text: expected at most 10 bytes in all, found 5 in .*a: give a part of it"):
        text.read_files([tmp_path / "a"] * 3)


def test_a_name_is_shown_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"text: cannot read '.*a\\nb': expected a file, found none"):
        text.read_files([tmp_path / "a\nb"])


def test_empty_file(tmp_path):
    (tmp_path / "a").write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"text: expected some text in .*a, found an empty file"):
        text.read_files([tmp_path / "a"])


def test_not_utf8(tmp_path):
    (tmp_path / "a").write_bytes(b"good \xff\xfe")
    with pytest.raises(ValueError, match=r"text: expected UTF-8 in .*a, found byte 0xff at 5"):
        text.read_files([tmp_path / "a"])


def test_too_short(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 2031)
    with pytest.raises(ValueError, match="text: expected at least 2032 bytes for rows of 128 tokens, got 2031"):
        text.read([tmp_path / "a"], 128)


def test_blanks_alone_are_nothing_to_hold_out(tmp_path):
    (tmp_path / "a").write_bytes(b"x" + b" " * 5000)
    with pytest.raises(ValueError, match="text: expected some text to train on and some to hold out, found blanks"):
        text.read([tmp_path / "a"], 128)
