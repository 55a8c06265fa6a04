"""The selection by the largest pre-activations: `csrc/topk.cpp`, which holds no dense z."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..entries import ACTIVE, LATENT, Entries

_ops = torch.ops.gemmascope_cpu


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, of: str = "token", among: Tensor | None = None, tf32: bool = False
) -> Entries:
    """By the contract of `reference.encode_topk`; tf32 changes nothing on a CPU. With ``among`` only the z of those
    latents are formed, which have the bits that they have among the others."""
    W, b_enc = W_enc.T, b_enc.float().contiguous()
    if among is None:
        return Entries(*_ops.encode_topk(x, W, b_enc, k, of == "batch"))
    (latents,) = torch.nonzero(among, as_tuple=True)
    N, d_sae, n_among = x.shape[0], W.shape[0], len(latents)
    room, k = k * N, min(k, n_among)
    if n_among == 0:
        offsets = torch.zeros(N + 1, dtype=torch.int64, device=x.device)
        z, numbers, tokens = (t[:0] for t in (b_enc, latents.to(torch.int32), latents.to(torch.int32)))
    else:
        given = (x, W.index_select(0, latents), b_enc.index_select(0, latents), k, of == "batch")
        z, numbers, tokens, offsets = _ops.encode_topk(*given)
        stored = int(offsets[-1])
        z, tokens, numbers = z[:stored], tokens[:stored], numbers[:stored] & LATENT
        numbers = (latents.index_select(0, numbers) + ACTIVE).to(torch.int32)
    rest = (0, room - len(z))
    return Entries(F.pad(z, rest), F.pad(numbers, rest, value=d_sae), F.pad(tokens, rest), offsets)
