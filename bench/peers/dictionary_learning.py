"""dictionary_learning: `JumpReluTrainer.update`, and its `JumpReluAutoEncoder` for inference."""

import torch
from torch import Tensor

from bench.contenders import INFERENCE, TRAINING, Contender, Inputs, copy_weights
from bench.trainers import Setting, Trainer, jumprelu_sae
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import TrainConfig

STEPS = 10**9  # more than are made: the trainer wants to know how many there will be


class DictionaryLearning(Contender):
    """It has no pre-encoder bias, so it is given the folded weights, which are the same function."""

    parts = (*TRAINING, *INFERENCE)
    requires = ("dictionary-learning",)
    only_beta1 = 0.0
    differs = (
        "dense; no pre-encoder bias, coefficient·(L0/target − 1)² of the batch whose gradient sees f instead of z, θ "
        "itself instead of log θ, clips gradients, waits for its loss in every step"
    )

    def set_up(self, inputs: Inputs) -> None:
        import nnsight
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer

        # It replaces parts of PyTorch when imported, among them what torch.compile is made of, and is not needed here.
        nnsight.DEFAULT_PATCHER.__exit__(None, None, None)

        self.inputs = inputs
        sae, loss = inputs.sae, inputs.loss
        self.trainer = JumpReluTrainer(
            steps=STEPS,
            activation_dim=sae.d_model,
            dict_size=sae.d_sae,
            layer=0,
            lm_name="",
            lr=inputs.rule.learning_rate,
            bandwidth=loss.bandwidth,
            sparsity_penalty=loss.l0_coefficient,
            warmup_steps=0,
            sparsity_warmup_steps=None,
            target_l0=inputs.l0,
            device=str(inputs.x.device),
        )
        copy_weights(sae.fold(), self.trainer.ae)
        self.f, self.steps = None, 0

    def before(self, part: str) -> None:
        if part == "backward":
            self.trainer.optimizer.zero_grad()
        if part == "decode" and self.f is None:
            self.f = self.encode()
        super().before(part)

    def forward(self) -> Tensor:
        self.total = self.trainer.loss(self.inputs.x, step=self.steps)
        return self.total

    def backward(self) -> None:
        self.total.backward()

    def step(self) -> None:
        self.trainer.update(self.steps, self.inputs.x)
        self.steps += 1

    @torch.no_grad()
    def encode(self) -> Tensor:
        return self.trainer.ae.encode(self.inputs.x)

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.trainer.ae.decode(self.f)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.trainer.ae(self.inputs.x)

    def outputs(self) -> dict[str, Tensor]:
        """x̂, and the gradients in which neither the penalty nor the pre-encoder bias takes part."""
        found = {"x_hat": self.infer()}
        self.forward()
        self.backward()
        found |= {name: getattr(self.trainer.ae, name).grad.clone() for name in ("W_dec", "b_enc")}
        self.trainer.optimizer.zero_grad()
        return found


def sparsity_warmup(config: TrainConfig, decay_start: int | None) -> int:
    """Ours, as far as it takes one: over before the last step, and before the rate decays."""
    return min(config.l0_warmup_steps, (decay_start or config.steps) - 1)


class DictionaryLearningTrainer(Trainer):
    name, requires, fixes_l0 = "dictionary_learning", ("dictionary-learning",), True
    differs = (
        "penalty (L0/target − 1)² whose gradient sees f instead of z, no pre-encoder bias, linear warm-up, "
        "clipped gradients"
    )
    defaults = "θ from 0.001 in a window of 0.001, then a constant rate"

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer

        config, shared = setting.config, setting.recipe == "shared"
        decay_start = config.steps - config.lr_decay_steps if config.lr_decay_steps else None
        self.trainer = JumpReluTrainer(
            steps=config.steps,
            activation_dim=start.d_model,
            dict_size=start.d_sae,
            layer=0,
            lm_name="",
            lr=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            sparsity_warmup_steps=sparsity_warmup(config, decay_start if shared else None),
            target_l0=setting.l0,
            **({"bandwidth": config.loss.bandwidth, "decay_start": decay_start} if shared else {}),
        )
        self.begin, self.steps, theirs = start, 0, self.trainer.ae
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_dec"):
                getattr(theirs, name).copy_(getattr(start, name))
            theirs.b_enc.copy_(start.b_enc - start.b_dec @ start.W_enc)
            if shared:
                theirs.threshold.fill_(config.threshold_init)

    def update(self, x: Tensor) -> None:
        self.trainer.update(self.steps, x.float() / self.begin.input_scale)
        self.steps += 1

    def sae(self) -> JumpReLUSAE:
        return jumprelu_sae(self.trainer.ae, self.begin, pre_encoder_bias=False)
