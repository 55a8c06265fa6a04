"""A whole suite on one device: forwards of a random Gemma, the ring, a step of every SAE; tokens a second, and memory.

    python -m bench.suite --save                                     Gemma 2 2B, all 78 sites at 16k
    python -m bench.suite --model tiny --device cpu --d-sae 64       a rehearsal, in seconds

The weights and the text are random: the time does not depend on what they say. Thresholds are set so that each SAE has
the L0 asked for, and the learning rate is too small to change that. Ends in one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.reporting import records
from gemmascope.activations import Feed, Harvester
from gemmascope.sites import Site, all_sites
from gemmascope.training import SAETrainer, Suite, TrainConfig
from gemmascope.training.spec import SAESpec

# Layers, d_model, width of the MLP, heads, key-value heads, width of a head, vocabulary.
MODELS = {
    "gemma-2-2b": (26, 2304, 9216, 8, 4, 256, 256_000),
    "gemma-2-9b": (42, 3584, 14336, 16, 8, 256, 256_000),
    "tiny": (2, 16, 24, 2, 1, 12, 61),
}


class RandomRows:
    """Rows of random tokens, as a `Harvester` takes them."""

    content = "random"

    def __init__(self, n_train: int, context: int, vocabulary: int):
        self.n_train, self.context, self._vocabulary = n_train, context, vocabulary

    def train(self, rows: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(int(rows[0]))
        shape = (len(rows), self.context)
        ids = torch.randint(3, self._vocabulary, shape, generator=generator, dtype=torch.int64, device="cpu")
        ids[:, 0] = 2
        return ids


def build(name: str, context: int, device: torch.device) -> nn.Module:
    """A Gemma 2 of that size with random weights, bf16 on a GPU."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    layers, d_model, mlp, heads, kv_heads, head_dim, vocabulary = MODELS[name]
    config = Gemma2Config(
        num_hidden_layers=layers,
        hidden_size=d_model,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=max(context, 64),
        attn_implementation="eager",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return Gemma2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def recipe(d_sae: int, batch_size: int, l0: float, compute_dtype: str) -> TrainConfig:
    """Weights hardly move, so that L0 stays what `set_l0` made it."""
    return TrainConfig.gemma_scope(
        d_sae=d_sae,
        batch_size=batch_size,
        steps=10**6,
        learning_rate=1e-9,
        compute_dtype=compute_dtype,
        b_dec_init="mean",
        sparsity="quadratic_l0",
        target_l0=l0,
    )


@torch.no_grad()
def set_l0(trainer: SAETrainer, x: Tensor, l0: float) -> None:
    """Thresholds at which latents fire on ``l0`` of d_sae pairs of token and latent, each as often as the others."""
    sae = trainer.sae
    few = x[:1024].to(sae.b_dec) / sae.input_scale
    z = (few - sae.b_dec) @ sae.W_enc
    n = max(1, round(l0 / sae.d_sae * len(few)))
    sae.threshold.copy_(z.topk(n, dim=0).values[-1].clamp(min=1e-6))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(args: argparse.Namespace, say: Callable[[str], Any] = print) -> dict[str, Any]:
    device = torch.device(args.device)
    model = build(args.model, args.context, device)
    sites = all_sites(model) if args.sites is None else [Site.parse(name) for name in args.sites]
    rows_per_block = max(1, args.ring_tokens // args.context)
    rows = RandomRows((args.blocks + 1) * rows_per_block, args.context, MODELS[args.model][-1])
    source = Harvester(
        model, rows, sites, seed=0, rows_per_block=rows_per_block, forward_rows=args.forward_rows, identity={}
    )
    wait_for(device)
    began = time.perf_counter()
    ring = {"device": device, "host": "cpu"}[args.ring]
    feed = Feed(source, batch_size=args.batch, seed=0, dtype=torch.bfloat16, device=device, ring_device=ring)
    filled = time.perf_counter() - began
    say(f"{len(sites)} sites, ring of {rows_per_block * args.context:,} tokens, filled in {filled:.1f} s")
    config = recipe(args.d_sae, args.batch, args.l0, args.compute_dtype)
    specs = [SAESpec(str(site), site, config) for site in sites]
    with closing(Suite(specs, feed.statistics, model_name=args.model, device=device)) as suite, feed:
        batches = feed.batches()
        first = next(batches)
        for name, trainer in suite.trainers.items():
            set_l0(trainer, first[suite.specs[name].site], args.l0)
        for _ in range(3):  # the dense route sees how few latents fire; then kernels are compiled
            suite.update(first)
        wait_for(device)
        del first
        steps, block = 0, feed.cursor[0]
        while feed.cursor[0] == block:  # the rest of the first superblock is not measured
            suite.update(next(batches))
        wait_for(device)
        before = dict(feed.seconds)
        started, block = time.perf_counter(), feed.cursor[0]
        while feed.cursor[0] < block + args.blocks:
            here = feed.cursor[0]
            while feed.cursor[0] == here:
                suite.update(next(batches))
                steps += 1
            wait_for(device)  # else the next forward would be charged for these steps
        seconds = time.perf_counter() - started
        spent = {name: feed.seconds[name] - before[name] for name in feed.seconds}
        spent["steps"] = seconds - sum(spent.values())
        rows_of_report = suite.report()
    row: dict[str, Any] = {
        "kind": "suite",
        "model": args.model,
        "sites": len(sites),
        "d_sae": args.d_sae,
        "l0": sum(each["l0"] for each in rows_of_report.values()) / len(rows_of_report),
        "context": args.context,
        "ring_tokens": rows_per_block * args.context,
        "ring": args.ring,
        "batch_size": args.batch,
        "compute_dtype": args.compute_dtype,
        "steps": steps,
        "tokens": steps * args.batch,
        "seconds": seconds,
        "tokens_per_second": steps * args.batch / seconds,
        "ms_per_sae_step": 1000 * spent["steps"] / (steps * len(sites)),
        "shares": {name: value / seconds for name, value in spent.items()},
        "machine": records.provenance(device, ("transformers",)),
    }
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="gemma-2-2b")
    parser.add_argument("--sites", nargs="+", help="such as layer_12/resid; all by default")
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--l0", type=float, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--forward-rows", type=int, default=8)
    parser.add_argument("--ring-tokens", type=int, default=1 << 16)
    parser.add_argument("--ring", choices=("device", "host"), default="device")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=2, help="superblocks to measure")
    parser.add_argument("--compute-dtype", choices=("fp32", "tf32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", action="store_true", help="append the row to the results")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    args = parser.parse_args(argv)
    row = measure(args)
    if args.save:
        records.append("suite", [row], args.results)
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
