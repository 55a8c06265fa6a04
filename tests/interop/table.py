"""The table of formats in docs/files.md, made from what `test_formats` proves, and the versions it proves it with."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GEMMA_SCOPE, GEMMA_SCOPE_2 = "Gemma Scope 1: `params.npz`", "Gemma Scope 2: `params.safetensors`, `config.json`"
SAELENS = "SAELens: `sae_weights.safetensors`, `cfg.json`"
CIRCUIT_TRACER = "circuit-tracer: `layer_L.safetensors`, `config.yaml`"
CIRCUIT_TRACER_CLT = "circuit-tracer, CLT: `W_enc_L.safetensors`, `W_dec_L.safetensors`, `config.yaml`"
GEMMA_SCOPE_2_CLT = "Gemma Scope 2, CLT: `params_layer_L.safetensors`"
SPARSIFY = "sparsify: `sae.safetensors`, `cfg.json`"
DICTIONARY_LEARNING = "dictionary_learning: `ae.pt`, `config.json`"
MODULES = {
    "sae-lens": "sae_lens",
    "circuit-tracer": "circuit_tracer",
    "eai-sparsify": "sparsify",
    "dictionary-learning": "dictionary_learning",
}


class Proof(NamedTuple):
    """Encode and decode are bit-equal, here and in the package. way: "in", from its file to here, "out", from here to
    its file, or "both", one file read by both. old: also with the older version."""

    format: str
    way: str
    kind: str
    package: str
    old: bool = False

    def __str__(self) -> str:
        return f"{self.format.partition(':')[0]}-{self.way}-{self.kind}-{self.package}".replace(" ", "_")


PROOFS = (
    Proof(GEMMA_SCOPE, "both", "JumpReLU", "sae-lens", old=True),
    Proof(GEMMA_SCOPE, "both", "transcoder", "circuit-tracer"),
    Proof(GEMMA_SCOPE_2, "both", "JumpReLU", "sae-lens"),
    Proof(GEMMA_SCOPE_2, "both", "transcoder", "circuit-tracer"),
    Proof(GEMMA_SCOPE_2, "both", "skip transcoder", "circuit-tracer"),
    Proof(SAELENS, "in", "standard", "sae-lens", old=True),
    Proof(SAELENS, "in", "JumpReLU", "sae-lens", old=True),
    Proof(SAELENS, "in", "TopK", "sae-lens", old=True),
    Proof(SAELENS, "in", "gated", "sae-lens", old=True),
    Proof(SAELENS, "in", "BatchTopK", "sae-lens", old=True),
    Proof(SAELENS, "out", "JumpReLU", "sae-lens", old=True),
    Proof(SAELENS, "out", "TopK", "sae-lens", old=True),
    Proof(SAELENS, "out", "transcoder", "sae-lens", old=True),
    Proof(SAELENS, "out", "skip transcoder", "sae-lens"),
    Proof(CIRCUIT_TRACER, "both", "transcoder", "circuit-tracer"),
    Proof(CIRCUIT_TRACER, "both", "skip transcoder", "circuit-tracer"),
    Proof(CIRCUIT_TRACER_CLT, "both", "CLT", "circuit-tracer"),
    Proof(GEMMA_SCOPE_2_CLT, "in", "CLT", "circuit-tracer"),
    Proof(GEMMA_SCOPE_2_CLT, "in", "skip CLT", "circuit-tracer"),
    Proof(SPARSIFY, "in", "TopK", "eai-sparsify"),
    Proof(DICTIONARY_LEARNING, "in", "standard", "dictionary-learning"),
    Proof(DICTIONARY_LEARNING, "in", "JumpReLU", "dictionary-learning"),
    Proof(DICTIONARY_LEARNING, "in", "TopK", "dictionary-learning"),
    Proof(DICTIONARY_LEARNING, "in", "gated", "dictionary-learning"),
    Proof(DICTIONARY_LEARNING, "in", "BatchTopK", "dictionary-learning"),
)


def versions() -> dict[str, list[str]]:
    """Those of each package that `make test-interop` installs, the newest first."""
    pins = (ROOT / "bench" / "peers" / "constraints.txt").read_text(encoding="utf-8")
    pins += (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name: re.findall(rf"(?:^|= ){name}==(\S+)$", pins, re.MULTILINE) for name in MODULES}


def formats_block() -> str:
    """The table as it should stand in docs/files.md."""
    lines = ["| format | in | out | bit-equal with |", "|---|---|---|---|"]
    known = versions()
    for format in dict.fromkeys(proof.format for proof in PROOFS):
        proofs = [proof for proof in PROOFS if proof.format == format]
        cells = [format]
        for way in ("in", "out"):
            cells.append(", ".join(dict.fromkeys(proof.kind for proof in proofs if proof.way in (way, "both"))) or "–")
        found = dict.fromkeys(
            f"{proof.package} {version}"
            for proof in proofs
            for version in known[proof.package][: None if proof.old else 1]
        )
        cells.append(", ".join(found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
