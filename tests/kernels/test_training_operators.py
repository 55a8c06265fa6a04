"""The operators of the training step on a CPU, plain PyTorch and native, by the checks of the Triton ones in fp64."""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.cpu import training as cpu_training
from gemmascope.kernels.eager import inference as eager
from gemmascope.kernels.eager import training as eager_training
from gemmascope.kernels.entries import Entries
from tests.helpers import LAYOUTS, assert_bitwise_equal, assert_within_budget, every_other, normal, shape_cases
from tests.kernels.entries import BANDWIDTH, batch, from_pre_activations
from tests.kernels.native import ISAS, needs_native

pytest.importorskip("triton")  # the modules of the checks need it
from tests.kernels import test_dense, test_entries, test_latents, test_residual, test_update
from tests.kernels.implementations import ask

DTYPES = (torch.float32, torch.bfloat16)
OBJECTIVES = test_latents.OBJECTIVES
BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture(
    params=[
        ("pytorch", "whole"),
        ("pytorch", "in pieces"),
        *(pytest.param(("cpu", isa), marks=needs_native) for isa in ISAS),
    ],
    ids=lambda way: "-".join(way),
    autouse=True,
)
def operators(request, monkeypatch):
    """The module of one implementation, whose operators the checks then call."""
    impl, way = request.param
    ask(impl, monkeypatch)
    if impl == "cpu":
        before = torch.ops.gemmascope_cpu.isa()
        torch.ops.gemmascope_cpu.use_isa(way)
        yield cpu_training
        torch.ops.gemmascope_cpu.use_isa(before)
        return
    if way == "in pieces":
        sizes = {"PRODUCT_TOKENS": 5, "Z_ELEMENTS": 24, "GATHER_ELEMENTS": 40, "CORE_ELEMENTS": 48}
        for name, size in sizes.items():
            for module in (eager, eager_training):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, size)
    yield eager_training


# ---- by entries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(16, 64, 16))
def test_entries_match_reference(operators, N, F, d, dtype):
    arguments = test_entries.operands(N, d, F, dtype)
    test_entries.assert_matches_reference(*arguments, operators.encode_entries(*arguments, BANDWIDTH, N * F))


@pytest.mark.parametrize("capacity", [0, 7, 100, 10_000, None])
def test_entries_with_ties_and_little_room(operators, capacity):
    arguments = test_entries.lattice_operands(20, 6, 130)
    entries = operators.encode_entries(*arguments, BANDWIDTH, capacity)
    room = int(entries.offsets[-1]) if capacity is None else capacity
    assert len(entries.z) == room
    test_entries.assert_equals_reference(arguments, room, entries)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_entries_of_any_strides(layout):
    test_entries.test_any_strides("cpu", layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_at_ties(dtype):
    test_entries.test_ties("cpu", dtype)


def test_entries_of_rows_and_latents_with_nothing_or_everything():
    test_entries.test_rows_with_nothing_and_with_everything("cpu")
    test_entries.test_dead_latents_and_no_entry_at_all("cpu")


def test_entries_of_bad_input(operators):
    test_entries.test_bad_input_stays_visible("cpu")
    inf, nan = torch.inf, torch.nan
    b_enc = torch.tensor([0.0, nan, inf, -inf, 2.0, -2.0, 0.0, 1.5, inf])
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, -inf, inf, 1.5, inf])
    arguments = torch.zeros(3, 4), torch.zeros(4, 9), b_enc, threshold, BANDWIDTH, None
    ours, expected = operators.encode_entries(*arguments), reference.encode_entries(*arguments)
    for name, a, b in zip(Entries._fields, ours, expected, strict=True):
        assert_bitwise_equal(name, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(5, 20, 33, empty=False))
def test_residual_matches_reference(N, F, d, dtype):
    test_residual.check(*batch(N, F, d, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [1, 2, 3], ids=["x", "W_dec", "b_dec"])
def test_residual_of_any_strides(which, layout):
    test_residual.test_any_strides(None, which, layout)


def test_residual_of_windows_empty_tokens_and_twins():
    test_residual.test_window_entries_have_u_but_no_part_in_the_reconstruction("cpu")
    test_residual.test_tokens_without_entries_and_twins("cpu")
    test_residual.test_wide_input_is_not_rounded_first("cpu")
    entries = from_pre_activations(normal(2, 5).abs() + 1, torch.full((5,), 0.5))
    test_residual.check(entries, normal(2, 7), normal(5, 7, seed=1), normal(7, seed=2))


@pytest.mark.parametrize(("N", "capacity"), [(0, 0), (0, 4), (3, 0)])
def test_residual_of_nothing(N, capacity):
    test_residual.test_nothing_to_sum(N, capacity, "cpu")


@pytest.mark.parametrize("missing", [1, 10, 1000])
def test_entries_beyond_the_capacity(operators, missing):
    test_residual.test_entries_beyond_the_capacity(missing, "cpu")
    cut = batch(7, 15, 9, capacity=max(0, batch(7, 15, 9).nnz - missing)).entries
    ours, expected = operators.by_latent(cut, 15), reference.by_latent(cut, 15)
    assert_bitwise_equal("order", ours.order, expected.order)
    assert_bitwise_equal("offsets", ours.offsets, expected.offsets)


def test_capacity_short_by_billions():
    test_residual.test_capacity_short_by_billions("cpu")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["z", "x", "W_dec", "b_dec"])
def test_residual_of_bad_input(where, bad):
    test_residual.test_bad_input_stays_visible(where, bad, torch.float32, "cpu")


@pytest.mark.parametrize(("N", "F"), [(1, 1), (6, 10), (33, 20), (0, 4)])
def test_transposed_entries_are_those_of_the_reference(operators, N, F):
    entries = batch(N, F, 3).entries
    ours, expected = operators.by_latent(entries, F), reference.by_latent(entries, F)
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


def test_latent_sums_of_nothing_of_a_slope_and_of_a_steep_penalty():
    test_latents.test_latents_without_entries("cpu")
    test_latents.test_nothing_at_all("cpu")
    test_latents.test_penalty_of_a_scalar_slope_expanded("cpu")
    test_latents.test_steep_tanh_penalty_has_no_cancellation(torch.device("cpu"))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["z", "u", "s"])
def test_latent_sums_of_bad_input(where, bad):
    test_latents.test_bad_input_stays_visible(where, bad, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, every_other])
def test_weight_gradients(layout, dtype):
    test_latents.test_weight_gradients(layout, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoder_times_reads_every_row_that_counts(operators, dtype):
    W_enc, db_enc = normal(700, 21, dtype=dtype), normal(700, seed=1)
    db_enc[::3] = 0
    exact = reference.encoder_times(W_enc.double(), db_enc.double())
    eager = reference.encoder_times(W_enc, db_enc)
    assert_within_budget("db_dec", operators.encoder_times(W_enc, db_enc), exact, eager)


# ---- the update


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
    test_update.test_threshold_never_falls_below_zero_and_shows_nan(rule, torch.device("cpu"))


@pytest.mark.parametrize("rule", [test_update.RULE, test_update.LOG], ids=["raw", "log"])
@pytest.mark.parametrize(("F", "d_in", "d", "low"), test_update.OF_GRADIENTS)
def test_update_from_dense_gradients(F, d_in, d, low, rule):
    test_update.test_update_from_dense_gradients(None, F, d_in, d, low, rule)


@pytest.mark.parametrize(("d_in", "d_out"), test_update.TWO_WIDTHS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_two_widths(d_in, d_out, beta1):
    test_update.test_two_widths(None, d_in, d_out, beta1)


def test_owed_decay():
    test_update.test_power_of_beta2_is_exact_after_many_updates("cpu")
    test_update.test_owed_decay_is_plain_dense_adam(None)


# ---- by whole matrices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(33, 64, 16))
def test_dense_encode_matches_reference(operators, N, F, d, dtype):
    arguments = test_dense.operands(N, d, F, dtype)
    test_dense.assert_matches_reference(*arguments, operators.dense_encode(*arguments, BANDWIDTH))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_dense_encode_of_any_strides(layout):
    test_dense.test_encode_of_any_strides("cpu", layout)


def test_dense_encode_at_ties_and_of_bad_input():
    for dtype in DTYPES:
        test_dense.test_ties("cpu", dtype)
    test_dense.test_counts_over_several_programs("cpu", 70)
    test_dense.test_bad_input_stays_visible("cpu")
    test_dense.test_backward_of_nothing("cpu", 0, 3)
    test_dense.test_backward_of_nothing("cpu", 3, 0)


@pytest.mark.parametrize("objective", test_dense.OBJECTIVES.values(), ids=test_dense.OBJECTIVES)
@pytest.mark.parametrize(("N", "F"), shape_cases(33, 64, empty=False))
def test_dense_backward_matches_reference(N, F, objective):
    test_dense.assert_backward_matches_reference(*test_dense.backward_operands(N, F), objective)


@pytest.mark.parametrize("objective", test_dense.OBJECTIVES.values(), ids=test_dense.OBJECTIVES)
def test_dense_backward_in_low_precision(objective):
    operands = test_dense.backward_operands(133, 40, torch.bfloat16)
    test_dense.assert_backward_matches_reference(*operands, objective)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dense_backward_of_bad_input(bad):
    test_dense.test_bad_gradients_stay_visible("cpu", bad)
    test_dense.test_f_is_read_for_the_tanh_penalty_only("cpu")
