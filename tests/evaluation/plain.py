"""Evaluation by plain hooks and loops in fp64, one token at a time: what the protocol is compared with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gemmascope.sites import Site
from tests.tiny_models import BOS, EOS, PAD

SPECIAL = (PAD, EOS, BOS)
SETS = ("text", "inliers", "every")


def module_of(model: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """The module, and whether the site is its input."""
    layer = model.get_submodule(f"model.layers.{site.layer}")
    inside = {"att": "self_attn.o_proj", "mlp": "post_feedforward_layernorm", "mlp_in": "pre_feedforward_layernorm"}
    return (layer.get_submodule(inside[site.kind]) if site.kind in inside else layer), site.kind == "att"


@contextmanager
def changed(model: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module, is_input = module_of(model, site)

    def before(module, args):
        return (change(args[0]), *args[1:])

    def after(module, args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def run(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


def activation(model: nn.Module, site: Site, ids: Tensor) -> Tensor:
    seen = []
    with changed(model, site, lambda x: seen.append(x.clone()) or x):
        run(model, ids)
    return seen[0]


def masks(x: Tensor, ids: Tensor, documents: Tensor, max_norm: float) -> dict[str, Tensor]:
    """documents: −1 at padding alone."""
    text = (documents >= 0) & ~torch.isin(ids, torch.tensor(SPECIAL))
    return {"text": text, "inliers": text & (x.norm(dim=-1) <= max_norm), "every": documents >= 0}


def scored(ids: Tensor, documents: Tensor) -> Iterator[list[int]]:
    """Row and column of each prediction that counts."""
    text = masks(torch.zeros(*ids.shape, 1), ids, documents, 1.0)["text"]
    yield from torch.nonzero(text[:, :-1] & text[:, 1:]).tolist()


def losses(model: nn.Module, ids: Tensor, documents: Tensor, logits: Tensor, clean: Tensor) -> dict[int, list[float]]:
    """Of each document: predictions, Σ cross-entropy and Σ KL from the clean prediction."""
    found: dict[int, list[float]] = {}
    for row, column in scored(ids, documents):
        q, p = (each[row, column].log_softmax(-1) for each in (logits, clean))
        terms = found.setdefault(int(documents[row, column]), [0.0, 0.0, 0.0])
        terms[0] += 1
        terms[1] -= q[ids[row, column + 1]].item()
        terms[2] += (p.exp() * (p - q)).sum().item()
    return found


def losses_with(model, ids, documents, site: Site, value: Tensor, mask: Tensor) -> dict[int, list[float]]:
    clean = run(model, ids)
    with changed(model, site, lambda x: torch.where(mask[..., None], value.to(x), x)):
        return losses(model, ids, documents, run(model, ids), clean)
