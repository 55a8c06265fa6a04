"""How sites are called elsewhere: TransformerLens, whose names SAELens and circuit-tracer use.

Our own names are those of Hugging Face modules, as in Gemma Scope 2's configs. The input of Gemma Scope 1's transcoders
has no module of its own: ``NORMALISED`` is x/rms(x) of the residual before the MLP, without the gain (1 + w) of the
norm, which ``pre_feedforward_layernorm.output`` has.
"""

import re
from typing import Any

NORMALISED = "pre_feedforward_layernorm.normalized"
MLP_IN = "pre_feedforward_layernorm.output"
MLP_OUT = "post_feedforward_layernorm.output"
ATTENTION_OUT = "self_attn.o_proj.input"
TRANSFORMER_LENS = {
    "output": "hook_resid_post",
    MLP_OUT: "hook_mlp_out",
    ATTENTION_OUT: "attn.hook_z",
    MLP_IN: "mlp.hook_in",
    NORMALISED: "ln2.hook_normalized",
}
POINTS = {theirs: ours for ours, theirs in TRANSFORMER_LENS.items()}
KINDS = {"output": "resid", MLP_OUT: "mlp", ATTENTION_OUT: "att", MLP_IN: "transcoder", NORMALISED: "transcoder"}


def site_name(layer: int, point: str) -> str:
    """``site_name(3, MLP_OUT) == "model.layers.3.post_feedforward_layernorm.output"``."""
    return f"model.layers.{layer}.{point}"


def split(site: Any) -> tuple[int, str] | None:
    """Layer and point of a site, by our name or by that of TransformerLens; None for what is none of those of
    `TRANSFORMER_LENS`."""
    if type(site) is not str:
        return None
    if match := re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,5})\.([\w.]+)", site, re.ASCII):
        return (int(match[1]), match[2]) if match[2] in TRANSFORMER_LENS else None
    if match := re.fullmatch(r"blocks\.(0|[1-9][0-9]{0,5})\.([\w.]+)", site, re.ASCII):
        return (int(match[1]), POINTS[match[2]]) if match[2] in POINTS else None
    return None


def hugging_face(site: Any) -> str | None:
    """``"model.layers.3.output"`` for that and for ``"blocks.3.hook_resid_post"``; other text as it is; None for what
    is no text."""
    found = split(site)
    return site_name(*found) if found else site if type(site) is str else None


def transformer_lens(site: Any) -> str | None:
    """``"blocks.3.hook_resid_post"`` for that and for ``"model.layers.3.output"``; None for a site without such a
    name."""
    found = split(site)
    return found and f"blocks.{found[0]}.{TRANSFORMER_LENS[found[1]]}"
