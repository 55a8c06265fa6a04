"""Stand-ins for sparsify."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.saes.standins.parts import drawn, of


class EncoderOutput(NamedTuple):
    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor


class ForwardOutput(NamedTuple):
    sae_out: Tensor
    latent_acts: Tensor
    latent_indices: Tensor
    fvu: Tensor


@of("sparsify.sparse_coder")
class SparseCoder(nn.Module):
    def __init__(self, d_in: int, num_latents: int, k: int = 5, activation: str = "topk", transcode: bool = False):
        super().__init__()
        self.cfg = SimpleNamespace(k=k, activation=activation, transcode=transcode)
        self.encoder = nn.Linear(d_in, num_latents)
        self.W_dec, self.b_dec = drawn(num_latents, d_in, scale=0.1), drawn(d_in, scale=0.1)
        self.W_skip = drawn(d_in, d_in, scale=0.1) if transcode else None

    def encode(self, x: Tensor) -> EncoderOutput:
        pre = torch.relu(self.encoder(x if self.cfg.transcode else x - self.b_dec))
        if self.cfg.activation == "topk":
            return EncoderOutput(*pre.topk(self.cfg.k, dim=-1, sorted=False), pre)
        values, within = pre.unflatten(-1, (self.cfg.k, -1)).max(-1)
        return EncoderOutput(values, within + torch.arange(self.cfg.k) * (pre.shape[-1] // self.cfg.k), pre)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        return (self.W_dec[top_indices] * top_acts[..., None].to(self.W_dec.dtype)).sum(-2) + self.b_dec

    def forward(self, x: Tensor, y: Tensor | None = None) -> ForwardOutput:
        acts, latents, _ = self.encode(x)
        y, out = x if y is None else y, self.decode(acts, latents)
        if self.W_skip is not None:
            out = out + x @ self.W_skip.mT
        return ForwardOutput(out, acts, latents, (y - out).square().sum() / (y - y.mean(0)).square().sum())
