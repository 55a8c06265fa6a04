"""The operators by PyTorch's own sparse operations: what a CPU runs where the native backend was not built.

Same signatures, results and treatment of NaN as `reference/`. Everything goes through memory a cache-full at a time:
on a CPU a fresh tensor of 100 MB costs more in page faults than the arithmetic that fills it. The product that makes z
comes in pieces that are searched for entries while they are still in a cache; sums over entries are `embedding_bag`,
products of pairs of rows `sampled_addmm`, which both work row by row in a fixed order, so that results repeat bit for
bit.
"""

import functools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.gates import activation, compute_dtype

# Elements of a temporary that is worked on in a core's own cache, of a tile of z, and of the rows that a piece of a
# pass over the entries gathers. Smaller ones lose more to the calls than they save.
CORE_ELEMENTS = 2**18
Z_ELEMENTS = 2**20
GATHER_ELEMENTS = 2**22
# Tokens of a product: their rows stay in the shared cache while W_enc passes once.
PRODUCT_TOKENS = 1024


# ---- encode


def _onednn_is_faster(x: Tensor, W: Tensor) -> bool:
    """Measured on AMD: with AVX-512 MKL is up to 2.5 times slower, with AVX2 only for a few dozen tokens; a small W is
    repacked in vain."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[0] < 8 or W.numel() < 2**18:
        return False
    if not (W.T.is_contiguous() and torch.backends.mkldnn.is_available()):
        return False
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return (wide or x.shape[0] <= 128) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x·W + b for x [N, d], W [d, F] and b [F] of one dtype."""
    if _onednn_is_faster(x, W):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), W.T, b.contiguous(), "none", [], "")
    return torch.mm(x, W).add_(b)


def true_positions(mask: Tensor) -> Tensor:
    """Where a contiguous ``mask`` is true, counted through all its elements; int64, ascending.

    `nonzero` takes as long for a byte as for a word, so a mask with few hits is searched eight bytes at a time.
    """
    flat = mask.view(-1)
    if flat.numel() % 8 == 0:
        words = torch.nonzero(flat.view(torch.int64))[:, 0]
        if 32 * len(words) < flat.numel():
            hits = torch.nonzero(flat.view(-1, 8).index_select(0, words).view(-1))[:, 0]
            return words.index_select(0, hits >> 3).mul_(8).add_(hits & 7)
    return torch.nonzero(flat)[:, 0]


def _search(z: Tensor, threshold: Tensor, reach: float, comparable: bool) -> Tensor:
    near = z > (threshold - reach if reach else threshold)
    if not (comparable and z.sum().isfinite()):
        near |= activation(z, threshold).isnan()
    return true_positions(near)


def row_blocks(x: Tensor, W_enc: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """How x·W_enc is cut into products: tokens, and the latents of each product with them.

    The bits of a product may depend on its shape, so everything that decides a gate cuts alike.
    """
    (N, d), d_sae, dtype = x.shape, W_enc.shape[1], compute_dtype(x)
    for start in range(0, N, PRODUCT_TOKENS):
        n = min(PRODUCT_TOKENS, N - start)
        width = max(1, Z_ELEMENTS // (n if W_enc.dtype == dtype else max(n, d)))
        yield slice(start, start + n), [slice(first, first + width) for first in range(0, d_sae, width)]


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z = x·W_enc + b_enc [N, F], in the compute dtype."""
    dtype = compute_dtype(x)
    b_enc, z = b_enc.to(dtype), torch.empty(x.shape[0], W_enc.shape[1], dtype=dtype, device=x.device)
    for tokens, tiles in row_blocks(x, W_enc):
        rows = x[tokens].to(dtype)
        for tile in tiles:
            z[tokens, tile] = linear(rows, W_enc[:, tile].to(dtype), b_enc[tile])
    return z


def near_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, reach: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, token and latent (int64) of every pair with z > θ − reach, or with a z or θ that makes f NaN; token after
    token, latents ascending."""
    dtype = compute_dtype(x)
    b_enc, threshold = b_enc.to(dtype), threshold.to(dtype)
    comparable = not threshold.isnan().any()
    parts = [(b_enc.new_empty(0), *(torch.empty(0, dtype=torch.int64, device=x.device),) * 2)]
    for tokens, tiles in row_blocks(x, W_enc):
        rows = x[tokens].to(dtype)
        found = []
        for tile in tiles:
            z = linear(rows, W_enc[:, tile].to(dtype), b_enc[tile])
            position = _search(z, threshold[tile], reach, comparable)
            token = position // z.shape[1]
            latent = position - token * z.shape[1] + tile.start
            found.append((z.view(-1).index_select(0, position), token + tokens.start, latent))
        if len(found) > 1:
            values, token, latent = map(torch.cat, zip(*found, strict=True))
            token, order = torch.sort(token, stable=True)
            found = [(values.index_select(0, order), token, latent.index_select(0, order))]
        parts += found
    values, token, latent = map(torch.cat, zip(*parts[-1:] if len(parts) == 2 else parts, strict=True))
    return values, token, latent


def row_offsets(token: Tensor, n_tokens: int) -> Tensor:
    """[N + 1] int64: where the entries of each token start."""
    offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=token.device)
    torch.cumsum(torch.bincount(token, minlength=n_tokens), 0, out=offsets[1:])
    return offsets


def encode_forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [nnz], indices [nnz] int32, offsets [N + 1] int64."""
    z, token, latent = near_threshold(x, W_enc, b_enc, threshold, 0.0)
    values = torch.where(z > threshold.to(z.dtype).index_select(0, latent), z, torch.nan)
    return values, latent.to(torch.int32), row_offsets(token, x.shape[0])


# ---- sums over entries


def row_pieces(offsets: Tensor, elements: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a CSR and their entries, at most ``elements`` entries at a time where a row has not more itself."""
    n, total = len(offsets) - 1, int(offsets[-1])
    if n and total <= elements:
        yield slice(0, n), slice(0, total)
        return
    starts, first = offsets.tolist(), 0
    for row in range(1, len(starts)):
        if row == len(starts) - 1 or starts[row + 1] - starts[first] > elements:
            yield slice(first, row), slice(starts[first], starts[row])
            first = row


def rows_in(dtype: torch.dtype, table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A table in ``dtype`` and the indices in it of rows ``indices`` of ``table``."""
    if table.dtype == dtype:
        return table, indices
    gathered = table.index_select(0, indices).to(dtype)
    return gathered, torch.arange(len(gathered), dtype=indices.dtype, device=indices.device)


def sum_rows(coefficients: Tensor, indices: Tensor, table: Tensor, starts: Tensor) -> Tensor:
    """Σ_e coefficients_e·table[indices_e] over the entries e of each list; all of one dtype. [lists, d]"""
    return F.embedding_bag(indices, table, starts.to(indices.dtype), mode="sum", per_sample_weights=coefficients)


@functools.cache
def _give_csr_notice() -> None:
    """PyTorch says once a process that CSR tensors are in beta; here, unheard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        options = {"dtype": torch.float32, "device": "cpu", "check_invariants": False}
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), **options)


def dot_rows(a: Tensor, b: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """⟨a[n], b[columns_e]⟩ for the entries e of each row n in compressed rows; a and b of one dtype."""
    _give_csr_notice()
    zeros = torch.zeros(columns.shape, dtype=a.dtype, device=a.device)
    starts, size = offsets.to(columns.dtype), (a.shape[0], b.shape[0])
    pattern = torch.sparse_csr_tensor(starts, columns, zeros, size=size, device=a.device, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0).values()


# ---- decode


def decode_forward(values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x̂ [N, d] in the dtype of ``W_dec``."""
    dtype = compute_dtype(W_dec)
    values, b_dec = values.to(dtype), b_dec.to(dtype)
    if W_dec.dtype == dtype:
        return sum_rows(values.contiguous(), indices.contiguous(), W_dec, offsets[:-1]).add_(b_dec)
    # In low precision `embedding_bag` would round the values, so rows are gathered and widened, a few at a time.
    x_hat = torch.empty(offsets.shape[0] - 1, W_dec.shape[1], dtype=W_dec.dtype, device=W_dec.device)
    for tokens, entries in row_pieces(offsets, GATHER_ELEMENTS // max(1, W_dec.shape[1])):
        rows, columns = rows_in(dtype, W_dec, indices[entries])
        x_hat[tokens] = sum_rows(values[entries].contiguous(), columns, rows, offsets[tokens] - entries.start) + b_dec
    return x_hat


def decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dvalues_e = ⟨g_n, W_dec[j]⟩ [nnz] and dW_dec[j] = Σ_e values_e·g_n [F, d], for entry e = (token n, latent j)."""
    dtype = compute_dtype(W_dec)
    grad, indices = grad.to(dtype).contiguous(), indices.contiguous()
    dvalues = _backward_values(grad, indices, offsets, W_dec).to(values.dtype) if need_values else None
    dW_dec = _backward_weight(grad, values.to(dtype), indices, offsets, W_dec) if need_W else None
    return dvalues, dW_dec


def _backward_values(grad: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    if W_dec.dtype == grad.dtype:
        return dot_rows(grad, W_dec.contiguous(), offsets, indices)
    dvalues = torch.empty(indices.shape, dtype=grad.dtype, device=grad.device)
    for tokens, entries in row_pieces(offsets, GATHER_ELEMENTS // max(1, W_dec.shape[1])):
        rows, columns = rows_in(grad.dtype, W_dec, indices[entries])
        starts = offsets[tokens.start : tokens.stop + 1] - entries.start
        dvalues[entries] = dot_rows(grad[tokens], rows, starts, columns)
    return dvalues


def _backward_weight(grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    """The entries latent by latent, tokens ascending."""
    latents, order = torch.sort(indices, stable=True)
    tokens = torch.repeat_interleave(
        torch.arange(len(grad), dtype=torch.int32, device=grad.device), offsets.diff(), output_size=len(indices)
    )
    starts = torch.searchsorted(latents, torch.arange(len(W_dec), dtype=latents.dtype, device=latents.device))
    values, tokens = values[order], tokens[order]
    if W_dec.dtype == grad.dtype:
        return sum_rows(values, tokens, grad, starts)
    dW_dec = torch.empty(W_dec.shape, dtype=W_dec.dtype, device=W_dec.device)
    rows = max(1, CORE_ELEMENTS // max(1, W_dec.shape[1]))
    bounds = [*starts.tolist(), len(tokens)]
    for first in range(0, len(W_dec), rows):
        stop = min(first + rows, len(W_dec))
        entries = slice(bounds[first], bounds[stop])
        dW_dec[first:stop] = sum_rows(values[entries], tokens[entries], grad, starts[first:stop] - bounds[first])
    return dW_dec


# ---- jumprelu


def _in_rows(tensor: Tensor) -> Iterator[slice]:
    """Rows of [N, F], a cache-full at a time."""
    step = max(1, CORE_ELEMENTS // max(1, tensor.shape[1]))
    for first in range(0, tensor.shape[0], step):
        yield slice(first, first + step)


def jumprelu_forward(pre: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f [N, F] in the dtype of ``pre``, l0 [N], firing_count [F] int32."""
    dtype = compute_dtype(pre)
    f = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    l0 = torch.empty(pre.shape[0], dtype=dtype, device=pre.device)
    firing_count = torch.zeros(pre.shape[1], dtype=torch.int32, device=pre.device)
    for rows in _in_rows(pre):
        f[rows], l0[rows], fired = reference.jumprelu_forward(pre[rows], b_enc, threshold)
        firing_count += fired
    return f, l0, firing_count


def jumprelu_backward(
    grad_f: Tensor, grad_l0: Tensor, pre: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre [N, F], db_enc [F], dthreshold [F] in the dtypes of ``pre``, ``b_enc``, ``threshold``."""
    dtype = compute_dtype(pre)
    theta, bias = threshold.to(dtype), b_enc.to(dtype)
    dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    db_enc, dtheta = torch.zeros_like(bias), torch.zeros_like(theta)
    for rows in _in_rows(pre):
        dpre[rows], db_rows, dtheta_rows = _jumprelu_backward(
            grad_f[rows].to(dtype), grad_l0[rows].to(dtype), pre[rows].to(dtype) + bias, theta, bandwidth
        )
        db_enc += db_rows
        dtheta += dtheta_rows
    return dpre, db_enc.to(b_enc.dtype), dtheta.to(threshold.dtype)


def _jumprelu_backward(u: Tensor, s: Tensor, z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, ...]:
    dz = u * reference.gate(z, theta)
    inside = reference.window(z, theta, bandwidth)
    return dz, dz.sum(0), reference.threshold_gradient(inside, u, s, theta, bandwidth)
