"""The public operators: the contract, the checks, the choice of implementation.

Every operator has a specification in plain PyTorch, the implementation "reference". ``impl`` says who runs it:

* ``"auto"``: the Triton kernels on a GPU; on a CPU the native backend where it was built, else plain PyTorch (`choose`
  tells which and why);
* ``"reference"``: plain PyTorch, any device, any float dtype; fp64 stays fp64;
* ``"pytorch"``: the same, written for speed on a CPU;
* ``"cpu"``: the native CPU backend, or a ValueError saying why it cannot run;
* ``"triton"``: the kernels, or a ValueError saying why they cannot run. Never a silent fallback.

Gates and windows are decided in fp32 (fp64 for fp64 inputs). Results repeat bit for bit from run to run. NaN or Inf in
gives NaN or Inf out, never a plausible zero.

The first three operators are inference and the activation; those after `encode_entries` are one exact training step,
and `entries.py` says what they exchange and why. None of the training operators is differentiable: they compute the
gradients.

All arguments are checked: ValueError or TypeError naming the argument, what was expected and what came. So are, on a
CPU, the indices and offsets inside a `SparseCode` and the tuples that the training operators exchange; on a GPU, where
a look at them would wait for the device, and inside torch.compile they are trusted. Tensors of torch.func transforms,
of forward-mode differentiation and DTensors are refused by name. Inside torch.autocast every operator and its backward
gives the bits that it gives outside.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import validation
from .autograd import Decode, JumpReLU, PreActivations
from .code import SparseCode
from .dispatch import choose
from .entries import ByLatent, DenseCode, Entries, LatentState, LatentSums, Objective, Residual, Rule
from .implementations import CHECK_WHAT_THEY_READ, MASKS_AS_BITS, NEED_CAPACITY, operator

# Room for this many entries a token is tried first where no capacity is given and one is needed, then what is needed.
FIRST_ROOM = 128


class JumpReLUOutput(NamedTuple):
    f: Tensor  # [N, F]
    l0: Tensor  # [N] fp32
    firing_count: Tensor  # [F] int32


def _is_read_unchecked(impl: str) -> bool:
    """Whether indices and starts of lists are to be checked before this implementation reads them."""
    return impl not in CHECK_WHAT_THEY_READ and not torch.compiler.is_compiling()


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


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, impl: str = "auto") -> Tensor:
    """z = x·W_enc + b_enc [N, F], as every gate of this implementation sees it: fp32, or fp64 with fp64.

    Arguments as of `encode`. The bits are those on which `encode`, `encode_entries` and `dense_encode` decide, so
    ``preactivations(…) > threshold`` is exactly what they call active. Never rounded to the dtype of x.

    Differentiable in ``x``, ``W_enc`` and ``b_enc``, with the products of the backward in the dtype of x. Second
    derivatives raise.
    """
    if not torch.compiler.is_compiling():
        validation.validate_product(x, W_enc, b_enc)
    return PreActivations.apply(x, W_enc, b_enc, choose(impl, x.device, x.dtype).impl)


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
    values, indices, offsets = operator("encode_forward", impl)(x, W_enc, b_enc, threshold)
    return SparseCode(values, indices, offsets, W_enc.shape[1])


def decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor, *, impl: str = "auto") -> Tensor:
    """x̂_n = Σ_e values_e·W_dec[indices_e] + b_dec over the entries e of token n, accumulated in fp32.

    code: from `encode`, or of one's own: see `SparseCode.check`. W_dec: [F, d] any float dtype, b_dec: [d]. Returns
    [N, d] in the dtype of ``W_dec``.

    Differentiable in ``code.values``, ``W_dec`` and ``b_dec``; dW_dec is summed latent by latent in token order,
    without atomics, so that it repeats bit for bit. Second derivatives raise.
    """
    if not torch.compiler.is_compiling():
        validation.validate_decode(code, W_dec, b_dec)
    impl = choose(impl, W_dec.device, W_dec.dtype).impl
    if _is_read_unchecked(impl):
        code.check()
    return Decode.apply(code.values, code.indices, code.offsets, W_dec, b_dec, impl)


# ---- the training step, by entries


@torch.no_grad()
def encode_entries(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    capacity: int | None = None,
    *,
    tf32: bool = False,
    impl: str = "auto",
) -> Entries:
    """The pairs (token n, latent j) that a training step needs: z > θ, or |z − θ| < ε/2, with z = x·W_enc + b_enc.

    x: [N, d] fp16, bf16, fp32 (fp64: plain PyTorch), b_dec subtracted. W_enc: [d, F] of the same dtype, fastest as the
    transposed view of a contiguous [F, d]. b_enc: [F] any float dtype. threshold: [F] fp32 (fp64 with fp64).
    bandwidth: ε > 0. capacity: room for entries; None: as much as there is. tf32: whether a GPU may round fp32
    operands to it; a CPU never does.

    Returns `Entries`, token after token, latents ascending. With a capacity nothing waits for the device, and where
    ``offsets[N] > capacity`` the entries beyond it are missing. z that is NaN or ±Inf is an entry, so that it spoils
    the loss. Products are accumulated in fp32 (fp64 with fp64), and the gate is that of `encode`.
    """
    if not torch.compiler.is_compiling():
        validation.validate_training_encode(x, W_enc, b_enc, threshold, bandwidth, tf32)
        validation.check_capacity(capacity)
    impl = choose(impl, x.device, x.dtype).impl
    run, arguments = operator("encode_entries", impl), (x, W_enc, b_enc, threshold, bandwidth)
    if capacity is not None or impl not in NEED_CAPACITY:
        return run(*arguments, capacity, tf32)
    room = FIRST_ROOM * x.shape[0]
    entries = run(*arguments, room, tf32)
    needed = int(entries.offsets[-1])
    return entries if needed <= room else run(*arguments, needed, tf32)


@torch.no_grad()
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    of: str = "token",
    among: Tensor | None = None,
    tf32: bool = False,
    impl: str = "auto",
) -> Entries:
    """The pairs (n, j) whose z = x·W_enc + b_enc is positive and among the k largest of the token (``of="token"``:
    TopK, arXiv 2406.04093), or among the k·N largest of the batch (``of="batch"``: BatchTopK, arXiv 2412.06410).

    x, W_enc, b_enc, tf32: as of `encode_entries`. k: 1 to F. among: bool [F], the only latents that may be chosen.

    Returns `Entries`, all of them active, token after token, latents ascending, with room for k·N; what is not needed
    holds z = 0, token 0 and the latent F. Of equal z the smaller token comes first, then the smaller latent. A z that
    is NaN or ±Inf counts as larger than every number, so that it spoils the loss. z has the bits of `preactivations`
    by the same implementation (with ``tf32`` those of `encode_entries`). On a GPU nothing waits for the device.
    """
    if not torch.compiler.is_compiling():
        validation.validate_encode_topk(x, W_enc, b_enc, k, of, among, tf32)
    impl = choose(impl, x.device, x.dtype).impl
    return operator("encode_topk", impl)(x, W_enc, b_enc, k, of, among, tf32)


@torch.no_grad()
def residual_pass(entries: Entries, x: Tensor, W_dec: Tensor, b_dec: Tensor, *, impl: str = "auto") -> Residual:
    """r_n = Σ_e f_e·W_dec[j] + b_dec − x_n over the entries e = (n, j) of token n, then ⟨r_n, W_dec[j]⟩ of each entry.

    entries: from `encode_entries`; f_e is its z where active, else 0. x: [N, d] fp32, neither rounded nor centred.
    W_dec: [F, d] fp32 or bf16. b_dec: [d] fp32. (All fp64 with plain PyTorch.)

    Returns `Residual`: the residual [N, d] in the dtype of W_dec, ‖r_n‖² [N] before that rounding, L0 [N], and u
    [capacity], undefined beyond the last entry. Sums are fp32.
    """
    if not torch.compiler.is_compiling():
        validation.validate_residual_pass(entries, x, W_dec, b_dec)
    impl = choose(impl, x.device, x.dtype).impl
    if _is_read_unchecked(impl):
        validation.check_places(entries, W_dec.shape[0])
    return operator("residual_pass", impl)(entries, x, W_dec, b_dec)


@torch.no_grad()
def by_latent(entries: Entries, d_sae: int, *, impl: str = "auto") -> ByLatent:
    """The entries in the order of their latents, tokens ascending within a latent: [capacity] int64 and [F + 1] int64.

    entries: from `encode_entries`. d_sae: F. The order does not depend on which thread
    comes first; on a GPU without waiting for the device.
    """
    if not torch.compiler.is_compiling():
        validation.validate_by_latent(entries, d_sae)
    impl = choose(impl, entries.z.device, entries.z.dtype).impl
    if _is_read_unchecked(impl):
        validation.check_places(entries, d_sae)
    return operator("by_latent", impl)(entries, d_sae)


@torch.no_grad()
def latent_pass(
    entries: Entries,
    u: Tensor,
    transposed: ByLatent,
    threshold: Tensor,
    s: Tensor,
    objective: Objective,
    *,
    impl: str = "auto",
) -> LatentSums:
    """What the entries contribute to the gradients, latent by latent: the formulas of `entries.py`.

    u: [capacity] of `residual_pass`. transposed: of `by_latent`. threshold: θ [F] fp32. s: [N] fp32, ∂L/∂l0_n. The
    slopes of ``objective`` may be 0-d fp32 or fp64 tensors on the device, which a captured launch reads anew.

    Returns `LatentSums`: the coefficients of each entry in the order of ``transposed``, db_enc, dθ, ⟨dW_dec[j],
    W_dec[j]⟩ and how often each latent fired, all [F]. Sums are fp32, in an order that depends on the latent alone.
    """
    if not torch.compiler.is_compiling():
        validation.validate_latent_pass(entries, u, transposed, threshold, s, objective)
    impl = choose(impl, threshold.device, threshold.dtype).impl
    if _is_read_unchecked(impl):
        validation.check_places(entries, threshold.shape[0])
        validation.check_lists(transposed)
    return operator("latent_pass", impl)(entries, u, transposed, threshold, s, objective)


@torch.no_grad()
def weight_gradients(
    transposed: ByLatent, sums: LatentSums, residual: Tensor, x_centred: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """dW_enc[j] = Σ dz·(x_n − b_dec) and dW_dec[j] = Σ dec·r_n over the entries of each latent: fp32, of the shapes of
    the weights.

    For those who want gradients in memory; `update_from_entries` never stores them. sums: of `latent_pass`. residual
    [N, d_out] and x_centred = x − b_dec [N, d_in]: of one float dtype.
    """
    if not torch.compiler.is_compiling():
        validation.validate_weight_gradients(transposed, sums, residual, x_centred)
        validation.check_listed_tokens(sums, transposed, residual.shape[0])
    impl = choose(impl, residual.device, residual.dtype).impl
    return operator("weight_gradients", impl)(transposed, sums, residual, x_centred)


@torch.no_grad()
def encoder_times(W_enc: Tensor, db_enc: Tensor, *, impl: str = "auto") -> Tensor:
    """Σ_j db_enc_j·W_enc[j], [d] fp32: what the pre-encoder bias takes from the gradient of b_dec.

    W_enc: [F, d], latent-major, any float dtype. db_enc: [F] fp32. On a GPU, and in the native backend, rows with the
    coefficient 0 are not read, whatever they hold.
    """
    if not torch.compiler.is_compiling():
        validation.validate_encoder_times(W_enc, db_enc)
    impl = choose(impl, W_enc.device, W_enc.dtype).impl
    return operator("encoder_times", impl)(W_enc, db_enc)


@torch.no_grad()
def update_from_entries(
    state: LatentState,
    transposed: ByLatent,
    sums: LatentSums,
    residual: Tensor,
    x_centred: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Adam, in place, on every latent that has entries; the others do not move, as with β1 = 0 they should not.

    state: contiguous tensors, fp32 (fp64: plain PyTorch), changed in place. residual, x_centred: [N, d] of one float
    dtype, as `residual_pass` and `encode_entries` had them. Those of a transcoder may be of two widths, [N, d_out] and
    [N, d_in], as its weights are; the Triton kernels raise ValueError for them. ok: int32 scalar on the device; with 0
    nothing is written. step: int64 scalar on the device, updates made so far. The learning rate of ``rule`` may be a
    0-d fp32 or fp64 tensor there, which a captured launch reads anew.

    The gradient of a latent's decoder row loses its component along the row, and after the step the row returns to unit
    norm. A latent that was idle for k updates first pays the decay β2^k that its second moments owe, so that the result
    is that of updating every latent every time. The threshold never falls below 0. With ``rule.beta1`` above 0 the
    state has first moments, which pay β1^k likewise; then an idle latent waits where Adam would let it drift on, as in
    `torch.optim.SparseAdam`.
    """
    if not torch.compiler.is_compiling():
        validation.validate_update_from_entries(state, transposed, sums, residual, x_centred, rule, ok, step)
    impl = choose(impl, state.W_dec.device, state.W_dec.dtype).impl
    if _is_read_unchecked(impl):
        validation.check_listed_tokens(sums, transposed, residual.shape[0])
    operator("update_from_entries", impl)(state, transposed, sums, residual, x_centred, rule, ok, step)


@torch.no_grad()
def settle(state: LatentState, step: Tensor, beta2: float, beta1: float = 0.0, *, impl: str = "auto") -> None:
    """Pay every moment, in place, the decay it owes up to ``step`` (int64 scalar: updates made), as before saving them.
    beta2: in (0, 1]. beta1: in [0, 1), above 0 where the state has first moments."""
    if not torch.compiler.is_compiling():
        validation.validate_settle(state, step, beta2, beta1)
    operator("settle", choose(impl, state.W_dec.device, state.W_dec.dtype).impl)(state, step, beta2, beta1)


# ---- the training step, by whole matrices


@torch.no_grad()
def dense_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    *,
    tf32: bool = False,
    impl: str = "auto",
) -> DenseCode:
    """f = z·1[z > θ] of every pair, and which pairs are active or in the window: for a code that is not sparse yet.

    Arguments as of `encode_entries`. Returns `DenseCode`: f [N, F] in the dtype of x, the two masks in a form that is
    the implementation's own, L0 [N], firing counts [F] and how many pairs `encode_entries` would have found. Does not
    wait for the device.
    """
    if not torch.compiler.is_compiling():
        validation.validate_training_encode(x, W_enc, b_enc, threshold, bandwidth, tf32)
    impl = choose(impl, x.device, x.dtype).impl
    return operator("dense_encode", impl)(x, W_enc, b_enc, threshold, bandwidth, tf32)


@torch.no_grad()
def dense_backward(
    u: Tensor, code: DenseCode, threshold: Tensor, s: Tensor, objective: Objective, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [N, F] in the memory and dtype of ``u``, db_enc [F] and dθ [F] fp32, from u = r·W_decᵀ without its 2/N.

    u: [N, F] fp16, bf16 or fp32, overwritten. code: of `dense_encode` by the same implementation. threshold: [F] fp32.
    s: [N] fp32, ∂L/∂l0_n. The slopes of ``objective`` are numbers here.
    """
    if not torch.compiler.is_compiling():
        validation.check_overwritten(u)
    impl = choose(impl, u.device, u.dtype).impl
    if not torch.compiler.is_compiling():
        validation.validate_dense_backward(u, code, threshold, s, objective, impl in MASKS_AS_BITS)
    return operator("dense_backward", impl)(u, code, threshold, s, objective)


@torch.no_grad()
def update_from_dense(
    state: LatentState,
    dW_enc: Tensor,
    dW_dec: Tensor,
    db_enc: Tensor,
    dthreshold: Tensor,
    touched: Tensor,
    rule: Rule,
    ok: Tensor,
    step: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """`update_from_entries` from gradients that stand in memory: dW_enc and dW_dec [F, d], db_enc and dθ [F], fp32.

    touched: [F] int32; latents with 0 do not move. The rest as there.
    """
    if not torch.compiler.is_compiling():
        validation.validate_update_from_dense(state, dW_enc, dW_dec, db_enc, dthreshold, touched, rule, ok, step)
    impl = choose(impl, state.W_dec.device, state.W_dec.dtype).impl
    operator("update_from_dense", impl)(state, dW_enc, dW_dec, db_enc, dthreshold, touched, rule, ok, step)
