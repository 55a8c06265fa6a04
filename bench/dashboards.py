"""How many latents a minute `gemmascope dashboards` does: python -m bench.dashboards --widths 16384 65536.

Everything but the model's forward, whose cost does not depend on the SAEs: encoding, collecting, logits and neighbours,
of an SAE with random weights on random activations whose thresholds are set for an L0. A row of JSON for each width on
standard output, what is being done on standard error. At 16k latents, 262,144 tokens and Gemma 3's vocabulary, encoding
and logits are 5.5 TFLOP each: minutes. Before that the largest activations of some latents, on some thousand tokens,
must be those of all activations at once.
"""

import argparse
import importlib
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from bench.reporting import records
from gemmascope import JumpReLUSAE, __version__
from gemmascope.dashboards.collect import Collector
from gemmascope.dashboards.largest import LargestOf
from gemmascope.dashboards.logits import LogitLens
from gemmascope.dashboards.neighbours import nearest
from gemmascope.dashboards.table import Sizes
from gemmascope.kernels import choose
from gemmascope.sites import Site

CHECKED = 16
GATE_TOKENS = 8192


def activations(start: int, tokens: int, d_model: int) -> Tensor:
    """Those of ``tokens`` tokens from ``start`` on: fp32 [tokens, d_model], the same whenever they are asked for."""
    return torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(start))


def sae_of(d_model: int, width: int, l0: float) -> JumpReLUSAE:
    """One of random weights that fires ``l0`` latents a token, by frequencies that differ."""
    draw = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(d_model, width, pre_encoder_bias=False, generator=draw)
    # z is normal; shares of latents fall over three decades, as those of real SAEs do.
    shares = torch.logspace(0, -3, width)[torch.randperm(width, generator=draw)]
    shares = (shares * (l0 / shares.sum())).clamp(max=0.5)
    with torch.no_grad():
        sae.threshold.copy_(torch.special.ndtri(1 - shares.double()).float().clamp(min=0))
    return sae


@torch.no_grad()
def gate(sae: JumpReLUSAE, tokens: int, batch: int, context: int) -> None:
    """Raise unless the largest examples of some latents on ``tokens`` tokens are those of all activations."""
    latents = torch.arange(0, sae.d_sae, max(1, sae.d_sae // CHECKED))[:CHECKED]
    collector = Collector(sae.d_sae, context, Sizes())
    dense = []
    for start in range(0, tokens, batch):
        x = activations(start, batch, sae.d_model)
        collector.add(sae.encode_sparse(x), every_token(batch, context), start // context)
        dense += [sae.encode_sparse(part).to_dense()[:, latents] for part in x.split(256)]
    cells = torch.cat(dense).view(tokens // context, -1, collector.sizes.window, len(latents)).amax(2).flatten(0, 1).T
    k = min(collector.sizes.top, cells.shape[1])
    largest = LargestOf(len(latents), k, cells.device)
    largest.add(cells.contiguous(), 0)
    if not torch.equal(collector.top.held.value[latents, :k], largest.found()[0].clamp(min=0)):
        raise SystemExit("the largest examples are not those of all activations: no times")


def every_token(batch: int, context: int) -> Tensor:
    """Which count: bool [batch // context, context]."""
    return torch.ones(batch // context, context, dtype=torch.bool)


@torch.no_grad()
def measure(width: int, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one width."""
    context, batch, sizes = given.context, max(1, 2048 // given.context) * given.context, Sizes()
    tokens = given.tokens // batch * batch
    sae = sae_of(given.d_model, width, given.l0)
    say(f"{width:,} latents: gate")
    gate(sae, min(tokens, GATE_TOKENS // batch * batch or batch), batch, context)
    collector = Collector(width, context, sizes)
    counted = every_token(batch, context)
    lens = head(given.d_model, given.vocabulary)
    seconds: dict[str, float] = dict.fromkeys(("encode", "collect", "together", "logits", "neighbours"), 0.0)
    peak = entries = 0

    def timed(name: str, begun: float) -> None:
        seconds[name] += time.perf_counter() - begun

    say(f"{width:,} latents: {tokens:,} tokens")
    for start in range(0, tokens, batch):
        x = activations(start, batch, given.d_model)
        begun = time.perf_counter()
        code = sae.encode_sparse(x)
        timed("encode", begun)
        begun = time.perf_counter()
        collector.add(code, counted, start // context)
        timed("collect", begun)
        entries += code.nnz
        peak = max(peak, collector.nbytes)
    begun = time.perf_counter()
    collector.found()
    timed("together", begun)
    say(f"{width:,} latents: logits of {given.vocabulary:,} tokens, neighbours")
    begun = time.perf_counter()
    lens.extremes(Site(0, "resid"), sae.W_dec.detach(), sizes.logits)
    timed("logits", begun)
    begun = time.perf_counter()
    nearest(sae.W_dec.detach(), sizes.related)
    timed("neighbours", begun)
    total = sum(seconds.values())
    return {
        "kind": "dashboards",
        "version": __version__,
        "torch": str(torch.__version__),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "impl": choose("auto", torch.device("cpu"), torch.float32).impl,
        "d_model": given.d_model,
        "d_sae": width,
        "vocabulary": given.vocabulary,
        "tokens": tokens,
        "context": context,
        "l0": round(entries / tokens, 2),
        "seconds": {name: round(each, 3) for name, each in seconds.items()} | {"total": round(total, 3)},
        "latents_per_minute": round(60 * width / total, 1),
        "state_bytes": peak,
    }


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def head(d_model: int, vocabulary: int) -> LogitLens:
    """The logits of a model of that width, of which there is nothing else."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    return LogitLens(transformers.Gemma3ForCausalLM(config))


def main() -> None:
    top = argparse.ArgumentParser(prog="python -m bench.dashboards", description=__doc__)
    top.add_argument("--widths", type=int, nargs="+", default=(16384, 65536))
    top.add_argument("--d-model", type=int, default=640)
    top.add_argument("--tokens", type=int, default=1 << 18)
    top.add_argument("--context", type=int, default=256)
    top.add_argument("--l0", type=float, default=60.0)
    top.add_argument("--vocabulary", type=int, default=262144)
    top.add_argument("--threads", type=int, default=1)
    top.add_argument("--save", action="store_true", help="append the rows to the results")
    given = top.parse_args()
    if given.context % Sizes().window:
        raise SystemExit(f"--context: expected a multiple of {Sizes().window}, got {given.context}")
    torch.set_num_threads(given.threads)
    for width in given.widths:
        row = measure(width, given)
        print(json.dumps(row), flush=True)
        if given.save:
            machine = records.provenance(torch.device("cpu"), ("transformers",))
            records.append("dashboards", [row | {"machine": machine}])


if __name__ == "__main__":
    main()
