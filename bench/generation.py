"""A token of generation with SAEs at every site: python -m bench.generation [--layers N] [--save]

A Gemma 2 of random weights and 2B's shapes, of one layer by default, generates greedily: as it is, with our SAEs in it,
steered by one latent a site with the SAE's error kept, and with the same SAEs as dense PyTorch and, with --saelens, as
SAELens's, all through `attach`. Thresholds are set for the given L0 with the SAEs before in the model; the L0 of the
text that is generated is in the rows. No contender is timed whose reconstructions of it are not those of fp64. The
vocabulary is small, so that the SAEs are not lost behind the logits.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders import copy_weights
from bench.reporting import records
from bench.timing.measure import Clock, interleaved, percentiles
from gemmascope import JumpReLUSAE, Site, attach
from gemmascope.kernels import preactivations
from gemmascope.sites import Add, Capture, all_sites, site_width

TOLERANCE = 1e-4
OPTIONS = ("layers", "vocabulary", "d_sae", "l0", "new_tokens")
PROMPT, CALIBRATION_ROWS = 8, 16


@dataclass(frozen=True)
class Sizes:
    """Of the model, those of Gemma 2 2B but for layers and vocabulary; of the SAEs; of what is generated."""

    layers: int = 1
    hidden: int = 2304
    intermediate: int = 9216
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 256
    vocabulary: int = 1024
    d_sae: int = 16384
    l0: int = 80
    new_tokens: int = 16


def make_model(sizes: Sizes, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        query_pre_attn_scalar=sizes.head_dim,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device).eval()


def make_saes(model: nn.Module, sizes: Sizes) -> dict[Site, JumpReLUSAE]:
    """An SAE at every site, of about the L0 asked for on what comes there when those before it are in the model."""
    generator = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    shape = (CALIBRATION_ROWS, PROMPT + sizes.new_tokens)
    tokens = torch.randint(3, sizes.vocabulary, shape, generator=generator)
    saes: dict[Site, JumpReLUSAE] = {}
    for site in all_sites(model):
        sae = JumpReLUSAE(site_width(model, site), sizes.d_sae, pre_encoder_bias=False, generator=generator).to(device)
        [x] = activations_at(model, tokens.to(device), [site], saes).values()
        z = preactivations(x, sae.W_enc.detach(), sae.b_enc.detach())
        threshold = z.flatten().float().cpu().kthvalue(z.numel() - sizes.l0 * len(x)).values.clamp(min=0)
        nn.init.constant_(sae.threshold, float(threshold))
        saes[site] = sae.requires_grad_(False)
    return saes


def activations_at(
    model: nn.Module, tokens: Tensor, sites: Iterable[Site], saes: Mapping[Site, JumpReLUSAE]
) -> dict[Site, Tensor]:
    """[tokens, width] at each of ``sites``, before its SAE, behind the prompt, while ``saes`` are in the model."""
    with Capture(model, sites) as capture, attach(model, saes) if saes else nullcontext():
        model(tokens, use_cache=False)
    return {site: capture[site][:, PROMPT:].flatten(0, 1) for site in sites}


class Dense(nn.Module):
    """The same SAE in dense PyTorch."""

    def __init__(self, sae: JumpReLUSAE):
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.sae.W_enc + self.sae.b_enc
        return (z * (z > self.sae.threshold)) @ self.sae.W_dec + self.sae.b_dec


def of_saelens(sae: JumpReLUSAE) -> nn.Module:
    from sae_lens import JumpReLUSAE as Theirs
    from sae_lens import JumpReLUSAEConfig

    options = {"apply_b_dec_to_input": False, "device": str(sae.W_enc.device)}
    theirs = Theirs(JumpReLUSAEConfig(sae.d_model, sae.d_sae, **options))
    copy_weights(sae, theirs)
    return theirs


def error(reconstruct: Callable[[Tensor], Tensor], sae: JumpReLUSAE, x: Tensor) -> float:
    """Of the reconstructions against fp64, in the Euclidean norm, over the tokens whose gates are not undecided."""
    weights = {name: value.double() for name, value in sae.named_parameters()}
    z = x.double() @ weights["W_enc"] + weights["b_enc"]
    decided = ((z - weights["threshold"]).abs() > 1e-5 * z.abs().amax()).all(1)
    exact = (z * (z > weights["threshold"]))[decided] @ weights["W_dec"] + weights["b_dec"]
    return ((reconstruct(x[decided]).double() - exact).norm() / exact.norm()).item()


Splicing = Callable[[], AbstractContextManager]


def contenders(
    model: nn.Module, saes: Mapping[Site, JumpReLUSAE], with_saelens: bool
) -> dict[str, tuple[Any, Splicing]]:
    """By name: the SAEs by site, whose reconstructions are gated, and what puts them into the model."""
    dense = {site: Dense(sae) for site, sae in saes.items()}
    steering: Any = {site: Add(0, 1.0) for site in saes}
    found: dict[str, tuple[Any, Splicing]] = {
        "model": ({}, nullcontext),
        "ours": (saes, partial(attach, model, saes)),
        "ours_steered": (saes, partial(attach, model, saes, mode="with_error", edits=steering)),
        "dense": (dense, partial(attach, model, dense)),
    }
    if with_saelens:
        theirs = {site: of_saelens(sae) for site, sae in saes.items()}
        found["saelens"] = (theirs, partial(attach, model, theirs))
    return found


@torch.no_grad()
def measure(sizes: Sizes, rounds: int, device: torch.device, with_saelens: bool = False) -> list[dict[str, Any]]:
    """A row a contender: milliseconds a token, or why there are none."""
    model = make_model(sizes, device)
    saes = make_saes(model, sizes)
    ids = torch.randint(3, sizes.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(2)).to(device)
    options = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens, "do_sample": False}
    # A model of random weights would say its last token again and again, and no SAE would have the L0 of other text.
    generate = partial(model.generate, ids, no_repeat_ngram_size=1, **options)
    with attach(model, saes):
        text = generate()
    activations = activations_at(model, text, saes, saes)
    l0 = [int(sae.encode_sparse(activations[site]).nnz) / len(activations[site]) for site, sae in saes.items()]
    found = {"mean_l0": sum(l0) / len(l0), "min_l0": min(l0), "max_l0": max(l0)}
    common = {"kind": "generation", "n_saes": len(saes), **found, **vars(sizes)}

    def call(splicing: Splicing) -> Any:
        with splicing():
            return generate()

    rows, calls = [], {}
    for name, (by_site, splicing) in contenders(model, saes, with_saelens).items():
        errors = [error(by_site[site], saes[site], activations[site]) for site in by_site]
        wrong = [each for each in errors if not each <= TOLERANCE]  # NaN is one of them
        if wrong:
            message = f"error {wrong[0]:.2g} against fp64, expected at most {TOLERANCE:g}"
            rows.append(common | {"contender": name, "failed": message})
            continue
        call(splicing)  # warm
        calls[name] = (lambda: None, partial(call, splicing))

    def failed(name: str, problem: Exception) -> None:
        rows.append(common | {"contender": name, "failed": f"{type(problem).__name__}: {problem}"})

    times = interleaved(Clock(device), calls, rounds, failed, lambda name: None)
    for name, found in times.items():
        rows.append(common | {"contender": name} | percentiles([ms / sizes.new_tokens for ms in found["ms"]]))
    return rows


def main(arguments: list[str] | None = None, sizes: Sizes = Sizes()) -> int:
    top = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__)
    for name in OPTIONS:
        top.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(sizes, name))
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--device", default="cpu")
    top.add_argument("--saelens", action="store_true", help="also through SAELens, which must be installed")
    top.add_argument("--save", action="store_true", help="append the rows to the results")
    top.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the results")
    given = top.parse_args(arguments)
    sizes = replace(sizes, **{name: getattr(given, name) for name in OPTIONS})
    device = torch.device(given.device)
    rows = measure(sizes, given.rounds, device, given.saelens)
    for row in rows:
        print(f"{row['contender']:14s} {row.get('failed') or format(row['p50_ms'], '.2f') + ' ms a token'}")
    if given.save:
        packages = ("transformers", *(("sae-lens",) if given.saelens else ()))
        machine = records.provenance(device, packages)
        records.append("generation", [row | {"machine": machine} for row in rows], given.results)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
