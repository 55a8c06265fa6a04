"""`Capture`: the activations of sites, recorded."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import Decoder, find_decoder, refuse_attention_without_cap
from .hooks import Call, Forwards, Handle, check_fired_once
from .site import Site, as_site, as_sites


class _Recording(Forwards):
    """The activations of the latest forward that has ended."""

    def __init__(self, decoder: Decoder, sites: Iterable[Site]):
        super().__init__(decoder, sites)
        self.latest: dict[Site, Tensor] = {}
        self._is_read = True

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"latest": {}, "_is_read": False}  # nobody can read what a copy records

    def begin(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> None:
        self.latest = {}

    def at_site(self, call: Call, site: Site, x: Tensor) -> None:
        if not self._is_read:
            return
        if x.is_inference():
            with torch.inference_mode(False):
                call.activations[site] = x.clone()
        else:
            call.activations[site] = x.detach()

    def end(self, call: Call) -> None:
        check_fired_once(call, self.sites)
        self.latest = call.activations


class Capture:
    """Record the activations of ``sites`` during the latest forward of the model's text model.

        with Capture(model, sites) as capture:
            model.model(input_ids, use_cache=False)
        resid = capture[Site(3, "resid")]  # [batch, seq, width]

    What is recorded is detached from the graph and an ordinary tensor, which autograd accepts as input even when it
    was captured under `torch.inference_mode`; it shares memory with the model's own activation otherwise. It stays
    readable after the block. Hooks run in the order they were set: a `Capture` opened inside `attach` sees the spliced
    activations, one opened before it those of the model. Forwards may run in several threads or one within another;
    each is recorded on its own, and the last to end is the latest. Inside the block a model that `torch.compile` has
    seen runs eagerly, from the modules that lead to the layers on.

    Raises EnvironmentProblemError when the forward ends and a site did not fire exactly once, when its shape is not
    [batch, seq, width] or its device meta, when it fires outside a forward (gradient checkpointing computing a layer
    again), when a module at a site was replaced, and for a model whose attention drops its soft-cap; ValueError for
    sites that the model does not have.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site | str]):
        sites = as_sites(sites)
        self._decoder = find_decoder(model)
        refuse_attention_without_cap(self._decoder.config)
        self._recording = _Recording(self._decoder, sites)
        self._handles: list[Handle] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._recording.sites

    def __enter__(self) -> "Capture":
        if self._handles:
            raise ValueError("Capture: expected to be entered once, found it active already")
        self._handles = self._recording.install(self._decoder)
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, site: Site | str) -> Tensor:
        site = as_site(site)
        if site not in self.sites:
            raise ValueError(f"site {site}: expected one of {', '.join(map(str, self.sites))}")
        if site not in self._recording.latest:
            raise ValueError(f"site {site}: expected a forward of the model before reading, found none completed")
        return self._recording.latest[site]
