"""`attach`: reconstructions in the place of the activations."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import Decoder, find_decoder, refuse_attention_without_cap, special_token_ids
from .hooks import check_activation, hook
from .site import Site, as_site

Reconstruct = Callable[[Tensor], Tensor]


class _SpecialTokens:
    """Knows, while the model runs, which positions hold tokens to leave alone."""

    def __init__(self, decoder: Decoder, ids: tuple[int, ...]):
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

    def __init__(self, site: Site, sae: Reconstruct, width: int, special: _SpecialTokens | None):
        self.site, self._sae, self._width, self._special = site, sae, width, special

    def __call__(self, x: Tensor) -> Tensor:
        check_activation(self.site, x, self._width)
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
            spliced_kinds(layer).discard(site.kind)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def spliced_kinds(layer: nn.Module) -> set[str]:
    """Kinds of the sites of ``layer`` that hold an SAE; kept on the layer, next to the hooks, so they stay together."""
    return layer.__dict__.setdefault("_gemmascope_spliced", set())


def attach(
    model: nn.Module,
    saes: Mapping[Site, Reconstruct] | Mapping[str, Reconstruct] | Mapping[Site | str, Reconstruct],
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
    decoder = find_decoder(model)
    refuse_attention_without_cap(decoder.config)
    if not isinstance(saes, Mapping):
        raise TypeError(f"saes: expected a dict from Site to SAE, got {type(saes).__name__}")
    by_site = {as_site(site): sae for site, sae in saes.items()}
    if not by_site:
        raise ValueError("saes: expected at least one site, got none")
    widths = {site: decoder.width(site) for site in by_site}
    layers = {site: decoder.layers[site.layer] for site in by_site}
    for site, sae in by_site.items():
        if not callable(sae):
            raise TypeError(f"site {site}: expected a module or function, got {type(sae).__name__}")
        d_model = getattr(sae, "d_model", widths[site])
        if d_model != widths[site]:
            raise ValueError(f"site {site}: expected an SAE of d_model {widths[site]}, got {d_model}")
        if site.kind in spliced_kinds(layers[site]):
            raise ValueError(f"site {site}: expected no SAE attached yet, found one; detach it first")

    skipped = special_token_ids(model) if skip_token_ids is None else tuple(skip_token_ids)
    special = _SpecialTokens(decoder, skipped) if skipped else None
    handles = list(special.handles) if special else []
    for site, sae in by_site.items():
        handles.append(hook(layers[site], site.kind, _Splice(site, sae, widths[site], special)))
        spliced_kinds(layers[site]).add(site.kind)
    return Attachment(layers, handles)
