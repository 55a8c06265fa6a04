"""The language model of the examples: a tiny random Gemma 2, or a real one by its name, and tokens to run it on."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

CONTEXT = 32
PAD, EOS, BOS = 0, 1, 2


def load(name: str | None, text: Path | None, rows: int) -> tuple[nn.Module, Tensor]:
    """The model, and ids [rows, CONTEXT] that begin with BOS: of ``text``, or drawn from the random model itself."""
    if name is None:
        model = tiny_model()
        return model, drawn_from(model, rows)
    if text is None:
        raise SystemExit("--text: expected a UTF-8 file for --model to read, got none")
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    rows = min(rows, len(ids) // (CONTEXT - 1))
    body = torch.tensor(ids[: rows * (CONTEXT - 1)]).view(rows, CONTEXT - 1)
    return model.eval(), torch.nn.functional.pad(body, (1, 0), value=tokenizer.bos_token_id)


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,  # so that so small a model attends, and prefers some tokens to others
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def drawn_from(model: nn.Module, rows: int) -> Tensor:
    """Text of the random model: no other model predicts it better, so any harm done to this one raises its loss."""
    generator, ids = torch.Generator().manual_seed(0), torch.full((rows, 1), BOS)
    for _ in range(CONTEXT - 1):
        logits = model(ids).logits[:, -1].float()
        logits[:, [PAD, EOS, BOS]] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return ids
