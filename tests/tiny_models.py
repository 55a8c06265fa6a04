"""Tiny randomly initialised Gemma 2 and Gemma 3, for tests of everything that runs inside a model."""

import torch
from torch import nn

from gemmascope.sites import Site

PAD, EOS, BOS = 0, 1, 2
VOCAB, WIDTH, HEADS, HEAD_DIM, LAYERS = 61, 16, 2, 12, 3

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    # Far above the usual 0.02: a model this small must be coaxed into attending and into saying anything.
    "initializer_range": 0.3,
}


def gemma2(seed: int = 0, attention: str | None = "eager", dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """A Gemma2ForCausalLM with both soft-caps; ``attention`` None leaves the choice to transformers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    options = {"layer_types": layer_types, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _build(Gemma2ForCausalLM, Gemma2Config(**(_TEXT | options | config)), seed, attention, dtype)


def gemma3(seed: int = 0, attention: str | None = "eager", dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    return _build(
        Gemma3ForCausalLM, Gemma3TextConfig(**(_TEXT | {"layer_types": layer_types} | config)), seed, attention, dtype
    )


def gemma3_multimodal(seed: int = 0, attention: str | None = "eager", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Gemma3ForConditionalGeneration, whose layers sit at ``model.language_model.layers`` next to a vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = Gemma3Config(
        text_config=_TEXT, vision_config=vision, mm_tokens_per_image=1, image_token_id=VOCAB - 1, pad_token_id=PAD
    )
    return _build(Gemma3ForConditionalGeneration, config, seed, attention, dtype)


def _build(model_class: type, config, seed: int, attention: str | None, dtype: torch.dtype) -> nn.Module:
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        # RMSNorm gains start at exactly 1 and would hide a norm applied or skipped by mistake.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, -0.3, 0.3)
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Ids [rows, length]: BOS, then ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 1, (rows, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def width(site: Site) -> int:
    return HEADS * HEAD_DIM if site.kind == "att" else WIDTH
