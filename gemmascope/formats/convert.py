"""Other projects' SAEs as ours: the same function in our tensors."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadFileError
from .arrays import Header
from .files import shown
from .manifest import SAEConfig
from .stored import Slots, StoredSAE, problem_in_headers, problem_in_numbers, problem_in_values

Reader = Callable[..., dict[str, Tensor]]


def read_slots(
    weights: Path, file: io.BufferedReader, read: Reader, slots: Slots, stated: tuple[int | None, int | None]
) -> dict[str, Tensor]:
    """The tensors of the open file ``weights``, finite, shaped as ``slots`` say. read: one of the readers of `arrays`
    and `torch_file`. stated: d_model and d_sae as in the config, None where they are not. Raises BadFileError."""
    name = shown(weights)

    def check(headers: dict[str, Header]) -> None:
        problem = problem_in_headers(slots, headers, stated=stated)
        if problem:
            raise BadFileError(f"{name}: {problem}")

    tensors = read(weights, check, file)
    problem = problem_in_numbers(tensors)
    if problem:
        raise BadFileError(f"{name}: {problem}")
    return tensors


def made(weights: Path, tensors: Mapping[str, Tensor], config: SAEConfig) -> StoredSAE:
    """The SAE made of what ``weights`` holds. Raises BadFileError for what overflowed on the way, and for a TopK of
    more latents than there are."""
    name, d_sae = shown(weights), tensors["b_enc"].shape[0]
    problem = problem_in_values(tensors)
    if problem is None and config.k is not None and not 1 <= config.k <= d_sae:
        problem = f"k: expected 1 to d_sae = {d_sae}, found {config.k}"
    if problem:
        raise BadFileError(f"{name}: {problem}")
    return StoredSAE(dict(tensors), config)


def without_decoder_norm(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc·n, b_enc·n and W_dec/n, with n_j = ‖W_dec_j‖: an SAE of latents in units of what they write.

    In at least fp32, rounded to the dtype of W_dec. A latent whose W_dec_j is 0 comes out as 0.
    """
    dtype = W_dec.dtype
    W_enc, b_enc, W_dec = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (W_enc, b_enc, W_dec))
    norm = W_dec.norm(dim=1)
    W_dec = W_dec / torch.where(norm > 0, norm, 1)[:, None]
    return (W_enc * norm).to(dtype), (b_enc * norm).to(dtype), W_dec.to(dtype)
