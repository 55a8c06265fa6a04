"""What the native CPU backend of the training step has of its own; `test_training_operators.py` has the rest."""

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels import reference
from gemmascope.kernels.cpu import training as cpu_training
from gemmascope.kernels.entries import ACTIVE, ByLatent, Entries, LatentState, Objective, Rule
from gemmascope.training.step import sparse_step
from tests.helpers import LAYOUTS, assert_bitwise_equal, errors, normal, shape_cases
from tests.kernels.entries import BANDWIDTH, batch, double, from_pre_activations
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


# ---- the update with first moments

MOMENTUM = test_update.RULE._replace(beta1=0.9)
RULES = {
    "raw": MOMENTUM,
    "log": MOMENTUM._replace(log_threshold=True),
    "half": MOMENTUM._replace(beta1=0.5, log_threshold=True),
}
FIRST = ("W_enc_m", "W_dec_m", "b_enc_m", "threshold_m")


def with_first_moments(state: LatentState) -> LatentState:
    """Of the size that gradients have by their second moments."""
    weights = state.W_enc, state.W_dec, state.b_enc, state.threshold
    firsts = (0.05 * normal(*w.shape, seed=40 + i) for i, w in enumerate(weights))
    return state._replace(**dict(zip(FIRST, firsts, strict=True)))


class Update:
    """One update of a state, from entries of 9 tokens or from matrices: of the same latents whatever does it."""

    def __init__(self, source: str, F: int, d_in: int, dtype: torch.dtype = torch.float32, d_out: int | None = None):
        self.source, d_out = source, d_in if d_out is None else d_out
        if source == "entries":
            transposed, sums = test_update.random_sums(9, F)
            self.touched = transposed.offsets.diff() > 0
            rows = normal(9, d_out, dtype=dtype, seed=20), normal(9, d_in, dtype=dtype, seed=21)
            self.given = (transposed, sums, *rows)
        else:
            self.touched = torch.tensor([True, False, True, False, *[True] * F])[:F]
            biases = normal(F, seed=32), normal(F, seed=33)
            self.given = (normal(F, d_in, seed=30), normal(F, d_out, seed=31), *biases, self.touched.int())

    def __call__(self, module, state: LatentState, rule: Rule, ok: int = 1, step: int = 20) -> LatentState:
        """The state after it, by ``module``, in the precision of the state."""
        after = test_update.clone(state)
        given = double(self.given) if state.W_dec.dtype == torch.float64 else self.given
        scalars = test_update.scalars(ok, step)
        getattr(module, f"update_from_{self.source}")(after, *given, rule, *scalars)
        return after


SOURCES = pytest.mark.parametrize("source", ["entries", "dense"])


@SOURCES
@pytest.mark.parametrize("step", [0, 3, 20])
@pytest.mark.parametrize("low", [False, True], ids=["", "low"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("F", "d"), [(1, 1), (5, 3), (4, 16), (6, 37)])
def test_first_moments_match_reference(native, F, d, rule, low, step, source):
    """Latents last touched at any of the updates made; widths of no vector, whole ones, and whole ones and a rest."""
    state = with_first_moments(test_update.random_state(F, d, low, updates=step))
    update = Update(source, F, d, torch.bfloat16 if low else torch.float32)
    exact, eager = update(reference, double(state), rule, step=step), update(reference, state, rule, step=step)
    after = update(native, state, rule, step=step)
    test_update.check_state(after, exact, eager)
    for name, a, b in zip(state._fields, after, state, strict=True):
        if a is not None:
            assert_bitwise_equal(name, a[~update.touched], b[~update.touched])
    for name in FIRST:
        assert (getattr(after, name) != getattr(state, name))[update.touched].any(), name


@SOURCES
def test_first_moments_of_a_transcoder(native, source):
    """W_enc narrower than W_dec."""
    state = test_update.random_state(5, 37)
    state = with_first_moments(state._replace(W_enc=state.W_enc[:, :19].clone(), W_enc_v=state.W_enc_v[:, :19].clone()))
    update = Update(source, 5, 19, d_out=37)
    exact, eager = update(reference, double(state), MOMENTUM), update(reference, state, MOMENTUM)
    test_update.check_state(update(native, state, MOMENTUM), exact, eager)


def test_hand_computed_first_moments(native):
    """One latent, last touched by update 2, now by update 5: each β = 1/2 pays 1/8, and 1 − β⁵ = 31/32."""
    one = torch.ones(1, 1)
    state = LatentState(
        3 * one, one.clone(), torch.tensor([3.0]), torch.tensor([3.0]), one.clone(), one.clone(), *torch.ones(2, 1),
        torch.tensor([2]), None, None, 8 * one, 8 * one, torch.tensor([8.0]), torch.tensor([8.0]),
    )  # fmt: skip
    rule = Rule(learning_rate=31 / 32, beta2=0.5, eps=0.0, log_threshold=False, beta1=0.5)
    gradient = torch.tensor([2.0])
    touched = torch.ones(1, dtype=torch.int32)
    native.update_from_dense(
        state, gradient[None], gradient[None], gradient, gradient, touched, rule, *test_update.scalars(step=4)
    )
    m, v = 8 / 8 + 2 / 2, 1 / 8 + 4 / 2
    expected = 3 - m / (v / (31 / 32)) ** 0.5
    for name in ("W_enc", "b_enc", "threshold"):
        torch.testing.assert_close(getattr(state, name).item(), expected, rtol=1e-6, atol=0, msg=name)
        assert getattr(state, name + "_m").item() == m
        assert getattr(state, name + "_v").item() == v
    assert state.W_dec_m.item() == 1  # the gradient of a row of one element lies along it
    assert state.last.tolist() == [5]


@SOURCES
@pytest.mark.parametrize("rule", [test_update.RULE, test_update.LOG], ids=["raw", "log"])
def test_without_first_moments_the_bits_are_those_of_a_beta1_of_nothing(native, rule, source):
    """β1 = 1e-300 is 0 in every power; first moments are then the gradients."""
    state = test_update.random_state(6, 37, low=True)
    update = Update(source, 6, 37)
    without = update(native, state, rule)
    with_them = update(native, with_first_moments(state), rule._replace(beta1=1e-300))
    for name, a, b in zip(state._fields[:11], without, with_them, strict=False):
        assert_bitwise_equal(name, a, b)
    assert without[11:] == (None,) * 4


def test_first_moments_over_many_updates(native):
    """120 updates from nothing of a latent with entries in 3 of 40, one that has none, one that always has some."""
    N, F, d, rule = 3, 3, 19, Rule(1e-3, 0.999, 1e-8, True, beta1=0.9)
    actual = test_update.random_state(F, d)
    actual.last.zero_()
    for v in actual[4:8]:
        v.zero_()
    actual = actual._replace(**{name: torch.zeros_like(getattr(actual, name[:-2])) for name in FIRST})
    start, exact, ok = test_update.clone(actual), double(test_update.clone(actual)), torch.ones((), dtype=torch.int32)
    for i in range(120):
        idle = torch.tensor([i % 40 > 2, True, False])
        transposed, sums = test_update.without(idle, *test_update.random_sums(N, F, active=0.5, seed=100 * i))
        rows, step = (normal(N, d, seed=i), normal(N, d, seed=i + 1000)), torch.tensor(i)
        native.update_from_entries(actual, transposed, sums, *rows, rule, ok, step)
        reference.update_from_entries(exact, transposed, double(sums), *double(rows), rule, ok, step)
    assert actual.last[0] < 120 - 30
    assert actual.last.tolist()[1:] == [0, 120]
    for state in (actual, exact):
        native.settle(state, torch.tensor(120), rule.beta2, rule.beta1)
    allowed = 2 * 120**0.5 * torch.finfo(torch.float32).eps  # roundings add up like a random walk
    for name, a, b in zip(actual._fields, actual, exact, strict=True):
        if a is not None and a.dtype == torch.float32:
            assert errors(a, b)["norm"] <= allowed, name
            if not name.endswith(("_m", "_v")):
                assert_bitwise_equal(name, a[1], getattr(start, name)[1])


@SOURCES
def test_first_moments_stay_without_permission(native, source):
    state = with_first_moments(test_update.random_state(5, 19, low=True))
    for name, a, b in zip(state._fields, Update(source, 5, 19)(native, state, MOMENTUM, ok=0), state, strict=True):
        assert_bitwise_equal(name, a, b)


@SOURCES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 36])
def test_first_moments_that_are_not_finite_show(native, column, value, source):
    """In the moment and the weight, of that latent alone."""
    state = with_first_moments(test_update.random_state(6, 37, low=True))
    for name in FIRST[:2]:
        getattr(state, name)[2, column] = value
    state.b_enc_m[2] = state.threshold_m[2] = value
    update = Update(source, 6, 37)
    actual, eager = update(native, state, MOMENTUM), update(reference, state, MOMENTUM)
    for name, a, b in zip(state._fields, actual, eager, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
    for name in ("W_enc", "W_enc_m", "W_enc_low"):
        assert (~getattr(actual, name).isfinite()).nonzero().tolist() == [[2, column]]
    assert (~actual.W_dec.isfinite().all(1)).nonzero().tolist() == [[2]]


@SOURCES
def test_first_moments_leave_a_lazy_copy_alone(native, source):
    """Memory that is shared until someone writes."""
    state = with_first_moments(test_update.random_state(5, 19))
    before = test_update.clone(state)
    lazy = LatentState(*(t if t is None else torch._lazy_clone(t) for t in state))
    update, scalars = Update(source, 5, 19), test_update.scalars()
    getattr(native, f"update_from_{source}")(lazy, *update.given, MOMENTUM, *scalars)
    for name in FIRST:
        assert_bitwise_equal(name, getattr(state, name), getattr(before, name))
        assert not torch.equal(getattr(lazy, name), getattr(before, name))


@SOURCES
def test_first_moments_by_any_number_of_threads(native, source):
    state = with_first_moments(test_update.random_state(300, 19))
    update, found = Update(source, 300, 19), []
    for count in (1, 3):
        with threads(count):
            found.append(update(native, state, MOMENTUM))
    for name, a, b in zip(state._fields, *found, strict=True):
        if a is not None:
            assert_bitwise_equal(name, a, b)


@SOURCES
def test_the_public_operator_has_first_moments(native, source):
    state = with_first_moments(test_update.random_state(5, 19))
    update, mine = Update(source, 5, 19), test_update.clone(state)
    getattr(kernels, f"update_from_{source}")(mine, *update.given, MOMENTUM, *test_update.scalars(), impl="cpu")
    for name, a, b in zip(state._fields, mine, update(native, state, MOMENTUM), strict=True):
        if a is not None:
            assert_bitwise_equal(name, a, b)


def refusals() -> list:
    cases, state = [], test_update.random_state(5, 3)
    full = with_first_moments(state)
    for name in FIRST:
        tensor = getattr(full, name)
        wrong = {
            "too short": tensor[:4].clone(), "none": None, "fp64": tensor.double(), "strided": tensor.repeat(2, 1)[::2],
        }  # fmt: skip
        if tensor.ndim == 1:
            wrong["strided"] = tensor.repeat(2)[::2]
        messages = {
            "too short": rf"{name}: expected shape \[5.*\], got \[4",
            "none": rf"{name}: expected shape \[5.*\], got \[0\]",
            "fp64": rf"{name}: expected dtype Float, got Double",
            "strided": rf"{name}: expected a contiguous tensor",
        }
        for what, value in wrong.items():
            error = TypeError if what == "fp64" else ValueError
            bad = full._replace(**{name: value})
            cases.append(pytest.param(bad, MOMENTUM, error, messages[what], id=f"{name} {what}"))
        alone = state._replace(**{name: tensor})
        message = rf"{name}: expected none with beta1 = 0, got shape \[5"
        cases.append(pytest.param(alone, test_update.RULE, ValueError, message, id=f"{name} without beta1"))
    for beta1 in (1.0, -0.1, torch.nan, torch.inf):
        message = r"beta1: expected a number in \[0, 1\), got "
        cases.append(pytest.param(full, MOMENTUM._replace(beta1=beta1), ValueError, message, id=f"beta1 {beta1}"))
    return cases


@SOURCES
@pytest.mark.parametrize(("state", "rule", "error", "message"), refusals())
def test_wrong_first_moments_are_refused(native, state, rule, error, message, source):
    before, update = test_update.clone(state), getattr(native, f"update_from_{source}")
    with pytest.raises(error, match=message):
        update(state, *Update(source, 5, 3).given, rule, *test_update.scalars())
    for name, a, b in zip(state._fields, state, before, strict=True):
        assert a is b or torch.equal(a, b), name


def test_a_state_of_too_few_tensors_is_refused():
    gradients = normal(5, 3), normal(5, 3), normal(5), normal(5), torch.ones(5, dtype=torch.int32)
    tensors = [torch.empty(0) if t is None else t for t in test_update.random_state(5, 3)[:11]]
    with pytest.raises(ValueError, match="state: expected 15 tensors, got 11"):
        torch.ops.gemmascope_cpu.update_from_dense(tensors, *gradients, 1e-3, 0.999, 1e-8, False, 0.0, 1)
