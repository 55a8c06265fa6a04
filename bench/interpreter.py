"""Triton's interpreter, mended where Triton 3.6 and numpy 2.4 part: loops whose bound comes from a program's index."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
from triton.runtime import interpreter


def with_loop_bounds(patch_tensor: Callable) -> Callable:
    """The interpreter's own set-up of tensors, and then loop bounds.

    Triton 3.6 makes an array of shape (1,) of such a bound, of which numpy 2.4 refuses to take ``int()``.
    """

    def patched(tensor, *arguments):
        patch_tensor(tensor, *arguments)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    return patched


@contextlib.contextmanager
def mended() -> Iterator[None]:
    with mock.patch.object(interpreter, "_patch_lang_tensor", with_loop_bounds(interpreter._patch_lang_tensor)):
        yield
