"""`Tap`: the activations of sites, handed over while the model runs."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .decoder import Decoder, find_decoder, refuse_attention_without_cap
from .hooks import Call, Forwards, Handle, check_fired_once
from .site import Site, as_sites


class _Handing(Forwards):
    def __init__(self, decoder: Decoder, sites: Iterable[Site], take: Callable[[Site, Tensor], Any]):
        super().__init__(decoder, sites)
        self._take = take

    def at_site(self, call: Call, site: Site, x: Tensor) -> None:
        self._take(site, x)

    def end(self, call: Call) -> None:
        check_fired_once(call, self.sites)


class Tap:
    """Call ``take(site, x)`` with x [batch, seq, width] at each of ``sites`` while a forward passes it.

        with Tap(model, sites, take) as tap:
            tap.text_model(input_ids=ids, use_cache=False)

    Where `Capture` keeps the activations of a forward until the next, nothing is kept here: ``take`` copies what it
    wants, and the model frees x when it needs it no more. ``x`` is the model's own tensor, not to be written to.

    Within the block the forward ends after the deepest of ``sites``: ``config.num_hidden_layers`` is that layer + 1,
    and afterwards what it was. What the text model returns is then of no use.

    Raises as `Capture` does, and ValueError for no sites.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site | str], take: Callable[[Site, Tensor], Any]):
        sites = as_sites(sites)
        if not sites:
            raise ValueError("sites: expected at least one, got none")
        self._decoder = find_decoder(model)
        refuse_attention_without_cap(self._decoder.config)
        self._handing = _Handing(self._decoder, sites, take)
        self._handles: list[Handle] = []
        self._n_layers = 0

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._handing.sites

    @property
    def text_model(self) -> nn.Module:
        return self._decoder.text_model

    def __enter__(self) -> "Tap":
        if self._handles:
            raise ValueError("Tap: expected to be entered once, found it active already")
        self._handles = self._handing.install(self._decoder)
        self._n_layers = self._decoder.config.num_hidden_layers
        self._decoder.config.num_hidden_layers = 1 + max(site.layer for site in self.sites)
        return self

    def __exit__(self, *exception) -> None:
        self._decoder.config.num_hidden_layers = self._n_layers
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
