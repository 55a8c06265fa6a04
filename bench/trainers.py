"""What `bench.quality` compares: trainers behind one face; the same start and batches, each one's own mathematics.

Every trainer starts from the same W_enc, W_dec, b_enc and b_dec and sees activations divided by the same scale. The
learning rate and the lengths of the warm-ups of the rate and of the penalty are equal. With ``recipe="published"``
everything else is what the package does by default; with "shared" the bandwidth, the thresholds' start, the decay of
the rate and the optimiser are ours wherever the package lets one say so. `TRAINERS` says where each is found.
"""

import copy
import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.contenders import Contender, Inputs, copy_weights
from gemmascope.kernels import Rule
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss, TrainConfig

RECIPES = ("published", "shared")
# Name: module, class, arguments.
TRAINERS: dict[str, tuple[str, str, dict]] = {
    "ours": ("bench.ours", "OursTrainer", {"name": "ours"}),
    "reference": ("bench.ours", "OursTrainer", {"name": "reference", "route": "reference", "impl": "reference"}),
    "saelens": ("bench.peers.saelens", "SAELensTrainer", {}),
    "dictionary_learning": ("bench.peers.dictionary_learning", "DictionaryLearningTrainer", {}),
    "sparsify": ("bench.peers.sparsify", "SparsifyTrainer", {}),
    "sparsify_adam": ("bench.peers.sparsify", "SparsifyTrainer", {"adam": True}),
}


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
    """Otherwise than ours with either recipe."""
    defaults = ""
    """Otherwise than ours with the recipe "published" alone."""

    def differences(self, recipe: str) -> str:
        return ", ".join(filter(None, (self.differs, self.defaults if recipe == "published" else "")))

    def start(self, setting: Setting, start: JumpReLUSAE, sample: Tensor) -> None:
        """Take over weights. start: not written to. sample: as harvested, for those that set something from it."""
        raise NotImplementedError

    def update(self, x: Tensor) -> None:
        """One step on activations [N, d_model] as harvested."""
        raise NotImplementedError

    def sae(self) -> nn.Module:
        """What `gemmascope.evaluate.evaluate_sae` takes; training may go on afterwards."""
        raise NotImplementedError


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
    copy_weights(theirs, sae)
    sae.threshold.clamp_(min=0.0)
    return sae


def class_of(name: str) -> type[Trainer]:
    """Raises ValueError for a name that is not in `TRAINERS`."""
    if name not in TRAINERS:
        raise ValueError(f"trainer: expected one of {', '.join(TRAINERS)}, found {name!r}")
    module, attribute, _ = TRAINERS[name]
    return getattr(importlib.import_module(module), attribute)


def make(name: str, impl: str = "auto") -> Trainer:
    """A trainer by name, ours by an implementation. Raises ValueError for another name and `UnavailableError` where its
    package is missing."""
    found = class_of(name)
    package = Contender()
    package.requires = found.requires
    package.check_available(torch.device("cpu"))
    arguments = TRAINERS[name][2]
    return found(**arguments | ({"impl": impl} if name == "ours" else {}))
