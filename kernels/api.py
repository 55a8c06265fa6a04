"""The public operators: the contract, the checks, the choice of implementation.

Every operator has an eager PyTorch reference (`reference.py`) which is its specification. ``impl`` says who runs it:

* ``"auto"``: the Triton kernels on a GPU; on a CPU the native backend where it was built, else plain PyTorch (`choose`
  tells which and why);
* ``"reference"``: plain PyTorch, any device, any float dtype; fp64 stays fp64;
* ``"pytorch"``: the same, written for speed on a CPU;
* ``"cpu"``: the native CPU backend, or a ValueError saying why it cannot run;
* ``"triton"``: the kernels, or a ValueError saying why they cannot run. Never a silent fallback.

Gates and windows are decided in fp32 (fp64 for fp64 inputs). Results repeat bit for bit from run to run. NaN or Inf in
gives NaN or Inf out, never a plausible zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import validation
from .autograd import Decode, JumpReLU, operator
from .code import SparseCode
from .dispatch import choose


class JumpReLUOutput(NamedTuple):
    f: Tensor  # [N, F]
    l0: Tensor  # [N] fp32
    firing_count: Tensor  # [F] int32


def jumprelu(
    pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float = 1e-3, *, impl: str = "auto"
) -> JumpReLUOutput:
    """JumpReLU with bias, with per-token L0 and per-latent firing counts, in one pass over [N, F].

        z = pre + b_enc;   f = z·1[z > threshold];   l0_n = Σ_j 1[z_nj > threshold_j]

    pre: [N, F] encoder product without its bias; fp16, bf16, fp32 (fp64: reference). May be strided.
    b_enc: [F], any float dtype. threshold: [F] fp32 (fp64 with fp64 ``pre``). bandwidth: ε > 0, width of the window.

    Returns f [N, F] in the dtype of ``pre``; l0 [N] fp32 (fp64 for fp64); firing_count [F] int32, not differentiable.

    Differentiable in ``pre``, ``b_enc`` and ``threshold``. With u = ∂L/∂f and s = ∂L/∂l0 the backward is

        dpre = u·1[z > θ];   db_enc = Σ_n dpre;   dθ = Σ_n 1[|z − θ| < ε/2]·( −(θ/ε)·u − s_n/ε )

    with no gradient from l0 to z (Rajamanoharan et al. 2024, arXiv 2407.14435, equations 11 and 12, rectangle kernel).
    Both inequalities are strict, and the window includes entries *below* the threshold. Second derivatives raise.
    """
    if not torch.compiler.is_compiling():
        validation.validate_jumprelu(pre, b_enc, threshold, bandwidth)
    choice = choose(impl, pre.device, pre.dtype)
    return JumpReLUOutput(*JumpReLU.apply(pre, b_enc, threshold, bandwidth, choice.impl))


@torch.no_grad()
def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, impl: str = "auto") -> SparseCode:
    """Sparse JumpReLU encoding for inference: f = z·1[z > threshold] with z = x·W_enc + b_enc, as a `SparseCode`.

    x: [N, d] fp16, bf16, fp32 (fp64: reference). W_enc: [d, F] of the same dtype; fastest when stored latent-major,
    that is as the transposed view of a contiguous [F, d] (as `JumpReLUSAE` keeps it). b_enc: [F] any float dtype.
    threshold: [F] fp32 (fp64 with fp64).

    Products are accumulated in fp32 (fp64 with fp64). Any L0 fits, a row with every latent active included. An entry
    whose z is NaN, or whose z is −Inf, is kept with the value NaN, so that bad input stays visible. Not differentiable;
    use `jumprelu` to train.
    """
    if not torch.compiler.is_compiling():
        validation.validate_encode(x, W_enc, b_enc, threshold)
    impl = choose(impl, x.device, x.dtype).impl
    values, indices, offsets = operator("encode", impl).encode_forward(x, W_enc, b_enc, threshold)
    return SparseCode(values, indices, offsets, W_enc.shape[1])


def decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor, *, impl: str = "auto") -> Tensor:
    """x̂_n = Σ_e values_e·W_dec[indices_e] + b_dec over the entries e of token n, accumulated in fp32.

    code: from `encode`; indices must lie in [0, F) (not checked: that would cost a pass). W_dec: [F, d] any float
    dtype, b_dec: [d]. Returns [N, d] in the dtype of ``W_dec``.

    Differentiable in ``code.values``, ``W_dec`` and ``b_dec``; dW_dec is summed latent by latent in token order,
    without atomics, so that it repeats bit for bit. Second derivatives raise.
    """
    if not torch.compiler.is_compiling():
        validation.validate_decode(code, W_dec, b_dec)
    impl = choose(impl, W_dec.device, W_dec.dtype).impl
    return Decode.apply(code.values, code.indices, code.offsets, W_dec, b_dec, impl)
