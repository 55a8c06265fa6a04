"""`attach`: reconstructions in the place of the activations."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_type
from ..errors import EnvironmentProblemError
from .decoder import Decoder, find_decoder, refuse_attention_without_cap
from .hooks import Call, Forwards, Handle, checkpointing, hooks_at, hooks_of, remove
from .site import Site, as_site
from .tokens import skipped_ids

Reconstruct = Callable[[Tensor], Tensor]


class _Splices(Forwards):
    """Puts an SAE's reconstruction in the place of the activation at each of ``saes``."""

    def __init__(self, decoder: Decoder, saes: Mapping[Site, Reconstruct], skipped: tuple[int, ...]):
        super().__init__(decoder, saes)
        self._saes, self._skipped = dict(saes), skipped

    def begin(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> None:
        # A multimodal model hands its text model embeddings, so the ids are those of the innermost call that has any.
        input_ids = args[0] if args else kwargs.get("input_ids")
        if self._skipped and isinstance(input_ids, Tensor) and not input_ids.is_floating_point():
            skipped = torch.tensor(self._skipped, device=input_ids.device, dtype=torch.int64)
            call.special = torch.isin(input_ids.long(), skipped)
        if self._skipped and call.special is None and call.depth == self._innermost:
            raise ValueError(
                "input_ids: expected them with the inputs, to leave special tokens alone, found only inputs_embeds; "
                "attach with skip_token_ids=() to splice at every position"
            )

    def at_site(self, call: Call, site: Site, x: Tensor) -> Tensor:
        if call.differentiable and checkpointing():
            raise EnvironmentProblemError(
                f"site {site}: expected to fire once in a forward, found gradient checkpointing, which computes it "
                "again when the SAE may be gone; switch gradient checkpointing off"
            )
        x_hat = self._saes[site](x)
        if not isinstance(x_hat, Tensor):
            raise TypeError(f"site {site}: expected a reconstruction that is a tensor, got {type(x_hat).__name__}")
        if x_hat.shape != x.shape:
            raise ValueError(
                f"site {site}: expected a reconstruction of shape {list(x.shape)}, got {list(x_hat.shape)}"
            )
        x_hat = x_hat.to(x.dtype)
        if not self._skipped:
            return x_hat
        mask = call.special
        if mask is None or mask.shape != x.shape[:2]:
            found = "none" if mask is None else f"{list(mask.shape)}"
            raise ValueError(f"input_ids: expected shape {list(x.shape[:2])} as at site {site}, found {found}")
        return torch.where(mask.to(x.device)[..., None], x, x_hat)

    def end(self, call: Call) -> None:
        for site in self.sites:
            if not call.fired.get(site):
                raise EnvironmentProblemError(f"site {site}: expected to fire once in a forward, found 0 times")


class Attachment:
    """SAEs spliced into a model, from `attach`. Leaving the with-block, or `detach`, restores the model."""

    def __init__(self, sites: tuple[Site, ...], handles: list[Handle]):
        self._sites, self._handles = sites, handles

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def detach(self) -> None:
        """Take the SAEs out again; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def is_spliced(layer: nn.Module, kind: str) -> bool:
    """Whether that site of ``layer`` holds an SAE."""
    return any(isinstance(hook.forwards, _Splices) for hook in hooks_at(layer, kind))


def detach_all(model: nn.Module) -> None:
    """Take every SAE out of ``model`` that `attach` put in, whoever holds the handles; without any, do nothing.

    Raises TypeError for what is no module.
    """
    check_type("model", model, nn.Module)
    for module in model.modules():
        for key, hook in hooks_of(module):
            if isinstance(hook.forwards, _Splices):
                remove(module, key)


def attach(
    model: nn.Module,
    saes: Mapping[Site, Reconstruct] | Mapping[str, Reconstruct] | Mapping[Site | str, Reconstruct],
    skip_token_ids: Iterable[int] | None = None,
) -> Attachment:
    """Splice SAEs into ``model``: from now on each site's activation x is replaced by ``sae(x)``, in x's dtype.

        with attach(model, {Site(3, "resid"): sae}):
            logits = model(input_ids).logits

    Without ``with``, keep what is returned and call its ``detach()``. Gradients flow through the SAEs.

    saes: a module per `Site` (or name of one), mapping [batch, seq, width] to the same shape; a ``d_model`` it has is
    compared with the width of the site. skip_token_ids: positions holding these tokens keep their activation; by
    default BOS, EOS and PAD of the model's config (`special_token_ids`), on which SAEs are not trained. Pass () to
    splice at every position, which inputs given as ``inputs_embeds`` alone need.

    Each forward has its own special tokens, in whichever thread it runs and whatever other forward it runs within. A
    model that `torch.compile` has seen runs eagerly while SAEs are attached, from the modules that lead to the layers
    on. The ``hidden_states`` of ``output_hidden_states`` are the spliced residuals, those that the next layer reads
    (the last one normed, as without SAEs). A copy of an attached model, deep or pickled, is attached to copies of the
    SAEs; `detach_all` takes them out.

    Raises ValueError for an empty ``saes``, an unknown site, a width that does not fit or a site that holds an SAE
    already; TypeError for what is no model, no SAE or no token id; EnvironmentProblemError for a model whose attention
    drops its soft-cap or is tensor-parallel. Nothing is attached then. During a forward: ValueError without input_ids,
    or when an SAE changes the shape; EnvironmentProblemError when a site did not fire, when the module at it was
    replaced, when its activations are on the device meta, or when gradient checkpointing would compute it again in the
    backward pass.
    """
    decoder = find_decoder(model)
    refuse_attention_without_cap(decoder.config)
    if not isinstance(saes, Mapping):
        raise TypeError(f"saes: expected a dict from Site to SAE, got {type(saes).__name__}")
    by_site = {as_site(site): sae for site, sae in saes.items()}
    if not by_site:
        raise ValueError("saes: expected at least one site, got none")
    if len(by_site) < len(saes):
        raise ValueError("saes: expected each site once, got one by both its Site and its name")
    for site, sae in by_site.items():
        width = decoder.width(site)
        if not callable(sae):
            raise TypeError(f"site {site}: expected a module or function, got {type(sae).__name__}")
        d_model = getattr(sae, "d_model", width)
        if d_model != width:
            raise ValueError(f"site {site}: expected an SAE of d_model {width}, got {d_model}")
        if is_spliced(decoder.layers[site.layer], site.kind):
            raise ValueError(f"site {site}: expected no SAE attached yet, found one; detach it first")
    splices = _Splices(decoder, by_site, skipped_ids(model, skip_token_ids))
    return Attachment(splices.sites, splices.install(decoder))
