"""From a case to contenders that are ready: inputs, room, weights, warmth."""

import torch

from bench.cases import Case, make
from bench.contenders import Contender, Inputs
from bench.timing import gate, measure
from bench.timing.inputs import construct
from bench.timing.measure import Clock

WARM_UPS = {"cpu": 1, "cuda": 2}
# Main memory that a trainer takes: weights, gradients and two moments of [d_model, d_sae] twice, and some [N, d_sae].
TRAINING_WEIGHTS, INFERENCE_WEIGHTS, TRAINING_CODES, INFERENCE_CODES = 8, 2, 8, 3


def needed_bytes(case: Case) -> int:
    """About what a contender takes on a CPU."""
    training = "step" in case.parts
    weights, codes = (
        (TRAINING_WEIGHTS, TRAINING_CODES) if training else (INFERENCE_WEIGHTS * case.shape.count, INFERENCE_CODES)
    )
    return 4 * case.shape.d_sae * (weights * case.shape.d_model + codes * case.tokens)


def check_room(case: Case, device: torch.device) -> None:
    """Raise MemoryError before the system starts to swap or to kill; a GPU's allocator does so by itself."""
    free, needed = measure.available_bytes(), needed_bytes(case)
    if device.type == "cuda" or free is None:
        return
    if needed > free:
        raise MemoryError(f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB available")


class Repeated(Contender):
    """Inference by many SAEs, one after another, each with weights of its own."""

    parts = ("infer",)

    def __init__(self, name: str, case: Case):
        self.contenders = [[make(name) for _ in range(shape.count)] for shape in case.shape.all]
        one = self.contenders[0][0]
        self.name, self.ours, self.differs, self.requires = one.name, one.ours, one.differs, one.requires
        if "infer" not in one.parts:
            self.parts = ()

    def check_available(self, device: torch.device) -> None:
        self.contenders[0][0].check_available(device)

    def set_up_all(self, inputs: list[Inputs]) -> None:
        for group, given in zip(self.contenders, inputs, strict=True):
            for contender in group:
                contender.set_up(given)

    def infer(self) -> None:
        for group in self.contenders:
            for contender in group:
                contender.infer()


def contender_of(name: str, case: Case) -> Contender:
    return Repeated(name, case) if case.shape.more else make(name)


def set_up(contender: Contender, inputs: list[Inputs]) -> None:
    if isinstance(contender, Repeated):
        contender.set_up_all(inputs)
    else:
        contender.set_up(inputs[0])


def warm(contender: Contender, parts: tuple[str, ...], clock: Clock) -> None:
    for part in parts:
        for _ in range(WARM_UPS[clock.device.type]):
            contender.before(part)
            getattr(contender, part)()
    clock.synchronise()


def small_inputs(case: Case, device: torch.device) -> list[Inputs]:
    """For `gate.agreement`, of each shape."""
    rest = (case.l0, device, case.dtype, case.skew, gate.gate_tokens(case.tokens), case.beta1)
    return [gate.agreement_inputs(shape.d_model, shape.d_sae, *rest) for shape in case.shape.all]


def all_inputs(case: Case, device: torch.device) -> list[Inputs]:
    options = {"dtype": case.dtype, "skew": case.skew, "beta1": case.beta1}
    return [construct(s.d_model, s.d_sae, case.tokens, case.l0, device, **options) for s in case.shape.all]
