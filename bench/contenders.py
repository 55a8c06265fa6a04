"""What is timed: one class for each implementation of the same work, behind one boundary for all.

A contender takes x that is already on the device and returns what the part is named after, on the device:

| part | from | to |
|---|---|---|
| `step` | x | updated weights: loss, gradients, optimiser, and whatever else its users' trainers do |
| `forward` | x | the training loss, as a tensor |
| `backward` | what `forward` left | gradients of all parameters (ours: and the update, which is one with them) |
| `encode` | x | the active latents, dense or sparse |
| `decode` | what `encode` gives | x̂ [N, d_model] |
| `infer` | x | x̂ by `encode` and `decode`, or however the package does it, without gradients |
| `module` | x | x̂ by calling the package's module as its users do, without gradients; often that is `infer` already |

The operators by themselves, for the suite `kernels`: `decode_backward`, `jumprelu`, `jumprelu_backward`.

Third-party packages are imported in `set_up`, never when a module of contenders is. A contender is made, set up, used
for one case and dropped with all it holds. `cases.CONTENDERS` says where each is found.
"""

import importlib.metadata
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemmascope.kernels import Rule
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss

TRAINING = ("step", "forward", "backward")
INFERENCE_WITHOUT_MODULE = ("infer", "encode", "decode")
INFERENCE = ("infer", "module", "encode", "decode")
OPERATORS = ("encode", "decode", "decode_backward", "jumprelu", "jumprelu_backward")
PARTS = tuple(dict.fromkeys((*TRAINING, *INFERENCE, *OPERATORS)))


# Names of a JumpReLU SAE's parameters, in our module and in those of some others.
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


class UnavailableError(Exception):
    """The contender cannot run here; the message says why in one line."""


@dataclass(frozen=True)
class Inputs:
    """What every contender of a case is given. Nothing here may be written to."""

    sae: JumpReLUSAE
    """fp32, on the device, rows of W_dec of unit norm, thresholds at which about ``l0`` latents a token fire."""
    x: Tensor
    """[N, d_model] fp32, on the device, mean squared norm 1."""
    loss: Loss
    rule: Rule
    l0: float
    dtype: str = "fp32"
    """The arithmetic of our own and of plain PyTorch's products: "fp32", "tf32" or "bf16". A package whose users run
    it otherwise keeps to its own and says so in its name."""

    @property
    def beta1(self) -> float:
        """Adam's. Another revision that ours is compared with may know none."""
        return getattr(self.rule, "beta1", 0.0)

    @property
    def k(self) -> int:
        """Latents a token for those that fix their number."""
        return max(1, round(self.l0))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    for name in PARAMETERS:
        getattr(target, name).copy_(getattr(source, name))


class Contender:
    """An implementation of some of the `PARTS`.

    Subclasses set ``name`` (as the command line and the table have it), ``parts``, ``differs`` (one sentence: what it
    does more or less than ours in these parts; "" where it does the same) and ``requires`` (distributions that must be
    installed and whose versions go into every row), and define `set_up` and a method for each part. Everything that is
    not the part's own work belongs into `set_up` or `before`, which are not timed.
    """

    name: str = ""
    parts: tuple[str, ...] = ()
    differs: str = ""
    requires: tuple[str, ...] = ()
    only_beta1: float | None = None
    """Adam's β1, of a trainer that has no other; None: it takes that of `Inputs`."""
    ours: bool = False
    """A failure or a red gate of ours ends in exit status 1; a peer's is a row."""
    tolerance: float = 1e-4
    """Largest relative error, in the Euclidean norm, of each of `outputs`; a contender beyond it is not timed. One that
    rounds to bf16 sets it to 1e-2 or so."""
    module_tolerance: float | None = None
    """That of the output `module`, where it is another: modules that round z before their gate let latents change
    sides."""

    def check_available(self, device: torch.device) -> None:
        """Raise `UnavailableError` when the contender cannot run on this machine. Cheap: nothing is imported."""
        for package in self.requires:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise UnavailableError(f"{package} is not installed") from None

    def check_beta1(self, beta1: float) -> None:
        """Raise `UnavailableError` when the contender cannot have a first moment that was asked for. Not asked for, 0,
        it keeps to its own, and says so in ``differs``."""
        if beta1 and self.only_beta1 not in (None, beta1):
            raise UnavailableError(f"its trainer has Adam's β1 at {self.only_beta1:g} and takes no {beta1:g}")

    def versions(self) -> dict[str, str]:
        return {package: importlib.metadata.version(package) for package in self.requires}

    def set_up(self, inputs: Inputs) -> None:
        """Take over weights and activations. Runs once, before any part; may raise `UnavailableError`."""
        raise NotImplementedError

    def before(self, part: str) -> None:
        """What a call of ``part`` needs beforehand; not timed. `decode` needs a code, `backward` a graph."""
        if part == "backward":
            self.forward()

    def check_made(self) -> None:
        """Called after the timing: raise when the calls did not do their work. May wait for the device."""

    def outputs(self) -> dict[str, Tensor]:
        """What this contender computes from ``inputs`` and must agree on with the fp64 reference, after `set_up`.

        Names: ``x_hat`` [N, d_model] of `infer`; ``module``, the same of `module` where that is another call; ``loss``,
        the scalar of `forward`; gradients of that loss by the name of the parameter, in our shapes: ``W_enc`` [d_model,
        d_sae], ``b_enc``, ``W_dec`` [d_sae, d_model], ``b_dec``,
        ``threshold``. Leave out what is defined differently, and say so in ``differs``.
        """
        return {}

    def exact(self, inputs: Inputs) -> dict[str, Tensor] | None:
        """What `outputs` should be, in fp64, for a contender that computes something else than a JumpReLU SAE (TopK,
        say) and brings a formula of its own. None: the reference of the JumpReLU SAE."""
        return None

    def forward(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def encode(self) -> object:
        raise NotImplementedError

    def decode(self) -> Tensor:
        raise NotImplementedError

    def infer(self) -> Tensor:
        raise NotImplementedError

    def module(self) -> Tensor:
        """For those whose `infer` is the call of a module."""
        return self.infer()
