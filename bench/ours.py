"""Our own contender and trainer."""

import copy
import math
from functools import cached_property

import torch
from torch import Tensor

from bench.arithmetic import OPERAND_DTYPES
from bench.contenders import INFERENCE, OPERATORS, TRAINING, Contender, Inputs, UnavailableError
from bench.trainers import Setting, Trainer
from gemmascope import kernels
from gemmascope.kernels.dispatch import choose
from gemmascope.kernels.implementations import operator
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.losses import l0_penalty, objective
from gemmascope.training.state import TrainState
from gemmascope.training.step import StepFigures, dense_step, sparse_step
from gemmascope.training.trainer import CAPACITY_MARGIN, CAPACITY_UNIT, SAETrainer

BANDWIDTH = 0.1  # of the activation by itself: wide enough that the window is a share of the entries worth summing


class WithheldError(Exception):
    """An update was not made; the time is not that of a step."""


class Ours(Contender):
    """The training step by one route, inference, and the operators, by one implementation.

    Training is in fp32 with products in ``inputs.dtype``; inference holds weights of that dtype.
    """

    ours = True
    parts = tuple(dict.fromkeys((*TRAINING, *INFERENCE, *OPERATORS)))

    def __init__(self, impl: str = "auto", route: str = "sparse"):
        self.impl, self.route = impl, route
        if route == "dense":
            self.parts = ("step",)

    def check_available(self, device: torch.device) -> None:
        try:
            choose(self.impl, device, torch.float32)
        except ValueError as error:
            raise UnavailableError(str(error)) from None

    def set_up(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.operand_dtype = OPERAND_DTYPES[inputs.dtype]
        self.tf32 = inputs.dtype == "tf32"
        self.tolerance = 1e-4 if inputs.dtype == "fp32" else 1e-2
        self.module_tolerance = 5e-2 if inputs.dtype == "bf16" else None  # as plain PyTorch's

    @cached_property
    def state(self) -> TrainState:
        sae = copy.deepcopy(self.inputs.sae)
        sae.impl = self.impl
        first_moments = {"first_moments": True} if self.inputs.beta1 else {}  # older revisions are compared with, too
        return TrainState.start(sae, self.inputs.dtype, **first_moments)

    @cached_property
    def capacity(self) -> int:
        """Room for the entries of x, with the trainer's margin."""
        inputs = self.inputs
        seen = int(sparse_step(self.state, inputs.x, inputs.loss, inputs.rule, CAPACITY_UNIT).n_entries)
        self.state.resume()
        return CAPACITY_UNIT * math.ceil(CAPACITY_MARGIN * max(1, seen) / CAPACITY_UNIT)

    def step(self) -> StepFigures:
        inputs = self.inputs
        arguments = (self.state, inputs.x, inputs.loss, inputs.rule)
        return dense_step(*arguments) if self.route == "dense" else sparse_step(*arguments, self.capacity)

    def check_made(self) -> None:
        """Raise `WithheldError` when any step so far did not update the weights. Waits for the device."""
        if self.state.stalled or self.state.skipped:
            raise WithheldError("updates were withheld; the times would not be those of a step")

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Entries, residual and loss; keeps what `backward` needs."""
        inputs, sae, impl = self.inputs, self.state.sae, self.state.impl
        x_centred = (inputs.x - sae.b_dec).to(self.state.encoder_rows.dtype)
        weights = (self.state.encoder_rows.T, sae.b_enc, sae.threshold)
        entries = kernels.encode_entries(
            x_centred, *weights, inputs.loss.bandwidth, self.capacity, tf32=self.tf32, impl=impl
        )
        out = kernels.residual_pass(entries, inputs.x, self.state.decoder_rows, sae.b_dec, impl=impl)
        penalty, s = l0_penalty(inputs.loss, out.l0)
        self.saved = (x_centred, entries, out, s)
        return out.squared_error.mean() + penalty

    @torch.no_grad()
    def backward(self) -> None:
        """Every gradient, and the update of all that is held by latent, in which the gradients of the weights are."""
        x_centred, entries, out, s = self.saved
        state, n, impl = self.state, len(x_centred), self.state.impl
        transposed = kernels.by_latent(entries, state.sae.d_sae, impl=impl)
        weights = objective(self.inputs.loss, n)
        sums = kernels.latent_pass(entries, out.u, transposed, state.sae.threshold, s, weights, impl=impl)
        self.db_dec = out.residual.sum(0, dtype=torch.float32) * (2 / n) - kernels.encoder_times(
            state.encoder_rows, sums.db_enc, impl=impl
        )
        ok = torch.ones((), dtype=torch.int32, device=x_centred.device)
        kernels.update_from_entries(
            state.latents, transposed, sums, out.residual, x_centred, self.inputs.rule, ok, state.updates, impl=impl
        )

    @cached_property
    def released(self) -> JumpReLUSAE:
        """The folded SAE, in the dtype of the operands, as one has it who loads it and moves it there."""
        sae = self.inputs.sae.fold()
        sae.impl = self.impl
        return sae.to(self.operand_dtype)

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """W_enc, b_enc, threshold, W_dec, b_dec of the folded SAE, the biases in fp32."""
        sae, released = self.inputs.sae.fold(), self.released
        found = (released.W_enc, sae.b_enc, sae.threshold, released.W_dec, sae.b_dec)
        return tuple(weight.detach() for weight in found)

    @cached_property
    def x(self) -> Tensor:
        return self.inputs.x.to(self.operand_dtype)

    @cached_property
    def code(self) -> kernels.SparseCode:
        return self.encode()

    @torch.no_grad()
    def encode(self) -> kernels.SparseCode:
        return kernels.encode(self.x, *self.weights[:3], impl=self.impl)

    @torch.no_grad()
    def decode(self) -> Tensor:
        return kernels.decode(self.code, *self.weights[3:], impl=self.impl)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return kernels.decode(self.encode(), *self.weights[3:], impl=self.impl)

    @torch.no_grad()
    def module(self) -> Tensor:
        return self.released(self.x)

    def decode_backward(self) -> tuple[Tensor, Tensor]:
        impl = choose(self.impl, self.x.device, self.operand_dtype).impl
        return operator("decode_backward", impl)(self.x, *self.code[:3], self.weights[3], True, True)

    @cached_property
    def pre(self) -> Tensor:
        return self.x @ self.weights[0]

    def jumprelu(self) -> kernels.JumpReLUOutput:
        return kernels.jumprelu(self.pre, *self.weights[1:3], BANDWIDTH, impl=self.impl)

    @cached_property
    def upstream(self) -> tuple[Tensor, Tensor]:
        """∂L/∂f [N, d_sae] and ∂L/∂l0 [N]; any numbers do, and those of ``pre`` are at hand."""
        return self.pre.flip(0), torch.full((1,), 1e-3, device=self.pre.device).expand(len(self.pre))

    def jumprelu_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        impl = choose(self.impl, self.x.device, self.operand_dtype).impl
        backward = operator("jumprelu_backward", impl)
        return backward(*self.upstream, self.pre, *self.weights[1:3], BANDWIDTH)

    def outputs(self) -> dict[str, Tensor]:
        found = {"x_hat": self.infer(), "module": self.module()}
        return found | ({"loss": self.forward()} if self.route == "sparse" else {})

    def before(self, part: str) -> None:
        super().before(part)
        needs = {"step": "capacity", "forward": "capacity", "decode": "code", "decode_backward": "code"}
        needs |= {"jumprelu": "pre", "jumprelu_backward": "upstream"}
        getattr(self, needs.get(part, "weights"), None)


class OursTrainer(Trainer):
    def __init__(self, name: str = "ours", route: str = "auto", impl: str = "auto", dtype: torch.dtype = torch.float32):
        self.name, self.route, self.impl, self.dtype = name, route, impl, dtype

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        config = setting.config.changed(route=self.route)
        self.trainer = SAETrainer(config, sample, impl=self.impl, dtype=self.dtype)

    def update(self, x: Tensor) -> None:
        self.trainer.update(x)

    def sae(self) -> JumpReLUSAE:
        self.trainer.flush()
        return self.trainer.sae
