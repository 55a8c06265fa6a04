"""How much memory training an SAE takes, counted before it is asked for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nlargest

import torch

from ..kernels import entries
from .state import RESERVOIR

GIB = 1 << 30
# Elements of f that the dense route holds; wider SAEs go through it in tiles of latents, which are encoded twice.
DENSE_ELEMENTS = 1 << 29
# Bytes the sparse step holds for each entry: z, latent, token, u, sort keys and order, coefficients by latent.
ENTRY_BYTES = 56
# And what it holds beside them for a gated SAE: m and its latents, the second u and coefficients, numbers of latents.
GATED_ENTRY_BYTES = 48
# For a penalty of a power p < 1: f, its slopes, and the coefficients that they make; and matrices of fp32 [N, tile].
POWER_ENTRY_BYTES, POWER_MATRICES = 32, 3
# Matrices of fp32 [N, tile] that the dense route of a gated SAE holds, and by how many times smaller its tiles are.
GATED_MATRICES, GATED_TILES = 7, 4
# What it holds for each entry while two chunks of a batch compete for the largest z.
COMPETING_BYTES = 128
# Columns of a block of the residual pass, which leaves a share of u in fp32 for each entry and block.
SHARE_COLUMNS = 256


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes, by what they hold. n_entries: the room for active or nearly active pairs of token and latent."""

    d_model: int
    d_sae: int
    batch_size: int
    n_entries: int
    weights: int
    second_moments: int
    copies: int
    activations: int
    pending: int
    entries: int
    scratch: int
    kind: str = "jumprelu"
    d_out: int | None = None
    """Of a transcoder."""
    skip: bool = False
    blocks: int = 0
    """As of `training_memory`."""
    of_power: bool = False
    """Whether the penalty is of a power of the activations."""
    kept_tokens: int = 0
    """Of those that dead latents may begin at, where they do."""
    first_moments: int = 0
    """Where Adam has them."""

    @property
    def total(self) -> int:
        lasting = self.weights + self.first_moments + self.second_moments + self.copies + self.kept_tokens
        return lasting + self.activations + self.pending + self.entries + self.scratch

    @property
    def step(self) -> int:
        """Held during a step alone."""
        return self.activations + self.entries + self.scratch

    def table(self) -> str:
        rows = {
            "weights, fp32": self.weights,
            **({"first moments, fp32": self.first_moments} if self.first_moments else {}),
            "second moments, fp32": self.second_moments,
            "bf16 copies of the weights": self.copies,
            f"activations of {self.batch_size:,} tokens": self.activations,
            "batches of steps under way": self.pending,
            **({"tokens for dead latents": self.kept_tokens} if self.kept_tokens else {}),
            f"{self.n_entries:,} entries": self.entries,
            "scratch": self.scratch,
            "total": self.total,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {size / GIB:8.2f} GiB" for name, size in rows.items())

    def advice(self, available: int) -> str:
        """The message for memory that ran out: the sizes, and what would fit into ``available`` bytes."""
        message = (
            f"out of memory: d_model {self.d_model}, d_sae {self.d_sae}, batch of {self.batch_size} tokens take about "
            f"{self.total / GIB:.1f} GiB"
        )
        if not available:
            return message + "; make d_sae or batch_size smaller"
        message += f" of the {available / GIB:.1f} GiB there are"
        if self.total < 0.9 * available:
            return message + "; something else holds memory on this device"
        for name, smaller in (("batch_size", self._halvings("batch_size", 256)), ("d_sae", self._halvings("d_sae", 1))):
            for size, total in smaller:
                if total < 0.9 * available:
                    return message + f"; a {name} of {size} would fit"
        return message + "; make d_sae and batch_size smaller"

    def _halvings(self, name: str, smallest: int) -> Iterator[tuple[int, int]]:
        """Halves, quarters, … of a size and the total each would take."""
        sizes = {"d_model": self.d_model, "d_sae": self.d_sae, "batch_size": self.batch_size}
        sizes[name] //= 2
        while sizes[name] >= smallest:
            dtype, l0 = "bf16" if self.copies else "fp32", self.n_entries / self.batch_size
            batches = self.pending // (4 * self.batch_size * (self.d_model + (self.d_out or 0)))
            options = {"pending": batches, "kind": self.kind, "d_out": self.d_out, "skip": self.skip}
            options |= {"compute_dtype": dtype, "l0": l0, "blocks": self.blocks, "of_power": self.of_power}
            options |= {"resampled": self.kept_tokens > 0, "first_moments": self.first_moments > 0}
            yield sizes[name], training_memory(**sizes, **options).total
            sizes[name] //= 2


@dataclass(frozen=True)
class SuiteMemory:
    """Bytes that several SAEs in training hold on their device, by what they hold."""

    weights: int
    first_moments: int
    second_moments: int
    copies: int
    pending: int
    kept_tokens: int
    steps: int
    """Activations, entries and scratch of the largest steps that are computed at a time."""

    @classmethod
    def of(cls, memories: Iterable[TrainingMemory], at_once: int) -> "SuiteMemory":
        """What those SAEs take together when ``at_once`` of their steps are computed at a time."""
        found = list(memories)
        return cls(
            weights=sum(each.weights for each in found),
            first_moments=sum(each.first_moments for each in found),
            second_moments=sum(each.second_moments for each in found),
            copies=sum(each.copies for each in found),
            pending=sum(each.pending for each in found),
            kept_tokens=sum(each.kept_tokens for each in found),
            steps=sum(nlargest(at_once, (each.step for each in found))),
        )

    @property
    def lasting(self) -> int:
        """What a checkpoint holds, up to counters."""
        return self.weights + self.first_moments + self.second_moments + self.copies + self.kept_tokens


def dense_tile(n_tokens: int, d_sae: int, kind: str = "jumprelu") -> int:
    """Latents that the dense route takes at a time."""
    return max(1, min(d_sae, DENSE_ELEMENTS // (n_tokens * (GATED_TILES if kind == "gated" else 1))))


def dense_tiles(n_tokens: int, d_sae: int, kind: str = "jumprelu") -> list[slice]:
    """All latents, by such tiles."""
    width = dense_tile(n_tokens, d_sae, kind)
    return [slice(start, start + width) for start in range(0, d_sae, width)]


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU, those PyTorch keeps for reuse included; 0 where it is not known."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def training_memory(
    d_model: int,
    d_sae: int,
    batch_size: int,
    compute_dtype: str,
    l0: float = 128,
    pending: int = 0,
    kind: str = "jumprelu",
    d_out: int | None = None,
    skip: bool = False,
    blocks: int = 0,
    of_power: bool = False,
    resampled: bool = False,
    first_moments: bool = False,
) -> TrainingMemory:
    """What one SAE in training holds on its device, with room for ``l0`` entries a token. pending: batches of earlier
    steps that are kept until their figures were read. kind: that of `TrainConfig`. d_out: width of a transcoder's
    target, with ``skip`` of its map from the input too. blocks: of an SAE of which k latents fire, the residuals that a
    token has, one for each prefix and for AuxK; 0 for others. of_power: whether its penalty is of a power p < 1.
    resampled: whether dead latents begin anew. first_moments: whether Adam has them."""
    gated, out, target = kind == "gated", d_model if d_out is None else d_out, d_out or 0
    weights = 4 * ((d_model + out) * d_sae + (3 if gated else 2) * d_sae + out + skip * d_model * out)
    operand = 2 if compute_dtype == "bf16" else 4
    n_entries, tile = int(l0 * batch_size), dense_tile(batch_size, d_sae, kind)
    chunk = entries.tokens_per_chunk(batch_size, d_sae)
    sparse = chunk * entries.scratch_bytes(d_sae)
    # f, u, two bits, and the gradients of both weights
    dense = batch_size * tile * (16 * GATED_MATRICES if gated else 8 * operand + 1) // 4 + 4 * (d_model + out) * tile
    scratch = max(sparse, dense + of_power * 4 * POWER_MATRICES * batch_size * tile)
    if blocks:  # a list of groups of 32 latents beside what says which is the largest of each; no dense route
        scratch = sparse + 4 * chunk * -(-d_sae // 32) + COMPETING_BYTES * n_entries * (chunk < batch_size)
    # x, x − b_dec, x̂ − x and its rounding; of a gated SAE those of relu(π) too; of a transcoder y, rounded for its
    # sums, and what a skip leaves
    rows = (d_model + out) * max(1, blocks) + gated * out + target
    activations = batch_size * (rows * (4 + operand) + 4 * skip * target)
    moments = weights + 4 * d_sae * gated  # those of θ too, which stays 0
    return TrainingMemory(
        d_model=d_model,
        d_sae=d_sae,
        batch_size=batch_size,
        n_entries=n_entries,
        weights=weights,
        first_moments=moments * first_moments,
        second_moments=moments,
        copies=2 * (d_model + out) * d_sae if compute_dtype == "bf16" else 0,
        activations=activations,
        pending=pending * 4 * batch_size * (d_model + target),
        entries=(ENTRY_BYTES + gated * GATED_ENTRY_BYTES + of_power * POWER_ENTRY_BYTES + 4 * -(-out // SHARE_COLUMNS))
        * n_entries,
        # the gradient of a skip, and what Adam makes of it
        scratch=scratch + 24 * d_sae + 16 * skip * d_model * out,
        kind=kind,
        d_out=d_out,
        skip=skip,
        blocks=blocks,
        of_power=of_power,
        kept_tokens=resampled * 4 * min(d_sae, RESERVOIR) * d_model,
    )
