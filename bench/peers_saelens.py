"""SAELens: the step of its own trainer on `JumpReLUTrainingSAE`, and its `JumpReLUSAE` for inference."""

import torch
from torch import Tensor

from bench.contenders import INFERENCE, TRAINING, Contender, Inputs

STEPS = 10**9  # more than are made: the trainer wants to know how many there will be
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def training_sae(inputs: Inputs, **options):
    """Their SAE in training, with our weights; their defaults but for λ, ε and ``options``."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    sae, loss = inputs.sae, inputs.loss
    given = {"l0_coefficient": loss.l0_coefficient, "jumprelu_bandwidth": loss.bandwidth} | options
    config = JumpReLUTrainingSAEConfig(sae.d_model, sae.d_sae, device=str(inputs.x.device), **given)
    theirs = JumpReLUTrainingSAE(config)
    copy_weights(sae, theirs)
    return theirs


@torch.no_grad()
def copy_weights(source, target) -> None:
    for name in PARAMETERS:
        getattr(target, name).copy_(getattr(source, name))


class SAELens(Contender):
    """In fp32 as by default, or as its options ``autocast`` (bf16) and ``compile_sae`` have it."""

    parts = (*TRAINING, *INFERENCE)
    requires = ("sae-lens",)
    differs = (
        "dense; clips gradients and counts firings on top, neither projects nor renormalises the decoder, θ itself "
        "instead of log θ, Adam with a first moment"
    )

    def __init__(self, autocast: bool = False, compiled: bool = False):
        self.autocast, self.compiled = autocast, compiled
        if autocast or compiled:
            self.parts = TRAINING

    def set_up(self, inputs: Inputs) -> None:
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.inputs, self.tolerance = inputs, 5e-2 if self.autocast else 1e-4
        sae, x = inputs.sae, inputs.x
        self.training_sae = training_sae(inputs)
        if self.compiled:
            self.training_sae.training_forward_pass = torch.compile(self.training_sae.training_forward_pass)
        rate = inputs.rule.learning_rate
        config = SAETrainerConfig(
            total_training_samples=STEPS * len(x),
            train_batch_size_samples=len(x),
            lr=rate,
            lr_end=rate,
            device=str(x.device),
            autocast=self.autocast,
        )
        self.trainer = SAETrainer(config, self.training_sae, iter(()))
        self.sae = None
        if "infer" in self.parts:
            released = sae.fold()
            options = {"apply_b_dec_to_input": False, "device": str(x.device)}
            self.sae = JumpReLUSAE(JumpReLUSAEConfig(sae.d_model, sae.d_sae, **options))
            copy_weights(released, self.sae)
        self.f = None

    def before(self, part: str) -> None:
        if part == "backward":
            self.training_sae.zero_grad()
        if part == "decode" and self.f is None:
            self.f = self.encode()
        super().before(part)

    def forward(self) -> Tensor:
        from sae_lens.saes.sae import TrainStepInput

        trainer = self.trainer
        given = TrainStepInput(
            self.inputs.x, trainer.get_coefficients(), trainer.dead_neurons, trainer.n_training_steps, False
        )
        with trainer.autocast_if_enabled:
            self.total = self.training_sae.training_forward_pass(given).loss
        return self.total

    def backward(self) -> None:
        self.total.backward()

    def step(self) -> None:
        self.trainer.step(self.inputs.x)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def encode(self) -> Tensor:
        return self.sae.encode(self.inputs.x)

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.sae.decode(self.f)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.sae(self.inputs.x)

    def outputs(self) -> dict[str, Tensor]:
        found = {} if self.sae is None else {"x_hat": self.infer()}
        found["loss"] = self.forward()
        self.backward()
        if not self.autocast:
            found |= {name: getattr(self.training_sae, name).grad.clone() for name in PARAMETERS}
        self.training_sae.zero_grad()
        return found
