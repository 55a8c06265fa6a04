"""A small Gemma that knows two facts about each of its towns, along directions that are known.

The embedding of a town is the direction of its colour, that of its shape and noise elsewhere; layer 0 adds nothing, so
that the stream after it is that embedding. The rest is trained for some seconds to answer both questions. All
directions are turned by a random rotation, so that no single coordinate stands for one.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy

from gemmascope.ravel.continuation import Continuation
from gemmascope.ravel.data import EntityData
from gemmascope.saes import JumpReLUSAE

COLOURS = ("red", "green", "blue", "white")
SHAPES = ("round", "square", "long")
WIDTH, TOWNS, STEPS = 24, 60, 160
TEMPLATES = {
    "colour": ("%s has the colour", "the colour of %s is", "say the colour : %s :"),
    "shape": ("%s has the shape", "the shape of %s is", "say the shape : %s :"),
}


@dataclass(frozen=True)
class Known:
    model: Any
    tokenizer: Any
    data: EntityData
    directions: Tensor
    """[COLOURS + SHAPES, WIDTH], orthonormal."""

    def continuation(self) -> Continuation:
        return Continuation(self.model)

    def dictionary(self) -> JumpReLUSAE:
        """The SAE whose latents are the directions."""
        sae = JumpReLUSAE(WIDTH, len(self.directions))
        with torch.no_grad():
            sae.W_enc.copy_(self.directions.T)
            sae.W_dec.copy_(self.directions)
            sae.b_enc.zero_()
            sae.b_dec.zero_()
            sae.threshold.fill_(0.5)
        return sae


def facts() -> EntityData:
    towns = [f"town{number}" for number in range(TOWNS)]
    labels = {
        "colour": {town: COLOURS[number % len(COLOURS)] for number, town in enumerate(towns)},
        "shape": {town: SHAPES[number // len(COLOURS) % len(SHAPES)] for number, town in enumerate(towns)},
    }
    return EntityData(
        "town",
        labels,
        TEMPLATES,
        {town: "test" if number % 3 == 0 else "train" for number, town in enumerate(towns)},
        {each: "test" if each == every[-1] else "train" for every in TEMPLATES.values() for each in every},
    )


def tokenizer(data: EntityData) -> Any:
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(" ".join(each.replace("%s", "") for every in TEMPLATES.values() for each in every).split())
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", *words, *COLOURS, *SHAPES, *data.entities]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@functools.cache
def small_model(seed: int = 0) -> Known:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    data = facts()
    words = tokenizer(data)
    config: Any = Gemma2Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    directions = turned[: len(COLOURS) + len(SHAPES)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Gemma2ForCausalLM(config)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for town in data.entities:
            noise = 0.3 * torch.randn(WIDTH - len(directions), generator=generator)
            x = noise @ turned[len(directions) :]
            x = x + directions[COLOURS.index(data.labels["colour"][town])]
            x = x + directions[len(COLOURS) + SHAPES.index(data.labels["shape"][town])]
            embedding[words.convert_tokens_to_ids(town)] = x / WIDTH**0.5  # Gemma multiplies by it
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[0].get_submodule(name).weight.zero_()
    frozen = [embedding, *model.model.layers[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    prompts = data.prompts()
    ids = [[2, *words(each.text, add_special_tokens=False)["input_ids"]] for each in prompts]
    length = max(map(len, ids))
    rows = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    ends = torch.tensor([len(row) - 1 for row in ids])
    answers = torch.tensor([words.convert_tokens_to_ids(data.labels[each.attribute][each.entity]) for each in prompts])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=1e-2)
    model.train()
    for _ in range(STEPS):
        batch = torch.randperm(len(rows), generator=generator)[:64]
        logits = model(input_ids=rows[batch], use_cache=False).logits[torch.arange(len(batch)), ends[batch]]
        optimiser.zero_grad()
        cross_entropy(logits, answers[batch]).backward()
        optimiser.step()
    return Known(model.requires_grad_(False).eval(), words, data, directions)
