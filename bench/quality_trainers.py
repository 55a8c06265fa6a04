"""Trainers behind one face for `bench.quality`: the same start, the same batches, each trainer's own mathematics.

Every trainer starts from the same W_enc, W_dec, b_enc and b_dec and sees activations divided by the same scale. The
learning rate and the lengths of the warm-ups of the rate and of the penalty are equal. With ``recipe="published"``
everything else is what the package does by default; with "shared" the bandwidth, the thresholds' start, the decay of
the rate and the optimiser are ours wherever the package lets one say so.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.contenders import Contender, Inputs
from bench.peers_saelens import PARAMETERS
from gemmascope.kernels import Rule
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss, TrainConfig
from gemmascope.training.trainer import SAETrainer

RECIPES = ("published", "shared")


@dataclass(frozen=True)
class Setting:
    """One training: the recipe, and how sparse, as the weight of the L0 penalty or as the L0 itself."""

    config: TrainConfig
    l0: float
    """For trainers that fix L0 or aim at one."""
    recipe: str = "published"


class Trainer:
    """Subclasses set the names as `bench.contenders.Contender` does, and define `start`, `update` and `sae`."""

    name = ""
    requires: tuple[str, ...] = ()
    fixes_l0 = False
    """Whether `Setting.l0` is what makes it sparse, instead of the weight of the penalty."""
    differs = ""

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        """Take over weights. start: not written to. sample: as harvested, for those that set something from it."""
        raise NotImplementedError

    def update(self, x: Tensor) -> None:
        """One step on activations [N, d_model] as harvested."""
        raise NotImplementedError

    def sae(self) -> "JumpReLUSAE | TopKSAE":
        """What `gemmascope.evaluate_sae` takes; training may go on afterwards."""
        raise NotImplementedError


class Ours(Trainer):
    def __init__(self, name: str, route: str, impl: str, dtype: torch.dtype = torch.float32):
        self.name, self.route, self.impl, self.dtype = name, route, impl, dtype

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        config = setting.config.changed(route=self.route)
        self.trainer = SAETrainer(config, sample, impl=self.impl, dtype=self.dtype)

    def update(self, x: Tensor) -> None:
        self.trainer.update(x)

    def sae(self) -> JumpReLUSAE:
        self.trainer.flush()
        return self.trainer.sae


def inputs_of(setting: Setting, start: JumpReLUSAE, sample: Tensor) -> Inputs:
    config = setting.config
    loss = Loss(config.loss.l0_coefficient, config.loss.bandwidth)
    rule = Rule(config.learning_rate, config.adam_beta2, config.adam_eps, log_threshold=False)
    return Inputs(start, sample, loss, rule, setting.l0)


@torch.no_grad()
def jumprelu_sae(theirs, start: JumpReLUSAE, pre_encoder_bias: bool) -> JumpReLUSAE:
    """Their weights as our module. Negative thresholds count as 0, as in the inference of both packages."""
    sae = copy.deepcopy(start)
    sae.pre_encoder_bias = pre_encoder_bias
    for name in PARAMETERS:
        getattr(sae, name).copy_(getattr(theirs, name))
    sae.threshold.clamp_(min=0.0)
    return sae


class SAELens(Trainer):
    name, requires = "saelens", ("sae-lens",)
    differs = (
        "θ from 0.01 in a window of 0.05, Adam with β1 = 0.9, linear warm-up, then a constant rate, clipped gradients, "
        "decoder neither projected nor renormalised"
    )

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        from sae_lens import JumpReLUTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer as TheirTrainer

        from bench.peers_saelens import training_sae

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
            **(
                {"adam_beta1": 0.0, "adam_beta2": config.adam_beta2, "lr_decay_steps": config.lr_decay_steps}
                if shared
                else {}
            ),
        )
        self.trainer, self.begin = TheirTrainer(given, theirs, iter(())), start

    def update(self, x: Tensor) -> None:
        self.trainer.step(x.float() / self.begin.input_scale)
        self.trainer.n_training_steps += 1

    def sae(self) -> JumpReLUSAE:
        return jumprelu_sae(self.trainer.sae, self.begin, pre_encoder_bias=True)


class DictionaryLearning(Trainer):
    name, requires, fixes_l0 = "dictionary_learning", ("dictionary-learning",), True
    differs = (
        "penalty (L0/target − 1)² whose gradient sees f instead of z, θ from 0.001 in a window of 0.001, no "
        "pre-encoder bias, linear warm-up, then a constant rate, clipped gradients"
    )

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
            sparsity_warmup_steps=config.l0_warmup_steps,
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


class Sparsify(Trainer):
    requires, fixes_l0 = ("eai-sparsify",), True

    def __init__(self, adam: bool = False):
        """adam: its option instead of its default optimiser, also with the recipe "published"."""
        self.adam, self.name = adam, "sparsify_adam" if adam else "sparsify"
        rule = "Adam with β1 = 0.9, its rate linearly down to 0" if adam else "schedule-free sign descent, its own rate"
        self.differs = f"TopK, FVU as the loss, {rule}"

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        from bench.peers_sparsify import CoderTraining, sparse_coder

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


def make(name: str, impl: str = "auto") -> Trainer:
    """A trainer by name. Raises ValueError for another name and `UnavailableError` where its package is missing."""
    trainers = {
        "ours": lambda: Ours("ours", "auto", impl),
        "reference": lambda: Ours("reference", "reference", "reference"),
        "saelens": SAELens,
        "dictionary_learning": DictionaryLearning,
        "sparsify": Sparsify,
        "sparsify_adam": lambda: Sparsify(adam=True),
    }
    if name not in trainers:
        raise ValueError(f"trainer: expected one of {', '.join(trainers)}, found {name!r}")
    trainer = trainers[name]()
    package = Contender()
    package.requires = trainer.requires
    package.check_available(torch.device("cpu"))
    return trainer
