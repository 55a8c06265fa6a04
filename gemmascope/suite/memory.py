"""What a run holds in memory and on the disk, by what it is, counted before any of it is asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..activations.moments import CHUNK_ELEMENTS
from ..sites import INPUT_KINDS, Site
from ..sites.decoder import embedding_weight, find_decoder
from ..training import SAETrainer
from ..training.memory import SuiteMemory
from ..training.spec import SAESpec
from .config import SuiteConfig
from .model import Loaded

DEVICE, HOST, DISK = "device", "host", "disk"

# PyTorch, transformers and their libraries in memory; a GPU's context and the workspaces of its matrix products.
LIBRARIES = 1 << 30
CONTEXT_OF_GPU = 3 << 28
TOKEN_BYTES = 4
# Of each token in a ring besides activations: its norm at each site; its row and position.
NORM_BYTES, PLACE_BYTES = 4, 12
# Tokens of one forward of the evaluation, at least one row.
EVALUATION_TOKENS = 2048

CHECKPOINT = "a checkpoint being written"


@dataclass(frozen=True)
class Item:
    what: str
    where: str
    nbytes: int


@dataclass(frozen=True)
class Needs:
    """Bytes of a run. On a CPU the device is the host, which then holds all of it."""

    items: tuple[Item, ...]
    evaluation: int
    """What the device holds at most when the SAEs are judged, in the place of what training holds there."""

    def at(self, where: str) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.where == where and item.nbytes > 0)

    def total(self, where: str) -> int:
        return sum(item.nbytes for item in self.at(where))


@dataclass(frozen=True)
class ModelSizes:
    """What a plan must know of a language model."""

    layers: int
    parameters: int
    nbytes: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    itemsize: int
    widths: dict[Site, int]
    """Of every site that SAEs are trained at."""

    @classmethod
    def of(cls, loaded: Loaded) -> "ModelSizes":
        decoder = find_decoder(loaded.model)
        config: Any = decoder.config
        tensors = list(loaded.model.parameters())
        return cls(
            layers=len(decoder.layers),
            parameters=sum(math.prod(p.shape) for p in tensors),
            nbytes=sum(tensor.nbytes for tensor in [*tensors, *loaded.model.buffers()]),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            vocabulary=embedding_weight(loaded.model).shape[0],
            itemsize=embedding_weight(loaded.model).element_size(),
            widths={site: decoder.width(site) for site in loaded.sites},
        )

    def width(self, site: Site) -> int:
        """Of a site, those included where transcoders read."""
        return self.hidden if site.kind in INPUT_KINDS else self.widths[site]

    def forward(self, rows: int, context: int) -> int:
        """Activations of one forward of the text model at most, with eager attention: about so many bytes."""
        tokens, size = rows * context, self.itemsize
        # Scores before and after the soft-cap, and the softmax in fp32 with its operand; two masks.
        attention = rows * context**2 * (self.heads * (2 * size + 8) + 2 * size)
        mlp = 3 * tokens * self.intermediate * size
        stream = tokens * self.hidden * (4 * size + 8)  # a norm computes in fp32
        return max(attention, mlp) + stream

    def evaluation(self, context: int) -> int:
        """The same with logits, as of the rows that the evaluation reads at once."""
        rows = max(1, min(EVALUATION_TOKENS, CHUNK_ELEMENTS // self.vocabulary) // context)
        return self.forward(rows, context) + rows * context * self.vocabulary * (2 * self.itemsize + 8)


def needs(
    config: SuiteConfig,
    specs: Sequence[SAESpec],
    model: ModelSizes,
    *,
    device: torch.device,
    ring: str,
    threads: int = 1,
    text_bytes: int = 0,
) -> Needs:
    """What training ``specs`` takes. ring: where it is, `DEVICE` or `HOST`. text_bytes: those of the token shards."""
    is_gpu = device.type == "cuda"
    own = DEVICE if is_gpu else HOST
    out = [None if spec.target is None else model.width(spec.target) for spec in specs]
    training = [
        SAETrainer.memory(spec.config, model.width(spec.site), device, d_out)
        for spec, d_out in zip(specs, out, strict=True)
    ]
    sites = {site for spec in specs for site in spec.sites}
    width = sum(model.width(site) for site in sites)
    itemsize = 2 if config.activations.dtype == "bfloat16" else 4
    capacity = config.rows_per_block * config.text.context
    batch = config.suite.batch_size * width * itemsize
    forward = model.forward(config.activations.forward_rows, config.text.context)
    # A GPU makes one step at a time, a CPU as many as it has threads.
    saes = SuiteMemory.of(training, 1 if is_gpu else threads)
    copied = is_gpu and ring == HOST
    items = [
        Item("language model", own, model.nbytes),
        Item("a forward of it", own, forward),
        Item(
            f"ring of {capacity:,} tokens, {config.activations.dtype}",
            own if ring == DEVICE else HOST,
            capacity * (width * itemsize + NORM_BYTES * len(sites)),
        ),
        Item("batches on their way", own, batch * (2 if copied else 1)),
        Item("SAEs: weights, fp32", own, saes.weights),
        *([Item("SAEs: first moments, fp32", own, saes.first_moments)] if saes.first_moments else []),
        Item("SAEs: second moments, fp32", own, saes.second_moments),
        Item("SAEs: bf16 copies", own, saes.copies),
        Item("SAEs: batches of steps under way", own, saes.pending),
        *([Item("SAEs: tokens for dead latents", own, saes.kept_tokens)] if saes.kept_tokens else []),
        Item("SAEs: activations, entries, scratch", own, saes.steps),
        Item("context and workspaces of the GPU", own, CONTEXT_OF_GPU if is_gpu else 0),
        Item("libraries", HOST, LIBRARIES),
        Item("pinned batches", HOST, 2 * batch if copied else 0),
        Item("rows and positions of the ring", HOST, capacity * PLACE_BYTES),
        Item(CHECKPOINT, HOST, saes.lasting),
        Item("tokens of the text", DISK, text_bytes),
        Item(f"{config.checkpoint.keep + 1} checkpoints", DISK, (config.checkpoint.keep + 1) * saes.lasting),
        Item("SAEs, folded", DISK, saes.weights),
    ]
    largest = max(each.weights + each.step for each in training)
    return Needs(tuple(items), model.nbytes + model.evaluation(config.text.context) + largest + CONTEXT_OF_GPU)
