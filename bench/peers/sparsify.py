"""sparsify: TopK with a fused dense encoder and a sparse decoder, at k equal to the L0 of the others."""

import contextlib
import os
import sys

import torch
from torch import Tensor

from bench.contenders import INFERENCE, TRAINING, Contender, Inputs
from bench.selection import BF16_TOLERANCE
from bench.trainers import Setting, Trainer, inputs_of
from gemmascope.saes import JumpReLUSAE


def import_sparsify():
    """The package; without a GPU, without its Triton kernels, which would be chosen and then find no driver."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    with contextlib.redirect_stdout(sys.stderr):  # it announces its decoder when it is imported
        import sparsify
    return sparsify


def sparse_coder(inputs: Inputs):
    """Their SAE with our weights; their defaults but for the sizes."""
    sparsify = import_sparsify()
    sae = inputs.sae
    theirs = sparsify.SparseCoder(
        sae.d_model, sparsify.SparseCoderConfig(num_latents=sae.d_sae, k=inputs.k), device=inputs.x.device
    )
    with torch.no_grad():
        theirs.encoder.weight.copy_(sae.W_enc.T)
        theirs.encoder.bias.copy_(sae.b_enc)
        theirs.W_dec.copy_(sae.W_dec)
        theirs.b_dec.copy_(sae.b_dec)
    return theirs


class CoderTraining:
    """What sparsify's trainer does with a batch, which it only does inside its loop over a language model: renormalise
    the decoder, the loss FVU, note which latents fired, project the decoder's gradient, update.

    optimiser: "adam", PyTorch's unfused one as its option has it, or "signum", its default: schedule-free sign descent.
    """

    def __init__(self, coder, optimiser: str, learning_rate: float, warm_up_steps: int = 0, steps: int = 10**9):
        from transformers import get_linear_schedule_with_warmup

        self.coder, self.scheduler = coder, None
        if optimiser == "adam":
            self.optimiser = torch.optim.Adam(coder.parameters(), lr=learning_rate)
            self.scheduler = get_linear_schedule_with_warmup(self.optimiser, warm_up_steps, steps)
        else:
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            self.optimiser = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=learning_rate), momentum=0.95)
            self.optimiser.train()
        self.did_fire = torch.zeros(coder.num_latents, dtype=torch.bool, device=coder.device)
        self.since_fired = torch.zeros(coder.num_latents, dtype=torch.long, device=coder.device)

    def step(self, x: Tensor) -> None:
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=None, total_variance=variance)
        self.did_fire[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.since_fired += len(x)
        self.since_fired[self.did_fire] = 0
        self.did_fire.zero_()


class Sparsify(Contender):
    parts = (*TRAINING, *INFERENCE)
    requires = ("eai-sparsify",)
    only_beta1 = 0.9

    def __init__(self, optimiser: str = "adam"):
        self.optimiser = optimiser
        self.differs = (
            "TopK, a fixed number of latents a token and no θ; FVU as the loss; "
            f"{'Adam with a first moment' if optimiser == 'adam' else 'schedule-free sign descent'}; "
            "on a GPU its forward is bf16 whatever the dtype"
        )

    def set_up(self, inputs: Inputs) -> None:
        self.inputs, self.tolerance = inputs, BF16_TOLERANCE if inputs.x.is_cuda else 1e-4
        self.coder = sparse_coder(inputs)
        self.training = CoderTraining(self.coder, self.optimiser, inputs.rule.learning_rate)
        self.code = None

    def before(self, part: str) -> None:
        if part == "backward":
            self.coder.zero_grad()
        if part == "decode" and self.code is None:
            self.code = self.encode()
        super().before(part)

    def forward(self) -> Tensor:
        self.total = self.coder(self.inputs.x).fvu
        return self.total

    def backward(self) -> None:
        self.total.backward()

    def step(self) -> None:
        self.training.step(self.inputs.x)

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor]:
        code = self.coder.encode(self.inputs.x)
        return code.top_acts, code.top_indices

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.coder.decode(*self.code)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.coder.decode(*self.encode())

    @torch.no_grad()
    def module(self) -> Tensor:
        return self.coder(self.inputs.x).sae_out

    def outputs(self) -> dict[str, Tensor]:
        found = {"x_hat": self.infer(), "module": self.module(), "loss": self.forward()}
        self.backward()
        coder = self.coder
        gradients = (coder.encoder.weight.grad.T, coder.encoder.bias.grad, coder.W_dec.grad, coder.b_dec.grad)
        found |= dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), (g.clone() for g in gradients), strict=True))
        coder.zero_grad()
        return found

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        """The TopK autoencoder in fp64, by autograd."""
        sae, x = inputs.sae, inputs.x.double()
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        W_enc, b_enc, W_dec, b_dec = parameters = [
            getattr(sae, name).detach().double().requires_grad_() for name in names
        ]
        z = torch.relu((x - b_dec) @ W_enc + b_enc)
        values, latents = z.topk(inputs.k)
        x_hat = torch.zeros_like(z).scatter(1, latents, values) @ W_dec + b_dec
        fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        gradients = torch.autograd.grad(fvu, parameters)
        found = {"x_hat": x_hat.detach(), "module": x_hat.detach(), "loss": fvu.detach()}
        return found | dict(zip(names, gradients, strict=True))


class TopKSAE(torch.nn.Module):
    """The k largest positive pre-activations of each token: encode and decode as `evaluate_sae` asks for them."""

    def __init__(self, coder, input_scale: float):
        super().__init__()
        self.input_scale, self.k = input_scale, coder.cfg.k
        self.W_enc, self.b_enc = coder.encoder.weight.detach().T.clone(), coder.encoder.bias.detach().clone()
        self.W_dec, self.b_dec = coder.W_dec.detach().clone(), coder.b_dec.detach().clone()

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        z = torch.relu((x / self.input_scale - self.b_dec) @ self.W_enc + self.b_enc)
        values, latents = z.topk(self.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, latents, values)

    def decode(self, f: Tensor) -> Tensor:
        return (f @ self.W_dec + self.b_dec) * self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class SparsifyTrainer(Trainer):
    requires, fixes_l0 = ("eai-sparsify",), True
    differs = "TopK, FVU as the loss"

    def __init__(self, adam: bool = False):
        """adam: its option instead of its default optimiser, also with the recipe "published"."""
        self.adam, self.name = adam, "sparsify_adam" if adam else "sparsify"

    def differences(self, recipe: str) -> str:
        adam = self.adam or recipe == "shared"
        rule = "Adam with β1 = 0.9, its rate linearly down to 0" if adam else "schedule-free sign descent, its own rate"
        return f"{self.differs}, {rule}"

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        config = setting.config
        self.coder, self.begin = sparse_coder(inputs_of(setting, start, sample)), start
        if self.adam or setting.recipe == "shared":
            self.training = CoderTraining(
                self.coder, "adam", config.learning_rate, config.lr_warmup_steps, steps=config.steps
            )
        else:
            self.training = CoderTraining(self.coder, "signum", 5e-3 / (start.d_sae / 2**14) ** 0.5)

    def update(self, x: Tensor) -> None:
        self.training.step(x.float() / self.begin.input_scale)

    def sae(self) -> TopKSAE:
        """Schedule-free optimisers hold another point for training than for use."""
        averages = getattr(self.training.optimiser, "eval", None)
        if averages:
            averages()
        sae = TopKSAE(self.coder, self.begin.input_scale)
        if averages:
            self.training.optimiser.train()
        return sae
