"""`probe`: do the sites of a loaded model hold what they should?"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import EnvironmentProblemError
from .attach import is_spliced
from .capture import Capture
from .decoder import Decoder, all_sites, evaluating, find_decoder, input_device, refuse_attention_without_cap
from .eager import hold_eager, release_eager
from .site import KINDS, Site

_PROBE_TOKENS = 16
# Large enough to push the scores of any trained or freshly initialised model far beyond a cap of 20 to 50.
_PROBE_SCALE = 1e4


def probe(model: nn.Module) -> None:
    """Check on a few tokens that the sites hold what they should; run it once per loaded model.

    1. Widths: every site fires once in a forward, with the width that the config says.
    2. Additive identity: resid[L] equals resid[L−1] + post_attention_layernorm.output[L] + mlp[L], bit for bit.
    3. Soft-cap: with attention scores scaled far beyond ``attn_logit_softcapping``, taking the cap away changes the
       attention of one layer of each type (sliding, full).

    The model is left as it was. Raises EnvironmentProblemError saying what failed; ValueError while SAEs are attached
    and for another kind of model; TypeError for what is no model.
    """
    decoder = find_decoder(model)
    refuse_attention_without_cap(decoder.config)
    for index, layer in enumerate(decoder.layers):
        for kind in filter(partial(is_spliced, layer), KINDS):
            raise ValueError(f"model: expected no SAE attached while probing, found one at {Site(index, kind)}")
    input_ids = torch.arange(_PROBE_TOKENS, device=input_device(decoder.text_model))[None] % decoder.config.vocab_size
    with torch.no_grad(), evaluating(decoder.text_model):
        _probe_identity(decoder, input_ids)
        if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
            _probe_soft_cap(decoder, input_ids)


@contextmanager
def _overridden(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _probe_identity(decoder: Decoder, input_ids: Tensor) -> None:
    stream_in: list[Tensor] = []
    from_attention: list[Tensor] = []

    def keep_input(module, args, kwargs):
        stream_in.append(args[0] if args else kwargs["hidden_states"])

    def keep_attention(module, args, output):
        from_attention.append(output)

    handles = [decoder.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    norms = [layer.get_submodule("post_attention_layernorm") for layer in decoder.layers]
    for norm in norms:
        hold_eager(norm)
        handles.append(norm.register_forward_hook(keep_attention))
    try:
        with Capture(decoder.text_model, all_sites(decoder.text_model)) as capture:
            decoder.text_model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            release_eager(norm)

    [previous] = stream_in
    for index, attention in enumerate(from_attention):
        resid = capture[Site(index, "resid")]
        expected = previous + attention + capture[Site(index, "mlp")]
        if not torch.equal(resid, expected):
            difference = (resid.double() - expected.double()).abs().max().item()
            raise EnvironmentProblemError(
                f"layer_{index}: expected resid to equal the previous resid + post_attention_layernorm.output + mlp "
                f"exactly, found a difference of {difference:.3g}"
            )
        previous = resid


def _probe_soft_cap(decoder: Decoder, input_ids: Tensor) -> None:
    first_of_type: dict[str | None, int] = {}
    for index, layer in enumerate(decoder.layers):
        first_of_type.setdefault(getattr(layer.self_attn, "layer_type", None), index)
    for index in first_of_type.values():
        attention, site = decoder.layers[index].get_submodule("self_attn"), Site(index, "att")

        def heads(site: Site = site) -> Tensor:
            with Capture(decoder.text_model, [site]) as capture:
                decoder.text_model(input_ids, use_cache=False)
            return capture[site]

        with _overridden(attention, "scaling", cast(float, attention.scaling) * _PROBE_SCALE):
            capped = heads()
            with _overridden(attention, "attn_logit_softcapping", None):
                uncapped = heads()
        if torch.equal(capped.nan_to_num(), uncapped.nan_to_num()):
            name = decoder.config._attn_implementation
            remedy = "" if name == "eager" else '; load the model with attn_implementation="eager"'
            raise EnvironmentProblemError(
                f"layer_{index}: expected attention {name!r} to apply attn_logit_softcapping="
                f"{decoder.config.attn_logit_softcapping:g}, found the same output without it{remedy}"
            )
