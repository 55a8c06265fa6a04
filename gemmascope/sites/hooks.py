"""How a site's activation is reached while the model runs, and which forward of the model it belongs to.

By hooks alone: the ``hidden_states`` a transformers model returns have the final norm applied to the last entry and
contain neither att nor mlp.
"""

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ..errors import EnvironmentProblemError
from .decoder import Decoder
from .eager import hold_eager, outside_compiled_code, release_eager
from .site import HOOK_POINTS, Site

# Kinds whose site is the input of a module, or made from it.
BEFORE = ("att", "mlp_in_normed")


def normalised(x: Tensor, eps: float) -> Tensor:
    """x·(mean x² + eps)^−½ over the last dimension, in fp32 (fp64 with fp64), then in the dtype of x: what an RMS norm
    makes of x before its gain."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@dataclass(eq=False)
class Call:
    """One call, while it runs, of a module that a forward passes through on its way to the layers."""

    depth: int
    """Which of `Decoder.callers` it is."""
    outer: "Call | None"
    """The call that this one is part of, if any: not that of another forward, within which this one may run."""
    differentiable: bool
    """Whether gradients were enabled when it began."""
    special: Tensor | None = None
    """Which positions hold tokens to leave alone; bool [batch, seq]."""
    start: int = 0
    """The column at which it begins, where that matters: those before it are in a cache."""
    activations: dict[Site, Tensor] = field(default_factory=dict)
    fired: dict[Site, int] = field(default_factory=dict)
    reached_layers: bool = False


class Forwards:
    """What happens at ``sites`` in each forward of a model, by hooks that `install` sets.

    Every forward has a state of its own, the `Call` of its text model: several may run at a time, in threads or one
    within another. Copies of the model, deep or pickled, carry copies of all of this and depend on nothing here.
    """

    deep = True
    """Whether nothing between the hooks is compiled either, so that every bit is the eager model's."""

    def __init__(self, decoder: Decoder, sites: Iterable[Site]):
        self._widths = {site: decoder.width(site) for site in sites}
        self._eps = getattr(decoder.config, "rms_norm_eps", 0.0)
        self._innermost, self._stack_name = len(decoder.callers) - 1, decoder.stack_name
        self._running = threading.local()

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self._widths)

    def install(self, decoder: Decoder) -> "list[Handle]":
        """Set the hooks."""
        handles = []
        for depth, module in enumerate(decoder.callers):
            handle = module.register_forward_pre_hook(_Before(self, depth), with_kwargs=True)
            handles.append(Handle(module, handle, self.deep))
        for site in self._widths:
            handles.append(_hook(decoder.layers[site.layer], _AtSite(self, site)))
        for depth, module in enumerate(decoder.callers):
            handle = module.register_forward_hook(_After(self, depth), always_call=True)
            handles.append(Handle(module, handle, self.deep))
        return handles

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _running=threading.local())

    # ---- what subclasses do

    def begin(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> None:
        """A call begins; that of the text model is the last to."""

    def at_site(self, call: Call, site: Site, x: Tensor) -> Tensor | None:
        """A site fires; a tensor that is returned takes the activation's place."""

    def end(self, call: Call) -> None:
        """The text model's call has ended without an exception."""

    # ---- what the hooks do

    def _calls(self) -> list[Call]:
        """Those that run in this thread, each within the one before."""
        return self._running.__dict__.setdefault("calls", [])

    def before(self, depth: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls = self._calls()
        outer = calls[-1] if calls and calls[-1].depth < depth else None
        call = Call(depth, outer, torch.is_grad_enabled(), outer.special if outer else None)
        calls.append(call)
        if depth == self._innermost:
            self._refuse_replaced(module)
        self.begin(call, args, kwargs)

    def after(self, depth: int, output: Any) -> None:
        calls = self._calls()
        while calls and calls[-1].depth > depth:  # interrupted, by an exception that torch does not tell hooks of
            calls.pop()
        if not calls or calls[-1].depth != depth:
            return
        call = calls.pop()
        if output is None:  # the forward failed; its exception is on the way
            return
        if depth == self._innermost:
            call.reached_layers = True
            self.end(call)
        if not call.reached_layers:
            raise EnvironmentProblemError(
                f"site {self.sites[0]}: expected to fire once in a forward, found that the forward did not go through "
                "the model's own layers, as with a CUDA graph or an exported copy"
            )
        if call.outer is not None:
            call.outer.reached_layers = True

    def fire(self, site: Site, x: Any) -> Tensor | None:
        check_activation(site, x, self._widths[site])
        if site.kind == "mlp_in_normed":
            x = normalised(x, self._eps)
        calls = self._calls()
        if not calls or calls[-1].depth != self._innermost:
            raise EnvironmentProblemError(
                f"site {site}: expected to fire during a forward of the model, found it outside one; "
                "switch gradient checkpointing off"
            )
        call = calls[-1]
        call.fired[site] = call.fired.get(site, 0) + 1
        return self.at_site(call, site, x)

    def _refuse_replaced(self, text_model: nn.Module) -> None:
        layers: Any = getattr(text_model, self._stack_name)
        for site in self._widths:
            try:
                in_place = any(hook.forwards is self for hook in hooks_at(layers[site.layer], site.kind))
            except (AttributeError, IndexError):
                in_place = False
            if not in_place:
                raise EnvironmentProblemError(
                    f"site {site}: expected the module that was there when the hooks were set, found another in its "
                    "place (an adapter added or merged?); set them again: detach, then attach, or open a new Capture"
                )


@dataclass(eq=False)
class Hook:
    """One of ours, told from others by its class. What it does is no compiler's matter."""

    forwards: Forwards


@dataclass(eq=False)
class _Before(Hook):
    depth: int

    @outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.forwards.before(self.depth, module, args, kwargs)


@dataclass(eq=False)
class _After(Hook):
    depth: int

    @outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.forwards.after(self.depth, output)


@dataclass(eq=False)
class _AtSite(Hook):
    site: Site

    @outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple, output: Any = None) -> Any:
        if self.site.kind in BEFORE:
            replaced = self.forwards.fire(self.site, args[0] if args else None)
            return None if replaced is None else (replaced, *args[1:])
        # A decoder layer returns a tensor since transformers 5 and a tuple before; indexing a tensor would silently
        # give the first row of the batch.
        is_tuple = isinstance(output, tuple)
        replaced = self.forwards.fire(self.site, output[0] if is_tuple else output)
        return (replaced, *output[1:]) if is_tuple and replaced is not None else replaced


class Handle:
    """One hook that is set. It keeps its module's call out of compiled code, as deep as `hold_eager` is told."""

    def __init__(self, module: nn.Module, handle: Any, deep: bool):
        self._module, self._id = module, handle.id
        hold_eager(module, deep)

    def remove(self) -> None:
        """Take it out; a second call does nothing."""
        remove(self._module, self._id)


def hooks_of(module: nn.Module) -> list[tuple[int, Hook]]:
    """Ours on ``module``, with their keys there."""
    found = (*module._forward_pre_hooks.items(), *module._forward_hooks.items())
    return [(key, hook) for key, hook in found if isinstance(hook, Hook)]


def remove(module: nn.Module, key: int) -> None:
    """Take one of `hooks_of` out, if it is there."""
    hook = module._forward_pre_hooks.get(key) or module._forward_hooks.get(key)
    if isinstance(hook, Hook):
        for kind in ("pre_hooks", "pre_hooks_with_kwargs", "hooks", "hooks_with_kwargs", "hooks_always_called"):
            getattr(module, f"_forward_{kind}").pop(key, None)
        release_eager(module, hook.forwards.deep)


def hooks_at(layer: nn.Module, kind: str) -> "list[_AtSite]":
    """Ours at a site of ``layer``."""
    found = (hook for _, hook in hooks_of(_module_at(layer, kind)))
    return [hook for hook in found if isinstance(hook, _AtSite) and hook.site.kind == kind]


def _module_at(layer: nn.Module, kind: str) -> nn.Module:
    """Whose input or output it is; the layer itself where the hook point names no module within."""
    return layer.get_submodule(HOOK_POINTS[kind].rpartition(".")[0])


def _hook(layer: nn.Module, hook: _AtSite) -> Handle:
    module = _module_at(layer, hook.site.kind)
    if hook.site.kind in BEFORE:
        return Handle(module, module.register_forward_pre_hook(hook), hook.forwards.deep)
    handle = module.register_forward_hook(hook)
    # What records `output_hidden_states` stays on the layer after its first use; it must come after the splices.
    for key, other in list(module._forward_hooks.items()):
        if getattr(other, "__module__", None) == "transformers.utils.output_capturing":
            module._forward_hooks[key] = module._forward_hooks.pop(key)
    return Handle(module, handle, hook.forwards.deep)


def check_activation(site: Site, activation: Any, width: int) -> None:
    if not isinstance(activation, Tensor):
        raise EnvironmentProblemError(f"site {site}: expected a tensor, found {type(activation).__name__}")
    if activation.ndim != 3 or activation.shape[-1] != width:
        raise EnvironmentProblemError(
            f"site {site}: expected activations [batch, seq, {width}], found {list(activation.shape)}"
        )
    if activation.is_meta:
        raise EnvironmentProblemError(
            f"site {site}: expected activations with values, found them on the device meta; load the model's weights"
        )


def check_fired_once(call: Call, sites: Iterable[Site]) -> None:
    """Raise EnvironmentProblemError unless each of ``sites`` fired exactly once in the forward that has ended."""
    for site in sites:
        if (times := call.fired.get(site, 0)) != 1:
            raise EnvironmentProblemError(f"site {site}: expected to fire once in a forward, found {times} times")


def checkpointing() -> bool:
    """Whether what runs now will be computed again in the backward pass, by `torch.utils.checkpoint`."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
