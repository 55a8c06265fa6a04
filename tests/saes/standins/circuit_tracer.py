"""Stand-ins for circuit-tracer."""

import torch
from torch import Tensor, nn

from tests.saes.standins.parts import drawn, of


class JumpReLU(nn.Module):
    def __init__(self, threshold: Tensor):
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


@of("circuit_tracer.transcoder.activation_functions")
class SignedTopK(nn.Module):
    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.zeros_like(x).scatter(-1, x.topk(self.k, dim=-1).indices, 1)


SignedTopK.__name__ = "TopK"  # as it is called there


@of("circuit_tracer.transcoder.single_layer_transcoder")
class SingleLayerTranscoder(nn.Module):
    def __init__(self, d_model: int, d_transcoder: int, activation, skip: bool = False):
        super().__init__()
        self.W_enc, self.W_dec = (
            drawn(d_transcoder, d_model, scale=d_model**-0.5),
            drawn(d_transcoder, d_model, scale=0.1),
        )
        self.b_enc, self.b_dec = drawn(d_transcoder, scale=0.1), drawn(d_model, scale=0.1)
        self.W_skip = drawn(d_model, d_model, scale=0.1) if skip else None
        self.activation_function = activation

    def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
        pre = input_acts.to(self.W_enc.dtype) @ self.W_enc.T + self.b_enc
        return self.activation_function(pre) if apply_activation_function else pre

    def compute_skip(self, input_acts: Tensor) -> Tensor:
        return input_acts @ self.W_skip.T

    def decode(self, acts: Tensor, input_acts: Tensor | None = None) -> Tensor:
        out = acts @ self.W_dec + self.b_dec
        return out if self.W_skip is None else out + self.compute_skip(input_acts)

    def forward(self, input_acts: Tensor) -> Tensor:
        return self.decode(self.encode(input_acts), input_acts)

    def encode_sparse(self, input_acts: Tensor, zero_positions: slice = slice(0, 1)):
        acts = self.encode(input_acts)
        acts[zero_positions] = 0
        sparse = acts.to_sparse()
        return sparse, self.W_enc[sparse.indices()[1]]


@of("circuit_tracer.transcoder.single_layer_transcoder")
class TranscoderSet(nn.Module):
    def __init__(self, transcoders: list[SingleLayerTranscoder]):
        super().__init__()
        self.transcoders = nn.ModuleList(transcoders)

    def encode(self, input_acts: Tensor) -> Tensor:
        return torch.stack([one.encode(x) for one, x in zip(self.transcoders, input_acts, strict=True)])

    def decode(self, acts: Tensor) -> Tensor:
        return torch.stack([one.decode(f) for one, f in zip(self.transcoders, acts, strict=True)])


@of("circuit_tracer.transcoder.cross_layer_transcoder")
class CrossLayerTranscoder(nn.Module):
    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f
