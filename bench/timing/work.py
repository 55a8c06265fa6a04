"""What a part cannot do without, in FLOPs and bytes, whoever runs it."""

from typing import NamedTuple

import torch

from bench.arithmetic import OPERAND_DTYPES
from bench.contenders import Inputs

CHUNK = 16384


class Size(NamedTuple):
    """What a part works on. active and entries (active or in the window): of the batch; touched: latents that have an
    entry; itemsize: bytes of an operand's element; moments: 1, or 2 where Adam's β1 is above 0."""

    n: int
    d: int
    f: int
    active: int
    entries: int
    touched: int
    itemsize: int
    moments: int = 1


@torch.no_grad()
def measure_size(inputs: Inputs) -> Size:
    sae, half = inputs.sae, inputs.loss.bandwidth / 2
    x_centred = inputs.x - sae.b_dec
    active = entries = touched = 0
    for start in range(0, sae.d_sae, CHUNK):
        part = slice(start, start + CHUNK)
        excess = x_centred @ sae.W_enc[:, part] + (sae.b_enc[part] - sae.threshold[part])
        near = (excess > 0) | (excess.abs() < half)
        active += int((excess > 0).sum())
        entries += int(near.sum())
        touched += int(near.any(0).sum())
    itemsize, moments = OPERAND_DTYPES[inputs.dtype].itemsize, 2 if inputs.beta1 else 1
    return Size(len(inputs.x), sae.d_model, sae.d_sae, active, entries, touched, itemsize, moments)


def operator_work(operator: str, size: Size) -> tuple[int, int]:
    """(FLOPs, bytes) of an operator of the sparse training step.

    encode_entries: one [N, d]·[d, F] product; x and W_enc read once, a bit per (token, latent) and fp32 z of each entry
    written and read, entries (z, latent, token) written. residual_pass: 2d FLOPs an active entry for x̂ and 2d an entry
    for u, from one gather of its row of W_dec; x read and the residual written. by_latent: keys read, int64 order and
    offsets written. latent_pass: 36 bytes an entry, 28 a latent. encoder_times: W_enc read. update_from_entries: 4d
    FLOPs an entry, gathering a row of x and of the residual; of each touched latent two rows of weights and two of
    second moments read and written, 15 FLOPs an element, two of first moments and 3 FLOPs more where there are such,
    and the bf16 copies written. Caches serve gathers when the rows fit: more than 100 % of the memory rate is possible.
    """
    n, d, f, active, entries, touched, b, moments = size
    return {
        "encode_entries": (2 * n * d * f, b * (n * d + d * f) + n * f // 4 + 20 * entries),
        "residual_pass": (2 * d * (active + entries), b * d * (entries + n) + 4 * n * d + 12 * entries),
        "by_latent": (0, 12 * entries + 8 * f),
        "latent_pass": (20 * entries, 36 * entries + 28 * f),
        "encoder_times": (2 * d * f, b * d * f + 4 * f),
        "update_from_entries": (
            4 * d * entries + (24 + 6 * moments) * d * touched,
            2 * b * d * entries + 12 * entries + (16 + 16 * moments + 4 * (b == 2)) * d * touched,
        ),
    }[operator]


FORWARD = ("encode_entries", "residual_pass")
BACKWARD = ("by_latent", "latent_pass", "encoder_times", "update_from_entries")


def part_work(part: str, size: Size) -> tuple[int, int]:
    """(FLOPs, bytes) of a part.

    step, forward, backward: the operators of the sparse step. encode: one [N, d]·[d, F] product; reads x and W_enc
    once, writes 8 bytes an active entry. decode: 2d FLOPs an active entry, each gathering a row of W_dec. infer and
    module: both. decode_backward: 4d FLOPs an active entry, gathering a row of W_dec for its value and one of ∂L/∂x̂
    for dW_dec, which is written. jumprelu reads pre and writes f; its backward reads pre and ∂L/∂f and writes dpre.
    """
    n, d, f, active, _, _, b, _ = size
    if part in ("step", "forward", "backward"):
        names = {"forward": FORWARD, "backward": BACKWARD}.get(part, FORWARD + BACKWARD)
        flops, n_bytes = zip(*(operator_work(name, size) for name in names), strict=True)
        return sum(flops), sum(n_bytes)
    if part in ("infer", "module"):
        (a, b), (c, d) = part_work("encode", size), part_work("decode", size)
        return a + c, b + d
    return {
        "encode": (2 * n * d * f, b * (n * d + d * f) + 8 * active),
        "decode": (2 * d * active, b * d * (active + n) + 8 * active),
        "decode_backward": (4 * d * active, b * d * (2 * active + f) + 12 * active),
        "jumprelu": (2 * n * f, 2 * b * n * f),
        "jumprelu_backward": (8 * n * f, 3 * b * n * f),
    }[part]
