"""The entries of a training batch by Triton against the fp64 reference: pytest tests/test_entries.py"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemmascope.kernels import reference
from gemmascope.kernels.entries import (
    ACTIVE,
    LATENT,
    WIDE_SCRATCH_BYTES,
    Entries,
    scratch_bytes,
    tokens_per_chunk,
)
from tests.helpers import (
    LAYOUTS,
    assert_bitwise_equal,
    assert_within_budget,
    lattice,
    normal,
    product_bound,
    product_slack,
    products_of,
    shape_cases,
)
from tests.kernels import sanitizer
from tests.kernels.entries import limit_scratch

pytest.importorskip("triton")
from gemmascope.kernels import gpu
from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import entries as gpu_entries
from gemmascope.kernels.gpu.encode_gemm import EncodeConfig
from gemmascope.kernels.gpu.entries import encode_entries

SPLIT_1 = EncodeConfig(16, 32, 16, 1, 1, 1)
SPLIT_2 = EncodeConfig(16, 64, 16, 2, 1, 1, group_m=2)
SPLIT_4 = EncodeConfig(16, 128, 16, 4, 1, 1)
DESCRIPTORS = EncodeConfig(16, 128, 16, 4, 1, 1, descriptors=True)
BANDWIDTH = 0.5  # half of it is one step of the lattice

interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def use(monkeypatch):
    """Forces a launch configuration on every encode of the test."""
    return lambda config: monkeypatch.setattr(gpu_encode_gemm, "encode_config", lambda *_: config)


def operands(N, d, F, dtype=torch.float32, device="cpu", make=normal, sigmas=1.5):
    """x, latent-major W_enc, b_enc and a threshold that one entry in twenty passes, with a few in the window below."""
    x, W = make(N, d, dtype=dtype, device=device), make(F, d, dtype=dtype, device=device, seed=1)
    return (
        x,
        W.T,
        make(F, device=device, seed=2),
        sigmas * max(d, 1) ** 0.5 + 0.25 * make(F, device=device, seed=3).abs(),
    )


def lattice_operands(N, d, F, dtype=torch.float32, device="cpu"):
    """The same where every precision computes the same z, and ties are common."""
    x, W_enc, b_enc, _ = operands(N, d, F, dtype, device, lattice)
    return x, W_enc, b_enc, lattice(F, device=device, seed=3).abs()


def exact_z(x, W_enc, b_enc):
    return x.double() @ W_enc.double() + b_enc.double()


def assert_matches_reference(x, W_enc, b_enc, threshold, entries):
    """The entries of the exact z, up to those whose z is within its rounding of an edge."""
    N, F, precision = x.shape[0], W_enc.shape[1], products_of(x)
    entries = Entries(*(t.cpu() for t in entries))
    x, W_enc, b_enc, threshold = (t.cpu() for t in (x, W_enc, b_enc, threshold))
    dtypes = torch.float32, torch.int32, torch.int32, torch.int64
    assert tuple(t.dtype for t in entries) == dtypes
    assert entries.offsets.is_contiguous()
    assert entries.offsets[0] == 0
    nnz = int(entries.offsets[-1])
    assert nnz <= entries.z.shape[0]
    assert (entries.latents[nnz:] == F).all()
    z, latents, tokens = (t[:nnz] for t in entries[:3])
    assert torch.equal(tokens.long(), torch.arange(N).repeat_interleave(entries.offsets.diff()))
    active, latents = latents >= ACTIVE, (latents & LATENT).long()
    assert ((tokens * F + latents).diff() > 0).all(), "latents do not ascend within the tokens"
    assert torch.equal(active, z > threshold[latents]), "active by another z than the one stored"
    exact, half = exact_z(x, W_enc, b_enc), BANDWIDTH / 2
    rounding = product_bound(x.shape[1], precision) * exact_z(x.abs(), W_enc.abs(), b_enc.abs())
    distance = exact - threshold
    certain = (distance.abs() > rounding) & ((distance.abs() - half).abs() > rounding)
    assert certain.float().mean() > 0.99 or N * F < 1000
    kept, gate = torch.zeros_like(certain), torch.zeros_like(certain)
    kept[tokens.long(), latents] = True
    gate[tokens.long(), latents] = active
    assert torch.equal(kept[certain], ((distance > 0) | (distance.abs() < half))[certain])
    assert torch.equal(gate[certain], (distance > 0)[certain])
    eager = x.float() @ W_enc.float() + b_enc.float()
    assert_within_budget("z", z, exact[kept], eager[kept], slack=product_slack(x.shape[1], precision))


def assert_equals_reference(arguments, capacity, entries):
    """Bit for bit, which lattice operands allow."""
    expected = reference.encode_entries(*(t.double() for t in arguments), BANDWIDTH, capacity)
    stored = min(capacity, int(expected.offsets[-1]))
    assert_bitwise_equal("offsets", entries.offsets, expected.offsets)
    assert_bitwise_equal("latents", entries.latents, expected.latents.to(torch.int32))
    for name in ("z", "tokens"):
        got, want = getattr(entries, name)[:stored], getattr(expected, name)[:stored]
        assert_bitwise_equal(name, got, want.to(got.dtype))


def test_is_the_operator_of_the_training_step():
    assert gpu.encode_entries is encode_entries


@interpreted
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(16, 64, 16))
def test_matches_reference(use, N, F, d):
    use(SPLIT_2)
    arguments = operands(N, d, F)
    assert_matches_reference(*arguments, encode_entries(*arguments, BANDWIDTH, N * F))


@interpreted
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        pytest.param(SPLIT_1, torch.float16, id="split1"),
        pytest.param(SPLIT_2, torch.bfloat16, id="split2"),
        pytest.param(SPLIT_4, torch.bfloat16, id="split4"),
        pytest.param(DESCRIPTORS, torch.bfloat16, id="descriptors"),
        pytest.param(gpu_encode_gemm.TF32, torch.float32, id="tf32"),
        pytest.param(gpu_encode_gemm.DESCRIPTORS, torch.bfloat16, id="shipped-descriptors"),
    ],
)
def test_every_tiling_matches_reference(use, config, dtype):
    use(config)
    # Tails; rows of 16-byte words, which descriptors need.
    arguments = operands(17, config.block_k + 8, config.block_n + 33, dtype, sigmas=2.5)
    assert_matches_reference(*arguments, encode_entries(*arguments, BANDWIDTH, 9000))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(device, layout):
    arguments = [layout(t) for t in operands(19, 21, 70, device=device)]
    assert_matches_reference(*arguments, encode_entries(*arguments, BANDWIDTH, 19 * 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties(device, dtype):
    """z = θ is in the window but not active; |z − θ| = ε/2 below the threshold is no entry."""
    arguments = lattice_operands(9, 6, 200, dtype, device)
    distance = exact_z(*arguments[:3]) - arguments[3]
    assert (distance == 0).sum() > 5
    assert (distance == -BANDWIDTH / 2).sum() > 5
    assert_equals_reference(arguments, 1800, encode_entries(*arguments, BANDWIDTH, 1800))


def around(z):
    """z with three fp32 numbers to either side."""
    found = [z]
    for way in (-torch.inf, torch.inf):
        beside = z
        for _ in range(3):
            beside = torch.nextafter(beside, torch.tensor(way))
            found.append(beside)
    return torch.stack(found)


@pytest.mark.parametrize("bandwidth", [1e-3, 0.03, 2.0, 1e-8, 1e-44, 1e30, 6e38, float("inf")])
def test_one_comparison_decides_what_the_window_does(device, bandwidth):
    """A z is an entry where it lies above the lower edge, to the bit, and where it cannot be compared."""
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    special = [0.0, -0.0, smallest, -smallest, 1e-38, 1.0, -1.0, largest, -largest, torch.inf, -torch.inf, torch.nan]
    threshold = torch.cat([torch.tensor(special), torch.logspace(-6, 6, 200), 1e-3 + 1e-4 * normal(200)])
    half = torch.tensor(bandwidth / 2)
    lower = gpu_entries.begin(threshold.to(device), bandwidth, torch.empty(0, dtype=torch.int32, device=device)).cpu()
    z = torch.cat(
        [around(z) for z in (lower, threshold, threshold - half, threshold + half, torch.zeros_like(threshold))]
        + [torch.tensor(special)[:, None].expand(-1, len(threshold)), 10 * normal(50, len(threshold), seed=1)]
    )
    inactive = (z <= threshold) & z.isfinite()
    entry = ~inactive | ((z - threshold).abs() < half)
    assert torch.equal(~((z <= lower) & z.isfinite()), entry)
    assert entry.any()
    assert not entry.all()


@pytest.mark.parametrize("capacity", [0, 1, 8, 9, 16, 50])
@pytest.mark.parametrize("F", [1, 300])
def test_every_latent_is_filled(device, monkeypatch, F, capacity):
    """By more programs than there are latents for, and by fewer than there are entries for."""
    monkeypatch.setattr(gpu_entries, "FILL_BLOCK", 8)
    monkeypatch.setattr(gpu_entries, "FILL_PROGRAMS", 2)
    threshold, latents = normal(F, device=device), torch.empty(capacity, dtype=torch.int32, device=device)
    with sanitizer.sanitize(race=True):
        lower = gpu_entries.begin(threshold, 0.1, latents)
    assert latents.tolist() == [F] * capacity
    assert (lower < threshold).all()


def test_several_segments(device):
    # Two segments a row, the last a partial one that ends inside a word.
    *rest, threshold = lattice_operands(2, 5, gpu_encode.SEGMENT + 45, device=device)
    arguments = *rest, threshold + 6
    capacity = 2 * arguments[1].shape[1]
    entries = encode_entries(*arguments, BANDWIDTH, capacity)
    assert entries.offsets[-1] > 50
    assert_equals_reference(arguments, capacity, entries)


def test_rows_with_nothing_and_with_everything(device):
    x, W_enc, b_enc, threshold = lattice_operands(6, 4, 77, device=device)
    x[1], x[3] = 0, 0
    x[4, 0], W_enc[0] = 64, W_enc[0].abs() + 1
    x[5] = x[4]
    b_enc, threshold = b_enc - 2.25, threshold + 0.5
    entries = encode_entries(x, W_enc, b_enc, threshold, BANDWIDTH, 6 * 77)
    lengths = entries.offsets.diff().tolist()
    assert (lengths[1], lengths[3], lengths[4], lengths[5]) == (0, 0, 77, 77)
    assert_equals_reference((x, W_enc, b_enc, threshold), 6 * 77, entries)


def test_dead_latents_and_no_entry_at_all(device):
    x, W_enc, b_enc, threshold = lattice_operands(5, 4, 40, device=device)
    threshold[::2] = 1e3
    entries = encode_entries(x, W_enc, b_enc, threshold, BANDWIDTH, 200)
    assert_equals_reference((x, W_enc, b_enc, threshold), 200, entries)
    none = encode_entries(x, W_enc, b_enc, torch.full_like(threshold, 1e3), BANDWIDTH, 7)
    assert none.offsets.tolist() == [0] * 6
    assert none.latents.tolist() == [40] * 7


@pytest.mark.parametrize("missing", [0, 1, 60, None])
@pytest.mark.parametrize("chunk", [None, 4])
def test_overflow(device, monkeypatch, missing, chunk):
    """What fits is right, nothing is written beyond it (the bounds check would see), the offsets are the true ones."""
    arguments = lattice_operands(6, 5, 90, device=device)
    needed = int(encode_entries(*arguments, BANDWIDTH, 0).offsets[-1])
    assert needed > 100
    if chunk:
        limit_scratch(monkeypatch, chunk * (4 * 90 + 4 * 3))
    capacity = 0 if missing is None else needed - missing
    assert_equals_reference(arguments, capacity, encode_entries(*arguments, BANDWIDTH, capacity))


def test_chunks_equal_the_whole(device, monkeypatch):
    arguments = lattice_operands(14, 8, 100, torch.bfloat16, device)
    limit_scratch(monkeypatch, 6 * (4 * 100 + 4 * 4))
    launches = []
    gemm = gpu_encode_gemm.encode_gemm
    monkeypatch.setattr(gpu_entries, "encode_gemm", lambda x, *rest: (launches.append(len(x)), gemm(x, *rest)))
    assert_equals_reference(arguments, 2000, encode_entries(*arguments, BANDWIDTH, 2000))
    assert launches == [6, 6, 2]


@pytest.mark.parametrize(
    ("F", "chunks", "gigabytes"),
    [
        pytest.param(1 << 14, [4096], 0.1, id="16k"),
        pytest.param(1 << 16, [2048, 2048], 0.7, id="65k"),
        pytest.param(1 << 17, [1024] * 4, 2.5, id="131k"),
        pytest.param(1 << 18, [1024] * 4, 4.9, id="262k"),
        pytest.param(1 << 20, [1024] * 4, 19.4, id="1M"),
        pytest.param(3 << 20, [256] * 16, 233, id="3M"),
        pytest.param(1 << 22, [256] * 16, 310, id="4M"),
    ],
)
def test_how_often_the_weight_is_read(monkeypatch, F, chunks, gigabytes):
    """bf16 weights of 4,096 tokens of Gemma 2 2B: launched without a tensor behind them, and every allocation noted."""
    N, d, launches, held = 4096, 2304, [], []

    class Launched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in ("new_empty", "empty") and result.shape[-1:] != (0,):
                held.append(result)
            return result

    monkeypatch.setattr(gpu_entries, "encode_gemm", lambda x, W, *_: launches.append((len(x), W.nbytes)))
    monkeypatch.setattr(gpu_entries, "launch_config", lambda *_: gpu_encode_gemm.DESCRIPTORS)
    monkeypatch.setattr(gpu_entries, "begin", lambda threshold, *_: threshold)
    for name in ("scan", "move"):
        monkeypatch.setattr(gpu_entries, name, lambda *_: None)
    x, W_enc = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((N, d), (d, F)))
    b_enc, threshold = torch.empty(2, F, device="meta")
    with Launched():
        encode_entries(x, W_enc, b_enc, threshold, 0.001, 64 * N)
    assert [tokens for tokens, _ in launches] == chunks
    assert sum(read for _, read in launches) < gigabytes * 1e9
    scratch = sum(t.nbytes for t in held if t.ndim == 2)
    assert scratch == tokens_per_chunk(N, F) * scratch_bytes(F) <= WIDE_SCRATCH_BYTES


def test_the_host_never_waits(device):
    """No operation whose result the host must read, whether a number or a shape."""

    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select")
            return function(*args, **(kwargs or {}))

    arguments = lattice_operands(3, 4, 40, device=device)
    with Forbid():
        with pytest.raises(AssertionError):
            int(arguments[3].sum())
        entries = encode_entries(*arguments, BANDWIDTH, 120)
    assert_equals_reference(arguments, 120, entries)


def test_bad_input_stays_visible(device):
    """NaN, ±Inf and a NaN threshold are active entries, so that they spoil the loss; z is stored as it is."""
    inf, nan = float("inf"), float("nan")
    b_enc = torch.tensor([0.0, nan, inf, -inf, 2.0, -2.0, 0.0, inf], device=device)
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, -inf, inf, inf], device=device)
    x, W_enc = torch.zeros(2, 4, device=device), torch.zeros(4, 8, device=device)
    x[1, 2] = nan
    entries = encode_entries(x, W_enc, b_enc, threshold, BANDWIDTH, 16)
    assert entries.offsets.tolist() == [0, 6, 14]
    assert entries.latents[:14].tolist() == [ACTIVE + j for j in (1, 2, 3, 4, 5, 7, *range(8))]
    z = torch.tensor([nan, inf, -inf, 2.0, -2.0, inf, *[nan] * 8], device=device)
    assert_bitwise_equal("z", entries.z[:14], z)


@interpreted
def test_columns_beyond_the_last_latent_are_not_kept(use):
    use(DESCRIPTORS)  # reads zeros there, and 0·NaN is NaN
    x, W_enc, b_enc, threshold = operands(4, 8, 33)
    entries = encode_entries(torch.full_like(x, torch.nan), W_enc, b_enc, threshold, BANDWIDTH, 200)
    assert entries.offsets.tolist() == [0, 33, 66, 99, 132]


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_tf32_only_when_asked_for(device, monkeypatch, tf32, precision):
    arguments = lattice_operands(17, 4, 9, device=device)
    configs = []
    gemm = gpu_encode_gemm.encode_gemm
    record = lambda *args: (configs.append(args[6]), gemm(*args))  # noqa: E731
    monkeypatch.setattr(gpu_entries, "encode_gemm", record)
    assert_equals_reference(arguments, 153, encode_entries(*arguments, BANDWIDTH, 153, tf32))
    assert [config.input_precision for config in configs] == [precision]


def test_repeats_bit_for_bit(device):
    arguments = operands(21, 40, 150, device=device)
    first = encode_entries(*arguments, BANDWIDTH, 1000)
    stored = min(1000, int(first.offsets[-1]))
    with sanitizer.sanitize(seed=1):
        again = encode_entries(*arguments, BANDWIDTH, 1000)
    assert torch.equal(again.offsets, first.offsets)
    assert torch.equal(again.latents, first.latents)
    assert torch.equal(again.z[:stored], first.z[:stored])
    assert torch.equal(again.tokens[:stored], first.tokens[:stored])


@interpreted
def test_offsets_beyond_32_bits():
    """The last segment of [4096, 2²⁰] scratch into the last of 2³¹ + 50 entries: addresses, hardly any memory."""
    N, F, capacity = 4096, 2**20, 2**31 + 50
    z, words, threshold = torch.empty(N, F), torch.empty(N, F // 32, dtype=torch.int32), torch.zeros(F)
    words[-1, -gpu_encode.SEGMENT // 32 :] = 0
    words[-1, -2:] = torch.tensor([-1, 5])
    latents = torch.tensor([*range(F - 64, F - 32), F - 32, F - 30])
    z[-1, latents] = torch.arange(34.0) - 3
    segments = N * F // gpu_encode.SEGMENT
    starts = torch.empty(segments + 1, dtype=torch.int64)
    starts[-2], starts[-1] = capacity - 34, capacity
    out = Entries(torch.empty(capacity), *(torch.empty(capacity, dtype=torch.int32) for _ in "lt"), starts)
    with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] - 1]):
        gpu_entries.move(words, z, threshold, starts, 100, out)
    assert torch.equal(out.z[-34:], torch.arange(34.0) - 3)
    assert torch.equal(out.latents[-34:].long(), latents + ACTIVE * (torch.arange(34) > 3))
    assert out.tokens[-34:].tolist() == [100 + N - 1] * 34


@pytest.mark.gpu
@pytest.mark.parametrize("F", [16384, 131072])
def test_full_shapes(device, F):
    """Against fp32 matmul on the same operands; entries within the rounding of an edge may differ and are counted."""
    N, d, bandwidth = 4096, 2304, 0.01
    x = normal(N, d, dtype=torch.bfloat16, device=device)
    W_enc = normal(F, d, dtype=torch.bfloat16, device=device, seed=1, scale=d**-0.5).T
    b_enc = normal(F, device=device, seed=2, scale=0.1)
    threshold = torch.full((F,), 2.9, device=device)
    entries = encode_entries(x, W_enc, b_enc, threshold, bandwidth, 400 * N)
    again = encode_entries(x, W_enc, b_enc, threshold, bandwidth, 400 * N)
    nnz = int(entries.offsets[-1])
    assert 0 < nnz <= 400 * N
    for first, second in zip(entries[:3], again[:3], strict=True):
        assert torch.equal(first[:nnz], second[:nnz])
    latents, tokens = (entries.latents[:nnz] & LATENT).long(), entries.tokens[:nnz].long()
    assert ((tokens * F + latents).diff() > 0).all()
    wrong = 0
    for start, stop in itertools.pairwise(range(0, N + 1, 512)):
        z = x[start:stop].float() @ W_enc.float() + b_enc
        part = slice(int(entries.offsets[start]), int(entries.offsets[stop]))
        at = tokens[part] - start, latents[part]
        kept = torch.zeros_like(z, dtype=torch.bool)
        kept[at] = True
        differs = kept != ((z > threshold) | ((z - threshold).abs() < bandwidth / 2))
        distance = (z - threshold).abs()
        assert torch.minimum(distance, (distance - bandwidth / 2).abs())[differs].le(1e-3).all()
        assert ((entries.z[part] - z[at]).abs() <= 1e-4 * (1 + z[at].abs())).all()
        wrong += int(differs.sum())
    assert wrong <= 2e-3 * nnz
