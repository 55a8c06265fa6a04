"""`attach`: reconstructions in the place of the activations, as they are or of a code that was edited."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_type
from ..errors import EnvironmentProblemError
from .decoder import Decoder, find_decoder, refuse_attention_without_cap
from .edits import Edit, as_edits
from .hooks import Call, Forwards, Handle, checkpointing, hooks_at, hooks_of, remove
from .reading import input_of, is_transcoder
from .scales import LatentScales
from .site import INPUT_KINDS, KINDS, Site, as_site, by_site
from .splice import MODES, Reconstruct, Splice
from .tokens import isin, skipped_ids
from .window import Window, check_mask, start_of


class _Splices(Forwards):
    """Puts what a `Splice` makes of it in the place of the activation at each of its sites. inputs: by site, the one
    that a transcoder there reads."""

    deep = False

    def __init__(
        self,
        decoder: Decoder,
        splices: Iterable[Splice],
        inputs: Mapping[Site, Site],
        skipped: tuple[int, ...],
        positions: Tensor | None,
    ):
        self._splices, self._inputs = {splice.site: splice for splice in splices}, dict(inputs)
        super().__init__(decoder, dict.fromkeys([*self._inputs.values(), *self._splices]))
        self._skipped, self._positions = skipped, positions
        self._counts_columns = positions is not None or any(
            splice.depends_on_columns for splice in self._splices.values()
        )

    def begin(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> None:
        # A multimodal model hands its text model embeddings, so the ids are those of the innermost call that has any.
        input_ids = args[0] if args else kwargs.get("input_ids")
        if self._skipped and isinstance(input_ids, Tensor) and not input_ids.is_floating_point():
            call.special = isin(input_ids, self._skipped)
        if self._skipped and call.special is None and call.depth == self._innermost:
            raise ValueError(
                "input_ids: expected them with the inputs, to leave special tokens alone, found only inputs_embeds; "
                "attach with skip_token_ids=() to splice at every position"
            )
        if self._counts_columns and call.depth == self._innermost:
            call.start = start_of([*args, *kwargs.values()])

    def at_site(self, call: Call, site: Site, x: Tensor) -> Tensor | None:
        if call.differentiable and checkpointing():
            raise EnvironmentProblemError(
                f"site {site}: expected to fire once in a forward, found gradient checkpointing, which computes it "
                "again when the SAE may be gone; switch gradient checkpointing off"
            )
        out = self._replaced(call, site, x) if site in self._splices else None
        if site in self._inputs.values():
            call.activations[site] = x if out is None else out
        return out

    def writes(self, site: Site) -> bool:
        """Or whether a transcoder only reads there."""
        return site in self._splices

    def _replaced(self, call: Call, site: Site, x: Tensor) -> Tensor:
        window, given = Window(x.shape[0], x.shape[1], call.start), None
        if (source := self._inputs.get(site)) is not None:
            given = call.activations.get(source)
            if given is None:
                raise EnvironmentProblemError(f"site {site}: expected {source} to fire before it, found it did not")
            given = given.to(x.device)
        replaced = self._splices[site](x, window, given)
        left_alone = self._left_alone(call, site, x, window)
        return replaced if left_alone is None else torch.where(left_alone.to(x.device)[..., None], x, replaced)

    def _left_alone(self, call: Call, site: Site, x: Tensor, window: Window) -> Tensor | None:
        """Which positions keep their activation: bool [batch, seq], or None for none."""
        mask = None
        if self._skipped:
            mask = call.special
            if mask is None or mask.shape != x.shape[:2]:
                found = "none" if mask is None else f"{list(mask.shape)}"
                raise ValueError(f"input_ids: expected shape {list(x.shape[:2])} as at site {site}, found {found}")
        if self._positions is not None:
            elsewhere = ~window.cut("positions", self._positions, False)
            mask = elsewhere if mask is None else mask | elsewhere.to(mask.device)
        return mask

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
    found = hooks_at(layer, kind)
    return any(isinstance(hook.forwards, _Splices) and hook.forwards.writes(hook.site) for hook in found)


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
    *,
    mode: str = "replace",
    edits: Mapping[Site, Edit | Sequence[Edit]] | Mapping[str, Edit | Sequence[Edit]] | None = None,
    latent_scales: Mapping[Site, LatentScales] | Mapping[str, LatentScales] | None = None,
    positions: Tensor | None = None,
    inputs: Mapping[Site, Site | str] | Mapping[str, Site | str] | None = None,
) -> Attachment:
    """Splice SAEs into ``model``: from now on each site's activation x is replaced by ``sae(x)``, in x's dtype.

        with attach(model, {Site(3, "resid"): sae}):
            logits = model(input_ids).logits

    Without ``with``, keep what is returned and call its ``detach()``. Gradients flow through the SAEs.

    saes: a module per `Site` (or name of one), mapping [batch, seq, width] to the same shape; a ``d_model`` it has is
    compared with the width of the site. A `Transcoder` stands at the site where it writes, "mlp" as a rule, and is
    given the activation of the site that it reads, from the same forward: that of ``inputs`` {where it writes: where it
    reads}, by default the one that its metadata names, in the same layer. skip_token_ids: positions holding these
    tokens keep their activation; by default BOS, EOS and PAD of the model's config (`special_token_ids`), on which SAEs
    are not trained. Pass () to splice at every position, which inputs given as ``inputs_embeds`` alone need.

    mode: with f the code of x and f′ the edited one, "replace" puts decode(f′) in the place of x, and "with_error"
    x + (decode(f′) − decode(f)), which keeps the error of the SAE: where nothing is edited that is x, to the bit, and
    with no edits at a site the SAE does not run. edits: by site, one or several, in the order in which they are made:
    `Ablate`, `Add`, `Clamp`, `Patch`. latent_scales: by site, `LatentScales` for the units of `Add` and `Clamp`, as
    `collect` measures them. positions: bool [columns] or [rows, columns]: elsewhere every site keeps its activation. An
    edit has ``positions`` of its own, read likewise: a column counts from the beginning of the sequence as the model
    was given it, padding included, whatever a cache holds of it; columns past the mask's last are not spliced. Beams,
    and several sequences a prompt, are rows of their own: ``mask.repeat_interleave(num_beams, 0)``.

    Each forward has its own special tokens, in whichever thread it runs and whatever other forward it runs within.
    ``torch.compile(model)``, before or after, compiles what lies between the hooks; SAEs run as they would without. A
    model compiled in place, by ``model.compile()``, runs eagerly while SAEs are attached. The ``hidden_states`` of
    ``output_hidden_states`` are the spliced residuals, those that the next layer reads (the last one normed, as without
    SAEs). A copy of an attached model, deep or pickled, is attached to copies of the SAEs; `detach_all` takes them out.

    Raises ValueError for an empty ``saes``, an unknown site or mode, a site of `INPUT_KINDS`, where nothing is written,
    a transcoder whose input is not known or that says it reads another kind of site (Gemma Scope 1's read
    mlp_in_normed, Gemma Scope 2's mlp_in), a width that does not fit, a site that holds an SAE already, edits of a site
    without SAE, a latent that the SAE does not have, and a unit without scales, with those of another SAE's width or of
    a latent that never fired; TypeError for what is no model, no SAE, no edit, no scales, no mask or no token id, and
    for "with_error" or edits at a site whose function has no ``encode``, ``decode`` and ``d_sae``;
    EnvironmentProblemError for a model whose attention drops its soft-cap or is tensor-parallel. Nothing is attached
    then. During a forward: ValueError without input_ids, for a mask of other rows, or when an SAE changes the shape;
    EnvironmentProblemError when a site did not fire, when the module at it was replaced, when its activations are on
    the device meta, or when gradient checkpointing would compute it again in the backward pass.
    """
    decoder = find_decoder(model)
    refuse_attention_without_cap(decoder.config)
    sae_at = by_site("saes", saes)
    check_choice("mode", mode, MODES)
    edits_at = _edits_at(sae_at, edits)
    scales_at = by_site("latent_scales", {} if latent_scales is None else latent_scales)
    for site, scales in scales_at.items():
        check_type(f"latent_scales: {site}", scales, LatentScales)
    if positions is not None:
        check_mask("positions", positions)
    splices, given = [], by_site("inputs", {} if inputs is None else inputs)
    read_at: dict[Site, Site] = {}
    for site, sae in sae_at.items():
        if site.kind in INPUT_KINDS:
            raise ValueError(f"site {site}: expected one where SAEs write, {', '.join(KINDS)}, got {site.kind!r}")
        if is_transcoder(sae):
            source = given.pop(site, None)
            read_at[site] = input_of(site, sae, None if source is None else as_site(source))
            decoder.check_fits(read_at[site], sae)
            if sae.d_out != decoder.width(site):
                raise ValueError(f"site {site}: expected a transcoder of d_out {decoder.width(site)}, got {sae.d_out}")
        else:
            decoder.check_fits(site, sae)
        if not callable(sae):
            raise TypeError(f"site {site}: expected a module or function, got {type(sae).__name__}")
        if is_spliced(decoder.layers[site.layer], site.kind):
            raise ValueError(f"site {site}: expected no SAE attached yet, found one; detach it first")
        splices.append(_splice(site, sae, mode, edits_at.get(site, ()), scales_at.get(site)))
    for site in given:
        raise ValueError(f"inputs: expected sites of transcoders in saes, got {site}")
    installed = _Splices(decoder, splices, read_at, skipped_ids(model, skip_token_ids), positions)
    return Attachment(tuple(sae_at), installed.install(decoder))


def _edits_at(saes: Mapping[Site, Any], edits: Any) -> dict[Site, tuple[Edit, ...]]:
    found = {site: as_edits(site, value) for site, value in by_site("edits", {} if edits is None else edits).items()}
    for site in found.keys() - saes.keys():
        raise ValueError(f"edits: expected sites of saes, {', '.join(map(str, saes))}, got {site}")
    return found


def _splice(site: Site, sae: Any, mode: str, edits: Sequence[Edit], scales: LatentScales | None) -> Splice:
    missing = [name for name in ("encode", "decode", "d_sae") if not hasattr(sae, name)]
    if missing and (edits or mode == "with_error"):
        raise TypeError(
            f"site {site}: expected an SAE with encode, decode and d_sae, whose code can be edited, got "
            f"{type(sae).__name__} without {' and '.join(missing)}"
        )
    try:
        return Splice(site, sae, mode, [edit.resolved(sae.d_sae, scales) for edit in edits])
    except ValueError as error:
        raise ValueError(f"site {site}: {error}") from error
