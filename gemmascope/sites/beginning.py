"""`beginning_at`, `without_layers`: forwards of a model that begin at one of its layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..checks import check_int
from .decoder import find_decoder


@contextmanager
def beginning_at(model: nn.Module, layer: int, stream: Tensor) -> Iterator[None]:
    """In this block forwards of ``model`` do not run the layers before ``layer``, which is given ``stream`` [batch,
    seq, hidden_size] for what they would have made of the tokens.

    To run the model on the same tokens again with something changed from that layer on: with ``stream`` the output of
    the layer before in the first forward, the result is the same, to the bit. The tokens must still be those. Nothing
    at a site of the layers before can be replaced or means anything then.

    Raises ValueError for a layer that the model does not have.
    """
    layers = find_decoder(model).layers
    check_int("layer", layer, 0, len(layers) - 1)
    with without_layers(layers[:layer], stream):
        yield


@contextmanager
def without_layers(layers: Sequence[nn.Module], stream: Tensor) -> Iterator[None]:
    """In this block ``layers``, the first ones of a stack, or all, are not run: the last of them gives ``stream``. The
    layers are of any decoder whose layers take the stream first and give the stream alone."""
    skipped: list[tuple[Any, Any]] = []
    try:
        for index, module in enumerate(layers):
            skipped.append((module, module.__dict__.get("forward")))
            module.forward = _giving(stream if index == 0 else None)
        yield
    finally:
        for module, before in skipped:
            if before is None:
                del module.forward
            else:  # that of a package which loads weights when they are needed
                module.forward = before


def _giving(stream: Tensor | None) -> Callable[..., Tensor]:
    """A layer's forward that gives ``stream``, without one what it is given."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if stream is None else stream

    return forward
