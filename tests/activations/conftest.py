"""Tokenizers and folders that the tests of tokens share."""

import pytest

from gemmascope.activations import packing
from tests.activations.token_rows import EOS, PAD, PROSE, document, make


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, with EOS and PAD."""
    from gemmascope.demo.byte_tokenizer import byte_tokenizer

    found = byte_tokenizer()
    found.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    assert (found.eos_token_id, found.pad_token_id) == (EOS, PAD)
    return found


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with merges, as large models have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "SHARD_BYTES", 64)
    monkeypatch.setattr(packing, "DOCUMENTS_PER_FILE", 3)


@pytest.fixture
def folder(tokenizer, tmp_path, small_shards):
    documents = [document(f"text number {index}", held_out=index == 3, index=index) for index in range(4)]
    make(documents, tokenizer, tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"text {index}")
    return folder
