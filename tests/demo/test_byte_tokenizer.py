"""The byte tokenizer: ids are bytes, also after saving and loading."""

import pytest
from transformers import AutoTokenizer, Gemma2Config

from gemmascope.activations.packing import tokenizer_hash
from gemmascope.demo.byte_tokenizer import BOS, byte_tokenizer
from gemmascope.demo.text import BOS as BOS_OF_THE_DEMO
from gemmascope.demo.text import VOCAB_SIZE

TEXTS = [
    "",
    "plain",
    "  two\n\n\ttabs\r\n",
    "ü €\U0001f600\0\x7f\x85�",
    "<bos> is text",
    "".join(map(chr, range(1, 2000))),
]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_the_bytes(text):
    assert encode(byte_tokenizer(), text) == list(text.encode())
    assert byte_tokenizer().decode(list(text.encode())) == text


def test_special_ids():
    tokenizer = byte_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, None, None)
    assert (BOS, len(tokenizer)) == (BOS_OF_THE_DEMO, VOCAB_SIZE)
    assert tokenizer("<bos>a", add_special_tokens=False)["input_ids"] == [BOS, 97]


@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "in a model's folder"])
def test_saved_and_loaded(tmp_path, with_model):
    tokenizer = byte_tokenizer()
    if with_model:
        Gemma2Config(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [encode(loaded, text) for text in TEXTS] == [list(text.encode()) for text in TEXTS]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (BOS, None, None)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
