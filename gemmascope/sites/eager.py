"""Modules whose hooks run whatever `torch.compile` has made of them.

Code that was compiled before a hook was set goes on without it (``torch._dynamo.config.skip_nnmodule_hook_guards``).
Two entries in a module's own dictionary keep it out of compiled code: a ``_compiled_call_impl``, which the module's
call goes to, that the compiler may not enter; and a ``forward``, whose coming and going compiled code notices.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn


class _Eager:
    """In the place of a module's ``_compiled_call_impl``; it may have several holders."""

    def __init__(self, module: nn.Module):
        self.holders = 0
        self.replaced = module.__dict__.get("_compiled_call_impl")
        self._call = torch.compiler.disable(module._call_impl, reason="hooks of gemmascope run outside compiled code")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def hold_eager(module: nn.Module) -> None:
    """Keep ``module`` out of compiled code until `release_eager` was called as often."""
    eager = module.__dict__.get("_compiled_call_impl")
    if not isinstance(eager, _Eager):
        eager = module.__dict__["_compiled_call_impl"] = _Eager(module)
        module.__dict__.setdefault("forward", module.forward)
    eager.holders += 1


def release_eager(module: nn.Module) -> None:
    eager = module.__dict__.get("_compiled_call_impl")
    if isinstance(eager, _Eager):
        eager.holders -= 1
        if eager.holders:
            return
        del module.__dict__["_compiled_call_impl"]
        if eager.replaced is not None:
            module.__dict__["_compiled_call_impl"] = eager.replaced
    # A copy of the module has this entry alone; one that somebody else has put in its place stays.
    if module.__dict__.get("forward") == MethodType(type(module).forward, module):
        del module.__dict__["forward"]
