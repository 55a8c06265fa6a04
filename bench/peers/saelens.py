"""SAELens: the step of its own trainer on `JumpReLUTrainingSAE`, and its `JumpReLUSAE` for inference."""

from typing import Any

import torch
from torch import Tensor

from bench.contenders import INFERENCE, PARAMETERS, TRAINING, Contender, Inputs, copy_weights
from bench.trainers import Setting, Trainer, inputs_of, jumprelu_sae
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import TrainConfig

STEPS = 10**9  # more than are made: the trainer wants to know how many there will be


def training_sae(inputs: Inputs, **options):
    """Their SAE in training, with our weights; their defaults but for λ, ε and ``options``."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    sae, loss = inputs.sae, inputs.loss
    given = {"l0_coefficient": loss.l0_coefficient, "jumprelu_bandwidth": loss.bandwidth} | options
    config = JumpReLUTrainingSAEConfig(sae.d_model, sae.d_sae, device=str(inputs.x.device), **given)
    theirs = JumpReLUTrainingSAE(config)
    copy_weights(sae, theirs)
    return theirs


class SAELens(Contender):
    """In fp32 as by default, or as its options ``autocast`` (bf16) and ``compile_sae`` have it."""

    parts = (*TRAINING, *INFERENCE)
    requires = ("sae-lens",)
    always_differs = (
        "dense; clips gradients and counts firings on top, neither projects nor renormalises the decoder, θ itself "
        "instead of log θ"
    )
    differs = f"{always_differs}, Adam with a first moment"

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
        rate, options = inputs.rule.learning_rate, {}
        if inputs.beta1:
            options = {"adam_beta1": inputs.beta1}
            self.differs = f"{self.always_differs}, latents without an entry drift on where ours wait"
        config = SAETrainerConfig(
            total_training_samples=STEPS * len(x),
            train_batch_size_samples=len(x),
            lr=rate,
            lr_end=rate,
            device=str(x.device),
            autocast=self.autocast,
            **options,
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


def shared_options(config: TrainConfig) -> dict[str, Any]:
    """What its `SAETrainerConfig` takes of our optimiser."""
    names = ("adam_beta1", "adam_beta2", "lr_decay_steps")
    return {name: getattr(config, name) for name in names}


class SAELensTrainer(Trainer):
    name, requires = "saelens", ("sae-lens",)
    differs = "linear warm-up, clipped gradients, decoder neither projected nor renormalised"
    defaults = "θ from 0.01 in a window of 0.05, Adam with β1 = 0.9, then a constant rate"

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        from sae_lens import JumpReLUTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        config, shared = setting.config, setting.recipe == "shared"
        options = {"l0_warm_up_steps": config.l0_warmup_steps}
        if not shared:
            options["jumprelu_bandwidth"] = JumpReLUTrainingSAEConfig.jumprelu_bandwidth
        theirs = training_sae(inputs_of(setting, start, sample), **options)
        if not shared:
            theirs.threshold.data.fill_(JumpReLUTrainingSAEConfig.jumprelu_init_threshold)
        rate = config.learning_rate
        given = SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=rate,
            lr_end=rate,
            lr_warm_up_steps=config.lr_warmup_steps,
            **shared_options(config) if shared else {},
        )
        self.trainer, self.begin = SAETrainer(given, theirs, iter(())), start

    def update(self, x: Tensor) -> None:
        self.trainer.step(x.float() / self.begin.input_scale)
        self.trainer.n_training_steps += 1

    def sae(self) -> JumpReLUSAE:
        return jumprelu_sae(self.trainer.sae, self.begin, pre_encoder_bias=True)
