"""`Harvester`: superblocks of activations, from forwards of a language model over rows of tokens."""

import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..checks import check_int, check_type, dtype_name
from ..formats.files import json_text
from ..runs import key_of
from ..sites import Site, Tap, evaluating, probe
from ..sites.decoder import find_decoder, input_device
from ..sites.tokens import TokenInput, forward_arguments, special_token_ids
from .order import RowOrder
from .outliers import norms_of
from .ring import Ring

_SAMPLES = 16  # of each parameter


class Rows(Protocol):
    """Of `TokenRows`, what a harvest reads."""

    @property
    def context(self) -> int: ...

    @property
    def n_train(self) -> int: ...

    @property
    def content(self) -> str: ...

    def train(self, rows: Tensor) -> Tensor: ...


class Harvester:
    """What flows through ``sites`` of ``model``, a superblock of ``rows_per_block`` rows at a time, the same in every
    run.

    rows: the tokens; those of padding come last in a row. Superblock k is the k-th piece of the endless order of
    `RowOrder` of ``seed``. forward_rows: rows of one forward, which its bits depend on. identity: JSON that says which
    model it is (name, revision, …); its dtype, its attention and a fingerprint of its weights are added here.

    The text model alone runs, in evaluation mode and without gradients, no further than the deepest of ``sites``. Each
    activation is copied into the ring while the model runs, but for those of BOS, EOS and PAD. The model is probed now
    (`sites.probe`) and, between superblocks, as it was.

    Raises as `sites.probe` and `sites.Tap` do; ValueError for no rows and numbers out of range; from `fill`, ValueError
    for ids that the vocabulary does not have and padding before text.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        sites: Iterable[Site | str],
        *,
        seed: int,
        rows_per_block: int,
        forward_rows: int = 8,
        identity: Mapping[str, Any] = MappingProxyType({}),
    ):
        check_int("rows_per_block", rows_per_block, 1)
        check_int("forward_rows", forward_rows, 1)
        if rows.n_train < 1:
            raise ValueError("rows: expected some to train on, got none")
        self._model, self._rows = model, rows
        self._order = RowOrder(rows.n_train, seed)
        self._rows_per_block, self._forward_rows = rows_per_block, forward_rows
        self.progress: Callable[[int], Any] = lambda rows: None
        """Called after each forward with the rows of the superblock that are done."""
        self._into: _Into | None = None
        self._tap = Tap(model, sites, self._take)
        skipped = special_token_ids(model)
        self._input = TokenInput(model, skipped)
        decoder = find_decoder(model)
        self.widths = {site: decoder.width(site) for site in self._tap.sites}
        probe(model)
        check_type("identity", identity, Mapping)
        self.identity: dict[str, Any] = {
            "model": json.loads(json_text(dict(identity), "identity")),
            "weights": _fingerprint(self._tap.text_model),
            "model_dtype": dtype_name(next(self._tap.text_model.parameters()).dtype),
            "attention": str(decoder.config._attn_implementation),
            "sites": [str(site) for site in self._tap.sites],
            "widths": list(self.widths.values()),
            "text": rows.content,
            "context": rows.context,
            "skipped_ids": list(skipped),
            "seed": seed,
            "rows_per_block": rows_per_block,
            "forward_rows": forward_rows,
        }
        """JSON: everything that the bits of every superblock depend on but the dtype of the ring."""
        self.device = input_device(model)
        """Where the model takes its tokens."""
        self.content = key_of(self.identity)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._tap.sites

    @property
    def capacity(self) -> int:
        """The most tokens that a superblock can have."""
        return self._rows_per_block * self._rows.context

    def tokens(self, block: int) -> int:
        """How many tokens superblock ``block`` has; the model does not run."""
        check_int("block", block, 0)
        rows = self._order.block(block, self._rows_per_block)
        return int(self._input.counted(self._rows.train(rows), None).sum())

    @without_autocast
    @torch.no_grad()
    def fill(self, block: int, ring: Ring) -> None:
        """Add the tokens of superblock ``block`` to ``ring``, in the order of its rows; see `Ring.fill`."""
        check_int("block", block, 0)
        devices: set[torch.device] = set()
        done = 0
        with evaluating(self._model), self._tap as tap:
            for rows in self._order.block(block, self._rows_per_block).split(self._forward_rows):
                tokens = self._rows.train(rows)
                self._input.check("rows", tokens, None)
                counted = self._input.counted(tokens, None)
                if counted.any():
                    row, position = counted.nonzero(as_tuple=True)
                    self._into = _Into(ring, ring.add(rows[row], position), counted, devices)
                    try:
                        tap.text_model(**forward_arguments(tokens, None, self.device))
                    finally:
                        self._into = None
                done += len(rows)
                self.progress(done)
        for device in devices:
            torch.cuda.synchronize(device)  # copies to the host are under way until then

    def _take(self, site: Site, x: Tensor) -> None:
        assert self._into is not None
        self._into.take(site, x)


def _fingerprint(model: nn.Module) -> str:
    """A key of some values of every parameter, which tells models apart that have been trained differently."""
    samples = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        sample = values.flatten()[:: max(1, values.numel() // _SAMPLES)].cpu() if not values.is_meta else None
        samples[name] = [list(values.shape), sample]
    return key_of(samples)


class _Into:
    """The place of one forward's tokens in the ring."""

    def __init__(self, ring: Ring, place: slice, counted: Tensor, devices: set[torch.device]):
        self._ring, self._place, self._devices = ring, place, devices
        self._counted = counted.flatten().nonzero().flatten()
        self._index: dict[torch.device, Tensor] = {}

    def take(self, site: Site, x: Tensor) -> None:
        """Copy the tokens that count out of x [batch, seq, width], and their norms."""
        ring, index = self._ring, self._index.get(x.device)
        if index is None:
            index = self._index[x.device] = self._counted.to(x.device)
        if x.is_cuda:
            self._devices.add(x.device)
        into, norms = ring.activations[site][self._place], ring.norms[site][self._place]
        rows = x.flatten(0, 1)
        if x.dtype == ring.dtype and x.device == ring.device:
            torch.index_select(rows, 0, index, out=into)
            norms.copy_(norms_of(into))
        else:
            converted = rows.index_select(0, index).to(ring.dtype)
            into.copy_(converted, non_blocking=ring.pinned)
            norms.copy_(norms_of(converted), non_blocking=ring.pinned)
