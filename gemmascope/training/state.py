"""`TrainState`: everything that training an SAE changes, held once.

The SAE's parameters are the master weights. Nothing keeps views of them: a step asks for them anew, so that it trains
whatever was loaded, put in their place, copied or changed in place, and what it cannot train is an error.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..checks import dtype_name
from ..kernels import LatentState, choose, entries, reference
from ..saes import BatchTopKSAE, JumpReLUSAE
from ..saes.base import BaseSAE
from ..saes.topk_transcoder import TopKTranscoder
from . import annealing

# What keeps updates back until the host mends it: bits of `TrainState.stalled`.
ROOM, COPIES = entries.ROOM, entries.COPIES
# Tokens that are kept for dead latents to begin at, at most: more latents do not begin anew at a time.
RESERVOIR = 4096
MASTER_DTYPES = (torch.float32, torch.float64)


def _look(weight: nn.Parameter) -> tuple:
    """Compares unequal to an earlier look when the weight lies in other memory, be it at the same address, or was
    changed in place in a way that PyTorch counts."""
    version = -1 if weight.is_inference() else weight._version
    return weakref.ref(weight.untyped_storage()), weight.data_ptr(), version


@dataclass(eq=False)
class TrainState:
    """An SAE in training, with what training adds to it on its device.

    Copies made by `copy.deepcopy` or pickle are independent of the original and go on with the same bits.
    """

    sae: BaseSAE
    W_enc_v: Tensor
    """Second moments of the parameters, in their dtype: [d_sae, d_in] and [d_sae, d_model], by latent; those of latents
    as of step ``last``."""
    W_dec_v: Tensor
    b_enc_v: Tensor
    threshold_v: Tensor
    b_dec_v: Tensor
    others_v: dict[str, Tensor]
    """Those of ``sae.OTHERS``, which every update moves."""
    W_enc_m: Tensor | None
    """First moments of all of these, likewise; None, and none in ``others_m``, where Adam's β1 is 0."""
    W_dec_m: Tensor | None
    b_enc_m: Tensor | None
    threshold_m: Tensor | None
    b_dec_m: Tensor | None
    others_m: dict[str, Tensor]
    no_threshold: Tensor | None
    """Zeros [d_sae] for an SAE without thresholds, which never move."""
    smallest_kept: Tensor | None
    """fp64 scalar: the moving average of the smallest z that fired, of an SAE whose threshold follows it."""
    seen: Tensor | None
    """[`RESERVOIR` or d_sae, d_in] tokens that dead latents may begin at, and fp64 their keys, descending, −Inf where
    there is none (`resample.observe`); where dead latents begin anew."""
    seen_keys: Tensor | None
    annealing: Tensor | None
    """fp64 [4] of p-annealing, see `annealing.start`."""
    last: Tensor
    """int64 [d_sae], updates made when the latent was last touched."""
    W_enc_low: Tensor | None
    """bf16 copies of the weights, [d_sae, d_model], that products read where ``compute_dtype`` is bf16."""
    W_dec_low: Tensor | None
    updates: Tensor
    """Updates made, int64 scalar."""
    skipped: Tensor
    """Updates withheld because the loss or what they would have made was not finite, int64 scalar."""
    stalled: Tensor
    """int64 scalar: 0, or `ROOM` when entries did not fit and `COPIES` when a copy was not that of its weight; every
    update is withheld until `resume`."""
    tokens_since_fired: Tensor
    """int64 [d_sae]."""
    compute_dtype: str
    turn: int = 0
    """Steps whose copies were compared with the weights, which decides on the column that is next."""
    _seen: tuple | None = field(default=None, repr=False)
    _fresh: bool = field(default=False, repr=False)

    @classmethod
    def start(
        cls,
        sae: BaseSAE,
        compute_dtype: str = "fp32",
        annealed: bool = False,
        resampled: bool = False,
        first_moments: bool = False,
    ) -> "TrainState":
        """annealed: whether the p of its penalty is. resampled: whether dead latents begin anew. first_moments: whether
        Adam has them. Raises ValueError when the SAE is neither fp32 nor fp64, or its implementation cannot run."""
        W_enc, W_dec, device = sae.W_enc.data.t(), sae.W_dec.data, sae.W_dec.device
        if W_dec.dtype not in MASTER_DTYPES:
            raise ValueError(f"sae: expected float32 or float64 master weights, got {dtype_name(W_dec.dtype)}")

        def zeros(like: Tensor) -> Tensor:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)

        def count(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def first(like: Tensor) -> Tensor | None:
            return zeros(like) if first_moments else None

        others = {name: getattr(sae, name).data for name in sae.OTHERS}
        state = cls(
            sae=sae,
            W_enc_v=zeros(W_enc),
            W_dec_v=zeros(W_dec),
            b_enc_v=zeros(sae.b_enc.data),
            threshold_v=zeros(sae.b_enc.data),
            b_dec_v=zeros(sae.b_dec.data),
            others_v={name: zeros(parameter) for name, parameter in others.items()},
            W_enc_m=first(W_enc),
            W_dec_m=first(W_dec),
            b_enc_m=first(sae.b_enc.data),
            threshold_m=first(sae.b_enc.data),
            b_dec_m=first(sae.b_dec.data),
            others_m={name: zeros(parameter) for name, parameter in others.items()} if first_moments else {},
            no_threshold=None if isinstance(sae, JumpReLUSAE) else zeros(sae.b_enc.data),
            smallest_kept=torch.zeros((), dtype=torch.float64, device=device)
            if isinstance(sae, BatchTopKSAE | TopKTranscoder)
            else None,
            seen=zeros(W_enc[:RESERVOIR]) if resampled else None,
            seen_keys=torch.full((min(sae.d_sae, RESERVOIR),), -torch.inf, dtype=torch.float64, device=device)
            if resampled
            else None,
            annealing=annealing.start(device) if annealed else None,
            last=count(sae.d_sae),
            W_enc_low=zeros(W_enc).bfloat16() if compute_dtype == "bf16" else None,
            W_dec_low=zeros(W_dec).bfloat16() if compute_dtype == "bf16" else None,
            updates=count(),
            skipped=count(),
            stalled=count(),
            tokens_since_fired=count(sae.d_sae),
            compute_dtype=compute_dtype,
        )
        state.impl  # noqa: B018 an implementation that cannot run is an error here already
        state.ready()
        return state

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: not what was seen of this SAE's memory."""
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"_seen": None}

    @cached_property
    def impl(self) -> str:
        return choose(self.sae.impl, self.W_dec_v.device, self.W_dec_v.dtype).impl

    @property
    def threshold(self) -> Tensor:
        """[d_sae]."""
        if self.no_threshold is not None:
            return self.no_threshold
        assert isinstance(self.sae, JumpReLUSAE)  # or it would have none
        return self.sae.threshold.data

    @property
    def latents(self) -> LatentState:
        """Parameters, moments and copies by latent. The weights are the SAE's own memory."""
        sae = self.sae
        return LatentState(
            sae.W_enc.data.t(),
            sae.W_dec.data,
            sae.b_enc.data,
            self.threshold,
            self.W_enc_v,
            self.W_dec_v,
            self.b_enc_v,
            self.threshold_v,
            self.last,
            self.W_enc_low,
            self.W_dec_low,
            self.W_enc_m,
            self.W_dec_m,
            self.b_enc_m,
            self.threshold_m,
        )

    @property
    def encoder_rows(self) -> Tensor:
        """[d_sae, d_model], as the products read it."""
        return self.sae.W_enc.data.t() if self.W_enc_low is None else self.W_enc_low

    @property
    def decoder_rows(self) -> Tensor:
        return self.sae.W_dec.data if self.W_dec_low is None else self.W_dec_low

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, always in the same order; their own memory, so that they can be copied to.

        Weights (W_enc by latent: contiguous, [d_sae, d_model]), moments, copies if there are any, counters.
        """
        sae = self.sae
        with_threshold = () if self.no_threshold is not None else ("threshold",)
        weights = {"W_enc": sae.W_enc.data.t()} | {
            name: getattr(sae, name).data for name in ("b_enc", "W_dec", "b_dec", *with_threshold, *sae.OTHERS)
        }
        rest = {item.name: getattr(self, item.name) for item in fields(self)}
        moments = {f"{name}_v": v for name, v in self.others_v.items()}
        moments |= {f"{name}_m": m for name, m in self.others_m.items()}
        return weights | moments | {name: value for name, value in rest.items() if isinstance(value, Tensor)}

    @property
    def copies_seen(self) -> bool:
        """Whether the next `ready` makes no new copies, as far as it can see."""
        return self._seen == (_look(self.sae.W_enc), _look(self.sae.W_dec))

    def put(self, tensors: Mapping[str, Tensor], turn: int, copies_seen: bool) -> None:
        """Take the values of `tensors` of another time. copies_seen: as it was then."""
        self.ready()
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.turn = turn
        self._seen = (_look(self.sae.W_enc), _look(self.sae.W_dec)) if copies_seen else None

    @cached_property
    def _began_with(self) -> dict[str, tuple]:
        """Shape, strides, dtype and device of each parameter; those of its second moments."""
        moments = {"W_enc": self.W_enc_v.t(), "b_enc": self.b_enc_v, "W_dec": self.W_dec_v, "b_dec": self.b_dec_v}
        moments |= self.others_v
        if self.no_threshold is None:
            moments["threshold"] = self.threshold_v
        return {name: (v.shape, v.stride(), v.dtype, v.device) for name, v in moments.items()}

    def ready(self, clamp: bool = True) -> LatentState:
        """`latents` for a step, in order.

        A weight with other strides is laid out anew, thresholds below 0 are set to the 0 they count as unless ``clamp``
        is False: a step whose first kernel does that asks for no launch of it. The copies are
        made anew when a weight lies in other memory than at the last step or was changed in place since, as far as
        PyTorch counts that; `copies_differ` finds the rest.
        Does not wait for the device. Raises ValueError for a parameter of another shape, dtype or device than training
        began with.
        """
        parameters = self.sae._parameters
        for name, began in self._began_with.items():
            p = parameters.get(name)
            if p is None or p.is_inference() or (p.shape, p.stride(), p.dtype, p.device) != began:
                self._put_in_order(name, p, began)
        W_enc, W_dec = self.sae.W_enc, self.sae.W_dec
        if W_enc.data_ptr() == W_dec.data_ptr():  # two parameters, even if they were given one memory
            W_enc.data = W_enc.data.clone()
        latents, self._fresh = self.latents, False
        if clamp:
            latents.threshold.clamp_(min=0)
        if self.W_enc_low is not None and self.W_dec_low is not None:
            seen = (_look(W_enc), _look(W_dec))
            if seen != self._seen:
                self.W_enc_low.copy_(latents.W_enc)
                self.W_dec_low.copy_(latents.W_dec)
                self._seen, self._fresh = seen, True
        return latents

    def _put_in_order(self, name: str, p: nn.Parameter | None, began: tuple) -> None:
        shape, strides, dtype, device = began
        if p is None:
            raise ValueError(f"sae: {name} is missing; training began with one of shape {list(shape)}: put it back")
        if p.shape != shape:
            raise ValueError(
                f"sae: {name} has shape {list(p.shape)}; training began with {list(shape)}: "
                "give it weights of that shape, or start a trainer for the others"
            )
        if p.device != device:
            raise ValueError(
                f"sae: {name} is on {p.device}; training began on {device}, where the second moments are: "
                f"move the SAE back with sae.to({str(device)!r}), and move a copy.deepcopy of it instead"
            )
        if p.dtype != dtype:
            began_as = dtype_name(dtype)
            raise ValueError(
                f"sae: {name} is {dtype_name(p.dtype)}; training needs the {began_as} master weights it started with: "
                f"load them, or go on with rounded ones by sae.to(torch.{began_as}), and cast a copy.deepcopy instead"
            )
        if p.stride() == strides and torch.is_inference_mode_enabled():
            return
        laid_out = torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(p.data)
        if p.is_inference():  # no step outside inference mode could change it
            self.sae._parameters[name] = nn.Parameter(laid_out, p.requires_grad)
        else:
            p.data = laid_out

    def next_column(self) -> int | None:
        """The column of the weights, each step another one, that is to be compared with what the copies have there; a
        difference, as after ``sae.W_dec.data[3] = row``, leaves no other trace. None where that needs no look: without
        copies, and when `ready` has just made them."""
        if self.W_enc_low is None or self.W_dec_low is None or self._fresh:
            return None
        column = self.turn % max(self.W_enc_low.shape[1], self.W_dec_low.shape[1])
        self.turn += 1
        return column

    def copies_differ(self) -> Tensor | None:
        """Bool scalar: whether the copies differ from the weights in `next_column`; None where that needs no look."""
        return reference.conclusion.copies_differ(self.latents, self.next_column())

    def resume(self) -> None:
        """Let updates be made again, the next one with new copies: once `stalled` was seen and room made if need be."""
        self.stalled.zero_()
        self.renew_copies()

    def renew_copies(self) -> None:
        """Let the next `ready` make new copies, as after a change of the weights that leaves no trace."""
        self._seen = None

    def settle(self, beta2: float, beta1: float = 0.0) -> None:
        """Pay the decay that moments of idle latents owe, as before saving them."""
        kernels.settle(self.ready(), self.updates, beta2, beta1)
