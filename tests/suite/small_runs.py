"""A language model, a text and a config so small that a whole run of `gemmascope train` takes a second or two."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from gemmascope.demo.byte_tokenizer import byte_tokenizer
from gemmascope.suite.config import SuiteConfig
from tests.tiny_models import gemma2

TEXT = "the a of to and in that is was he for it with as his on be at by had not are but from or have an they"
WORDS = TEXT.split()


def write_model(folder: Path, seed: int = 0) -> Path:
    """A folder that transformers loads: Gemma 2 of 3 layers, width 16, over bytes."""
    model = gemma2(seed, vocab_size=257, bos_token_id=256, eos_token_id=None, pad_token_id=None)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents of a few hundred bytes, one a line."""
    draw = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for number in range(documents):
            text = " ".join(draw.choices(WORDS, k=60))
            # Source and name decide which documents are held out, and the source is by default the file's path.
            out.write(json.dumps({"name": f"document {number}", "source": "words", "text": text}) + "\n")
    return file


def tables(model: Path, text: Path, out: Path) -> dict[str, Any]:
    """The config of a run of 24 steps over three superblocks: three sites, four SAEs."""
    return {
        "model": {"name": str(model)},
        "text": {"files": [str(text)], "context": 32, "held_out_every": 4},
        "activations": {"ring_tokens": 1024, "dtype": "float32", "forward_rows": 8},
        "suite": {
            "sites": ["layer_1/resid", "layer_0/mlp", "layer_1/att"],
            "tokens": 24 * 120,
            "batch_size": 120,
            "sae": [
                {"d_sae": 48, "target_l0": 6, "sites": ["layer_1/*"]},
                {"d_sae": 32, "target_l0": [4, 8], "sites": ["layer_0/mlp"]},
            ],
        },
        "checkpoint": {"steps": 5},
        "evaluate": {"rows": 12, "train_rows": 24},
        "run": {"out": str(out), "log_every": 4, "device": "cpu"},
    }


def config(model_folder: Path, text_file: Path, out: Path, **sections: dict[str, Any]) -> SuiteConfig:
    made = tables(model_folder, text_file, out)
    for name, section in sections.items():
        made[name] |= section
    return SuiteConfig.from_dict(made)


def write_config(file: Path, tables: dict[str, Any]) -> Path:
    """The same as a file of TOML."""
    lines = []
    for name, section in tables.items():
        values = {key: value for key, value in section.items() if key != "sae"}
        blocks = [("[[suite.sae]]", block) for block in section.get("sae", [])]
        for heading, table in [(f"[{name}]", values), *blocks]:
            lines += [heading, *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file.write_text("\n".join(lines) + "\n")
    return file


def hash_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of every SAE that a run left, by its path."""
    found = sorted((folder / "saes").rglob("params.npz"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
