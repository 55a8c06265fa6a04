"""How a site's activation is reached while the model runs.

By hooks alone: the ``hidden_states`` a transformers model returns have the final norm applied to the last entry and
contain neither att nor mlp.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import EnvironmentProblemError
from .site import Site


def hook(layer: nn.Module, kind: str, function: Callable[[Tensor], Tensor | None]):
    """Call ``function`` with each activation of the site; a tensor it returns takes the activation's place."""
    if kind == "att":

        def before(module, args):
            replaced = function(args[0])
            return None if replaced is None else (replaced, *args[1:])

        return layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(before)

    def after(module, args, output):
        # A decoder layer returns a tensor since transformers 5 and a tuple before; indexing a tensor would silently
        # give the first row of the batch.
        is_tuple = isinstance(output, tuple)
        replaced = function(output[0] if is_tuple else output)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if is_tuple else replaced

    module = layer if kind == "resid" else layer.get_submodule("post_feedforward_layernorm")
    return module.register_forward_hook(after)


def check_activation(site: Site, activation: Tensor, width: int) -> None:
    if not isinstance(activation, Tensor):
        raise EnvironmentProblemError(f"site {site}: expected a tensor, found {type(activation).__name__}")
    if activation.ndim != 3 or activation.shape[-1] != width:
        raise EnvironmentProblemError(
            f"site {site}: expected activations [batch, seq, {width}], found {list(activation.shape)}"
        )
