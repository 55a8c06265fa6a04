"""Where SAEs read and write inside Gemma 2 and Gemma 3: capture activations, splice reconstructions, probe the model.

Three sites a layer (Gemma Scope, arXiv 2408.05147 §3.1), by DeepMind's hook names:

    att    model.layers.L.self_attn.o_proj.input              heads concatenated, before W_O    heads·head_dim wide
    mlp    model.layers.L.post_feedforward_layernorm.output   what the MLP adds to the stream   hidden_size wide
    resid  model.layers.L.output                              the stream after the layer        hidden_size wide

Sites are reached by hooks alone: the ``hidden_states`` a transformers model returns have the final norm applied to the
last entry and contain neither att nor mlp. This module imports torch only; models come from transformers 5.17 or newer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_int
from .errors import EnvironmentProblemError

KINDS = ("att", "mlp", "resid")

_HOOK_POINTS = {
    "att": "self_attn.o_proj.input",
    "mlp": "post_feedforward_layernorm.output",
    "resid": "output",
}
_PARTS = ("self_attn", "post_attention_layernorm", "post_feedforward_layernorm")
_PROBE_TOKENS = 16
# Large enough to push the scores of any trained or freshly initialised model far beyond a cap of 20 to 50.
_PROBE_SCALE = 1e4


@dataclass(frozen=True, order=True)
class Site:
    """One place in the model: ``layer`` (from 0) and ``kind`` ("att", "mlp" or "resid")."""

    layer: int
    kind: str

    def __post_init__(self):
        check_int("layer", self.layer, 0)
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def name(self) -> str:
        """DeepMind's name of the hook point, the same for every class of model."""
        return f"model.layers.{self.layer}.{_HOOK_POINTS[self.kind]}"

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a hook name ("model.layers.3.output") or of a short name ("layer_3/resid")."""
        if not isinstance(name, str):
            raise TypeError(f"site: expected a Site or a str, got {type(name).__name__}")
        if match := re.fullmatch(r"layer_(0|[1-9][0-9]{0,5})/(\w+)", name, re.ASCII):
            layer, kind = match.groups()
            if kind in KINDS:
                return cls(int(layer), kind)
        elif match := re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,5})\.([\w.]+)", name, re.ASCII):
            layer, point = match.groups()
            for kind, hook_point in _HOOK_POINTS.items():
                if point == hook_point:
                    return cls(int(layer), kind)
        raise ValueError(
            f"site: expected layer_L/KIND with KIND one of {', '.join(KINDS)}, or model.layers.L.POINT with POINT "
            f"one of {', '.join(_HOOK_POINTS.values())}, got {name!r}"
        )

    def __str__(self) -> str:
        return f"layer_{self.layer}/{self.kind}"


@dataclass(frozen=True)
class _Decoder:
    """The part of a model that the sites belong to."""

    callers: tuple[nn.Module, ...]
    """The model, the text model that holds the layers, and every module between them, outermost first."""
    config: Any
    layers: tuple[nn.Module, ...]
    """The layers that a forward runs."""

    @property
    def text_model(self) -> nn.Module:
        return self.callers[-1]

    def width(self, site: Site) -> int:
        if site.layer >= len(self.layers):
            raise ValueError(f"site {site}: expected a layer from 0 to {len(self.layers) - 1}, got {site.layer}")
        if site.kind != "att":
            return self.config.hidden_size
        _refuse_sharded(site, self.layers[site.layer].self_attn.o_proj)
        return self.config.num_attention_heads * self.config.head_dim


def _find_decoder(model: nn.Module) -> _Decoder:
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
    config = getattr(callers[-1], "config", None)
    if config is None:
        raise ValueError(f"model: expected a config on {'.'.join(names) or type(model).__name__}, found none")
    # Users lower num_hidden_layers to stop the forward early; the layers behind it stay in memory and never run.
    return _Decoder(callers, config, tuple(stack)[: config.num_hidden_layers])


def _is_gemma_layer(layer: nn.Module) -> bool:
    parts_present = all(isinstance(getattr(layer, part, None), nn.Module) for part in _PARTS)
    return parts_present and isinstance(getattr(layer.self_attn, "o_proj", None), nn.Module)


def _refuse_sharded(site: Site, o_proj: nn.Module) -> None:
    placements = getattr(getattr(o_proj, "weight", None), "placements", ())
    # FSDP shards dimension 0 and gathers before the forward; only a split of the input features splits z.
    row_wise = any(placement.is_shard(1) or placement.is_shard(-1) for placement in placements)
    if row_wise or getattr(o_proj, "_is_hooked", False) or getattr(o_proj, "_hf_tp_plan", None):
        raise EnvironmentProblemError(
            f"site {site}: expected o_proj on one device, found it sharded by tensor parallelism, where its input is "
            "only this rank's heads; load the model without tp_plan"
        )


def _refuse_attention_without_cap(config: Any) -> None:
    cap, attention = getattr(config, "attn_logit_softcapping", None), str(config._attn_implementation)
    if cap is not None and "sdpa" in attention:
        raise EnvironmentProblemError(
            f"attention: expected one that applies attn_logit_softcapping={cap:g}, found {attention!r}, "
            'which drops it; load the model with attn_implementation="eager"'
        )


def _as_site(site: Site | str) -> Site:
    return site if isinstance(site, Site) else Site.parse(site)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards every module has its training flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def all_sites(model: nn.Module) -> list[Site]:
    """Every site of the model: layer by layer, and in each att, mlp, resid."""
    return [Site(layer, kind) for layer in range(len(_find_decoder(model).layers)) for kind in KINDS]


def site_width(model: nn.Module, site: Site) -> int:
    """Width of the activations at ``site``, from the model's config: heads·head_dim at att, else hidden_size."""
    return _find_decoder(model).width(site)


def special_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The BOS, EOS and PAD ids of the model's config, sorted: tokens that SAEs are neither trained nor scored on."""
    ids: set[int] = set()
    for module in _find_decoder(model).callers:
        config = getattr(module, "config", None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return tuple(sorted(ids))


def _hook(layer: nn.Module, kind: str, function: Callable[[Tensor], Tensor | None]):
    """Call ``function`` with each activation of the site; a tensor it returns takes the activation's place."""
    if kind == "att":

        def before(module, args):
            replaced = function(args[0])
            return None if replaced is None else (replaced, *args[1:])

        return layer.self_attn.o_proj.register_forward_pre_hook(before)

    def after(module, args, output):
        # A decoder layer returns a tensor since transformers 5 and a tuple before; indexing a tensor would silently
        # give the first row of the batch.
        is_tuple = isinstance(output, tuple)
        replaced = function(output[0] if is_tuple else output)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if is_tuple else replaced

    module = layer if kind == "resid" else layer.post_feedforward_layernorm
    return module.register_forward_hook(after)


def _check_activation(site: Site, activation: Tensor, width: int) -> None:
    if not isinstance(activation, Tensor):
        raise EnvironmentProblemError(f"site {site}: expected a tensor, found {type(activation).__name__}")
    if activation.ndim != 3 or activation.shape[-1] != width:
        raise EnvironmentProblemError(
            f"site {site}: expected activations [batch, seq, {width}], found {list(activation.shape)}"
        )


class Capture:
    """Record the activations of ``sites`` during the latest forward of the model's text model.

        with Capture(model, sites) as capture:
            model.model(input_ids, use_cache=False)
        resid = capture[Site(3, "resid")]  # [batch, seq, width]

    What is recorded is detached from the graph and an ordinary tensor, which autograd accepts as input even when it
    was captured under `torch.inference_mode`; it shares memory with the model's own activation otherwise. It stays
    readable after the block. Hooks run in the order they were set: a `Capture` opened inside `attach` sees the spliced
    activations, one opened before it those of the model.

    Raises EnvironmentProblemError when the forward ends and a site did not fire exactly once, when its shape is not
    [batch, seq, width], when it fires outside a forward (gradient checkpointing computing a layer again), and for a
    model whose attention drops its soft-cap; ValueError for sites that the model does not have.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site | str]):
        if isinstance(sites, (Site, str)):
            raise TypeError(f"sites: expected a list of sites, got {type(sites).__name__}")
        self._decoder = _find_decoder(model)
        _refuse_attention_without_cap(self._decoder.config)
        self._widths = {site: self._decoder.width(site) for site in map(_as_site, sites)}
        self._captured: dict[Site, Tensor] = {}
        self._fired: dict[Site, int] | None = None
        self._handles: list[Any] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self._widths)

    def __enter__(self) -> "Capture":
        if self._handles:
            raise ValueError("Capture: expected to be entered once, found it active already")
        text_model = self._decoder.text_model
        self._handles.append(text_model.register_forward_pre_hook(self._begin))
        for site in self._widths:
            layer = self._decoder.layers[site.layer]
            self._handles.append(_hook(layer, site.kind, partial(self._record, site)))
        self._handles.append(text_model.register_forward_hook(self._end))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, site: Site | str) -> Tensor:
        site = _as_site(site)
        if site not in self._widths:
            raise ValueError(f"site {site}: expected one of {', '.join(map(str, self._widths))}")
        if self._fired is not None or site not in self._captured:
            raise ValueError(f"site {site}: expected a forward of the model before reading, found none completed")
        return self._captured[site]

    def _begin(self, module, args) -> None:
        self._captured.clear()
        self._fired = dict.fromkeys(self._widths, 0)

    def _record(self, site: Site, activation: Tensor) -> None:
        _check_activation(site, activation, self._widths[site])
        if self._fired is None:
            raise EnvironmentProblemError(
                f"site {site}: expected to fire during a forward of the model, found it outside one; "
                "switch gradient checkpointing off"
            )
        self._fired[site] += 1
        if activation.is_inference():
            with torch.inference_mode(False):
                self._captured[site] = activation.clone()
        else:
            self._captured[site] = activation.detach()

    def _end(self, module, args, output) -> None:
        fired, self._fired = self._fired, None
        for site, times in fired.items():
            if times != 1:
                self._captured.clear()
                raise EnvironmentProblemError(f"site {site}: expected to fire once in a forward, found {times} times")


class _SpecialTokens:
    """Knows, while the model runs, which positions hold tokens to leave alone."""

    def __init__(self, decoder: _Decoder, ids: tuple[int, ...]):
        self._ids = ids
        self._running = [False] * len(decoder.callers)
        self.mask: Tensor | None = None
        self.handles = []
        # A multimodal model hands its text model embeddings, so the ids are those of the outermost call that has any.
        for depth, module in enumerate(decoder.callers):
            before, after = partial(self._before, depth), partial(self._after, depth)
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, always_call=True))

    def _before(self, depth: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not any(self._running[:depth]):
            self.mask = None
        self._running[depth] = True
        input_ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(input_ids, Tensor) and not input_ids.is_floating_point():
            skipped = torch.tensor(self._ids, device=input_ids.device, dtype=input_ids.dtype)
            self.mask = torch.isin(input_ids, skipped)
        if self.mask is None and depth == len(self._running) - 1:
            raise ValueError(
                "input_ids: expected them with the inputs, to leave special tokens alone, found only inputs_embeds; "
                "attach with skip_token_ids=() to splice at every position"
            )

    def _after(self, depth: int, *_) -> None:
        self._running[depth] = False


class _Splice:
    """Puts an SAE's reconstruction in the place of the activation."""

    def __init__(self, site: Site, sae: Callable[[Tensor], Tensor], width: int, special: _SpecialTokens | None):
        self.site, self._sae, self._width, self._special = site, sae, width, special

    def __call__(self, x: Tensor) -> Tensor:
        _check_activation(self.site, x, self._width)
        x_hat = self._sae(x)
        if x_hat.shape != x.shape:
            raise ValueError(
                f"site {self.site}: expected a reconstruction of shape {list(x.shape)}, got {list(x_hat.shape)}"
            )
        x_hat = x_hat.to(x.dtype)
        if self._special is None:
            return x_hat
        mask = self._special.mask
        if mask is None or mask.shape != x.shape[:2]:
            found = "none" if mask is None else f"{list(mask.shape)}"
            raise ValueError(f"input_ids: expected shape {list(x.shape[:2])} as at site {self.site}, found {found}")
        return torch.where(mask.to(x.device)[..., None], x, x_hat)


class Attachment:
    """SAEs spliced into a model, from `attach`. Leaving the with-block, or `detach`, restores the model."""

    def __init__(self, layers: dict[Site, nn.Module], handles: list[Any]):
        self._layers, self._handles = layers, handles

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self._layers)

    def detach(self) -> None:
        """Take the SAEs out again; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for site, layer in self._layers.items():
            _spliced_kinds(layer).discard(site.kind)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def _spliced_kinds(layer: nn.Module) -> set[str]:
    """Kinds of the sites of ``layer`` that hold an SAE; kept on the layer, next to the hooks, so they stay together."""
    return layer.__dict__.setdefault("_gemmascope_spliced", set())


def attach(
    model: nn.Module,
    saes: Mapping[Site | str, Callable[[Tensor], Tensor]],
    skip_token_ids: Iterable[int] | None = None,
) -> Attachment:
    """Splice SAEs into ``model``: from now on each site's activation x is replaced by ``sae(x)``, in x's dtype.

        with attach(model, {Site(3, "resid"): sae}):
            logits = model(input_ids).logits

    Without ``with``, keep what is returned and call its ``detach()``. Gradients flow through the SAEs.

    saes: a module per `Site` (or name of one), mapping [batch, seq, width] to the same shape; a ``d_model`` it has is
    compared with the width of the site. skip_token_ids: positions holding these tokens keep their activation; by
    default BOS, EOS and PAD of the model's config (`special_token_ids`), on which SAEs are not trained. Pass () to
    splice at every position, which inputs given as ``inputs_embeds`` alone need.

    Raises ValueError for an empty ``saes``, an unknown site, a width that does not fit or a site that holds an SAE
    already; EnvironmentProblemError for a model whose attention drops its soft-cap or is tensor-parallel. Nothing is
    attached then. During a forward: ValueError without input_ids, or when an SAE changes the shape.
    """
    decoder = _find_decoder(model)
    _refuse_attention_without_cap(decoder.config)
    if not isinstance(saes, Mapping):
        raise TypeError(f"saes: expected a dict from Site to SAE, got {type(saes).__name__}")
    saes = {_as_site(site): sae for site, sae in saes.items()}
    if not saes:
        raise ValueError("saes: expected at least one site, got none")
    widths = {site: decoder.width(site) for site in saes}
    layers = {site: decoder.layers[site.layer] for site in saes}
    for site, sae in saes.items():
        if not callable(sae):
            raise TypeError(f"site {site}: expected a module or function, got {type(sae).__name__}")
        d_model = getattr(sae, "d_model", widths[site])
        if d_model != widths[site]:
            raise ValueError(f"site {site}: expected an SAE of d_model {widths[site]}, got {d_model}")
        if site.kind in _spliced_kinds(layers[site]):
            raise ValueError(f"site {site}: expected no SAE attached yet, found one; detach it first")

    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    special = _SpecialTokens(decoder, skipped) if skipped else None
    handles = list(special.handles) if special else []
    for site, sae in saes.items():
        handles.append(_hook(layers[site], site.kind, _Splice(site, sae, widths[site], special)))
        _spliced_kinds(layers[site]).add(site.kind)
    return Attachment(layers, handles)


def probe(model: nn.Module) -> None:
    """Check on a few tokens that the sites hold what they should; run it once per loaded model.

    1. Widths: every site fires once in a forward, with the width that the config says.
    2. Additive identity: resid[L] equals resid[L−1] + post_attention_layernorm.output[L] + mlp[L], bit for bit.
    3. Soft-cap: with attention scores scaled far beyond ``attn_logit_softcapping``, taking the cap away changes the
       attention of one layer of each type (sliding, full).

    The model is left as it was. Raises EnvironmentProblemError saying what failed; ValueError while SAEs are attached.
    """
    decoder = _find_decoder(model)
    _refuse_attention_without_cap(decoder.config)
    for index, layer in enumerate(decoder.layers):
        for kind in sorted(_spliced_kinds(layer)):
            raise ValueError(f"model: expected no SAE attached while probing, found one at {Site(index, kind)}")
    device = decoder.text_model.get_input_embeddings().weight.device
    input_ids = torch.arange(_PROBE_TOKENS, device=device)[None] % decoder.config.vocab_size
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


def _probe_identity(decoder: _Decoder, input_ids: Tensor) -> None:
    stream_in: list[Tensor] = []
    from_attention: list[Tensor] = []

    def keep_input(module, args, kwargs):
        stream_in.append(args[0] if args else kwargs["hidden_states"])

    handles = [decoder.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    for layer in decoder.layers:
        norm = layer.post_attention_layernorm
        handles.append(norm.register_forward_hook(lambda module, args, output: from_attention.append(output)))
    try:
        with Capture(decoder.text_model, all_sites(decoder.text_model)) as capture:
            decoder.text_model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

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


def _probe_soft_cap(decoder: _Decoder, input_ids: Tensor) -> None:
    first_of_type: dict[str | None, int] = {}
    for index, layer in enumerate(decoder.layers):
        first_of_type.setdefault(getattr(layer.self_attn, "layer_type", None), index)
    for index in first_of_type.values():
        attention, site = decoder.layers[index].self_attn, Site(index, "att")

        def heads(site: Site = site) -> Tensor:
            with Capture(decoder.text_model, [site]) as capture:
                decoder.text_model(input_ids, use_cache=False)
            return capture[site]

        with _overridden(attention, "scaling", attention.scaling * _PROBE_SCALE):
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
