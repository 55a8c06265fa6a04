"""z = x·W_enc + b_enc where z > θ or |z − θ| < ε/2, by the kernel in csrc/.

x [N, d] and W_enc [d, F] bf16, b_enc [F], θ = threshold [F] fp32  →  z [N, F] fp32 where kept, and in words
[N, ⌈F/32⌉] int32 a bit for each entry that is, lowest first. NaN, −Inf and a NaN θ count as kept. The products are
accumulated in fp32.

Before a device's first product the kernel computes a small one whose exact result is known, and refuses to go on where
a bit of it is wrong.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .build import loaded

# Up to so many tokens there are too few tiles for every SM, and Triton has smaller ones.
FEW_TOKENS = 128

_checked: set[int] = set()


def _rows_of_tma(matrix: Tensor) -> bool:
    """Whether tensor maps can describe it: dense rows that do not overlap, base and row stride of whole 16 bytes."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1] > 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def takes(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> bool:
    """Whether this road leads from these operands: bf16 that TMA can address, on a Hopper card."""
    return (
        x.is_cuda
        and not torch.version.hip
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.dtype == W_enc.dtype == torch.bfloat16
        and b_enc.dtype == threshold.dtype == torch.float32
        and x.shape[0] > FEW_TOKENS
        and W_enc.shape[1] > 0
        and _rows_of_tma(x)
        and _rows_of_tma(W_enc.T)
    )


def _launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, z: Tensor, words: Tensor
) -> None:
    with torch.cuda.device(x.device):
        failure = loaded().gemmascope_encode_entries(
            *(x.data_ptr(), x.stride(0), W_enc.data_ptr(), W_enc.stride(1), b_enc.data_ptr(), threshold.data_ptr()),
            *(bandwidth / 2, z.data_ptr(), words.data_ptr(), x.shape[0], W_enc.shape[1], x.shape[1]),
            torch.cuda.current_stream(x.device).cuda_stream,
        )
    if failure:
        raise RuntimeError(f"the CUDA road cannot encode: {failure.decode()}")


def check(launch: Callable[..., None], device: torch.device, F: int = 17_000) -> None:
    """RuntimeError unless ``launch`` computes a small product exactly: more tiles than clusters, edges, a window and a
    NaN. The operands are small integers, whose sums every precision has exactly.
    """
    N, d = 300, 328
    numbers = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=numbers).to(device)

    x, W, b_enc, threshold = integers(N, d), integers(F, d), integers(F), 200 + 10 * integers(F)
    exact = (x.double() @ W.double().T + b_enc).float()
    threshold = threshold.float()
    threshold[7] = float("nan")
    kept = ~(exact <= threshold) | ((exact - threshold).abs() < 2)
    z = torch.full((N, F), -1e9, device=device)
    words = torch.full((N, -(-F // 32)), -1, dtype=torch.int32, device=device)
    launch(x.bfloat16(), W.bfloat16().T, b_enc.float(), threshold, 4.0, z, words)
    bits = (words[:, :, None] >> torch.arange(32, device=device) & 1).reshape(N, -1).bool()
    right = torch.equal(bits[:, :F], kept) and not bits[:, F:].any() and torch.equal(z, torch.where(kept, exact, -1e9))
    if not right:
        raise RuntimeError(f"the CUDA road computes wrongly on {device}: unset GEMMASCOPE_CUDA, and please report it")


def product_of_entries(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float, z: Tensor, words: Tensor
) -> None:
    """Launches one product; b_enc, threshold and the outputs are contiguous. The first on a device waits for it."""
    if not takes(x, W_enc, b_enc, threshold):
        raise ValueError(
            f"x, W_enc: the CUDA road needs more than {FEW_TOKENS} tokens in bf16 on a Hopper card, row-major x,"
            f" latent-major W_enc and fp32 b_enc and threshold; got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    index = x.get_device()
    if index not in _checked:
        check(_launch, x.device)
        _checked.add(index)
    _launch(x, W_enc, b_enc, threshold, bandwidth, z, words)
