"""The dense route's passes over [N, F] by Triton against the fp64 reference: pytest tests/test_dense.py"""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.entries import DenseCode, Objective
from tests.helpers import (
    LAYOUTS,
    assert_bitwise_equal,
    assert_within_budget,
    every_other,
    lattice,
    normal,
    product_bound,
    product_slack,
    products_of,
    shape_cases,
    transposed,
)
from tests.kernels import sanitizer

pytest.importorskip("triton")
from gemmascope.kernels import gpu
from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.gpu import dense as gpu_dense
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu.dense import dense_backward, dense_encode
from gemmascope.kernels.gpu.encode_gemm import EncodeConfig

SPLIT_1 = EncodeConfig(16, 32, 16, 1, 1, 1)
SPLIT_2 = EncodeConfig(16, 64, 16, 2, 1, 1, group_m=2)
SPLIT_4 = EncodeConfig(16, 128, 16, 4, 1, 1)
DESCRIPTORS = EncodeConfig(16, 128, 16, 4, 1, 1, descriptors=True)
BANDWIDTH = 0.5  # half of it is one step of the lattice

PLAIN = Objective(BANDWIDTH)
OBJECTIVES = {
    "plain": PLAIN,
    "frequency": PLAIN._replace(frequency_slope=0.03),
    "tanh": PLAIN._replace(tanh_slope=0.2, tanh_scale=0.7),
    "ste": PLAIN._replace(ste_to_z=True),
    "all": Objective(BANDWIDTH, 0.03, 0.2, 0.7, True),
}
COUNTS = ("l0", "firing_count", "touched", "n_entries")

interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def use(monkeypatch):
    """Forces a launch configuration on every encode of the test."""
    return lambda config: monkeypatch.setattr(gpu_encode_gemm, "encode_config", lambda *_: config)


def operands(N, d, F, dtype=torch.float32, device="cpu", make=normal):
    """x, latent-major W_enc, b_enc and a threshold that one entry in six passes, with some in the window."""
    x, W = make(N, d, dtype=dtype, device=device), make(F, d, dtype=dtype, device=device, seed=1)
    return x, W.T, make(F, device=device, seed=2), max(d, 1) ** 0.5 + 0.25 * make(F, device=device, seed=3).abs()


def lattice_operands(N, d, F, dtype=torch.float32, device="cpu"):
    """The same where every precision computes the same z, and ties are common."""
    x, W_enc, b_enc, _ = operands(N, d, F, dtype, device, lattice)
    return x, W_enc, b_enc, lattice(F, device=device, seed=3).abs()


def exact_z(x, W_enc, b_enc):
    return x.double() @ W_enc.double() + b_enc.double()


def unpack(words, F):
    """Words of bits to bool [N, F]; the bits beyond F must be 0. On a CPU a mask may be numbers [N, F] instead."""
    if words.dtype != torch.int32:
        return words.bool()
    bits = (words.cpu()[:, :, None] >> torch.arange(32) & 1).bool().flatten(1)
    assert not bits[:, F:].any(), "bits beyond the last latent"
    return bits[:, :F]


def assert_counts_are_those_of_the_bits(code, F):
    active, inside = unpack(code.active, F), unpack(code.window, F)
    assert_bitwise_equal("l0", code.l0.cpu(), active.sum(1).float())
    assert_bitwise_equal("firing_count", code.firing_count.cpu(), active.sum(0).int())
    assert_bitwise_equal("touched", code.touched.cpu(), (active | inside).sum(0).int())
    assert_bitwise_equal("n_entries", code.n_entries.cpu(), (active | inside).sum())
    return active, inside


def assert_matches_reference(x, W_enc, b_enc, threshold, code):
    """f and both gates of the exact z, up to those whose z is within its rounding of an edge."""
    F, precision = W_enc.shape[1], products_of(x)
    assert code.f.shape == (x.shape[0], F)
    assert code.active.dtype == code.window.dtype
    active, inside = assert_counts_are_those_of_the_bits(code, F)
    x, W_enc, b_enc, threshold = (t.cpu() for t in (x, W_enc, b_enc, threshold))
    distance = exact_z(x, W_enc, b_enc) - threshold
    rounding = product_bound(x.shape[1], precision) * exact_z(x.abs(), W_enc.abs(), b_enc.abs())
    certain = (distance.abs() > rounding) & ((distance.abs() - BANDWIDTH / 2).abs() > rounding)
    assert certain.float().mean() > 0.99 or distance.numel() < 1000
    assert torch.equal(active[certain], (distance > 0)[certain])
    assert torch.equal(inside[certain], (distance.abs() < BANDWIDTH / 2)[certain])
    exact = reference.dense_encode(*(t.double() for t in (x, W_enc, b_enc, threshold)), BANDWIDTH).f
    eager = reference.dense_encode(x, W_enc, b_enc, threshold, BANDWIDTH).f
    slack = product_slack(x.shape[1], precision)
    assert_within_budget("f", code.f.cpu()[certain], exact[certain], eager[certain], slack=slack)


def assert_equals_reference(arguments, code):
    """Bit for bit, which lattice operands allow."""
    expected = reference.dense_encode(*(t.double() for t in arguments), BANDWIDTH)
    F = expected.f.shape[1]
    assert_bitwise_equal("f", code.f.cpu(), expected.f.to(code.f.dtype).cpu())
    active, inside = assert_counts_are_those_of_the_bits(code, F)
    assert torch.equal(active, expected.active.bool().cpu())
    assert torch.equal(inside, expected.window.bool().cpu())
    for name in COUNTS:
        assert torch.equal(getattr(code, name).double(), getattr(expected, name).double()), name


def test_are_the_operators_of_the_training_step():
    assert gpu.dense_encode is dense_encode
    assert gpu.dense_backward is dense_backward


@interpreted
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(16, 64, 16))
def test_encode_matches_reference(use, N, F, d):
    use(SPLIT_2)
    arguments = operands(N, d, F)
    code = dense_encode(*arguments, BANDWIDTH)
    assert code.active.dtype == code.window.dtype == torch.int32
    assert_matches_reference(*arguments, code)


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
    # A tail along every dimension; rows of 16-byte words, which descriptors need.
    arguments = operands(config.block_m + 1, config.block_k + 8, config.block_n + 33, dtype)
    assert_matches_reference(*arguments, dense_encode(*arguments, BANDWIDTH))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_encode_of_any_strides(device, layout):
    arguments = [layout(t) for t in operands(19, 21, 70, device=device)]
    assert_matches_reference(*arguments, dense_encode(*arguments, BANDWIDTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties(device, dtype):
    arguments = lattice_operands(9, 6, 200, dtype, device)
    distance = exact_z(*arguments[:3]) - arguments[3]
    assert (distance == 0).sum() > 5
    assert (distance.abs() == BANDWIDTH / 2).sum() > 5
    assert_equals_reference(arguments, dense_encode(*arguments, BANDWIDTH))


@pytest.mark.parametrize("F", [70, 1100])
def test_counts_over_several_programs(device, F):
    """Everything active in 300 rows, so that every byte of a counter is full; but the first latent, which is dead."""
    x, W_enc, b_enc, threshold = lattice_operands(300, 1, F, device=device)
    threshold = torch.full_like(threshold, -64.0)
    threshold[0] = 64
    code = dense_encode(x, W_enc, b_enc, threshold, BANDWIDTH)
    assert code.firing_count.tolist() == [0] + [300] * (F - 1)
    assert code.l0.tolist() == [F - 1] * 300
    assert_equals_reference((x, W_enc, b_enc, threshold), code)


def test_bad_input_stays_visible(device):
    """NaN, −Inf and a NaN threshold are NaN in f, and count as active."""
    inf, nan = float("inf"), float("nan")
    b_enc = torch.tensor([0.0, nan, inf, -inf, 2.0, -2.0, 0.0, 1.5], device=device)
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, -inf, inf, 1.5], device=device)
    x, W_enc = torch.zeros(2, 4, device=device), torch.zeros(4, 8, device=device)
    x[1, 2] = nan
    code = dense_encode(x, W_enc, b_enc, threshold, BANDWIDTH)
    f = torch.tensor([[0, nan, inf, nan, nan, -2.0, 0, 0], [nan] * 8], device=device)
    assert_bitwise_equal("f", code.f, f)
    eager = reference.dense_encode(x, W_enc, b_enc, threshold, BANDWIDTH)
    assert_bitwise_equal("f of the reference", eager.f, f)
    assert unpack(code.active, 8).int().tolist() == [[0, 1, 1, 1, 1, 1, 0, 0], [1] * 8]
    assert code.touched.tolist() == [1, 2, 2, 2, 2, 2, 1, 2]
    assert_counts_are_those_of_the_bits(code, 8)


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_tf32_only_when_asked_for(device, monkeypatch, tf32, precision):
    arguments = lattice_operands(20, 4, 40, device=device)
    configs = []
    gemm = gpu_encode_gemm.encode_gemm
    record = lambda *args: (configs.append(args[6]), gemm(*args))  # noqa: E731
    monkeypatch.setattr(gpu_dense, "encode_gemm", record)
    assert_equals_reference(arguments, dense_encode(*arguments, BANDWIDTH, tf32))
    assert [config.input_precision for config in configs] == [precision]


def backward_operands(N, F, dtype=torch.float32, device="cpu", d=3):
    """u, the kernel's code of a lattice, the reference's of the same, θ and s."""
    arguments = lattice_operands(N, d, F, dtype, device)
    u, s = normal(N, F, dtype=dtype, device=device, seed=7), normal(N, device=device, seed=8)
    exact = reference.dense_encode(*(t.double() for t in arguments), BANDWIDTH)
    return u, dense_encode(*arguments, BANDWIDTH), exact, arguments[3], s


def assert_backward_matches_reference(u, code, exact_code, threshold, s, objective):
    exact = reference.dense_backward(u.double(), exact_code, threshold.double(), s.double(), objective)
    low = DenseCode(*(t.float() if t.dtype == torch.float64 else t for t in exact_code))
    eager = reference.dense_backward(u.clone(), low, threshold, s, objective)
    actual = dense_backward(u, code, threshold, s, objective)
    assert actual[0].data_ptr() == u.data_ptr(), "dz must take the memory of u"
    for name, got, want, ordinary in zip(("dz", "db_enc", "dtheta"), actual, exact, eager, strict=True):
        assert_within_budget(name, got, want, ordinary)


@pytest.mark.parametrize(("N", "F"), shape_cases(4, 256, empty=False))
def test_backward_matches_reference(device, N, F):
    assert_backward_matches_reference(*backward_operands(N, F, device=device), OBJECTIVES["all"])


@pytest.mark.parametrize(("N", "F"), [(0, 3), (3, 0)])
def test_backward_of_nothing(device, N, F):
    code = dense_encode(*operands(N, 4, F, device=device), BANDWIDTH)
    u, theta, s = torch.empty(N, F, device=device), torch.ones(F, device=device), torch.ones(N, device=device)
    dz, db_enc, dthreshold = dense_backward(u, code, theta, s, PLAIN)
    assert dz is u
    assert db_enc.tolist() == dthreshold.tolist() == [0.0] * F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective(device, objective, dtype):
    # Two programs of 128 rows, the last ragged.
    assert_backward_matches_reference(*backward_operands(133, 40, dtype, device), objective)


@pytest.mark.parametrize("layout", [every_other, transposed])
def test_backward_of_any_strides(device, layout):
    u, *rest, threshold, s = backward_operands(19, 70, device=device)
    assert_backward_matches_reference(layout(u), *rest, layout(threshold), layout(s), OBJECTIVES["all"])
    assert_backward_matches_reference(u, *rest, threshold, s[:1].expand(19), PLAIN)


def test_dead_latents_get_no_gradient(device):
    u, code, _, threshold, s = backward_operands(9, 70, device=device)
    dead = code.touched == 0
    code = code._replace(active=code.active & -2, window=code.window & -2)
    dead[::32] = True
    dz, db_enc, dthreshold = dense_backward(u, code, threshold, s, PLAIN)
    for gradient in (dz[:, dead], db_enc[dead], dthreshold[dead]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert dz[:, ~dead].any()


def test_f_is_read_for_the_tanh_penalty_only(device):
    u, code, _, threshold, s = backward_operands(9, 70, device=device)
    spoilt = code._replace(f=torch.full_like(code.f, torch.nan))
    for first, second in zip(
        dense_backward(u.clone(), code, threshold, s, OBJECTIVES["ste"]),
        dense_backward(u.clone(), spoilt, threshold, s, OBJECTIVES["ste"]),
        strict=True,
    ):
        assert torch.equal(first, second)
    assert dense_backward(u, spoilt, threshold, s, OBJECTIVES["tanh"])[2].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_stay_visible(device, bad):
    """Also where the entry is neither active nor in the window."""
    u, code, _, threshold, s = backward_operands(9, 70, device=device)
    nothing = (~(unpack(code.active, 70) | unpack(code.window, 70))).nonzero()
    n, j = nothing[len(nothing) // 2].tolist()
    u[n, j] = bad
    dz, db_enc, dthreshold = dense_backward(u, code, threshold, s, PLAIN)
    assert dz.isnan().nonzero().tolist() == [[n, j]]
    for gradient in (db_enc, dthreshold):
        assert gradient.isnan().nonzero().tolist() == [[j]]


def test_repeats_bit_for_bit(device):
    arguments = operands(140, 5, 300, device=device)
    u, s = normal(140, 300, device=device, seed=7), normal(140, device=device, seed=8)

    def run():
        code = dense_encode(*arguments, BANDWIDTH)
        return *code, *dense_backward(u.clone(), code, arguments[3], s, OBJECTIVES["all"])

    first = run()
    with sanitizer.sanitize(seed=1):
        again = run()
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@interpreted
def test_backward_offsets_beyond_32_bits():
    """The last tile of [4096, 2²⁰]: 32 GiB of addresses, a few pages of memory."""
    N, F = 4096, 2**20
    rows, columns = slice(N - 128, N), slice(F - 256, F)
    u, f = torch.empty(N, F), torch.empty(N, F)
    words = [torch.empty(N, F // 32, dtype=torch.int32) for _ in range(2)]
    values, code, _, threshold, s = backward_operands(128, 256)
    u[rows, columns], f[rows, columns] = values, code.f
    for large, small in zip(words, (code.active, code.window), strict=True):
        large[rows, -8:] = small
    wide = [torch.zeros(F), torch.zeros(F, dtype=torch.int32), torch.zeros(N)]
    wide[0][columns], wide[1][columns], wide[2][rows] = threshold, code.firing_count, s
    large = code._replace(f=f, active=words[0], window=words[1], firing_count=wide[1])
    objective = OBJECTIVES["all"]._replace(tanh_slope=OBJECTIVES["all"].tanh_slope * 128 / N)
    s_scaled = wide[2] * (128 / N)
    objective = objective._replace(frequency_slope=objective.frequency_slope * 128 / N)
    with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] * dims[1] * dims[2] - 1]):
        dense_backward(u, large, wide[0], s_scaled, objective)
    expected = dense_backward(values, code, threshold, s, OBJECTIVES["all"])
    assert torch.equal(u[rows, columns] * (N / 128), expected[0]), "2/N and its like are powers of two, hence exact"


@interpreted
def test_encode_offsets_beyond_32_bits(use):
    """The last tile of f and of both masks at [4096, 2²⁰], then its counts."""
    N, F, d = 4096, 2**20, 8
    use(SPLIT_2)
    x, W_enc, b_enc, _ = operands(N, d, F, torch.float16, make=lattice)
    threshold = lattice(F, seed=3).abs()
    f = torch.empty(N, F, dtype=torch.float16)
    active, window = (torch.empty(N, F // 32, dtype=torch.int32) for _ in range(2))
    last = lambda dims: [dims[0] * dims[1] * dims[2] - 1]  # noqa: E731
    with sanitizer.sanitize(race=False, programs=last):
        gpu_encode_gemm.encode_gemm(x, W_enc, b_enc, threshold, f, active, SPLIT_2, "dense", BANDWIDTH, window)
    expected = reference.dense_encode(x[-16:], W_enc[:, -64:], b_enc[-64:], threshold[-64:], BANDWIDTH)
    assert torch.equal(f[-16:, -64:], expected.f)
    assert torch.equal(unpack(active[-16:, -2:], 64), expected.active.bool())
    assert torch.equal(unpack(window[-16:, -2:], 64), expected.window.bool())
    active[-128:, -32:], window[-128:, -32:] = 5, 1
    l0, firing_count, touched = (torch.zeros(n, dtype=torch.int32) for n in (N, F, F))
    with sanitizer.sanitize(race=False, programs=last):
        gpu_dense._count_bits(active, window, l0, firing_count, touched)
    assert l0[-128:].tolist() == [64] * 128
    assert firing_count[-1024:].tolist() == [128, 0, 128, *[0] * 29] * 32


def test_configurations_suit_their_kernels():
    assert gpu_dense.COUNT.block_n * gpu_dense.COUNT.tiles <= 255, "a byte of a counter would overflow"


@pytest.mark.gpu
def test_full_shapes(device):
    """Decisions and gradients against fp32 eager PyTorch at full width."""
    N, d, F, bandwidth = 4096, 2304, 16384, 0.01
    x = normal(N, d, dtype=torch.bfloat16, device=device)
    W_enc = normal(F, d, dtype=torch.bfloat16, device=device, seed=1, scale=d**-0.5).T
    b_enc, threshold = normal(F, device=device, seed=2, scale=0.1), torch.full((F,), 0.1, device=device)
    code = dense_encode(x, W_enc, b_enc, threshold, bandwidth)
    z = x.float() @ W_enc.float() + b_enc
    f = torch.where(z > threshold, z, 0)
    differs = (code.f > 0) != (f > 0)
    assert (z - threshold).abs()[differs].le(1e-3).all()
    assert differs.float().mean() < 1e-3
    assert ((code.f.float() - f).abs() <= 1e-2 * f.abs() + 1e-3).logical_or(differs).all()
    assert_counts_are_those_of_the_bits(code, F)
    shifts = torch.arange(32, device=device)
    bits = [((words[:, :, None] >> shifts) & 1).float().flatten(1) for words in (code.active, code.window)]
    u, s = normal(N, F, dtype=torch.bfloat16, device=device, seed=7), normal(N, device=device, seed=8)
    objective = Objective(bandwidth, 0.03, 0.2, 0.7, True)
    low = code._replace(active=bits[0], window=bits[1])
    expected = reference.dense_backward(u.clone(), low, threshold, s, objective)
    actual = dense_backward(u.clone(), code, threshold, s, objective)
    for got, want in zip(actual, expected, strict=True):
        assert (got.float() - want.float()).norm() <= 1e-3 * want.float().norm()
    again = dense_backward(u.clone(), code, threshold, s, objective)
    assert all(torch.equal(first, second) for first, second in zip(again, actual, strict=True))
