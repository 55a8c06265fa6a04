"""Stand-ins for dictionary_learning."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tests.saes.standins.parts import drawn, of


@of("dictionary_learning.dictionary")
class Dictionary(ABC, nn.Module):
    """An ABC first, as there: objects of its classes are laid out otherwise than those of nn.Module."""

    @abstractmethod
    def encode(self, x: Tensor, **options): ...

    @abstractmethod
    def decode(self, f: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, output_features: bool = False):
        f = self.encode(x)
        return (self.decode(f), f) if output_features else self.decode(f)


@of("dictionary_learning.dictionary")
class AutoEncoder(Dictionary):
    def __init__(self, activation_dim: int, dict_size: int):
        super().__init__()
        self.encoder, self.decoder = (
            nn.Linear(activation_dim, dict_size),
            nn.Linear(dict_size, activation_dim, bias=False),
        )
        # As there, W_enc is a transposed view.
        self.encoder.weight = nn.Parameter((activation_dim**-0.5 * torch.randn(activation_dim, dict_size)).T)
        self.encoder.bias = nn.Parameter(-1.7 + 0.1 * torch.randn(dict_size))
        self.bias = drawn(activation_dim, scale=0.1)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x - self.bias))

    def decode(self, f: Tensor) -> Tensor:
        return self.decoder(f) + self.bias


@of("dictionary_learning.dictionary")
class AutoEncoderNew(AutoEncoder):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        del self.bias
        self.decoder.bias = drawn(sizes[0], scale=0.1)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x))

    def decode(self, f: Tensor) -> Tensor:
        return self.decoder(f)


@of("dictionary_learning.dictionary")
class GatedAutoEncoder(AutoEncoder):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        del self.bias
        self.encoder.bias, self.decoder_bias = None, drawn(sizes[0], scale=0.1)
        self.r_mag, self.mag_bias = drawn(sizes[1], scale=0.3), drawn(sizes[1])
        self.gate_bias = nn.Parameter(-1.5 + 0.3 * torch.randn(sizes[1]))

    def encode(self, x: Tensor, return_gate: bool = False):
        y = self.encoder(x - self.decoder_bias)
        pi = y + self.gate_bias
        f = (pi > 0) * torch.relu(self.r_mag.exp() * y + self.mag_bias)
        return (f, torch.relu(pi)) if return_gate else f

    def decode(self, f: Tensor) -> Tensor:
        return self.decoder(f) + self.decoder_bias


@of("dictionary_learning.dictionary")
class Matrices(Dictionary):
    """W_enc, W_dec and the biases, as some of its dictionaries hold them."""

    def __init__(self, activation_dim: int, dict_size: int):
        super().__init__()
        self.W_enc = drawn(activation_dim, dict_size, scale=activation_dim**-0.5)
        self.W_dec = drawn(dict_size, activation_dim, scale=0.1)
        self.b_enc, self.b_dec = drawn(dict_size, scale=0.1), drawn(activation_dim, scale=0.1)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


@of("dictionary_learning.dictionary")
class JumpReluAutoEncoder(Matrices):
    def __init__(self, *sizes: int, apply_b_dec_to_input: bool = False):
        super().__init__(*sizes)
        self.threshold = nn.Parameter(1.7 + 0.2 * torch.randn(sizes[1]))
        self.apply_b_dec_to_input = apply_b_dec_to_input

    def encode(self, x: Tensor, output_pre_jump: bool = False):
        pre = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        f = torch.relu(pre * (pre > self.threshold))
        return (f, pre) if output_pre_jump else f


@of("dictionary_learning.trainers.top_k")
class AutoEncoderTopK(AutoEncoder):
    def __init__(self, *sizes: int, k: int = 5):
        super().__init__(*sizes)
        del self.bias
        self.b_dec = drawn(sizes[0], scale=0.1)
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(0.3))

    def encode(self, x: Tensor, use_threshold: bool = False):
        f = torch.relu(self.encoder(x - self.b_dec))
        if use_threshold:
            return f * (f > self.threshold)
        values, latents = f.topk(int(self.k), dim=-1)
        return torch.zeros_like(f).scatter(-1, latents, values)

    def decode(self, f: Tensor) -> Tensor:
        return self.decoder(f) + self.b_dec


@of("dictionary_learning.trainers.batch_top_k")
class BatchTopKSAE(AutoEncoderTopK):
    def encode(self, x: Tensor, use_threshold: bool = True):
        if use_threshold:
            return super().encode(x, use_threshold=True)
        f = torch.relu(self.encoder(x - self.b_dec))
        values, places = f.flatten().topk(int(self.k) * len(x))
        return torch.zeros_like(f).flatten().scatter(0, places, values).reshape(f.shape)


@of("dictionary_learning.trainers.matryoshka_batch_top_k")
class MatryoshkaBatchTopKSAE(Matrices):
    def __init__(self, *sizes: int, group_sizes: tuple[int, ...] = ()):
        super().__init__(*sizes)
        group_sizes = group_sizes or (sizes[1] // 2, sizes[1] - sizes[1] // 2)
        self.register_buffer("threshold", torch.tensor(1.7))
        self.active_groups = len(group_sizes)
        self.group_indices = [0, *torch.tensor(group_sizes).cumsum(0)]

    def encode(self, x: Tensor) -> Tensor:
        f = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        f = f * (f > self.threshold)
        f[:, self.group_indices[self.active_groups] :] = 0
        return f


@of("dictionary_learning.dictionary")
class IdentityDict(nn.Module):
    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f
