"""Plain PyTorch: the dense training step, sparse decoders that come with it, and the bare products."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.arithmetic import OPERAND_DTYPES, allowing_tf32
from bench.contenders import INFERENCE, INFERENCE_WITHOUT_MODULE, TRAINING, Contender, Inputs
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss

# Rounding z to bf16 moves latents across the threshold; in fp32 only the order of sums differs.
TOLERANCES = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}


class JumpReLU(torch.autograd.Function):
    """z·1[z > θ] with the straight-through gradient of θ, as dense PyTorch has it (arXiv 2407.14435, equation 11)."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, u):
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.bandwidth / 2
        return u * (z > threshold), (-(threshold / ctx.bandwidth) * window * u).sum(0), None


class Step(torch.autograd.Function):
    """1[z > θ] (equation 12)."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, u):
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.bandwidth / 2
        return None, (-(1 / ctx.bandwidth) * window * u).sum(0), None


def dense_loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, log_threshold: Tensor, loss: Loss
) -> Tensor:
    threshold = log_threshold.exp()
    z = (x - b_dec) @ W_enc + b_enc
    x_hat = JumpReLU.apply(z, threshold, loss.bandwidth) @ W_dec + b_dec
    l0 = Step.apply(z, threshold, loss.bandwidth).sum(1)
    return (x_hat - x).square().sum(1).mean() + loss.l0_coefficient * l0.mean()


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    z = torch.addmm(b_enc, x, W_enc)
    return z * (z > threshold)


def dense_decode(f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return torch.addmm(b_dec, f, W_dec)


def project(gradient: Tensor, W_dec: Tensor) -> None:
    gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec


def renormalise(W_dec: Tensor) -> None:
    W_dec /= W_dec.norm(dim=1, keepdim=True)


def released_weights(sae: JumpReLUSAE, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, threshold, W_dec, b_dec of the folded SAE, contiguous, in one dtype."""
    folded = sae.fold()
    names = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
    return tuple(getattr(folded, name).detach().to(dtype).contiguous() for name in names)


class DenseSAE(nn.Module):
    """Inference as one writes it: a module of five tensors."""

    def __init__(self, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor):
        super().__init__()
        given = {"W_enc": W_enc, "b_enc": b_enc, "threshold": threshold, "W_dec": W_dec, "b_dec": b_dec}
        for name, tensor in given.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return dense_decode(dense_encode(x, self.W_enc, self.b_enc, self.threshold), self.W_dec, self.b_dec)


class DensePyTorch(Contender):
    """Autograd through dense tensors, projection of the decoder's gradient, fused Adam, renormalisation; eager or by
    torch.compile. With dtype "bf16" training runs under autocast and inference holds weights of that dtype."""

    parts = (*TRAINING, *INFERENCE)

    def __init__(self, compiled: bool = False):
        self.compiled = compiled
        self.differs = self._differs(0.0)

    def _differs(self, beta1: float) -> str:
        drift = ", but latents without an entry drift on where ours wait" if beta1 else ""
        return "dense autograd" + (", compiled" if self.compiled else "") + "; the same update as ours" + drift

    def set_up(self, inputs: Inputs) -> None:
        self.inputs, self.tolerance = inputs, TOLERANCES[inputs.dtype]
        self.differs = self._differs(inputs.beta1)
        sae, rule = inputs.sae, inputs.rule
        trained = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold.log()]
        self.parameters = [tensor.detach().clone().contiguous().requires_grad_() for tensor in trained]
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=rule.learning_rate, betas=(inputs.beta1, rule.beta2), eps=rule.eps, fused=True
        )
        self.x = inputs.x.to(OPERAND_DTYPES[inputs.dtype])
        *self.encoder, self.W_dec, self.b_dec = released_weights(sae, self.x.dtype)
        self.f = None
        sae = DenseSAE(*self.encoder, self.W_dec, self.b_dec)

        def maybe_compiled(part):
            return torch.compile(part, dynamic=False) if self.compiled else part

        self.loss_of, self.project, self.renormalise, self.encode_of, self.decode_of = map(
            maybe_compiled, (dense_loss, project, renormalise, dense_encode, dense_decode)
        )
        self.sae = maybe_compiled(sae)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        dtype = self.inputs.dtype
        with allowing_tf32(dtype == "tf32"):
            yield

    def before(self, part: str) -> None:
        if part == "backward":
            self.optimiser.zero_grad()
        if part == "decode" and self.f is None:
            self.f = self.encode()
        super().before(part)

    def forward(self) -> Tensor:
        x = self.inputs.x
        with self.arithmetic(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.inputs.dtype == "bf16"):
            self.total = self.loss_of(x, *self.parameters, self.inputs.loss)
        return self.total

    def backward(self) -> None:
        with self.arithmetic():
            self.total.backward()

    def step(self) -> None:
        W_dec = self.parameters[2]
        self.optimiser.zero_grad()
        self.forward()
        self.backward()
        with torch.no_grad():
            self.project(W_dec.grad, W_dec)
            self.optimiser.step()
            self.renormalise(W_dec)

    @torch.no_grad()
    def encode(self) -> Tensor:
        with self.arithmetic():
            return self.encode_of(self.x, *self.encoder)

    @torch.no_grad()
    def decode(self) -> Tensor:
        with self.arithmetic():
            return self.decode_of(self.f, self.W_dec, self.b_dec)

    @torch.no_grad()
    def infer(self) -> Tensor:
        with self.arithmetic():
            return self.decode_of(self.encode_of(self.x, *self.encoder), self.W_dec, self.b_dec)

    @torch.no_grad()
    def module(self) -> Tensor:
        with self.arithmetic():
            return self.sae(self.x)

    def outputs(self) -> dict[str, Tensor]:
        found = {"x_hat": self.infer(), "module": self.module(), "loss": self.forward()}
        self.backward()
        if self.inputs.dtype == "fp32":
            found |= dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), (p.grad for p in self.parameters), strict=False))
            log_threshold = self.parameters[4]
            found["threshold"] = log_threshold.grad / log_threshold.exp()
        self.optimiser.zero_grad()
        return found


class SparseDecoder(Contender):
    """A dense encoder whose active latents go through a sparse product of PyTorch's own."""

    parts = INFERENCE_WITHOUT_MODULE

    def set_up(self, inputs: Inputs) -> None:
        self.tolerance = TOLERANCES[inputs.dtype]
        self.x = inputs.x.to(OPERAND_DTYPES[inputs.dtype])
        *self.encoder, self.W_dec, self.b_dec = released_weights(inputs.sae, self.x.dtype)
        self.code = None

    def before(self, part: str) -> None:
        if part.startswith("decode") and self.code is None:
            self.code = self.encode()

    def decode_of(self, code: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.decode_of(self.code)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.decode_of(self.encode())

    def outputs(self) -> dict[str, Tensor]:
        return {"x_hat": self.infer()}


class EmbeddingBag(SparseDecoder):
    parts = (*INFERENCE_WITHOUT_MODULE, "decode_backward")
    differs = "dense encoder and nonzero(), then F.embedding_bag"

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and values of the active entries, and where each token's begin."""
        f = dense_encode(self.x, *self.encoder)
        tokens, latents = f.nonzero(as_tuple=True)
        counts = torch.bincount(tokens, minlength=len(f))
        return latents, f[tokens, latents], counts.cumsum(0) - counts

    def decode_of(self, code: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        latents, values, offsets = code
        return F.embedding_bag(latents, self.W_dec, offsets, mode="sum", per_sample_weights=values) + self.b_dec

    def before(self, part: str) -> None:
        super().before(part)
        if part == "decode_backward":
            latents, values, offsets = self.code
            self.leaves = [values.detach().requires_grad_(), self.W_dec.detach().requires_grad_()]
            self.x_hat = F.embedding_bag(
                latents, self.leaves[1], offsets, mode="sum", per_sample_weights=self.leaves[0]
            )

    def decode_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.x_hat, self.leaves, self.x)


class TorchSparse(SparseDecoder):
    differs = "dense encoder and to_sparse_csr(), then a product of torch.sparse"

    def set_up(self, inputs: Inputs) -> None:
        super().set_up(inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once in a process: "Sparse CSR tensor support is in beta state"
            torch.eye(1).to_sparse_csr()

    @torch.no_grad()
    def encode(self) -> Tensor:
        return dense_encode(self.x, *self.encoder).to_sparse_csr()

    def decode_of(self, code: Tensor) -> Tensor:
        return torch.addmm(self.b_dec.expand(len(self.x), -1), code, self.W_dec)


class Products(Contender):
    """The dense products alone: what any encoder, and a decoder of dense f, cannot do without."""

    parts = INFERENCE_WITHOUT_MODULE
    differs = "the two dense products alone: no bias, no gate"

    def set_up(self, inputs: Inputs) -> None:
        dtype = OPERAND_DTYPES[inputs.dtype]
        sae = inputs.sae.fold()
        self.x = inputs.x.to(dtype)
        self.W_enc, self.W_dec = sae.W_enc.detach().T.to(dtype).T, sae.W_dec.detach().to(dtype)
        z = self.x @ self.W_enc + sae.b_enc.detach()
        self.f = torch.where(z > sae.threshold, z, 0).to(dtype)

    def encode(self) -> Tensor:
        return torch.mm(self.x, self.W_enc)

    def decode(self) -> Tensor:
        return torch.mm(self.f, self.W_dec)

    def infer(self) -> Tensor:
        return torch.mm(torch.mm(self.x, self.W_enc), self.W_dec)
