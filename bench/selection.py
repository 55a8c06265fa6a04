"""TopK and BatchTopK encoders as they select in training: ours and plain PyTorch's. The suite `topk` of `bench.cases`;
x̂ of what each selects is held to fp64 before it is timed."""

import torch
from torch import Tensor

from bench.arithmetic import OPERAND_DTYPES
from bench.contenders import Contender, Inputs, UnavailableError
from gemmascope import kernels
from gemmascope.kernels import LATENT, Entries
from gemmascope.kernels.dispatch import choose

# z rounded to bf16 lets latents at the border change sides: at k 64 of 4,096, x̂ differs by .057 of its norm.
BF16_TOLERANCE = 1e-1
Code = tuple[Tensor, Tensor, Tensor]  # z, token and latent of what was selected; what is beside them has z = 0


class Selecting(Contender):
    """`encode` of x that is centred and rounded beforehand, k the L0 of the others. of: "token" or "batch"."""

    parts = ("encode",)

    def __init__(self, of: str = "token"):
        self.of = of

    def set_up(self, inputs: Inputs) -> None:
        sae, dtype = inputs.sae, OPERAND_DTYPES[inputs.dtype]
        self.inputs, self.tolerance = inputs, 1e-4 if inputs.dtype == "fp32" else 5e-2
        self.x = (inputs.x - sae.b_dec.detach()).to(dtype)
        self.W_enc = sae.W_enc.detach().T.to(dtype).contiguous().T  # by latent, as training holds it
        self.b_enc = sae.b_enc.detach()

    def selected(self) -> Code:
        raise NotImplementedError

    def outputs(self) -> dict[str, Tensor]:
        sae, (z, tokens, latents) = self.inputs.sae, self.selected()
        f = torch.zeros(len(self.x), sae.d_sae, device=z.device).index_put(
            (tokens, latents), z.float(), accumulate=True
        )
        return {"x_hat": f @ sae.W_dec.detach() + sae.b_dec.detach()}

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        sae, x = inputs.sae, inputs.x.double()
        W_enc, b_enc, W_dec, b_dec = (
            getattr(sae, name).detach().double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        )
        z = torch.relu((x - b_dec) @ W_enc + b_enc)
        rows, k = (z, inputs.k) if self.of == "token" else (z.view(1, -1), inputs.k * len(z))
        values, places = rows.topk(k)
        return {"x_hat": torch.zeros_like(rows).scatter(1, places, values).view_as(z) @ W_dec + b_dec}


class Ours(Selecting):
    """`encode_topk`."""

    ours = True

    def __init__(self, of: str = "token", impl: str = "auto"):
        super().__init__(of)
        self.impl = impl

    def check_available(self, device: torch.device) -> None:
        try:
            choose(self.impl, device, torch.float32)
        except ValueError as error:
            raise UnavailableError(str(error)) from None

    @torch.no_grad()
    def encode(self) -> Entries:
        given, options = (self.x, self.W_enc, self.b_enc, self.inputs.k), {"of": self.of, "impl": self.impl}
        return kernels.encode_topk(*given, tf32=self.inputs.dtype == "tf32", **options)

    def selected(self) -> Code:
        entries = self.encode()
        stored = int(entries.offsets[-1])
        z, latents, tokens = (values[:stored] for values in entries[:3])
        return z, tokens.long(), (latents & LATENT).long()


class PlainPyTorch(Selecting):
    """A product, relu and `torch.topk`, eager or by torch.compile."""

    def __init__(self, of: str = "token", compiled: bool = False):
        super().__init__(of)
        self.compiled = compiled
        self.differs = "z in the dtype of the operands, among equals as torch.topk chooses"

    def set_up(self, inputs: Inputs) -> None:
        super().set_up(inputs)
        if inputs.dtype == "bf16":
            self.tolerance = BF16_TOLERANCE
        self.b_enc, k = self.b_enc.to(self.x.dtype), inputs.k * (1 if self.of == "token" else len(self.x))

        def select(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.relu(torch.addmm(b_enc, x, W_enc))
            return (z if self.of == "token" else z.view(1, -1)).topk(k, sorted=False)

        self.select = torch.compile(select, dynamic=False) if self.compiled else select

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor]:
        return self.select(self.x, self.W_enc, self.b_enc)

    def selected(self) -> Code:
        z, places = self.encode()
        d_sae = self.W_enc.shape[1]
        if self.of == "token":
            places = places + torch.arange(len(places), device=places.device)[:, None] * d_sae
        z, places = z.flatten(), places.flatten()
        return z, places // d_sae, places % d_sae
