"""Modules whose hooks run whatever `torch.compile` has made of them.

Code that was compiled before a hook was set goes on without it (``torch._dynamo.config.skip_nnmodule_hook_guards``).
Two entries in a module's own dictionary keep its call out of compiled code: a ``_compiled_call_impl``, which the
module's call goes to, that the compiler may not enter; and a ``forward``, whose coming and going compiled code notices.
What lies between the hooks, the module's own forward, may be compiled where its holders say so.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn

_REASON = "hooks of gemmascope run outside compiled code"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_compiled_code(function: _Function) -> _Function:
    """A decorator: neither the function nor what it calls is compiled with what calls it."""
    return cast(Any, torch.compiler.disable(function, reason=_REASON))


class _Eager:
    """In the place of a module's ``_compiled_call_impl``; it may have several holders."""

    def __init__(self, module: nn.Module):
        self.holders = self.deep_holders = 0
        self.replaced = module.__dict__.get("_compiled_call_impl")
        call = module._call_impl
        self._shallow = torch.compiler.disable(call, recursive=False, reason=_REASON)
        self._deep = outside_compiled_code(call)

    @torch.compiler.disable(recursive=False, reason=_REASON)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._deep if self.deep_holders else self._shallow)(*args, **kwargs)


def hold_eager(module: nn.Module, deep: bool = True) -> None:
    """Keep the call of ``module`` out of compiled code until `release_eager` was called as often.

    deep: also what the module's forward calls; one such holder is enough.
    """
    eager = module.__dict__.get("_compiled_call_impl")
    if not isinstance(eager, _Eager):
        eager = module.__dict__["_compiled_call_impl"] = _Eager(module)
        module.__dict__.setdefault("forward", module.forward)
    eager.holders += 1
    eager.deep_holders += deep


def release_eager(module: nn.Module, deep: bool = True) -> None:
    """Undo one `hold_eager` of the same ``deep``."""
    eager = module.__dict__.get("_compiled_call_impl")
    if isinstance(eager, _Eager):
        eager.holders -= 1
        eager.deep_holders -= deep
        if eager.holders:
            return
        del module.__dict__["_compiled_call_impl"]
        if eager.replaced is not None:
            module.__dict__["_compiled_call_impl"] = eager.replaced
    # A copy of the module has this entry alone; one that somebody else has put in its place stays.
    if module.__dict__.get("forward") == MethodType(type(module).forward, module):
        del module.__dict__["forward"]
