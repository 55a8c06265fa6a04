"""Text in, byte tokens out: the split, the baseline, and one test per message."""

import math
import os

import pytest
import torch

from gemmascope.activations.held_out import HELD_OUT_EVERY
from gemmascope.demo import text
from gemmascope.demo.text import BOS


def test_python_documentation_is_real_text():
    documentation = text.python_documentation()
    assert 1_000_000 < len(documentation) < 10_000_000
    documentation.decode("utf-8")
    assert b"Evaluates" in documentation or b"Return" in documentation


def test_docstrings(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\nx = "no"\n'
    )
    assert list(text.docstrings(path)) == ["Module.", "Class.", "Method."]
    path.write_text("def broken(:\n")
    assert list(text.docstrings(path)) == []


def test_rows_start_with_bos_and_drop_the_rest():
    assert text.rows(b"abcdefgh", 4).tolist() == [[BOS, 97, 98, 99], [BOS, 100, 101, 102]]


def numbers_in(rows):
    return rows[:, 1:].unique().tolist()


def test_split_is_disjoint_and_holds_out_a_sixteenth():
    corpus = b"".join(bytes([i]) * 10 for i in range(HELD_OUT_EVERY))  # a number for each row
    train, held_out = text.split(corpus, 11, seed=0)
    (number,) = numbers_in(held_out)
    assert numbers_in(train) == [other for other in range(HELD_OUT_EVERY) if other != number]
    assert {numbers_in(text.split(corpus, 11, seed)[1])[0] for seed in range(200)} == set(range(HELD_OUT_EVERY))


def test_held_out_rows_come_from_all_over():
    """Of any sixteenth of the text a block, so that the figures are not those of one piece of it."""
    corpus = b"".join(bytes([i]) * 32 * 10 for i in range(8 * HELD_OUT_EVERY))  # a number for each block
    train, held_out = text.split(corpus, 11, seed=1)
    found = numbers_in(held_out)
    assert [number // HELD_OUT_EVERY for number in found] == list(range(8))
    assert not set(found) & set(numbers_in(train))
    assert len(held_out) == 8 * 32


def test_bigram_loss_of_a_certain_text_is_near_zero_and_of_noise_is_that_of_unigrams():
    certain = text.rows(b"ab" * 5000, 21)
    assert text.bigram_loss(certain, certain[:50]) < 0.1
    noise = torch.randint(0, 4, (2000, 20), generator=torch.Generator().manual_seed(0))
    assert text.bigram_loss(noise, noise[:500]) == pytest.approx(math.log(4), abs=0.01)


def test_bigram_loss_by_hand():
    # Seen: 0→1 three times, 0→2 once. With vanishing smoothing p(1|0) = 3/4; the grid's least is 0.1.
    train = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2]])
    unigram = (3 + 1) / (4 + text.VOCAB_SIZE)
    losses = [-math.log((3 + a * unigram) / (4 + a)) for a in (0.1, 0.3, 1, 3, 10, 30, 100, 300)]
    assert text.bigram_loss(train, torch.tensor([[0, 1]])) == pytest.approx(min(losses))


def test_read_files_joins(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_text("zwei ß")
    assert text.read_files([tmp_path / "a", tmp_path / "b"]).decode() == "one\n\nzwei ß"


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
    assert text.read_files([tmp_path / "a", tmp_path / "a"]) == b"five5\n\nfive5"
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


def test_too_short():
    with pytest.raises(ValueError, match="text: expected at least 2032 bytes for rows of 128 tokens, got 2031"):
        text.split(b"x" * 2031, 128, seed=0)
    assert [len(part) for part in text.split(b"x" * 2032, 128, seed=0)] == [15, 1]
