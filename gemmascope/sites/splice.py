"""`Splice`: what takes the place of the activation at one site."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import SparseCode, density
from .edits import Edit
from .site import Site
from .window import Window

Reconstruct = Callable[[Tensor], Tensor]
MODES = ("replace", "with_error")


class Splice:
    """An SAE at ``site``, its code edited by ``edits``, which are resolved.

        replace      x ← D(f′)                   D the decoder, f the code of x, f′ the edited one
        with_error   x ← x + (D(f′) − D(f))      x itself, to the bit, where nothing is edited

    Where no gradient is wanted, an SAE with ``encode_sparse`` works on its active entries.
    """

    def __init__(self, site: Site, sae: Any, mode: str, edits: Sequence[Edit]):
        self.site, self.sae, self.mode, self.edits = site, sae, mode, tuple(edits)

    @property
    def depends_on_columns(self) -> bool:
        return any(edit.depends_on_columns for edit in self.edits)

    def __call__(self, x: Tensor, window: Window, given: Tensor | None = None) -> Tensor:
        """What takes the place of x [batch, seq, width], in its shape and dtype. given: what a transcoder reads
        [batch, seq, d_in]; an SAE reads x."""
        read = x if given is None else given
        if not self.edits:
            return x if self.mode == "with_error" else self._checked(self.sae(read), x).to(x.dtype)
        code, edited = self._codes(read, window)
        x_hat = self._decoded(edited, code, x, given)
        if self.mode == "replace":
            return x_hat.to(x.dtype)
        return _moved(x, self._decoded(code, code, x, given), x_hat)

    def _codes(self, x: Tensor, window: Window) -> tuple[Any, Any]:
        """The code of x and the edited one: of entries, or dense [batch, seq, d_sae]."""
        if hasattr(self.sae, "encode_sparse") and not _wants_gradients(self.sae, x):
            code = edited = self.sae.encode_sparse(x.flatten(0, 1))
            for edit in self.edits:
                edited = edit.sparse(edited, window)
            return code, edited
        code = self.sae.encode(x)
        expected = (*x.shape[:-1], self.sae.d_sae)
        if not isinstance(code, Tensor) or code.shape != expected:
            found = f"shape {list(code.shape)}" if isinstance(code, Tensor) else type(code).__name__
            raise ValueError(f"site {self.site}: expected activations of shape {list(expected)}, got {found}")
        edited = code.flatten(0, 1)
        for edit in self.edits:
            edited = edit.dense(edited, window)
        return code, edited.reshape(code.shape)

    def _decoded(self, code: Any, like: Any, x: Tensor, given: Tensor | None) -> Tensor:
        """x̂ of a code, by entries or as a whole matrix as is best for ``like``, so that equal rows of both give equal
        bits."""
        if isinstance(code, SparseCode):
            entries = code if density.is_sparse(like) else code.to_dense()
            x_hat = self._decode(entries, None if given is None else given.flatten(0, 1))
            return self._checked(x_hat, x.flatten(0, 1)).reshape(x.shape)
        return self._checked(self._decode(code, given), x)

    def _decode(self, code: Any, given: Tensor | None) -> Any:
        return self.sae.decode(code) if given is None else self.sae.decode(code, given)

    def _checked(self, x_hat: Any, x: Tensor) -> Tensor:
        if not isinstance(x_hat, Tensor):
            raise TypeError(f"site {self.site}: expected a reconstruction that is a tensor, got {type(x_hat).__name__}")
        if x_hat.shape != x.shape:
            raise ValueError(
                f"site {self.site}: expected a reconstruction of shape {list(x.shape)}, got {list(x_hat.shape)}"
            )
        return x_hat


def _moved(x: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """x + (after − before), rounded once; where they are equal, x to the bit.

    As x − (before − after): x − 0 is x, and −0 + 0 would be 0.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, after.dtype), torch.float32)
    return (x.to(wide) - (before.to(wide) - after.to(wide))).to(x.dtype)


def _wants_gradients(sae: Any, x: Tensor) -> bool:
    """Whether what is computed here is to be differentiated."""
    parameters = sae.parameters() if isinstance(sae, nn.Module) else ()
    return torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in parameters))
