"""The part of Gemma 2 and Gemma 3 that the sites belong to: found in a model, measured, refused where it would deceive.

This imports torch only; models come from transformers 5.17 or newer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checks import check_type
from ..errors import EnvironmentProblemError
from .eager import hold_eager, release_eager
from .reading import check_reads, is_transcoder
from .site import INPUT_KINDS, KINDS, Site, as_site

# Packages whose models hold other modules, or weights that were folded, in the place of those that the sites name.
_WRAPPERS = {
    "transformer_lens": "load it with transformers' AutoModelForCausalLM; its hook names are understood as sites",
    "nnsight": "pass the model of transformers that it wraps; its names are understood as sites",
}
INPUT_NORM = "pre_feedforward_layernorm"
_PARTS = ("self_attn", "post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Decoder:
    """The part of a model that the sites belong to."""

    callers: tuple[nn.Module, ...]
    """The model, the text model that holds the layers, and every module between them, outermost first."""
    config: Any
    layers: tuple[nn.Module, ...]
    """The layers that a forward runs."""
    stack_name: str
    """The attribute of the text model that holds them, and those that are left out."""

    @property
    def text_model(self) -> nn.Module:
        return self.callers[-1]

    def width(self, site: Site) -> int:
        if site.layer >= len(self.layers):
            raise ValueError(f"site {site}: expected a layer from 0 to {len(self.layers) - 1}, got {site.layer}")
        if site.kind in INPUT_KINDS and not isinstance(getattr(self.layers[site.layer], INPUT_NORM, None), nn.Module):
            raise ValueError(f"site {site}: expected layers with a {INPUT_NORM}, found one without")
        if site.kind != "att":
            return self.config.hidden_size
        _refuse_sharded(site, self.layers[site.layer].get_submodule("self_attn.o_proj"))
        return self.config.num_attention_heads * self.config.head_dim

    def check_fits(self, site: Site, sae: Any) -> None:
        """Raise ValueError for a site that there is not and for an SAE that says it is of another width. The site of a
        transcoder is here the one that it reads."""
        width = self.width(site)
        if is_transcoder(sae):
            check_reads(site, sae)
            if sae.d_in != width:
                raise ValueError(f"site {site}: expected a transcoder of d_in {width}, got {sae.d_in}")
        if (d_model := getattr(sae, "d_model", width)) != width:
            raise ValueError(f"site {site}: expected an SAE of d_model {width}, got {d_model}")


def find_decoder(model: nn.Module) -> Decoder:
    _refuse_wrappers(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    stacks = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    found = {name: stack for name, stack in stacks.items() if all(map(_is_gemma_layer, stack))}
    if len(found) != 1:
        candidates = ", ".join(f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in (found or stacks).items())
        raise ValueError(
            "model: expected exactly one stack of Gemma 2 or Gemma 3 decoder layers, "
            f"found {len(found)} in {type(model).__name__}; candidates: {candidates or 'none'}"
        )
    [(path, stack)] = found.items()
    names = path.split(".")[:-1]
    callers = tuple(model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1))
    if any(isinstance(module, nn.DataParallel) for module in callers):
        raise EnvironmentProblemError(
            "model: expected one whose layers run themselves, found it in DataParallel, which runs copies of them; "
            "pass the model within, or use DistributedDataParallel"
        )
    config = getattr(callers[-1], "config", None)
    if config is None:
        raise ValueError(f"model: expected a config on {'.'.join(names) or type(model).__name__}, found none")
    # Users lower num_hidden_layers to stop the forward early; the layers behind it stay in memory and never run.
    return Decoder(callers, config, tuple(stack)[: config.num_hidden_layers], path.split(".")[-1])


def _refuse_wrappers(model: Any) -> None:
    """By the names of its classes: the packages are not imported."""
    packages = {each.__module__.partition(".")[0] for each in type(model).__mro__}
    for package in packages & _WRAPPERS.keys():
        raise TypeError(
            f"model: expected a Gemma of transformers, got {type(model).__name__} of {package}; {_WRAPPERS[package]}"
        )


def _is_gemma_layer(layer: nn.Module) -> bool:
    parts_present = all(isinstance(getattr(layer, part, None), nn.Module) for part in _PARTS)
    return parts_present and isinstance(getattr(layer.self_attn, "o_proj", None), nn.Module)


def embedding_weight(model: nn.Module) -> Tensor:
    """[vocabulary, hidden_size], where a model of transformers turns token ids into activations."""
    return _embedding(model).weight


def _embedding(model: nn.Module) -> Any:
    return cast(Any, find_decoder(model).text_model).get_input_embeddings()


def input_device(model: nn.Module) -> torch.device:
    """Where token ids must be: the device of the embedding's weights, or that on which its offloaded weights run.

    Raises EnvironmentProblemError where those are on the device meta and nothing of accelerate's will load them.
    """
    embedding = _embedding(model)
    if not embedding.weight.is_meta:
        return embedding.weight.device
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's; several may be chained in one
    for each in (hook, *getattr(hook, "hooks", ())):
        if (device := getattr(each, "execution_device", None)) is not None:
            return torch.device(device)
    raise EnvironmentProblemError("model: expected weights with values, found them on the device meta; load them first")


def _refuse_sharded(site: Site, o_proj: nn.Module) -> None:
    placements = getattr(getattr(o_proj, "weight", None), "placements", ())
    # FSDP shards dimension 0 and gathers before the forward; only a split of the input features splits z.
    row_wise = any(placement.is_shard(1) or placement.is_shard(-1) for placement in placements)
    if row_wise or getattr(o_proj, "_is_hooked", False) or getattr(o_proj, "_hf_tp_plan", None):
        raise EnvironmentProblemError(
            f"site {site}: expected o_proj on one device, found it sharded by tensor parallelism, where its input is "
            "only this rank's heads; load the model without tp_plan"
        )


def refuse_attention_without_cap(config: Any) -> None:
    cap, attention = getattr(config, "attn_logit_softcapping", None), str(config._attn_implementation)
    if cap is not None and "sdpa" in attention:
        raise EnvironmentProblemError(
            f"attention: expected one that applies attn_logit_softcapping={cap:g}, found {attention!r}, "
            'which drops it; load the model with attn_implementation="eager"'
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards every module has its training flag back."""
    check_type("model", model, nn.Module)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """What `torch.compile` has made of the modules that lead to the layers is not run."""
    callers = find_decoder(model).callers
    for module in callers:
        hold_eager(module)
    try:
        yield
    finally:
        for module in callers:
            release_eager(module)


def all_sites(model: nn.Module) -> list[Site]:
    """Every site of the model: layer by layer, and in each att, mlp, resid."""
    return [Site(layer, kind) for layer in range(len(find_decoder(model).layers)) for kind in KINDS]


def site_width(model: nn.Module, site: Site | str) -> int:
    """Width of the activations at ``site``, from the model's config: heads·head_dim at att, else hidden_size."""
    return find_decoder(model).width(as_site(site))
