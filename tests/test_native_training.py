"""The native CPU backend of the training step: the Triton operators' oracles, asked about the C++ ones."""

import pytest
import torch

from gemmascope.kernels import _cpu_training
from gemmascope.kernels import training_reference as reference
from gemmascope.kernels.entries import ByLatent, Entries, Objective
from gemmascope.kernels.implementations import operator
from gemmascope.training.step import sparse_step
from tests.entries import BANDWIDTH, batch, from_pre_activations
from tests.helpers import LAYOUTS, assert_bitwise_equal, assert_within_budget, normal, shape_cases
from tests.native import ISAS, needs_native, screening, threads  # noqa: F401 (a fixture)

pytest.importorskip("triton")  # the modules of the oracles need it
from tests import test_dense, test_entries, test_latents, test_residual, test_update
from tests.training import test_step

pytestmark = needs_native
DTYPES = (torch.float32, torch.bfloat16)
OBJECTIVES = test_latents.OBJECTIVES
ORACLES = {
    test_entries: ("encode_entries",),
    test_residual: ("residual_pass",),
    test_latents: ("by_latent", "latent_pass", "encoder_times", "weight_gradients"),
    test_update: ("update_from_entries", "update_from_dense"),
    test_dense: ("dense_encode", "dense_backward"),
}


@pytest.fixture(params=ISAS, autouse=True)
def native(request, monkeypatch):
    """The operators by one instruction set, also under the names by which the other modules' checks call them."""
    for module, names in ORACLES.items():
        for name in names:
            monkeypatch.setattr(module, name, operator(name, "cpu"))
    before = torch.ops.gemmascope_cpu.isa()
    torch.ops.gemmascope_cpu.use_isa(request.param)
    yield _cpu_training
    torch.ops.gemmascope_cpu.use_isa(before)


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(32, 96, 256))
def test_entries_match_reference(native, N, F, d, dtype):
    arguments = test_entries.operands(N, d, F, dtype)
    test_entries.assert_matches_reference(*arguments, native.encode_entries(*arguments, BANDWIDTH, N * F))


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("N", [3, 20, 600])
@pytest.mark.parametrize("capacity", [0, 7, 100, 10_000, None])
def test_entries_with_ties_and_little_room(native, N, capacity):
    arguments = test_entries.lattice_operands(N, 6, 130)
    entries = native.encode_entries(*arguments, BANDWIDTH, capacity)
    room = int(entries.offsets[-1]) if capacity is None else capacity
    assert len(entries.z) == room
    test_entries.assert_equals_reference(arguments, room, entries)


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_entries_of_any_strides(native, layout):
    arguments = [layout(t) for t in test_entries.operands(19, 21, 70)]
    test_entries.assert_matches_reference(*arguments, native.encode_entries(*arguments, BANDWIDTH, 19 * 70))


@pytest.mark.usefixtures("screening")
def test_a_window_narrower_than_rounding_still_holds_the_threshold(native):
    """θ − ε is θ in fp32 there; z = θ is not active, but |z − θ| = 0 < ε/2."""
    x, W_enc, b_enc = torch.zeros(2, 1), torch.zeros(1, 3), torch.tensor([999.0, 1000.0, 1001.0])
    entries = native.encode_entries(x, W_enc, b_enc, torch.full((3,), 1000.0), 1e-5, None)
    assert entries.z.tolist() == [1000.0, 1001.0] * 2


@pytest.mark.usefixtures("screening")
@pytest.mark.parametrize("N", [2, 30])
def test_entries_of_bad_input_are_those_of_the_reference(native, N):
    inf, nan = torch.inf, torch.nan
    b_enc = torch.tensor([0.0, nan, inf, -inf, 2.0, -2.0, 0.0, 1.5, inf])
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, -inf, inf, 1.5, inf])
    x, W_enc = torch.zeros(N, 4), torch.zeros(4, 9)
    x[1, 2] = nan
    arguments = x, W_enc, b_enc, threshold, BANDWIDTH, None
    for name, ours, expected in zip(
        Entries._fields, native.encode_entries(*arguments), reference.encode_entries(*arguments), strict=True
    ):
        assert_bitwise_equal(name, ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(5, 20, 33, empty=False))
def test_residual_matches_reference(N, F, d, dtype):
    test_residual.check(*batch(N, F, d, dtype))


def test_residual_of_bad_input():
    inputs = batch(5, 9, 6)
    inputs.entries.z[:3] = torch.tensor([torch.nan, -torch.inf, torch.inf])
    ours = _cpu_training.residual_pass(inputs.entries, inputs.x, inputs.W_dec, inputs.b_dec)
    eager = reference.residual_pass(inputs.entries, inputs.x, inputs.W_dec, inputs.b_dec)
    assert torch.equal(ours.squared_error.isfinite(), eager.squared_error.isfinite())
    assert not ours.squared_error.isfinite().all()


def test_entries_beyond_the_capacity(native):
    whole = batch(7, 15, 9)
    cut = batch(7, 15, 9, capacity=whole.nnz - 10)
    full, part = (native.residual_pass(b.entries, b.x, b.W_dec, b.b_dec) for b in (whole, cut))
    complete = int((whole.entries.offsets[1:] <= len(cut.entries.z)).sum())
    assert_bitwise_equal("residual", part.residual[:complete], full.residual[:complete])
    ours, expected = native.by_latent(cut.entries, 15), reference.by_latent(cut.entries, 15)
    assert_bitwise_equal("order", ours.order, expected.order)
    assert_bitwise_equal("offsets", ours.offsets, expected.offsets)


@pytest.mark.parametrize(("N", "F"), [(1, 1), (6, 10), (33, 20), (0, 4)])
def test_transposed_entries_are_those_of_the_reference(native, N, F):
    entries = batch(N, F, 3).entries
    ours, expected = native.by_latent(entries, F), reference.by_latent(entries, F)
    nnz = int(expected.offsets[-1])
    assert_bitwise_equal("order", ours.order[:nnz], expected.order[:nnz])
    assert_bitwise_equal("offsets", ours.offsets, expected.offsets)
    assert sorted(ours.order.tolist()) == list(range(len(entries.z)))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("N", "F"), shape_cases(9, 7, empty=False))
def test_latent_sums_match_reference(N, F, objective):
    test_latents.check(*test_latents.of_batch(batch(N, F, 3)), OBJECTIVES[objective])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_latent_sums_at_ties(objective):
    test_latents.test_ties(objective, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoder_times_reads_every_row_that_counts(native, dtype):
    W_enc, db_enc = normal(700, 21, dtype=dtype), normal(700, seed=1)
    db_enc[::3] = 0
    exact = reference.encoder_times(W_enc.double(), db_enc.double())
    eager = reference.encoder_times(W_enc, db_enc)
    assert_within_budget("db_dec", native.encoder_times(W_enc, db_enc), exact, eager)


@pytest.mark.parametrize("rule", [test_update.RULE, test_update.LOG], ids=["raw", "log"])
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(4, 6, 16, empty=False))
def test_update_matches_reference(N, F, d, rule):
    test_update.check_entries(N, F, d, rule)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_update_of_bf16_rows_and_copies(dtype, low):
    test_update.check_entries(9, 5, 37, test_update.LOG, dtype, low)


def test_what_the_update_leaves_alone():
    for low in (False, True):
        test_update.test_latents_without_entries_stay_bit_for_bit(low, "cpu")
    for source in ("entries", "dense"):
        test_update.test_nothing_changes_without_permission(source, "cpu")
    test_update.test_both_sources_agree("cpu")


@pytest.mark.parametrize("rule", [test_update.RULE, test_update.LOG], ids=["raw", "log"])
def test_threshold_never_falls_below_zero_and_shows_nan(rule):
    test_update.test_threshold_never_falls_below_zero_and_shows_nan(rule, "cpu")


@pytest.mark.parametrize(("F", "d", "low"), [(1, 1, False), (5, 15, True), (5, 16, True), (5, 37, True)])
def test_update_from_dense_gradients(F, d, low):
    test_update.test_update_from_dense_gradients(None, F, d, low, test_update.LOG)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(33, 64, 16))
def test_dense_encode_matches_reference(native, N, F, d, dtype):
    arguments = test_dense.operands(N, d, F, dtype)
    test_dense.assert_matches_reference(*arguments, native.dense_encode(*arguments, BANDWIDTH))


def test_dense_encode_at_ties_and_of_bad_input():
    for dtype in DTYPES:
        test_dense.test_ties("cpu", dtype)
    test_dense.test_counts_over_several_programs("cpu", 70)
    test_dense.test_bad_input_stays_visible("cpu")
    test_dense.test_backward_of_nothing("cpu", 0, 3)
    test_dense.test_backward_of_nothing("cpu", 3, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("N", "F"), shape_cases(33, 64, empty=False))
def test_dense_backward_matches_reference(N, F, objective):
    operands = test_dense.backward_operands(N, F)
    test_dense.assert_backward_matches_reference(
        *operands, test_dense.OBJECTIVES["ste" if objective == "ste_to_z" else objective]
    )


def test_same_bits_with_any_number_of_threads():
    """A few steps of the sparse route, of many blocks, from one state."""
    sizes, loss = test_step.Sizes(70, 40, 500), test_step.LOSSES["l0"]
    found = []
    for count in (1, 2, 5):
        with threads(count):
            state = test_step.start("cpu", sizes=sizes)
            for x in test_step.data(3, sizes):
                sparse_step(state, x, loss, test_step.rule(), None)
            found.append(test_step.everything(state))
    for other in found[1:]:
        for name, value in found[0].items():
            assert_bitwise_equal(name, value, other[name])


def spoiled(index, value):
    """The arguments of each operator that takes indices, one of which is out of range."""
    inputs = batch(4, 6, 3)
    entries = Entries(*(t.clone() for t in inputs.entries))
    getattr(entries, index)[1] = value
    return inputs, entries


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        ("latents", 6, r"latents: expected indices in \[0, 6\), got 6 at 1"),
        ("offsets", -1, "offsets: expected ascending entries, got -1 after 0"),
    ],
)
def test_indices_of_the_entries_are_checked(native, index, value, message):
    inputs, entries = spoiled(index, value)
    with pytest.raises(IndexError, match=message):
        native.residual_pass(entries, inputs.x, inputs.W_dec, inputs.b_dec)


def test_indices_by_latent_are_checked(native):
    inputs, entries = spoiled("latents", 2**20)
    with pytest.raises(IndexError, match=r"latents: expected indices in \[0, 6\), got 1048576 at 1"):
        native.by_latent(entries, 6)
    inputs, entries = spoiled("tokens", 4)
    transposed, u = native.by_latent(entries, 6), normal(len(entries.z))
    with pytest.raises(IndexError, match=r"tokens: expected indices in \[0, 4\), got 4"):
        native.latent_pass(entries, u, transposed, inputs.threshold, inputs.s, Objective(BANDWIDTH))
    order = transposed.order.clone()
    order[0] = len(order)
    bad = ByLatent(order, transposed.offsets)
    with pytest.raises(IndexError, match=r"order: expected indices in \[0, \d+\), got \d+ at 0"):
        native.latent_pass(inputs.entries, u, bad, inputs.threshold, inputs.s, Objective(BANDWIDTH))
    too_many = ByLatent(transposed.order, transposed.offsets + torch.arange(7) * 1000)
    with pytest.raises(IndexError, match=r"offsets: expected at most \d+ entries, got \d+"):
        native.latent_pass(inputs.entries, u, too_many, inputs.threshold, inputs.s, Objective(BANDWIDTH))


def test_indices_of_the_update_are_checked(native):
    state, (transposed, sums) = test_update.random_state(5, 3), test_update.random_sums(4, 5)
    before = test_update.clone(state)
    sums.tokens[1] = 4
    rows = normal(4, 3), normal(4, 3, seed=1)
    with pytest.raises(IndexError, match=r"tokens: expected indices in \[0, 4\), got 4 at 1"):
        native.update_from_entries(state, transposed, sums, *rows, test_update.RULE, *test_update.scalars())
    with pytest.raises(IndexError, match=r"rows: expected indices in \[0, 4\), got 4 at 1"):
        native.weight_gradients(transposed, sums, *rows)
    for name, a, b in zip(state._fields, state, before, strict=True):
        assert_bitwise_equal(name, a, b) if a is not None else None


def test_shapes_and_types_are_checked(native):
    inputs = batch(4, 6, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \[4, 3\], got \[4, 2\]"):
        native.residual_pass(inputs.entries, inputs.x[:, :2], inputs.W_dec, inputs.b_dec)
    with pytest.raises(TypeError, match="W_dec: expected dtype Float or BFloat16, got Half"):
        native.residual_pass(inputs.entries, inputs.x, inputs.W_dec.half(), inputs.b_dec)
    short = inputs.entries._replace(offsets=inputs.entries.offsets[:4])
    with pytest.raises(ValueError, match="offsets: expected 5 entries, got 4"):
        native.residual_pass(short, inputs.x, inputs.W_dec, inputs.b_dec)
    x, W_enc, b_enc, threshold = test_entries.operands(2, 3, 4)
    with pytest.raises(ValueError, match="bandwidth: expected a number > 0, got 0"):
        native.encode_entries(x, W_enc, b_enc, threshold, 0.0, None)
    with pytest.raises(ValueError, match="capacity: expected 0 or more, got -1"):
        native.encode_entries(x, W_enc, b_enc, threshold, 0.5, -1)


def test_twins_do_not_depend_on_their_neighbours(native):
    inputs = batch(6, 12, 9)
    out = native.residual_pass(inputs.entries, inputs.x, inputs.W_dec, inputs.b_dec)
    assert_bitwise_equal("twins", out.residual[2], out.residual[3])
    assert_bitwise_equal("no entry", out.residual[1], inputs.b_dec - inputs.x[1])
    entries = from_pre_activations(normal(2, 5).abs() + 1, torch.full((5,), 0.5))
    test_residual.check(entries, normal(2, 7), normal(5, 7, seed=1), normal(7, seed=2))
