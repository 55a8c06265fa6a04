"""`Capture`: the activations of sites, recorded."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EnvironmentProblemError
from .decoder import find_decoder, refuse_attention_without_cap
from .hooks import check_activation, hook
from .site import Site, as_site


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
        self._decoder = find_decoder(model)
        refuse_attention_without_cap(self._decoder.config)
        self._widths = {site: self._decoder.width(site) for site in map(as_site, sites)}
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
            self._handles.append(hook(layer, site.kind, partial(self._record, site)))
        self._handles.append(text_model.register_forward_hook(self._end))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, site: Site | str) -> Tensor:
        site = as_site(site)
        if site not in self._widths:
            raise ValueError(f"site {site}: expected one of {', '.join(map(str, self._widths))}")
        if self._fired is not None or site not in self._captured:
            raise ValueError(f"site {site}: expected a forward of the model before reading, found none completed")
        return self._captured[site]

    def _begin(self, module, args) -> None:
        self._captured.clear()
        self._fired = dict.fromkeys(self._widths, 0)

    def _record(self, site: Site, activation: Tensor) -> None:
        check_activation(site, activation, self._widths[site])
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
        assert fired is not None  # `_begin` comes first
        for site, times in fired.items():
            if times != 1:
                self._captured.clear()
                raise EnvironmentProblemError(f"site {site}: expected to fire once in a forward, found {times} times")
