"""`attribute`: how a metric of the model's output depends on each latent that fired."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..checks import check_choice
from ..kernels import SparseCode
from .attach import attach
from .collect import checked_saes, encoded, kept_tokens
from .decoder import evaluating, input_device
from .site import Site
from .splice import MODES
from .tokens import forward_arguments


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found; the rows of every code are the tokens where ``kept``, in order."""

    codes: dict[Site, SparseCode]
    """The activations f."""
    gradients: dict[Site, SparseCode]
    """∂metric/∂f of the same entries: the same indices and offsets, other values."""
    kept: Tensor
    """bool [rows, context]."""
    metric: float

    def effects(self, site: Site) -> SparseCode:
        """−f·∂metric/∂f of each entry: to first order, what ablating it alone does to the metric."""
        code = self.codes[site]
        return code._replace(values=-code.values * self.gradients[site].values)


def attribute(
    model: nn.Module,
    tokens: Tensor,
    saes: Mapping[Site, Any] | Mapping[str, Any] | Mapping[Site | str, Any],
    metric: Callable[[Any], Tensor],
    *,
    mode: str = "with_error",
    attention_mask: Tensor | None = None,
    skip_token_ids: Iterable[int] | None = None,
) -> Attribution:
    """∂metric/∂f of every latent that fires, at all sites of ``saes`` from one forward and one backward pass.

        found = attribute(model, tokens, {Site(3, "resid"): sae}, lambda output: output.logits[0, -1, 42])
        found.gradients[Site(3, "resid")]  # a SparseCode beside found.codes[Site(3, "resid")]

    metric: makes a scalar tensor of what ``model(…)`` returns. tokens: ids [rows, context]; attention_mask and
    skip_token_ids as of `collect`. mode: as of `attach`. "with_error": the derivative of the model itself in the
    direction of each latent: activations and output are the model's own, to the bit, and behind a site it responds as
    it does without SAEs. "replace": that of the model that runs on the reconstructions, SAEs that come later included.
    Gates are held as they are: no derivative goes through the threshold.

    With "with_error" nothing of the size tokens × d_sae is made for an SAE with ``encode_sparse``, whose ``decode``
    takes a `SparseCode` and is differentiable in its values; "replace" needs the dense activations, and their graph.
    The model is in evaluation mode meanwhile, and no ``grad`` is left in it or in the SAEs. Memory is that of a
    backward pass from the first site on, so give few rows at a time.

    Raises ValueError for a metric that is no scalar or does not depend on the output, TypeError for one that is no
    tensor; else as `attach` and `collect` do.
    """
    check_choice("mode", mode, MODES)
    if not callable(metric):
        raise TypeError(f"metric: expected a function, got {type(metric).__name__}")
    sae_at = checked_saes(model, saes)
    for site, sae in sae_at.items():
        if not hasattr(sae, "decode"):
            raise TypeError(f"site {site}: expected an SAE with encode and decode, got {type(sae).__name__}")
    kept = kept_tokens(model, tokens, attention_mask, skip_token_ids)
    probes = {site: _Probe(sae, mode, kept) for site, sae in sae_at.items()}
    arguments = forward_arguments(tokens, attention_mask, input_device(model))
    with torch.enable_grad(), evaluating(model), attach(model, probes, skip_token_ids=()):
        value = metric(model(**arguments))
        if not isinstance(value, Tensor):
            raise TypeError(f"metric: expected a function to a torch.Tensor, got one to {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"metric: expected a function to a scalar, got one to shape {list(value.shape)}")
        if not value.requires_grad:
            raise ValueError("metric: expected one that depends on the model's output, differentiably, got a constant")
        values = [probe.values for probe in probes.values()]
        found = torch.autograd.grad(value.sum(), values, allow_unused=True, materialize_grads=True)
    codes = {site: probe.code for site, probe in probes.items()}
    gradients = {site: codes[site]._replace(values=each) for site, each in zip(codes, found, strict=True)}
    return Attribution(codes, gradients, kept, value.item())


class _Probe:
    """A function of x [batch, seq, width] that keeps the code of the tokens that are kept, as a part of the graph."""

    def __init__(self, sae: Any, mode: str, kept: Tensor):
        self._sae, self._mode, self._kept = sae, mode, kept
        self.code: SparseCode
        self.values: Tensor

    @without_autocast
    def __call__(self, x: Tensor) -> Tensor:
        rows = self._kept.flatten().to(x.device).nonzero()[:, 0]
        inputs = x.flatten(0, 1).index_select(0, rows)
        if self._mode == "with_error":
            code = encoded(self._sae, inputs.detach())
            self.values = code.values.detach().requires_grad_()
        else:
            code = SparseCode.from_dense(self._sae.encode(inputs))
            self.values = code.values.requires_grad_()
        self.code = code._replace(values=self.values.detach())
        x_hat = self._decoded(code._replace(values=self.values))
        if self._mode == "with_error":
            return _Beside.apply(x, x_hat, rows)
        return x.flatten(0, 1).index_copy(0, rows, x_hat.to(x.dtype)).reshape(x.shape)

    def _decoded(self, code: SparseCode) -> Tensor:
        return self._sae.decode(code if hasattr(self._sae, "encode_sparse") else code.to_dense())


class _Beside(torch.autograd.Function):
    """x itself, with the gradient of x and that of x̂ [n, width] of some of its tokens: d(x̂ + (x − x̂)) with the error
    x − x̂ a function of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dtype = x_hat.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        [grad], [rows] = grads, ctx.saved_tensors
        return grad, grad.flatten(0, 1).index_select(0, rows).to(ctx.dtype), None
