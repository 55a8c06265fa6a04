"""What the native CPU backend of the training step has of its own; `test_training_operators.py` has the rest."""

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.cpu import training as cpu_training
from gemmascope.kernels.entries import ACTIVE, ByLatent, Entries, Objective
from gemmascope.training.step import sparse_step
from tests.helpers import LAYOUTS, assert_bitwise_equal, normal, shape_cases
from tests.kernels.entries import BANDWIDTH, batch, from_pre_activations
from tests.kernels.native import ISAS, needs_native, operands_with_ties, screening, threads  # noqa: F401 (a fixture)

pytest.importorskip("triton")  # the modules of the oracles need it
from tests.kernels import test_dense, test_entries, test_residual, test_update
from tests.kernels.implementations import ask
from tests.training import test_step

pytestmark = needs_native
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=ISAS, autouse=True)
def native(request, monkeypatch):
    """The operators by one instruction set, also under the names by which the other modules' checks call them."""
    ask("cpu", monkeypatch)
    before = torch.ops.gemmascope_cpu.isa()
    torch.ops.gemmascope_cpu.use_isa(request.param)
    yield cpu_training
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 5, 16, 33, 600])
@pytest.mark.parametrize(("d", "bias"), [(1, 1.0), (31, 1.0), (256, 1.0), (300, 1.0), (700, 1.0), (2048, 3e7)])
@pytest.mark.parametrize("bandwidth", [BANDWIDTH, 1e-6])
def test_both_routes_decide_by_the_preactivations(native, bandwidth, d, bias, N, dtype):
    x, W_enc, b_enc, threshold, z = operands_with_ties(N, d, dtype, bias)
    active, window = z > threshold, (z - threshold).abs() < bandwidth / 2
    entry = active | window
    for count in (1, 3):
        with threads(count):
            entries = native.encode_entries(x, W_enc, b_enc, threshold, bandwidth, None)
            code = native.dense_encode(x, W_enc, b_enc, threshold, bandwidth)
        tokens, latents = entry.int().nonzero().int().unbind(1)
        assert_bitwise_equal("z", entries.z, z[entry])
        assert_bitwise_equal("latents", entries.latents, latents + ACTIVE * active[entry].int())
        assert_bitwise_equal("tokens", entries.tokens, tokens)
        assert_bitwise_equal("active", test_dense.unpack(code.active, z.shape[1]), active)
        assert_bitwise_equal("window", test_dense.unpack(code.window, z.shape[1]), window)
        assert_bitwise_equal("f", code.f, torch.where(active, z, 0.0).to(dtype))


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
    with pytest.raises(ValueError, match=message):
        native.residual_pass(entries, inputs.x, inputs.W_dec, inputs.b_dec)


def test_indices_by_latent_are_checked(native):
    inputs, entries = spoiled("latents", 2**20)
    with pytest.raises(ValueError, match=r"latents: expected indices in \[0, 6\), got 1048576 at 1"):
        native.by_latent(entries, 6)
    inputs, entries = spoiled("tokens", 4)
    transposed, u = native.by_latent(entries, 6), normal(len(entries.z))
    with pytest.raises(ValueError, match=r"tokens: expected indices in \[0, 4\), got 4"):
        native.latent_pass(entries, u, transposed, inputs.threshold, inputs.s, Objective(BANDWIDTH))
    order = transposed.order.clone()
    order[0] = len(order)
    bad = ByLatent(order, transposed.offsets)
    with pytest.raises(ValueError, match=r"order: expected indices in \[0, \d+\), got \d+ at 0"):
        native.latent_pass(inputs.entries, u, bad, inputs.threshold, inputs.s, Objective(BANDWIDTH))
    too_many = ByLatent(transposed.order, transposed.offsets + torch.arange(7) * 1000)
    with pytest.raises(ValueError, match=r"offsets: expected at most \d+ entries, got \d+"):
        native.latent_pass(inputs.entries, u, too_many, inputs.threshold, inputs.s, Objective(BANDWIDTH))


def test_indices_of_the_update_are_checked(native):
    state, (transposed, sums) = test_update.random_state(5, 3), test_update.random_sums(4, 5)
    before = test_update.clone(state)
    sums.tokens[1] = 4
    rows = normal(4, 3), normal(4, 3, seed=1)
    with pytest.raises(ValueError, match=r"tokens: expected indices in \[0, 4\), got 4 at 1"):
        native.update_from_entries(state, transposed, sums, *rows, test_update.RULE, *test_update.scalars())
    with pytest.raises(ValueError, match=r"rows: expected indices in \[0, 4\), got 4 at 1"):
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
