"""A tokenizer without a vocabulary to fetch: a token is a byte of UTF-8."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS = 256
BOS_TOKEN = "<bos>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are the bytes, 256 is BOS; there is neither EOS nor PAD.

    Saved by ``save_pretrained``, `transformers.AutoTokenizer` gives the same ids.
    """
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {BOS_TOKEN: BOS}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS_TOKEN])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS_TOKEN)


def _characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's): itself where it can be seen."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256)]
