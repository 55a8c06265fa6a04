"""Sparse encoding by Triton against the fp64 reference: pytest tests/test_encode.py"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.arithmetic import allowing_tf32
from gemmascope.kernels import SparseCode, encode, reference
from tests.helpers import (
    DTYPES,
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
from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.gpu import common
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu.common import architecture
from gemmascope.kernels.gpu.encode_gemm import EncodeConfig, encode_config

SHIPPED = {
    name: config
    for name, config in vars(gpu_encode_gemm).items()
    if isinstance(config, EncodeConfig) and name != "EncodeConfig"
}
SPLIT_1 = EncodeConfig(16, 32, 16, 1, 1, 1)
SPLIT_2 = EncodeConfig(16, 64, 16, 2, 1, 1, group_m=2)
SPLIT_4 = EncodeConfig(16, 128, 16, 4, 1, 1)
DESCRIPTORS = EncodeConfig(16, 128, 16, 4, 1, 1, descriptors=True)
ARCHITECTURES = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950")

interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def use(monkeypatch):
    """Forces a launch configuration on every encode of the test."""
    return lambda config: monkeypatch.setattr(gpu_encode_gemm, "encode_config", lambda *_: config)


@pytest.fixture(params=["few", "many"])
def route(request, monkeypatch):
    """Both ways to compact, whatever the number of tokens."""
    if request.param == "many":
        monkeypatch.setattr(gpu_encode, "FEW_TOKENS", 0)


def operands(N, d, F, dtype=torch.float32, device="cpu", make=normal, seed=0):
    """x, latent-major W_enc, b_enc and a threshold that about one entry in thirty passes."""
    x, W = make(N, d, dtype=dtype, device=device, seed=seed), make(F, d, dtype=dtype, device=device, seed=seed + 1)
    b_enc = make(F, device=device, seed=seed + 2)
    return x, W.T, b_enc, max(d, 1) ** 0.5 * (2 + 0.25 * make(F, device=device, seed=seed + 3))


def assert_same_code(code, expected):
    for name, got, want in zip(("values", "indices", "offsets"), code[:3], expected[:3], strict=True):
        assert_bitwise_equal(name, got, want)


def assert_matches_reference(x, W_enc, b_enc, threshold, code=None, precision=None):
    """The entries of the exact z that pass, up to those whose z is within its rounding of the threshold. precision: of
    the products, see `products_of`. Returns the share of its budget that the values' error takes."""
    code = code or encode(x, W_enc, b_enc, threshold, impl="triton")
    precision = precision or products_of(x)
    values, indices, offsets = (t.cpu() for t in code[:3])
    x, W_enc, b_enc, threshold = (t.cpu() for t in (x, W_enc, b_enc, threshold))
    assert (values.dtype, indices.dtype, offsets.dtype) == (torch.float32, torch.int32, torch.int64)
    assert offsets[0] == 0
    assert offsets[-1] == values.shape[0] == indices.shape[0]
    code = SparseCode(values, indices, offsets, W_enc.shape[1])
    tokens = code.token_indices()
    keys = tokens * code.d_sae + indices
    assert (keys.diff() > 0).all(), "latents do not ascend inside the rows"
    z = x.double() @ W_enc.double() + b_enc.double()
    bound = product_bound(x.shape[1], precision)
    certain = (z - threshold).abs() > bound * (x.double().abs() @ W_enc.double().abs() + b_enc.double().abs())
    kept = torch.zeros_like(certain)
    kept[tokens, indices.long()] = True
    assert torch.equal(kept[certain], (z > threshold)[certain])
    eager = x.float() @ W_enc.float() + b_enc.float()
    return assert_within_budget("values", values, z[kept], eager[kept], slack=product_slack(x.shape[1], precision))


@interpreted
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        pytest.param(SPLIT_1, torch.float16, id="split1-fp16"),
        pytest.param(SPLIT_2, torch.float32, id="split2-fp32"),
        pytest.param(SPLIT_2, torch.bfloat16, id="split2-bf16"),
        pytest.param(SPLIT_4, torch.float16, id="split4-fp16"),
    ],
)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(16, 128, 16))
def test_matches_reference(use, N, F, d, dtype, config):
    use(config)
    assert_matches_reference(*operands(N, d, F, dtype))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "d", "F"),
    [
        pytest.param(1, 8, 1, id="smallest"),  # boxes larger than the tensors
        pytest.param(17, 24, 131, id="tails"),  # a tail along every dimension
        pytest.param(32, 32, 256, id="even"),
    ],
)
def test_descriptors_match_reference(use, N, d, F, dtype):
    use(DESCRIPTORS)
    assert_matches_reference(*operands(N, d, F, dtype))


@interpreted
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tiles_match_reference(use, name):
    config = SHIPPED[name]
    use(config)
    dtype = torch.float32 if name.startswith(("FP32", "TF32")) else torch.bfloat16
    assert_matches_reference(*operands(config.block_m + 1, config.block_k + 8, config.block_n + 33, dtype))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(use, layout):
    use(SPLIT_2)
    x, W_enc, b_enc, threshold = operands(19, 21, 70)
    assert_matches_reference(layout(x), layout(W_enc), layout(b_enc), layout(threshold))


def test_several_segments(device, route):
    # Three segments, the last a partial one that ends inside a word.
    assert_matches_reference(*operands(3, 5, 2 * gpu_encode.SEGMENT + 45, device=device))


@pytest.mark.parametrize(("rows", "F"), [(1, 5), (3, 32), (7, 70), (16, 64), (40, 100)])
def test_scan(device, monkeypatch, rows, F):
    """Programs of several groups and groups of several programs; in parts, each from where the last one ended."""
    for name, size in (("SEGMENT", 32), ("COUNT_BLOCK", 2), ("SCAN_BLOCK", 16), ("SCAN_TOTALS", 4)):
        monkeypatch.setattr(gpu_encode, name, size)
    per_row, generator = -(-F // 32), torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (rows, per_row), generator=generator, dtype=torch.int64)
    bits = (words[..., None] >> torch.arange(32) & 1).sum(-1)
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), bits.flatten().cumsum(0)])
    words = words.int().to(device)
    for part in (rows, 3, 1):
        starts, offsets = (torch.empty(n + 1, dtype=torch.int64, device=device) for n in (rows * per_row, rows))
        with sanitizer.sanitize(race=True):
            for first in range(0, rows, part):
                count = min(part, rows - first)
                gpu_encode.scan(words[first : first + count], count, per_row, starts, offsets, first)
        assert_bitwise_equal("starts", starts.cpu(), expected)
        assert_bitwise_equal("offsets", offsets.cpu(), expected[::per_row])


def test_scan_goes_on_beyond_32_bits(device):
    words = torch.full((1, 1), -1, dtype=torch.int32, device=device)
    starts, offsets = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
    starts[1] = offsets[1] = 2**31 + 5
    gpu_encode.scan(words, 1, 1, starts, offsets, 1)
    assert starts.tolist() == offsets.tolist() == [0, 2**31 + 5, 2**31 + 37]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tie_is_not_active(device, dtype, route):
    """On a lattice every precision computes the same z, so the code must be the reference's, bit for bit."""
    x, W_enc, b_enc, _ = operands(8, 6, 200, dtype, device, make=lattice)
    threshold = lattice(200, device=device, seed=9).abs()
    z = x.double() @ W_enc.double() + b_enc.double()
    assert (z == threshold).sum() > 5
    expected = reference.encode_forward(x, W_enc, b_enc, threshold)
    assert_same_code(encode(x, W_enc, b_enc, threshold, impl="triton"), expected)


@pytest.mark.parametrize("F", [160, 77])
def test_every_latent_active(device, F, route):
    x, W_enc, b_enc, threshold = operands(3, 7, F, device=device)
    code = encode(x, W_enc, b_enc, torch.full_like(threshold, -1e3), impl="triton")
    assert torch.equal(code.l0(), torch.full((3,), F, device=device))
    assert torch.equal(code.indices.view(3, F), torch.arange(F, device=device, dtype=torch.int32).expand(3, F))
    assert_matches_reference(x, W_enc, b_enc, torch.full_like(threshold, -1e3), code)


def test_no_latent_active(device, route):
    x, W_enc, b_enc, threshold = operands(18, 7, 77, device=device)
    code = encode(x, W_enc, b_enc, torch.full_like(threshold, 1e3), impl="triton")
    assert code.nnz == 0
    assert torch.equal(code.offsets, torch.zeros(19, dtype=torch.int64, device=device))


def test_both_routes_give_the_same_bits(device, monkeypatch):
    monkeypatch.setattr(gpu_encode, "ROW_BLOCK", 32)  # three blocks a row, the last a partial one
    arguments = operands(4, 20, 2 * 32 * 32 + 45, device=device)
    few = encode(*arguments, impl="triton")
    monkeypatch.setattr(gpu_encode, "FEW_TOKENS", 0)
    assert_same_code(encode(*arguments, impl="triton"), few)
    assert few.nnz > 100


class Kernels(TorchDispatchMode):
    """What runs on the device: Triton's kernels by name, and the operators of PyTorch that are not views or memory."""

    # The tests fill memory that nobody initialises.
    FREE = ("new_empty", "empty", "fill_", "slice", "select", "permute", "transpose", "t", "alias", "detach")

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for module in (gpu_encode, gpu_encode_gemm):
            monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, kernel, *arguments, **named):
        self.found.append(kernel.fn.__name__)
        with _disable_current_modes():  # the interpreter copies
            common.launch(kernel, *arguments, **named)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name not in self.FREE:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("N", [1, 64])
def test_a_few_tokens_take_two_kernels(device, monkeypatch, N):
    arguments = operands(N, 16, 70, device=device)
    with Kernels(monkeypatch) as kernels:
        code = gpu_encode._encode(*arguments)  # by way of the operator its parts would not be seen
    assert kernels.found == ["_encode_fwd_kernel", "_compact_rows_kernel", "_local_scalar_dense"]
    assert_matches_reference(*arguments, SparseCode(*code, 70))


def test_more_than_a_few_tokens_are_counted_first(device, monkeypatch):
    monkeypatch.setattr(gpu_encode, "FEW_TOKENS", 4)
    arguments = operands(5, 16, 70, device=device)
    with Kernels(monkeypatch) as kernels:
        code = gpu_encode._encode(*arguments)
    assert [name for name in kernels.found if name.endswith("_kernel")] == [
        *("_encode_fwd_kernel", "_count_kernel", "_scan_kernel", "_compact_kernel"),
    ]
    assert_matches_reference(*arguments, SparseCode(*code, 70))


def test_more_entries_than_a_few_tokens_have_room_for(device, monkeypatch):
    monkeypatch.setattr(gpu_encode, "FEW_TOKENS_L0", 7)
    x, W_enc, b_enc, threshold = operands(3, 7, 77, device=device)
    some = encode(x, W_enc, b_enc, threshold, impl="triton")
    assert 0 < some.nnz <= 21
    with Kernels(monkeypatch) as kernels:
        gpu_encode._encode(x, W_enc, b_enc, threshold - 2e3)
    assert kernels.found.count("_compact_rows_kernel") == 2
    code = encode(x, W_enc, b_enc, torch.full_like(threshold, -1e3), impl="triton")
    assert torch.equal(code.l0(), torch.full((3,), 77, device=device))
    assert_matches_reference(x, W_enc, b_enc, torch.full_like(threshold, -1e3), code)


def test_duplicate_tokens_get_the_same_bits(device):
    x, W_enc, b_enc, threshold = operands(1, 33, 150, device=device, make=lattice)
    code = encode(x.expand(40, -1), W_enc, b_enc, threshold, impl="triton")
    assert code.nnz > 0
    assert_bitwise_equal("rows", code.to_dense(), code.to_dense()[:1].expand(40, -1))


def test_bad_input_stays_visible(device, route):
    """NaN, -Inf and a NaN threshold are kept as NaN, +Inf as +Inf; +Inf against an infinite threshold is NaN."""
    inf, nan = float("inf"), float("nan")
    b_enc = torch.tensor([0.0, nan, inf, -inf, 2.0, inf, -inf, nan, -2.0, 0.0], device=device)
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, inf, -inf, nan, -inf, inf], device=device)
    x, W_enc = torch.zeros(3, 4, device=device), torch.zeros(4, 10, device=device)
    x[1, 2] = nan
    x[2, 0] = -inf
    W_enc[0] = 1.0
    code = encode(x, W_enc, b_enc, threshold, impl="triton")
    expected = reference.encode_forward(x, W_enc, b_enc, threshold)
    assert code.indices[code.offsets[0] : code.offsets[1]].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert_same_code(code, expected)


@interpreted
@pytest.mark.parametrize("config", [SPLIT_1, DESCRIPTORS], ids=["pointers", "descriptors"])
def test_nothing_is_written_past_the_last_token(use, config):
    """Whole tiles of latents, and a tile of tokens that is not full."""
    use(config)
    x, W_enc, b_enc, threshold = operands(config.block_m + 1, 16, config.block_n)
    code = encode(x, W_enc, b_enc, torch.full_like(threshold, -1e3), impl="triton")
    assert code.l0().tolist() == [config.block_n] * len(x)


@interpreted
def test_columns_beyond_the_last_latent_are_not_kept(use):
    # A descriptor reads zeros there, and 0·NaN is NaN.
    use(DESCRIPTORS)
    x, W_enc, b_enc, threshold = operands(4, 8, 33)
    code = encode(torch.full_like(x, torch.nan), W_enc, b_enc, threshold, impl="triton")
    assert code.l0().tolist() == [33] * 4


def test_chunks_equal_the_whole(device, monkeypatch):
    # Lattice: the BLAS behind the interpreter rounds by a row's place in its tile, tensor cores do not.
    arguments = operands(20, 20, 100, torch.bfloat16, device, make=lattice)
    whole = encode(*arguments, impl="triton")
    limit_scratch(monkeypatch, 6 * (4 * 100 + 4 * 4))
    launches = []
    gemm = gpu_encode.encode_gemm
    monkeypatch.setattr(
        gpu_encode, "encode_gemm", lambda x, *rest: (launches.append((len(x), rest[-1])), gemm(x, *rest))
    )
    chunked = encode(*arguments, impl="triton")
    config = encode_config(architecture(device), torch.bfloat16, 20, False)
    assert launches == [(6, config)] * 3 + [(2, config)], "the tiling is that of the whole batch"
    assert_same_code(chunked, whole)


@interpreted
def test_chunks_are_whole_tiles_of_equal_number(monkeypatch):
    arguments = operands(5 * 128 + 3, 2, 3)
    launches = []
    gemm = gpu_encode.encode_gemm
    limit_scratch(monkeypatch, (4 * 128 + 100) * (4 * 3 + 4))
    monkeypatch.setattr(gpu_encode, "encode_gemm", lambda x, *rest: (launches.append(len(x)), gemm(x, *rest)))
    assert_matches_reference(*arguments)
    assert launches == [3 * 128, 2 * 128 + 3], "not four tiles and what is left"


def test_a_row_larger_than_the_scratch_still_runs(device, monkeypatch):
    limit_scratch(monkeypatch, 64)
    assert_matches_reference(*operands(3, 5, 100, device=device))


def test_repeats_bit_for_bit(device, route):
    arguments = operands(35, 40, 150, device=device)
    first = encode(*arguments, impl="triton")
    for seed in (1, 2):
        with sanitizer.sanitize(seed=seed):
            again = encode(*arguments, impl="triton")
        assert_same_code(again, first)


@interpreted
@pytest.mark.parametrize(("far_row", "far_column"), [(2**30 + 7, 1), (1, 2**28 + 1)], ids=["row", "column"])
def test_operand_offsets_beyond_32_bits(use, far_row, far_column):
    """Strides alone reach past 2³¹ elements, untouched in between; each stride fits 32 bits, the products do not."""
    use(SPLIT_1)
    d = SPLIT_1.block_k + 4  # the step from one block of columns to the next is such a product too
    x, W_enc, b_enc, threshold = operands(3, d, 3, torch.float16)
    memory = torch.empty(2, 2 * far_row + (d - 1) * far_column + 1, dtype=torch.float16)
    far_x, far_W = (m.as_strided((3, d), (far_row, far_column)) for m in memory)
    with sanitizer.sanitize(race=False):
        assert_matches_reference(far_x.copy_(x), far_W.copy_(W_enc.T).T, b_enc, threshold - 9)


@interpreted
def test_scratch_offsets_beyond_32_bits(use):
    """The last tile and the last segment of [4096, 2²⁰] scratch: 16 GiB of addresses, a few pages of memory."""
    N, F, d = 4096, 2**20, 8
    x, W_enc, b_enc, threshold = operands(N, d, F, torch.float16, make=lattice)
    config = SPLIT_2
    z, words = torch.empty(N, F), torch.empty(N, F // 32, dtype=torch.int32)
    with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] - 1]):
        gpu_encode_gemm.encode_gemm(x, W_enc, b_enc, threshold, z, words, config)
    kept = (words[-16:, -2:, None] >> torch.arange(32) & 1).bool().view(16, 64)
    exact = x[-16:].double() @ W_enc[:, -64:].double() + b_enc[-64:].double()
    assert torch.equal(kept, exact > threshold[-64:])
    assert torch.equal(z[-16:, -64:][kept].double(), exact[kept])
    words[-1, -gpu_encode.SEGMENT // 32 : -2] = 0
    count = int(kept[-1].sum())
    per_row = F // gpu_encode.SEGMENT
    starts = torch.zeros(N * per_row + 1, dtype=torch.int64)
    starts[-1] = count
    values, indices = torch.empty(count), torch.empty(count, dtype=torch.int32)
    with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] - 1]):
        gpu_encode._compact(words, z, threshold, starts, values, indices)
    assert torch.equal(values, z[-1, -64:][kept[-1]])
    assert torch.equal(indices, F - 64 + kept[-1].nonzero().flatten().int())


def test_configurations_suit_their_kernels():
    chosen = set()
    sizes = (1, 16, 17, 128, 129, 4096)
    for arch, dtype, n, describable, tf32 in itertools.product(
        ARCHITECTURES, DTYPES, sizes, (False, True), (False, True)
    ):
        config = encode_config(arch, dtype, n, describable, tf32)
        chosen.add(config)
        assert config.block_n % (32 * config.split) == 0, "a slab must be whole words"
        assert config.split in (1, 2, 4)
        # Below Hopper the compiler turns descriptors into two-byte loads; elsewhere they need aligned rows.
        assert not config.descriptors or (describable and arch in ("sm_90", "sm_100", "sm_103"))
        # On the other cards of AMD it is not a precision that the compiler knows.
        allowed = tf32 and dtype == torch.float32 and (arch == "gfx942" or not arch.startswith("gfx"))
        assert config.input_precision == "ieee" or allowed
    assert chosen == set(SHIPPED.values()), "a configuration that nothing chooses, or one that is not in the table"


@pytest.mark.parametrize(
    ("shape", "strides", "start", "answer"),
    [
        pytest.param((4, 16), (16, 1), 0, True, id="contiguous"),
        pytest.param((4, 16), (24, 1), 8, True, id="aligned-rows"),
        pytest.param((4, 16), (16, 1), 1, False, id="base"),
        pytest.param((4, 16), (17, 1), 0, False, id="row-stride"),
        pytest.param((4, 16), (1, 4), 0, False, id="transposed"),
        pytest.param((4, 16), (0, 1), 0, False, id="expanded"),
        pytest.param((4, 16), (8, 1), 0, False, id="overlapping"),
        pytest.param((4, 0), (8, 1), 0, False, id="empty"),
    ],
)
def test_what_descriptors_can_address(shape, strides, start, answer):
    memory = torch.empty(256, dtype=torch.bfloat16)
    assert gpu_encode_gemm.describable(memory.as_strided(shape, strides, start)) is answer


@pytest.mark.gpu
@pytest.mark.parametrize("F", [16384, 131072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_shapes(device, F, dtype):
    """Against fp32 matmul on the same operands; entries within the rounding of θ may differ and are counted."""
    N, d = 4096, 2304
    x = normal(N, d, dtype=dtype, device=device)
    W_enc = normal(F, d, dtype=dtype, device=device, seed=1, scale=d**-0.5).T
    b_enc = normal(F, device=device, seed=2, scale=0.1)
    threshold = torch.full(
        (F,), torch.special.ndtri(torch.tensor(1 - 64 / F, dtype=torch.float64)).item(), device=device
    )
    code = encode(x, W_enc, b_enc, threshold, impl="triton")
    assert 40 < code.nnz / N < 120
    assert (code.token_indices() * F + code.indices).diff().min() > 0
    uncertain, again = 0, encode(x, W_enc, b_enc, threshold, impl="triton")
    assert_same_code(again, code)
    with allowing_tf32(False):
        for start in range(0, N, 512):
            rows = slice(start, start + 512)
            z = x[rows].float() @ W_enc.float() + b_enc
            entries = slice(int(code.offsets[start]), int(code.offsets[start + 512]))
            part = SparseCode(
                code.values[entries], code.indices[entries], code.offsets[start : start + 513] - entries.start, F
            )
            kept = torch.zeros_like(z, dtype=torch.bool)
            kept[part.token_indices(), part.indices.long()] = True
            band = 1e-4 * (1 + z.abs())  # tensor cores may truncate each of the d / 16 partial sums
            wrong = kept != (z > threshold)
            assert (z - threshold).abs()[wrong].le(band[wrong]).all()
            uncertain += int(wrong.sum())
            assert ((part.values - z[kept]).abs() <= band[kept]).all()
    assert uncertain <= 1e-3 * code.nnz


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tiles_on_the_device(device, use, name):
    config = SHIPPED[name]
    if config.descriptors and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    use(config)
    dtype = torch.float32 if name.startswith(("FP32", "TF32")) else torch.bfloat16
    arguments = operands(config.block_m + 1, 2 * config.block_k + 8, config.block_n + 33, dtype, device)
    precision = "tf32" if config.input_precision == "tf32" else None
    assert_matches_reference(*arguments, precision=precision)
