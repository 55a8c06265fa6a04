"""The latent-major pass by Triton against the fp64 reference: python -m pytest tests/test_latents.py"""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.entries import ACTIVE, LATENT, ByLatent, Entries, Objective
from tests.helpers import (
    assert_bitwise_equal,
    assert_same_not_finite,
    assert_within_budget,
    every_other,
    exp_slack,
    lattice,
    normal,
    shape_cases,
    transposed,
)
from tests.kernels import sanitizer
from tests.kernels.entries import BANDWIDTH, batch, double, from_pre_activations

pytest.importorskip("triton")
from gemmascope.kernels.gpu import latents as gpu_latents
from gemmascope.kernels.gpu import weighted_sum as gpu_weighted_sum
from gemmascope.kernels.gpu.latents import LatentConfig, latent_pass, weight_gradients
from gemmascope.kernels.gpu.weighted_sum import encoder_parts, encoder_times
from gemmascope.kernels.transpose import by_latent

interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")
OBJECTIVES = {
    "plain": Objective(BANDWIDTH),
    "frequency": Objective(BANDWIDTH, frequency_slope=0.03),
    "tanh": Objective(BANDWIDTH, tanh_slope=0.2, tanh_scale=0.7),
    "ste_to_z": Objective(BANDWIDTH, ste_to_z=True),
    "all": Objective(BANDWIDTH, 0.03, 0.2, 0.7, True),
}
BY_ENTRY = ("dec", "dz", "tokens")


@pytest.fixture
def small_tiles(monkeypatch):
    config = LatentConfig(block_f=4, lanes=4, long=6, long_lanes=8, num_warps=1)
    monkeypatch.setattr(gpu_latents, "CONFIG", config)


def of_batch(inputs, seed=9):
    """entries, u, transposed, threshold, s"""
    u = normal(len(inputs.entries.z), device=inputs.x.device, seed=seed)
    return inputs.entries, u, by_latent(inputs.entries, len(inputs.threshold)), inputs.threshold, inputs.s


def check(entries, u, transposed, threshold, s, objective):
    nnz = int(transposed.offsets[-1])
    arguments = entries, u, transposed, threshold, s
    actual, eager = latent_pass(*arguments, objective), reference.latent_pass(*arguments, objective)
    exact = reference.latent_pass(*double(arguments), objective)
    for name, a, b, c in zip(actual._fields, actual, exact, eager, strict=True):
        if name in BY_ENTRY:
            a, b, c = a[:nnz], b[:nnz], c[:nnz]
        if a.is_floating_point():
            assert_within_budget(name, a, b, c)
        else:
            assert_bitwise_equal(name, a, c)
    return actual


@interpreted
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("N", "F"), shape_cases(8, 4, empty=False))
def test_matches_reference(small_tiles, N, F, objective):
    check(*of_batch(batch(N, F, 3)), OBJECTIVES[objective])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shipped_tiles_match_reference(objective, device):
    """Lists of some groups of entries, and some long ones of as many."""
    config = gpu_latents.CONFIG
    N, F = config.long_lanes + 9, config.block_f + 3
    z = normal(N, F, seed=1) - torch.linspace(0, 3, F)
    threshold = torch.full((F,), 0.9)
    entries = Entries(*(t.to(device) for t in from_pre_activations(z, threshold)))
    lengths = by_latent(entries, F).offsets.diff()
    assert ((lengths > config.lanes) & (lengths <= config.long)).any()
    assert (lengths > config.long).any()
    u, s = normal(len(entries.z), device=device), 0.01 * normal(N, device=device, seed=2).abs()
    check(entries, u, by_latent(entries, F), threshold.to(device), s, OBJECTIVES[objective])


@interpreted
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 7, 8, 9, 17])
def test_lists_around_the_gather(small_tiles, tokens):
    """The second latent has an entry on every token, from seven on a long list; the first and the third on the first
    two."""
    z = torch.full((tokens, 3), -9.0)
    z[:, 1], z[:2] = 1.5, 1.0
    entries = from_pre_activations(z, torch.full((3,), 0.9))
    inputs = entries, normal(len(entries.z)), by_latent(entries, 3), torch.full((3,), 0.9), normal(tokens, seed=1)
    assert check(*inputs, OBJECTIVES["all"]).firing_count.tolist() == [min(2, tokens), tokens, min(2, tokens)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties(objective, device):
    """Multiples of ε/2: z = θ is in the window but not active, |z − θ| = ε/2 is out of the window."""
    z, threshold = lattice(9, 11, step=BANDWIDTH / 2, reach=3), lattice(11, step=BANDWIDTH / 2, reach=2, seed=1).abs()
    assert (z == threshold).any()
    assert ((z - threshold) == BANDWIDTH / 2).any()
    entries = Entries(*(t.to(device) for t in from_pre_activations(z, threshold)))
    u = normal(len(entries.z), device=device)
    arguments = entries, u, by_latent(entries, 11), threshold.to(device), normal(9, device=device, seed=1)
    sums = check(*arguments, OBJECTIVES[objective])
    assert torch.equal(sums.firing_count.cpu(), (z > threshold).sum(0).int())


def test_latents_without_entries(device):
    inputs = of_batch(batch(6, 10, 3, device=device))
    sums = latent_pass(*inputs, OBJECTIVES["all"])
    idle = inputs[2].offsets.diff() == 0
    assert idle.any()
    for name in ("db_enc", "dthreshold", "along", "firing_count"):
        assert not getattr(sums, name)[idle].any(), name
    latents, offsets = torch.full_like(inputs[0].latents, 10), torch.zeros_like(inputs[0].offsets)
    nothing = by_latent(inputs[0]._replace(latents=latents, offsets=offsets), 10)
    for value in latent_pass(*inputs[:2], nothing, *inputs[3:], OBJECTIVES["all"])[3:]:
        assert not value.any()


def test_nothing_at_all(device):
    inputs = batch(0, 4, 3, device=device, capacity=0)
    sums = latent_pass(*of_batch(inputs), OBJECTIVES["all"])
    assert [t.shape[0] for t in sums] == [0, 0, 0, 4, 4, 4, 4]
    assert not sums.db_enc.any()


@interpreted
def test_long_lists_leave_the_others_alone(small_tiles):
    """Each latent's sums, bit for bit, whatever lists stand beside its own."""
    lengths = torch.tensor([5, 20, 6, 5, 6, 3])
    z = 1.5 + 0.1 * normal(20, 6, seed=1)
    z[torch.arange(20)[:, None] >= lengths] = -9
    threshold, s, u = torch.full((6,), 0.9), 0.01 * normal(20, seed=2).abs(), normal(20, 6, seed=3)

    def sums(columns):
        entries = from_pre_activations(z[:, columns], threshold[columns])
        nnz, of_entries = int(entries.offsets[-1]), torch.zeros(len(entries.z))
        of_entries[:nnz] = u[:, columns][entries.tokens[:nnz], entries.latents[:nnz] & LATENT]
        lists = by_latent(entries, len(columns))
        return latent_pass(entries, of_entries, lists, threshold[columns], s, OBJECTIVES["all"])[3:]

    for name, together, alone in zip(
        ("db_enc", "dthreshold", "along", "firing_count"),
        sums([0, 1, 2, 3, 4, 5]),
        map(torch.cat, zip(*(sums([j]) for j in range(6)), strict=True)),
        strict=True,
    ):
        assert_bitwise_equal(name, together, alone)


@pytest.mark.parametrize("objective", ["frequency", "tanh", "all"])
def test_slopes_on_the_device(objective, device):
    """The same bits as from numbers; a slope that holds 0 changes nothing, and one that changes is read anew."""
    inputs = of_batch(batch(6, 10, 3, device=device))
    nnz, given = int(inputs[2].offsets[-1]), OBJECTIVES[objective]

    def compare(slopes, expected):
        actual = latent_pass(*inputs, given._replace(frequency_slope=slopes[0], tanh_slope=slopes[1]))
        for name, a, b in zip(actual._fields, actual, latent_pass(*inputs, expected), strict=True):
            assert_bitwise_equal(name, *((a[:nnz], b[:nnz]) if name in BY_ENTRY else (a, b)))

    numbers = given.frequency_slope, given.tanh_slope
    slopes = [torch.tensor(n, dtype=torch.float64, device=device) for n in numbers]
    compare(slopes, given)
    for slope in slopes:
        slope.mul_(0)
    compare(slopes, given._replace(frequency_slope=0.0, tanh_slope=0.0))


def test_penalty_of_a_scalar_slope_expanded(device):
    entries, u, transposed, threshold, _ = of_batch(batch(6, 10, 3, device=device))
    s = torch.tensor(0.02, device=device).expand(6)
    check(entries, u, transposed, every_other(threshold), s, OBJECTIVES["plain"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["z", "u", "s"])
def test_bad_input_stays_visible(where, bad, device):
    entries, u, transposed, threshold, s = of_batch(batch(6, 12, 3, device=device))
    place = int(entries.offsets[4]) + 1
    target = {"z": entries.z, "u": u, "s": s}[where]
    target[4 if where == "s" else place] = bad
    if where == "s":  # some entry of the token is in a window
        entries.z[place] = threshold[entries.latents[place] & LATENT]
    arguments = entries, u, transposed, threshold, s
    actual, eager = (f(*arguments, OBJECTIVES["all"]) for f in (latent_pass, reference.latent_pass))
    assert not all(t.isfinite().all() for t in (eager.db_enc, eager.dthreshold, eager.along))
    nnz = int(transposed.offsets[-1])
    for name, a, b in zip(actual._fields, actual, eager, strict=True):
        assert_same_not_finite(name, *((a[:nnz], b[:nnz]) if name in BY_ENTRY else (a, b)))


def test_steep_tanh_penalty_has_no_cancellation(device):
    """1 − tanh² of a large argument underflows to 0 by subtraction; the slope is exp(−2·a)·4."""
    z = torch.tensor([[12.0]], device=device)
    entries = Entries(*(t.to(device) for t in from_pre_activations(z.cpu(), torch.ones(1))))
    arguments = entries, torch.zeros(len(entries.z), device=device), by_latent(entries, 1), torch.ones(1, device=device)
    sums = latent_pass(*arguments, torch.zeros(1, device=device), Objective(BANDWIDTH, tanh_slope=1.0, tanh_scale=1.0))
    expected = 4 * torch.exp(torch.tensor([-24.0], dtype=torch.float64))
    slack = exp_slack(24) if device.type == "cuda" else 0.0
    assert_within_budget("dz", sums.dz[:1], expected, expected.float(), slack=slack)


def test_repeats_bit_for_bit(device):
    inputs = of_batch(batch(200, gpu_latents.CONFIG.block_f + 3, 3, device=device))
    assert (inputs[2].offsets.diff() > gpu_latents.CONFIG.long).any()
    nnz = int(inputs[2].offsets[-1])
    first = latent_pass(*inputs, OBJECTIVES["all"])
    for seed in (1, 2):
        with sanitizer.sanitize(race=True, seed=seed):
            again = latent_pass(*inputs, OBJECTIVES["all"])
        for name, a, b in zip(first._fields, again, first, strict=True):
            assert_bitwise_equal(name, *((a[:nnz], b[:nnz]) if name in BY_ENTRY else (a, b)))


@interpreted
def test_offsets_beyond_32_bits(small_tiles):
    """The last three entries of 2³¹ + 3, of the last latent, in another order than they are listed in."""
    capacity = 2**31 + 3
    z, u = (torch.empty(capacity) for _ in range(2))
    latents, tokens = (torch.empty(capacity, dtype=torch.int32) for _ in range(2))
    order = torch.empty(capacity, dtype=torch.int64)
    z[-3:], u[-3:] = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, -3.0, 2.0])
    latents[-3:], tokens[-3:] = ACTIVE + 4, torch.tensor([0, 2, 1], dtype=torch.int32)
    order[-3:] = torch.tensor([capacity - 2, capacity - 1, capacity - 3])
    transposed = ByLatent(order, torch.tensor([0, 0, 0, 0, capacity - 3, capacity]))
    threshold, s = torch.full((5,), 0.9), normal(3)
    last = Entries(z[-3:], latents[-3:], tokens[-3:], torch.tensor([0, 1, 2, 3]))
    near = ByLatent(torch.tensor([1, 2, 0]), torch.tensor([0, 0, 0, 0, 0, 3]))
    expected = latent_pass(last, u[-3:], near, threshold, s, OBJECTIVES["all"])
    with sanitizer.sanitize(race=False, programs=lambda dims: [1]):
        far = latent_pass(Entries(z, latents, tokens, None), u, transposed, threshold, s, OBJECTIVES["all"])
    for name, a, b in zip(far._fields, far, expected, strict=True):
        assert_bitwise_equal(name, *((a[-3:], b) if name in BY_ENTRY else (a[4:], b[4:])))


def test_by_latent_sorts_tokens_within_latents(device):
    entries = batch(9, 7, 2, device=device).entries
    nnz = int(entries.offsets[-1])
    order, offsets = by_latent(entries, 7)
    keys = (entries.latents[:nnz] & LATENT).long() * 9 + entries.tokens[:nnz]
    assert torch.equal(order[:nnz].sort().values, torch.arange(nnz, device=device))
    assert (keys[order[:nnz]].diff() > 0).all()
    counts = torch.bincount((entries.latents[:nnz] & LATENT).long(), minlength=7)
    assert torch.equal(offsets.diff(), counts)
    assert offsets[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, every_other])
def test_weight_gradients(layout, dtype, device):
    inputs = batch(6, 12, 9, dtype, device)
    arguments = of_batch(inputs)
    residual, x_centred = (layout(normal(6, 9, dtype=dtype, device=device, seed=seed)) for seed in (1, 2))
    sums = reference.latent_pass(*arguments, OBJECTIVES["all"])
    actual = weight_gradients(arguments[2], sums, residual, x_centred)
    eager = reference.weight_gradients(arguments[2], sums, residual, x_centred)
    exact = reference.weight_gradients(*double((arguments[2], sums, residual, x_centred)))
    for name, a, b, c in zip(("dW_enc", "dW_dec"), actual, exact, eager, strict=True):
        assert_within_budget(name, a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("groups", "rows", "F"), [(1024, 64, 1), (1024, 64, 65), (3, 2, 13), (3, 2, 12), (3, 2, 5), (99, 2, 150)]
)
def test_encoder_times(groups, rows, F, dtype, device, monkeypatch):
    monkeypatch.setattr(gpu_weighted_sum, "_GROUPS", groups)
    monkeypatch.setattr(gpu_weighted_sum, "_GROUP_ROWS", rows)
    W_enc, db_enc = normal(F, 7, dtype=dtype, device=device), normal(F, device=device, seed=1)
    db_enc[1::3] = 0
    exact = db_enc.double() @ W_enc.double()
    assert_within_budget("product", encoder_times(W_enc, db_enc), exact, db_enc @ W_enc.float())


@pytest.mark.parametrize("layout", [transposed, every_other])
def test_encoder_times_of_any_strides(layout, device):
    W_enc, db_enc = layout(normal(70, 300, device=device)), normal(70, device=device, seed=1)
    exact = db_enc.double() @ W_enc.double()
    assert_within_budget("product", encoder_times(W_enc, db_enc), exact, db_enc @ W_enc)


def test_encoder_times_of_nothing(device):
    for F, d in ((0, 3), (3, 0), (0, 0)):
        W_enc, db_enc = torch.zeros(F, d, device=device), torch.ones(F, device=device)
        assert_bitwise_equal("product", encoder_times(W_enc, db_enc), torch.zeros(d, device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_encoder_times_of_bad_input(bad, device):
    """Whatever a row holds is seen unless its coefficient is 0, and a bad coefficient is."""
    W_enc, db_enc = normal(5, 3, device=device), torch.tensor([1.0, 0.0, -2.0, 3.0, 0.5], device=device)
    expected = encoder_times(W_enc, db_enc)
    W_enc[1, 1] = bad
    assert_bitwise_equal("unread", encoder_times(W_enc, db_enc), expected)
    W_enc[2, 1] = bad
    assert encoder_times(W_enc, db_enc).isfinite().tolist() == [True, False, True]
    db_enc[3] = bad
    assert not encoder_times(W_enc, db_enc).isfinite().any()
    W_enc, db_enc = normal(9, 3, device=device), torch.zeros(9, device=device)
    db_enc[6] = bad  # the only coefficient of its group that is not 0
    assert not encoder_times(W_enc, db_enc).isfinite().any()


def test_encoder_times_repeats_in_two_launches(device):
    W_enc, db_enc = normal(150, 300, device=device), normal(150, device=device, seed=1)
    first = encoder_times(W_enc, db_enc)
    for seed in (1, 2):
        with sanitizer.sanitize(race=True, seed=seed) as report:
            again = encoder_times(W_enc, db_enc)
        assert_bitwise_equal("product", again, first)
        if not W_enc.is_cuda:
            assert report.launches == 2


def test_encoder_times_in_parts(device):
    """Those of a step, of which the first launch is all."""
    W_enc, db_enc = normal(150, 9, device=device), normal(150, device=device, seed=1)
    with sanitizer.sanitize(race=True) as report:
        parts = encoder_parts(W_enc, db_enc)
    assert parts.shape == (3, 9)
    assert_within_budget("product", parts.sum(0), db_enc.double() @ W_enc.double(), db_enc @ W_enc)
    if not W_enc.is_cuda:
        assert report.launches == 1


@interpreted
def test_encoder_times_beyond_32_bits():
    """The last two rows of a table of 2³¹ elements and more, all others with the coefficient 0; the eighth block of
    columns, of the last group."""
    F, d = 1 << 20, 2049
    W_enc, db_enc = torch.empty(F, d, dtype=torch.bfloat16), torch.zeros(F)
    W_enc[-2:], db_enc[-2:] = normal(2, d).bfloat16(), torch.tensor([2.0, -0.5])
    with sanitizer.sanitize(race=False, programs=lambda dims: [8 * dims[1] - 1]):
        rows = gpu_weighted_sum._sum_rows(db_enc, W_enc, 256, gpu_weighted_sum.ROWS)
    block = slice(7 * 256, 8 * 256)
    assert_bitwise_equal("partial", rows[-1, block], (2 * W_enc[-2].float() - 0.5 * W_enc[-1].float())[block])
