"""A Gemma 2 of about a million parameters over byte tokens, trained from scratch: the demo's language model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM

from ..formats.files import atomic_write
from ..suite.model import plain_defaults
from .byte_tokenizer import BOS, byte_tokenizer
from .text import VOCAB_SIZE

CONTEXT = 128


@dataclass(frozen=True)
class LanguageModelConfig:
    """Gemma 2's own architecture, small: alternating sliding and full attention, both soft-caps on."""

    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    steps: int = 500
    batch_rows: int = 8
    """Rows of 128 tokens in each update."""
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    final_learning_rate: float = 0.1
    """Where the linear decay ends, as a share of ``learning_rate``."""
    seed: int = 0


@plain_defaults()
def build(config: LanguageModelConfig) -> Gemma2ForCausalLM:
    """The untrained model, in fp32 with eager attention (the one that keeps the soft-cap)."""
    head_dim = config.d_model // config.n_heads
    architecture = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.d_model,
        intermediate_size=4 * config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads // 2,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=CONTEXT // 4,
        max_position_embeddings=CONTEXT,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Gemma2ForCausalLM(architecture).float().eval()


@plain_defaults()
def train(
    model: Gemma2ForCausalLM,
    rows: Tensor,
    config: LanguageModelConfig,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Next-token training on ``rows`` [n, context], in place; a BOS is not predicted. ``log(step, loss)`` after each
    step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator)
    model.train()
    for step in range(config.steps):
        rise = min(1.0, (step + 1) / config.warmup_steps)
        fall = 1 - (1 - config.final_learning_rate) * step / config.steps
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * rise * fall
        picked = order[torch.arange(step * config.batch_rows, (step + 1) * config.batch_rows) % len(rows)]
        batch = rows[picked]
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=BOS)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        log(step + 1, loss.item())
    model.eval()


def save(model: Gemma2ForCausalLM, folder: Path) -> list[Path]:
    """The model and its tokenizer, for transformers' own ``from_pretrained``: the files, each whole or not at all."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    with atomic_write(config) as temporary:
        temporary.write_text(model.config.to_json_string(use_diff=True), encoding="utf-8")
    with atomic_write(weights) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    of_tokenizer = byte_tokenizer().save_pretrained(folder)
    return [config, weights, *(Path(file) for file in of_tokenizer if Path(file).exists())]
