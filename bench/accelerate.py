"""What users of other packages gain by `gemmascope.accelerate`: the same module as it comes and accelerated, called as
they call it. The suite `accelerate` of `bench.cases`; both are held to the fp64 reference before either is timed."""

from typing import Any

import torch
from torch import Tensor

from bench.arithmetic import OPERAND_DTYPES
from bench.contenders import INFERENCE_WITHOUT_MODULE, Contender, Inputs, copy_weights
from bench.peers.sparsify import Sparsify, sparse_coder
from gemmascope import accelerate


class Called(Contender):
    """`infer` is a call of the module; `encode` and `decode` are its own, with what lies between them stored."""

    parts = INFERENCE_WITHOUT_MODULE

    def __init__(self, accelerated: bool = False):
        self.ours = self.accelerated = accelerated
        self.differs = "" if accelerated else "dense"

    def make(self, inputs: Inputs) -> Any:
        """The package's module for inference, with the weights of ``inputs``."""
        raise NotImplementedError

    def set_up(self, inputs: Inputs) -> None:
        dtype = OPERAND_DTYPES[inputs.dtype]
        self.tolerance = 1e-4 if inputs.dtype == "fp32" else 5e-2
        self.x, self.code = inputs.x.to(dtype), None
        self.theirs = self.make(inputs).to(dtype=dtype)
        if self.accelerated:
            accelerate(self.theirs)

    def before(self, part: str) -> None:
        if part == "decode" and self.code is None:
            self.code = self.encode()

    @torch.no_grad()
    def encode(self) -> Any:
        return self.theirs.encode(self.x)

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.theirs.decode(self.code)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.theirs(self.x)

    def outputs(self) -> dict[str, Tensor]:
        """By a call, and by its halves."""
        self.before("decode")
        return {"x_hat": self.infer(), "module": self.decode()}


class SAELensCalled(Called):
    requires = ("sae-lens",)

    def make(self, inputs: Inputs) -> Any:
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

        sae = inputs.sae.fold()
        options = {"apply_b_dec_to_input": False, "device": str(inputs.x.device)}
        theirs = JumpReLUSAE(JumpReLUSAEConfig(sae.d_model, sae.d_sae, **options))
        copy_weights(sae, theirs)
        return theirs


class DictionaryLearningCalled(Called):
    requires = ("dictionary-learning",)

    def make(self, inputs: Inputs) -> Any:
        import nnsight
        from dictionary_learning.dictionary import JumpReluAutoEncoder

        nnsight.DEFAULT_PATCHER.__exit__(None, None, None)  # see bench/peers/dictionary_learning.py
        sae = inputs.sae.fold()
        theirs = JumpReluAutoEncoder(sae.d_model, sae.d_sae, device=inputs.x.device)
        copy_weights(sae, theirs)
        return theirs


class SparsifyCalled(Called):
    requires = ("eai-sparsify",)

    def __init__(self, accelerated: bool = False):
        super().__init__(accelerated)
        self.differs = "TopK, a fixed number of latents a token; on a GPU its own forward is bf16 whatever the dtype"

    def make(self, inputs: Inputs) -> Any:
        return sparse_coder(inputs)

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor]:
        code = self.theirs.encode(self.x)
        return code.top_acts, code.top_indices

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.theirs.decode(*self.code)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.theirs(self.x).sae_out

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        return Sparsify().exact(inputs)
