"""Rows of tokens: packed by hand and by a plain loop, held out by name, made once, and never wrong unnoticed."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from gemmascope.activations import Document, TokenRows, packing, read_documents, tokenise
from gemmascope.activations.packing import is_held_out, tokenizer_hash
from gemmascope.demo.byte_tokenizer import byte_tokenizer
from tests.activations.token_rows import BOS, EOS, PAD, PROSE, all_of, document, everything, make, numbers

# ---- rows


def test_rows_by_hand(tokenizer, tmp_path):
    texts = ["abc", "defghijkl", "m", "n", "opq"]
    documents = [document(text, index=index) for index, text in enumerate(texts)]
    documents.insert(2, document("held", held_out=True))
    rows = make(documents, tokenizer, tmp_path, context=6)
    a, d, m, n, o = (ord(letter) for letter in "admno")
    expected = [
        [BOS, a, a + 1, a + 2, BOS, d],
        [BOS, d + 1, d + 2, d + 3, d + 4, d + 5],
        [BOS, d + 6, d + 7, d + 8, BOS, m],
        [BOS, n, BOS, o, o + 1, o + 2],  # n begins a row: one BOS is enough
    ]
    assert all_of(rows, "train").tolist() == expected
    found = rows.documents_of("train", torch.arange(4))
    assert found.tolist() == [[-1, 0, 0, 0, -1, 1], [-1, 1, 1, 1, 1, 1], [-1, 1, 1, 1, -1, 3], [-1, 4, -1, 5, 5, 5]]
    assert found.dtype == torch.int64
    assert all_of(rows, "held_out").tolist() == [[BOS, *b"held", PAD]]
    assert rows.documents_of("held_out", torch.tensor([0])).tolist() == [[-1, 2, 2, 2, 2, -1]]
    assert rows.document_names([2, 1]) == [("s", documents[2].name), ("s", documents[1].name)]
    assert (rows.context, rows.n_train, rows.n_held_out, rows.n_documents) == (6, 4, 1, 6)
    assert rows.special_ids == (BOS, EOS, PAD)


def test_a_bos_at_the_end_of_a_row_is_followed_by_another(tokenizer, tmp_path):
    rows = make(
        [document("abcd"), document("e", index=1), document("h", held_out=True)], tokenizer, tmp_path, context=6
    )
    assert all_of(rows, "train").tolist() == [[BOS, *b"abcd", BOS], [BOS, *b"e", PAD, PAD, PAD, PAD]]
    assert rows.documents_of("train", torch.arange(2)).tolist() == [[-1, 0, 0, 0, 0, -1], [-1, 1, -1, -1, -1, -1]]


@pytest.mark.parametrize(("special", "expected"), [({"eos_token": "<eos>"}, 257), ({}, BOS)], ids=["EOS", "BOS"])
def test_what_stands_in_for_pad(tmp_path, special, expected):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(special)
    rows = make([document("a"), document("h", held_out=True)], tokenizer, tmp_path, context=4)
    assert all_of(rows, "train").tolist() == [[BOS, ord("a"), expected, expected]]
    assert rows.documents_of("train", torch.tensor([0])).tolist() == [[-1, 0, -1, -1]]


def plain_rows(documents, context):
    """(token, document) in rows, by a loop over the tokens."""
    rows = []
    for number, text in documents:
        for token, of in [(BOS, -1), *((token, number) for token in text.encode())]:
            if not rows or len(rows[-1]) == context:
                rows.append([(BOS, -1)] if token != BOS else [])
            rows[-1].append((token, of))
    if rows:
        rows[-1] += [(PAD, -1)] * (context - len(rows[-1]))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12),
    context=st.integers(2, 17),
    shard=st.integers(4, 400),
    batch=st.integers(1, 400),
    piece=st.integers(2, 50),
)
def test_rows_are_those_of_a_plain_loop(tokenizer, tmp_path_factory, texts, context, shard, batch, piece):
    """Whatever the sizes of shards, batches and pieces are."""
    texts = [(True, 3), (False, 5), *texts]
    documents = [document("abcdefghij"[i % 10] * n, held_out=side, index=i) for i, (side, n) in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARD_BYTES", shard)
        patch.setattr(packing, "BATCH_CHARACTERS", batch)
        patch.setattr(packing, "PIECE_CHARACTERS", piece)
        patch.setattr(packing, "DOCUMENTS_PER_FILE", 1 + shard % 5)
        rows = make(documents, tokenizer, tmp_path_factory.mktemp("rows"), context=context)
    for part, side in (("train", False), ("held_out", True)):
        of_part = [(i, found.text) for i, found in enumerate(documents) if is_held_out(found, 4) == side]
        expected = torch.tensor(plain_rows(of_part, context))
        assert torch.equal(all_of(rows, part), expected[..., 0])
        assert torch.equal(rows.documents_of(part, numbers(rows, part)), expected[..., 1])
    assert rows.document_names(range(len(documents))) == [("s", found.name) for found in documents]


def test_rows_are_read_in_any_order(tokenizer, tmp_path, small_shards):
    rows = make([document(PROSE), document("h", held_out=True)], tokenizer, tmp_path)
    whole = all_of(rows, "train")
    assert len([name for name in os.listdir(tmp_path) if name.startswith("train")]) == (rows.n_train + 1) // 2
    picked = torch.randint(rows.n_train, (50,), generator=torch.Generator().manual_seed(0))
    for numbers_ in (picked, picked.int(), picked[:0]):
        assert torch.equal(rows.train(numbers_), whole[numbers_.long()])
    assert rows.train(picked).dtype == torch.int64


def test_threads_may_read_at_once(tokenizer, tmp_path, small_shards):
    rows = make([document(PROSE), document("h", held_out=True)], tokenizer, tmp_path)
    whole, found = all_of(TokenRows.open(tmp_path), "train"), []
    threads = [threading.Thread(target=lambda: found.append(all_of(rows, "train"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(each, whole) for each in found)


def test_shards_are_safetensors(tokenizer, tmp_path):
    rows = make([document("abc"), document("h", held_out=True)], tokenizer, tmp_path)
    found = load_file(tmp_path / "train-00000.safetensors")
    assert found["tokens"].dtype == torch.uint32
    assert torch.equal(found["tokens"].long(), all_of(rows, "train"))
    assert (found["documents"].tolist(), found["starts"].tolist()) == ([0], [0])


def test_defaults_of_pytorch_do_not_matter(tokenizer, tmp_path):
    rows = make([document("abc"), document("h", held_out=True)], tokenizer, tmp_path)
    with torch.device("meta"):
        assert rows.train(torch.tensor([0], device="cpu")).device.type == "cpu"
        assert rows.documents_of("train", torch.tensor([0], device="cpu")).device.type == "cpu"


# ---- what counts as text


@pytest.mark.parametrize("name", ["tokenizer", "bpe"])
def test_the_names_of_special_tokens_are_text(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    text = "a<bos>b <eos><pad> <bos>"
    rows = make([document(text), document("h", held_out=True)], tokenizer, tmp_path, context=64)
    special = set(rows.special_ids)
    (row,) = all_of(rows, "train").tolist()
    (of,) = rows.documents_of("train", torch.tensor([0])).tolist()
    ids = [token for token, number in zip(row, of, strict=True) if number == 0]
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text
    assert row[0] == rows.bos
    assert set(row[1 + len(ids) :]) == {rows.pad}
    assert rows.facts["special_ids_dropped"] == 0


def test_a_tokenizer_that_gives_special_ids_all_the_same(tokenizer, tmp_path):
    class Stubborn:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 3

        def get_vocab(self):
            return {"a": 0, "d": 9}

        def __call__(self, texts, **settings):
            return {"input_ids": [[0, 1, 9, 3, 2, 0] for _ in texts]}

    rows = make([document("x"), document("h", held_out=True)], Stubborn(), tmp_path)
    assert all_of(rows, "train").tolist() == [[1, 0, 9, 0, 3, 3, 3, 3]]
    assert rows.facts["special_ids_dropped"] == 6
    for wrong in (10, -1):
        Stubborn.__call__ = lambda self, texts, wrong=wrong, **settings: {"input_ids": [[0, wrong] for _ in texts]}
        with pytest.raises(ValueError, match=f"tokenizer: expected ids from 0 to 9, the largest it has, got {wrong}"):
            make([document("y"), document("h", held_out=True)], Stubborn(), tmp_path / "new")


def test_empty_documents_are_skipped_and_counted(tokenizer, tmp_path):
    texts = ["", "a", " \n\t", "b", "\0"]
    documents = [document(text, index=index) for index, text in enumerate(texts)] + [document("h", held_out=True)]
    rows = make(documents, tokenizer, tmp_path, context=16)
    assert all_of(rows, "train")[0, :7].tolist() == [BOS, ord("a"), BOS, ord("b"), BOS, 0, PAD]
    assert (rows.facts["skipped"], rows.facts["documents"]) == (2, {"train": 3, "held_out": 1})
    assert rows.document_names([0, 1]) == [("s", documents[1].name), ("s", documents[3].name)]


def test_lone_surrogates_are_replaced_and_counted(tokenizer, bpe, tmp_path):
    documents = [document("a\ud800b\udfff"), document("\ud83d\ude00", index=1), document("h", held_out=True)]
    rows = make(documents, tokenizer, tmp_path / "bytes", context=32)
    text = bytes(token for token in all_of(rows, "train")[0].tolist() if token < 256).decode()
    assert text == "a�b�\U0001f600"
    assert rows.facts["repaired"] == 2
    make(documents, bpe, tmp_path / "bpe")
    odd = Document("na\udc80me", "x", "so\ud800urce")
    rows = make([odd, document("t"), document("h", held_out=True)], tokenizer, tmp_path / "names")
    assert (odd.source, odd.name) in rows.document_names([0, 1])


def test_long_documents_are_tokenised_in_pieces_that_make_no_difference(bpe, tmp_path, monkeypatch):
    text = PROSE * 5
    documents = [document(text), document("h", held_out=True)]
    whole = make(documents, bpe, tmp_path / "whole")
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 150)
    pieces = list(packing._pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 150
    assert len(pieces) > len(text) / 150
    cut = make(documents, bpe, tmp_path / "cut")
    assert torch.equal(all_of(whole, "train"), all_of(cut, "train"))


@pytest.mark.parametrize("text", ["x" * 1000, " " * 1000, "\n" * 1000, "ab " * 300, "a\n" * 400], ids=range(5))
def test_pieces_of_odd_texts(text, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 100)
    pieces = list(packing._pieces(text))
    assert "".join(pieces) == text
    assert all(50 <= len(piece) <= 100 for piece in pieces[:-1])


def test_facts(tokenizer, tmp_path):
    documents = [document("ab"), document("ü", index=1, source="t"), document("hold", held_out=True)]
    facts = make(documents, tokenizer, tmp_path).facts
    assert facts["documents"] == {"train": 2, "held_out": 1}
    assert facts["tokens"] == {"train": 4, "held_out": 4}
    assert facts["bytes"] == 8
    assert facts["sources"] == {"s": {"documents": 2, "tokens": 6}, "t": {"documents": 1, "tokens": 2}}
    assert [facts[name] for name in ("skipped", "repaired", "cut", "left_out", "n_sources")] == [0, 0, 0, 0, 2]


# ---- which side


def test_held_out_are_about_one_of_every(tmp_path):
    for every in (2, 4, 16):
        share = np.mean([is_held_out(Document(f"{index}.txt", "", "s"), every) for index in range(8000)])
        assert share == pytest.approx(1 / every, rel=0.15)


def test_text_and_order_do_not_decide_and_the_source_does():
    sides = [
        [is_held_out(Document(f"{index}", text, source), 4) for index in range(64)]
        for text, source in ("as", "bs", "at")
    ]
    assert sides[0] == sides[1] != sides[2]


def sides_of(rows):
    """{name: part}, from the rows themselves."""
    found = {}
    for part in packing.PARTS:
        for number in rows.documents_of(part, numbers(rows, part)).unique().tolist():
            if number >= 0:
                (name,) = rows.document_names([number])
                assert found.setdefault(name, part) == part
    return found


def test_more_documents_move_none_to_the_other_side(tokenizer, tmp_path):
    documents = [Document(f"{index}.txt", f"text {index}", f"{index}.txt") for index in range(60)]
    few = sides_of(make(documents[::2], tokenizer, tmp_path / "few"))
    many = sides_of(make(documents[::-1], tokenizer, tmp_path / "many"))
    assert len(few) == 30
    assert few.items() <= many.items()
    assert len(many) == 60
    assert set(few.values()) == set(packing.PARTS)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], r"documents: expected text, got none \(0 empty documents\)"),
        ([document(" ")], r"documents: expected text, got none \(1 empty documents\)"),
        ([document("a")], r"one of 4, by the hash of its name\), got 1 and 0: give more documents, split long ones"),
        ([document("a", held_out=True)], r"got 0 and 1: give more documents"),
    ],
    ids=["none", "empty", "train", "held out"],
)
def test_both_sides_need_a_document(tokenizer, tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        make(documents, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- limits


def text_of(rows, part):
    return bytes(token for token in all_of(rows, part).flatten().tolist() if token < 256).decode()


def test_max_tokens_counts_text_to_train_on_and_ends_the_reading(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 1)

    def documents():
        yield from (document("abc"), document("h", held_out=True), document("defg", index=1))
        raise AssertionError("read on")

    rows = make(documents(), tokenizer, tmp_path, max_tokens=5)
    assert (text_of(rows, "train"), text_of(rows, "held_out")) == ("abcde", "h")
    assert rows.facts["tokens"] == {"train": 5, "held_out": 1}
    assert rows.facts["cut"] == 1


@pytest.mark.parametrize("batch", [1, 70, 1000])
def test_reading_goes_on_to_the_first_held_out_document(tokenizer, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch)
    documents = [
        *(document("abc", index=index) for index in range(3)),
        document("hold this", held_out=True),
        document("no", held_out=True, index=7),
        document("no", index=8),
    ]
    rows = make(documents, tokenizer, tmp_path, max_tokens=4)
    assert (text_of(rows, "train"), text_of(rows, "held_out")) == ("abca", "hold")


@pytest.mark.parametrize("batch", [1, 70, 1000])
def test_max_tokens_per_source(tokenizer, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 3)
    documents = [
        document("abc"),
        document("hel", held_out=True),
        document("defghijklmnop", index=1),
        document("no", index=2),
        document("xyz", index=3, source="t"),
        document("no", held_out=True, index=4),
    ]
    rows = make(documents, tokenizer, tmp_path, max_tokens_per_source=8)
    assert (text_of(rows, "train"), text_of(rows, "held_out")) == ("abcdexyz", "hel")
    assert rows.facts["sources"] == {"s": {"documents": 3, "tokens": 8}, "t": {"documents": 1, "tokens": 3}}
    assert (rows.facts["cut"], rows.facts["left_out"]) == (1, 2)


# ---- once


def counting(tokenizer):
    """The tokenizer, with the number of its calls."""

    class Counting:
        calls = 0

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *arguments, **settings):
            self.calls += 1
            return tokenizer(*arguments, **settings)

    return Counting()


def test_files_are_tokenised_once(tokenizer, tmp_path, corpus):
    tokenizer = counting(tokenizer)

    def again(**arguments):
        before = tokenizer.calls
        rows = make(read_documents(["*.txt"], base=corpus), tokenizer, tmp_path / "out", **arguments)
        return rows, tokenizer.calls > before

    first, made = again()
    assert made
    rows, made = again()
    assert not made
    assert rows.content == first.content
    for arguments in ({"context": 9}, {"every": 3}, {"max_tokens": 20}, {"max_tokens_per_source": 3}, {"key": "k"}):
        rows, made = again(**arguments)
        assert made, arguments
        assert everything(TokenRows.open(tmp_path / "out")) == everything(rows)
    again()
    (corpus / "3.txt").write_text("text $")
    rows, made = again()
    assert made
    assert rows.content != first.content


def test_collections_are_known_by_their_text_and_iterators_by_the_key(tokenizer, tmp_path):
    tokenizer = counting(tokenizer)
    documents = [document("abc"), document("h", held_out=True)]
    for key, calls in (("", (1, 1, 2)), ("k", (1, 1, 1))):
        tokenizer.calls, out, found = 0, tmp_path / f"out{key}", []
        make(documents, tokenizer, out, key=key)
        found.append(tokenizer.calls)
        make(tuple(documents), tokenizer, out, key=key)
        found.append(tokenizer.calls)
        make([*documents, document("new", index=5)], tokenizer, out / "other", key=key)
        tokenizer.calls -= 1
        iterators = out / "iterators"
        make(iter(documents), tokenizer, iterators, key=key)
        tokenizer.calls -= 1
        make(iter(documents), tokenizer, iterators, key=key)
        found.append(tokenizer.calls)
        assert tuple(found) == calls
    rows = make([*documents, document("new", index=5)], tokenizer, tmp_path / "out")
    assert "new" in text_of(rows, "train")


def test_another_tokenizer_makes_other_rows(tokenizer, bpe, tmp_path, corpus):
    first = make(read_documents(["*.txt"], base=corpus), tokenizer, tmp_path / "out")
    second = make(read_documents(["*.txt"], base=corpus), bpe, tmp_path / "out")
    assert first.content != second.content
    assert second.identity["tokenizer"] == tokenizer_hash(bpe)


def test_the_hash_of_a_tokenizer(tokenizer, bpe):
    before = tokenizer_hash(bpe)
    bpe(["a", "bc"], padding=True, truncation=True, max_length=2, split_special_tokens=True)
    assert tokenizer_hash(bpe) == before
    other = byte_tokenizer()
    assert tokenizer_hash(other) == tokenizer_hash(byte_tokenizer())
    other.add_special_tokens({"pad_token": "<bos>"})
    assert len({tokenizer_hash(found) for found in (byte_tokenizer(), tokenizer, bpe, other)}) == 4
    code = """
from gemmascope.activations.packing import tokenizer_hash
from gemmascope.demo.byte_tokenizer import byte_tokenizer
print(tokenizer_hash(byte_tokenizer()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer_hash(byte_tokenizer())


def test_content_is_that_of_the_rows(tokenizer, tmp_path):
    documents = [document("abc"), document("h", held_out=True)]
    contents = [make(documents, tokenizer, tmp_path / name, key=name).content for name in "ab"]
    assert contents[0] == contents[1]
    assert make([document("abd"), documents[1]], tokenizer, tmp_path / "c").content != contents[0]
    assert make(documents, tokenizer, tmp_path / "d", context=9).content != contents[0]


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"documents": "text"}, TypeError, "documents: expected an iterable of Document, got str"),
        ({"documents": ["text"]}, TypeError, "documents: expected an iterable of Document, got str in it"),
        ({"documents": 3}, TypeError, "documents: expected an iterable of Document, got int"),
        ({"tokenizer": "gemma"}, TypeError, "tokenizer: expected a tokenizer of transformers, got str"),
        ({"out": 3}, TypeError, "out: expected a str or an os.PathLike, got int"),
        ({"context": 1}, ValueError, "context: expected at least 2, got 1"),
        ({"held_out_every": 1}, ValueError, "held_out_every: expected at least 2, got 1"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"max_tokens_per_source": 2.5}, TypeError, "max_tokens_per_source: expected an int, got float"),
        ({"key": None}, TypeError, "key: expected a str, got NoneType"),
    ],
    ids=lambda value: None,
)
def test_wrong_arguments(tokenizer, tmp_path, arguments, kind, message):
    given = {"documents": [document("a")], "tokenizer": tokenizer, "out": tmp_path / "out", "context": 8} | arguments
    with pytest.raises(kind) as error:
        tokenise(given.pop("documents"), given.pop("tokenizer"), given.pop("out"), **given)
    assert str(error.value) == message


def test_folders_of_others_are_left_alone(tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    documents = [document("a"), document("h", held_out=True)]
    with pytest.raises(ValueError, match="out: expected a new folder or one of tokens, found other files in"):
        make(documents, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="out: expected a folder, found a file"):
        make(documents, tokenizer, tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_tokenizer_without_bos(tmp_path, tokenizer):
    backend = byte_tokenizer().backend_tokenizer
    with pytest.raises(ValueError, match="tokenizer: expected one with a BOS token"):
        make([document("a")], PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([0], TypeError, "rows: expected a torch.Tensor of integers, got list"),
        (torch.zeros(1), TypeError, "rows: expected a torch.Tensor of integers, got float32"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, "rows: expected shape [n], got [1, 1]"),
        (torch.tensor([0, 99]), ValueError, "rows: expected numbers from 0 to 5, got 99"),
        (torch.tensor([-1]), ValueError, "rows: expected numbers from 0 to 5, got -1"),
    ],
    ids=range(5),
)
def test_wrong_rows(folder, rows, kind, message):
    found = TokenRows.open(folder)
    assert found.n_train == 6
    for reading in (found.train, lambda rows: found.documents_of("train", rows)):
        with pytest.raises(kind) as error:
            reading(rows)
        assert str(error.value) == message


def test_wrong_parts_and_documents(folder):
    rows = TokenRows.open(folder)
    with pytest.raises(ValueError, match="part: expected 'train' or 'held_out', got 'test'"):
        rows.documents_of("test", torch.tensor([0]))
    for number in (-1, 5):
        with pytest.raises(ValueError, match="numbers: expected"):
            rows.document_names([number])
    assert repr(rows) == f"TokenRows('{folder}': 6 + 2 rows of 8)"


def test_progress(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 1)
    calls = []
    make([document("ab"), document("h", held_out=True)], tokenizer, tmp_path, progress=lambda *call: calls.append(call))
    assert calls[:2] == [(1, 2), (2, 3)]
