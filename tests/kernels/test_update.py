"""The update by Triton against the fp64 reference and plain dense Adam: python -m pytest tests/test_update.py"""

from dataclasses import replace

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.dispatch import interpreting
from gemmascope.kernels.entries import ByLatent, LatentState, LatentSums, Rule
from tests.helpers import (
    assert_bitwise_equal,
    assert_same_not_finite,
    assert_within_budget,
    errors,
    exp_slack,
    normal,
    shape_cases,
)
from tests.kernels import sanitizer
from tests.kernels.entries import double

pytest.importorskip("triton")
from gemmascope.kernels.gpu import update as gpu_update
from gemmascope.kernels.gpu.update import UpdateConfig, settle, update_from_dense, update_from_entries

RULE = Rule(learning_rate=1e-2, beta2=0.999, eps=1e-8, log_threshold=False)
LOG = RULE._replace(log_threshold=True)
RULES = {"raw": RULE, "log": LOG, "raw .9": RULE._replace(beta1=0.9), "log .5": LOG._replace(beta1=0.5)}
EVERY_BETA1 = pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
SMALL = UpdateConfig(block_d=16, unroll=2, num_warps=1, long=4, lanes=2, long_warps=1, long_programs=3)
interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(gpu_update, "CONFIG", SMALL)


def uniform(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_state(F, d, low=False, device="cpu", updates=20, beta1=0.0, d_in=None) -> LatentState:
    """As after ``updates`` updates, latents last touched at different ones of them. d_in: of W_enc, if it is not d."""
    d_in = d_in or d
    shapes = ((F, d_in), (F, d), (F,), (F,))
    W_enc, W_dec = normal(F, d_in, seed=1), torch.nn.functional.normalize(normal(F, d, seed=2), dim=1)
    moments = (1e-2 * uniform(*shape, seed=3 + i) for i, shape in enumerate(shapes))
    last = torch.randint(0, updates + 1, (F,), generator=torch.Generator().manual_seed(7))
    copies = (W_enc.bfloat16(), W_dec.bfloat16()) if low else (None, None)
    first = (normal(*shape, seed=40 + i) for i, shape in enumerate(shapes)) if beta1 else ()
    state = (W_enc, W_dec, normal(F, seed=8), 0.1 + uniform(F, seed=9), *moments, last, *copies, *first)
    return LatentState(*(t if t is None else t.to(device) for t in state))


def tensors(state: LatentState, rows=slice(None)) -> dict:
    """What the state has, of these latents, by name."""
    return {name: t[rows] for name, t in state._asdict().items() if t is not None}


def assert_same_state(actual: LatentState, expected: LatentState, rows=slice(None)):
    """The same bits in these latents."""
    expected_tensors = tensors(expected, rows)
    for name, tensor in tensors(actual, rows).items():
        assert_bitwise_equal(name, tensor, expected_tensors.pop(name))
    assert not expected_tensors


def clone(state: LatentState) -> LatentState:
    return LatentState(*(t if t is None else t.clone() for t in state))


def random_sums(N, F, device="cpu", active=0.4, seed=10) -> tuple[ByLatent, LatentSums]:
    """Coefficients of the listed pairs, room for two more; of F > 2 latents the second has none, the third has all."""
    listed = uniform(F, N, seed=seed) < active
    if F > 2:
        listed[1], listed[2] = False, True
    latents, tokens = torch.nonzero(listed, as_tuple=True)
    offsets = torch.nn.functional.pad(listed.sum(1).cumsum(0), (1, 0))
    dec, dz = (normal(len(latents) + 2, seed=seed + i) for i in (1, 2))
    dec[-2:] = dz[-2:] = torch.nan
    tokens = torch.nn.functional.pad(tokens.int(), (0, 2), value=2**31 - 1)
    totals = (normal(F, seed=seed + i) for i in (3, 4, 5))
    sums = LatentSums(dec, dz, tokens, *totals, torch.zeros(F, dtype=torch.int32))
    order = torch.arange(len(dec))
    return ByLatent(order.to(device), offsets.to(device)), LatentSums(*(t.to(device) for t in sums))


def sums_of_lists(lengths, N, device="cpu", seed=10) -> tuple[ByLatent, LatentSums]:
    """Lists of these lengths, of random tokens, without room for more. What a latent has depends on its place alone."""
    F, parts = len(lengths), []
    for j, length in enumerate(lengths):
        tokens = torch.randperm(N, generator=torch.Generator().manual_seed(seed + j))[:length].sort().values.int()
        parts.append((*(normal(length, seed=seed + j + shift) for shift in (100, 200)), tokens))
    entries = (torch.cat(part) for part in zip(*parts, strict=True))
    totals = (torch.cat([normal(1, seed=seed + j + shift) for j in range(F)]) for shift in (300, 400, 500))
    sums = LatentSums(*entries, *totals, torch.zeros(F, dtype=torch.int32))
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    return ByLatent(torch.arange(len(sums.dec)).to(device), offsets.to(device)), LatentSums(
        *(t.to(device) for t in sums)
    )


def scalars(ok=1, step=20, device="cpu"):
    return torch.tensor(ok, dtype=torch.int32, device=device), torch.tensor(step, device=device)


def check_state(actual: LatentState, exact: LatentState, eager: LatentState):
    for name, a, b, c in zip(actual._fields, actual, exact, eager, strict=True):
        if a is None:
            continue
        if a.dtype == torch.int64:
            assert_bitwise_equal(name, a, c)
        else:
            assert_within_budget(name, a, b, c)


def run_entries(update, state, sums, rows, rule, ok, step):
    update(state, sums[0], sums[1], *rows, rule, ok, step)
    return state


def check_entries(N, F, d, rule, dtype=torch.float32, low=False, device="cpu", sums=None, d_in=None):
    """The state before and after one update from entries, which agrees with the reference, and the entries."""
    state, sums = random_state(F, d, low, device, beta1=rule.beta1, d_in=d_in), sums or random_sums(N, F, device)
    rows = tuple(normal(N, width, dtype=dtype, device=device, seed=seed) for width, seed in ((d, 20), (d_in or d, 21)))
    rest = (rule, *scalars(device=device))
    actual = run_entries(update_from_entries, clone(state), sums, rows, *rest)
    eager = run_entries(reference.update_from_entries, clone(state), sums, rows, *rest)
    exact = run_entries(reference.update_from_entries, double(clone(state)), double(sums), double(rows), *rest)
    check_state(actual, exact, eager)
    return state, actual, sums


@interpreted
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(4, 6, 16, empty=False))
def test_matches_reference(small_tiles, N, F, d, rule):
    check_entries(N, F, d, rule)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("d", [3, gpu_update.CONFIG.block_d + 1])
@EVERY_BETA1
def test_shipped_tiles_match_reference(d, dtype, low, beta1, device):
    check_entries(7, 4, d, LOG._replace(beta1=beta1), dtype, low, device)


def check_idle(rule, low, device):
    before, after, (transposed, _) = check_entries(5, 6, 9, rule, low=low, device=device)
    idle = transposed.offsets.diff() == 0
    assert idle.any()
    assert not idle.all()
    assert_same_state(after, before, idle)
    moved = tensors(after, ~idle)
    for name, tensor in tensors(before, ~idle).items():
        assert not torch.equal(tensor, moved[name]), name


@pytest.mark.parametrize("low", [False, True])
def test_latents_without_entries_stay_bit_for_bit(low, device):
    check_idle(RULE, low, device)


@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_latents_without_entries_wait_with_their_first_moments(beta1, device):
    check_idle(RULE._replace(beta1=beta1), True, device)


N_LONG = 9  # tokens; a list is long from SMALL.long = 4 entries, and 4 of a long one are fetched together
LISTS = {
    "one": [1],
    "one of every token": [N_LONG],
    "around the bound": [0, 1, 2, 3, 4, 5, 3, 4, 0],
    "around the gather": [7, 8, 9, 0, 3, 8],
    "long ones side by side": [4, 4, 4, 4, 4, 4, 4],
    "long ones of every token": [N_LONG] * 5,
    "long ones that start anywhere": [1, 4, 2, 4, 3, 7, 1, 1, 5, 1],
    "only short ones": [3, 3, 3, 3],
}


@interpreted
@pytest.mark.parametrize(("name", "d"), [("around the bound", 1), *((name, d) for name in LISTS for d in (16, 37))])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_lists_of_all_lengths(small_tiles, name, d, beta1):
    lengths, rule = LISTS[name], LOG._replace(beta1=beta1)
    sums = sums_of_lists(lengths, N_LONG)
    _, after, _ = check_entries(N_LONG, len(lengths), d, rule, torch.bfloat16, True, sums=sums)
    touched = torch.tensor(lengths) > 0
    norms = after.W_dec[touched].double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=3e-7, atol=0.0)
    assert_bitwise_equal("W_enc_low", after.W_enc_low[touched], after.W_enc[touched].bfloat16())
    assert_bitwise_equal("W_dec_low", after.W_dec_low[touched], after.W_dec[touched].bfloat16())


@pytest.mark.parametrize("d", [5, 2 * gpu_update.CONFIG.block_d])
@EVERY_BETA1
def test_shipped_tiles_with_long_lists(d, beta1, device):
    long = gpu_update.CONFIG.long
    lengths = [long - 1, long, 0, 3 * long, long + 1, 2 * long + 5]
    sums = sums_of_lists(lengths, 3 * long, device)
    check_entries(3 * long, len(lengths), d, LOG._replace(beta1=beta1), torch.bfloat16, True, device, sums)


OF_GRADIENTS = [
    (1, 1, 1, False),
    *((5, d, d, True) for d in (15, 16, 37)),
    *((5, d_in, d, low) for d_in, d, low in ((7, 37, True), (37, 7, False))),
]
# Both within a block, a block apart, the narrower one full or not.
TWO_WIDTHS = [(5, 37), (37, 5), (16, 48), (48, 16), (15, 16), (33, 17)]


@interpreted
@pytest.mark.parametrize(("d_in", "d_out"), TWO_WIDTHS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_two_widths(small_tiles, d_in, d_out, beta1):
    """Those of a transcoder, for short lists and long."""
    lengths, rule = LISTS["around the bound"], LOG._replace(beta1=beta1)
    sums = sums_of_lists(lengths, N_LONG)
    state, after, _ = check_entries(N_LONG, len(lengths), d_out, rule, torch.bfloat16, True, sums=sums, d_in=d_in)
    assert (after.W_enc.shape[1], after.W_dec.shape[1]) == (d_in, d_out)
    touched = torch.tensor(lengths) > 0
    assert_same_state(after, state, ~touched)
    assert_bitwise_equal("W_enc_low", after.W_enc_low[touched], after.W_enc[touched].bfloat16())
    assert_bitwise_equal("W_dec_low", after.W_dec_low[touched], after.W_dec[touched].bfloat16())


@pytest.mark.parametrize("wider", ["in", "out"])
def test_shipped_tiles_of_two_widths(wider, device):
    long, widths = gpu_update.CONFIG.long, (3, 2 * gpu_update.CONFIG.block_d + 1)
    lengths = [long - 1, long, 0, 3 * long]
    sums = sums_of_lists(lengths, 3 * long, device)
    d_in, d_out = widths if wider == "out" else reversed(widths)
    check_entries(3 * long, len(lengths), d_out, LOG, torch.bfloat16, True, device, sums, d_in)


def launches(monkeypatch) -> list[tuple[str, tuple]]:
    """Fills with the kernels and grids of the launches to come."""
    seen, launch = [], gpu_update.launch

    def noting(kernel, grid, *arguments, **named):
        seen.append((kernel.__name__, grid))
        launch(kernel, grid, *arguments, **named)

    monkeypatch.setattr(gpu_update, "launch", noting)
    return seen


@interpreted
def test_grids_do_not_look_at_the_lists(small_tiles, monkeypatch):
    """They are the same with one list of all entries, with one entry a latent and with none."""
    seen = launches(monkeypatch)
    d, rest = 37, (RULE, *scalars())
    rows = normal(8, d), normal(8, d, seed=1)
    for lengths in ([8, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [0, 4, 0, 4, 0, 0, 0, 0]):
        run_entries(update_from_entries, random_state(8, d), sums_of_lists(lengths, 8), rows, *rest)
    assert seen == 3 * [("_long_lists_kernel", (3, 3)), ("_update_kernel", (8,))]


@interpreted
def test_nothing_looks_for_long_lists_where_there_is_no_room_for_one(small_tiles, monkeypatch):
    seen = launches(monkeypatch)
    check_entries(3, 1, 5, RULE, sums=sums_of_lists([3], 3))
    assert seen == [("_update_kernel", (1,))]


@interpreted
@pytest.mark.parametrize("lengths", [[0, 1, 2, 3], [4, 5, 8, 9]], ids=["short", "long"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_latent_depends_on_its_entries_alone(small_tiles, lengths, beta1):
    """The same bits whatever its neighbours have and wherever its list begins."""
    d, before, k, rule = 19, 7, len(lengths), RULE._replace(beta1=beta1)
    rows = normal(N_LONG, d), normal(N_LONG, d, seed=1)
    mine = slice(before, before + k)
    alone = LatentState(**tensors(clone(random_state(before + k, d, True, beta1=beta1)), mine))
    transposed, sums = sums_of_lists(lengths, N_LONG)
    update_from_entries(alone, transposed, sums, *rows, rule, *scalars())
    for others in ([0] * before, [1, 5, 0, 9, 2, 4, 4], [9] * before):
        state, (_, theirs) = random_state(before + k, d, True, beta1=beta1), sums_of_lists(others, N_LONG, seed=50)
        together = LatentSums(*(torch.cat(parts) for parts in zip(theirs, sums, strict=True)))
        offsets = torch.nn.functional.pad(torch.tensor(others + lengths).cumsum(0), (1, 0))
        update_from_entries(state, ByLatent(None, offsets), together, *rows, rule, *scalars())
        assert_same_state(LatentState(**tensors(state, mine)), alone)


@interpreted
@pytest.mark.parametrize("lengths", [[2, 3], [5, 9]], ids=["short", "long"])
@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_columns_beyond_the_row_do_not_count(small_tiles, lengths, beta1):
    """Without eps they are 0/0."""
    rule = RULE._replace(eps=0.0, beta1=beta1)
    _, after, _ = check_entries(N_LONG, 2, 37, rule, sums=sums_of_lists(lengths, N_LONG))
    assert after.W_dec.isfinite().all()


@interpreted
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("table", [0, 1], ids=["residual", "x"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_what_is_not_finite_shows(small_tiles, table, value, beta1):
    """In the latents that have an entry of the token, in short lists and long ones, and in no other."""
    d, lengths = 37, [2, 5, 3, 9, 0, 4]
    state, (transposed, sums) = random_state(len(lengths), d, True, beta1=beta1), sums_of_lists(lengths, N_LONG)
    rows = [normal(N_LONG, d), normal(N_LONG, d, seed=1)]
    rows[table][4, 30] = value
    eager, rest = clone(state), (transposed, sums, *rows, RULE._replace(beta1=beta1), *scalars())
    update_from_entries(state, *rest)
    reference.update_from_entries(eager, *rest)
    lists = sums.tokens.split(lengths)
    hit = torch.tensor([4 in tokens.tolist() for tokens in lists])
    assert hit[torch.tensor(lengths) >= SMALL.long].any()
    assert hit[torch.tensor(lengths) < SMALL.long].any()
    assert not hit.all()
    found = tensors(state)
    for name, expected in tensors(eager).items():
        assert_same_not_finite(name, found[name], expected)
    for weight in ((state.W_dec, state.W_enc)[table], (state.W_dec_low, state.W_enc_low)[table]):
        assert torch.equal(~weight.isfinite().all(1), hit)


@interpreted
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("F", "d_in", "d", "low"), OF_GRADIENTS)
def test_update_from_dense_gradients(small_tiles, F, d_in, d, low, rule):
    state = random_state(F, d, low, beta1=rule.beta1, d_in=d_in)
    gradients = normal(F, d_in, seed=30), normal(F, d, seed=31), normal(F, seed=32), normal(F, seed=33)
    touched = torch.tensor([2, 0, 1, 0, 5][:F], dtype=torch.int32)
    actual, eager, exact = clone(state), clone(state), double(clone(state))
    rest = (touched, rule, *scalars())
    update_from_dense(actual, *gradients, *rest)
    reference.update_from_dense(eager, *gradients, *rest)
    reference.update_from_dense(exact, *double(gradients), *rest)
    check_state(actual, exact, eager)
    assert_same_state(actual, state, touched == 0)


def test_both_sources_agree(device):
    """With `along` taken of the very gradient, the entries and the matrices give the same numbers."""
    N, F, d = 6, 5, 9
    state, (transposed, sums) = random_state(F, d, device=device), random_sums(N, F, device)
    residual, x_centred = (normal(N, d, device=device, seed=seed) for seed in (20, 21))
    gradients = reference.weight_gradients(transposed, sums, residual, x_centred)
    sums = sums._replace(along=(gradients[1].double() * state.W_dec).sum(1).float())
    touched = transposed.offsets.diff().int()
    of_entries, of_dense = clone(state), clone(state)
    rest = (RULE, *scalars(device=device))
    update_from_entries(of_entries, transposed, sums, residual, x_centred, *rest)
    update_from_dense(of_dense, *gradients, sums.db_enc, sums.dthreshold, touched, *rest)
    found = tensors(of_dense)
    for name, tensor in tensors(of_entries).items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6, msg=name)


def check_permission(source, device, beta1):
    N, F, d = gpu_update.CONFIG.long if source == "long entries" else 4, 3, 5
    state, (transposed, sums) = random_state(F, d, True, device, beta1=beta1), random_sums(N, F, device)
    after, rest = clone(state), (RULE._replace(beta1=beta1), *scalars(ok=0, device=device))
    rows = [torch.full((N, d), torch.nan, device=device)] * 2
    if source != "dense":
        update_from_entries(after, transposed, sums, *rows, *rest)
    else:
        gradients = [torch.full((F, d), torch.nan, device=device)] * 2
        touched = torch.ones(F, dtype=torch.int32, device=device)
        update_from_dense(after, *gradients, sums.db_enc, sums.dthreshold, touched, *rest)
    assert_same_state(after, state)


@pytest.mark.parametrize("source", ["entries", "long entries", "dense"])
def test_nothing_changes_without_permission(source, device):
    check_permission(source, device, 0.0)


@pytest.mark.parametrize("source", ["entries", "long entries", "dense"])
def test_no_first_moment_changes_without_permission(source, device):
    check_permission(source, device, 0.9)


@pytest.mark.parametrize("rule", [RULE, LOG], ids=["raw", "log"])
def test_threshold_never_falls_below_zero_and_shows_nan(rule, device):
    state, (transposed, sums) = random_state(4, 3, device=device), random_sums(5, 4, device, active=1.0)
    state.threshold_v.zero_()
    sums.dthreshold.copy_(torch.tensor([1.0, 1.0, -1.0, torch.nan]))
    eager = clone(state)
    rows = normal(5, 3, device=device), normal(5, 3, device=device, seed=1)
    rest = (rule._replace(learning_rate=10.0), *scalars(device=device))
    update_from_entries(state, transposed, sums, *rows, *rest)
    reference.update_from_entries(eager, transposed, sums, *rows, *rest)
    assert_same_not_finite("threshold", state.threshold, eager.threshold)
    assert state.threshold[3].isnan()
    # exp(-45.6) of the logarithmic rule
    rtol = exp_slack(46) if device.type == "cuda" else 0.0
    torch.testing.assert_close(state.threshold[0], eager.threshold[0], rtol=rtol, atol=0.0)
    assert (state.threshold[0] == 0) == (rule is RULE)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_repeats_bit_for_bit(beta1, device):
    long, rule = gpu_update.CONFIG.long, RULE._replace(beta1=beta1)
    state = random_state(12, 19, True, device, beta1=beta1)
    sums = sums_of_lists([0, 1, 5, long] * 3, long, device)
    rows = normal(long, 19, device=device), normal(long, 19, device=device, seed=1)
    first = run_entries(update_from_entries, clone(state), sums, rows, rule, *scalars(device=device))
    for seed in (1, 2):
        with sanitizer.sanitize(race=True, seed=seed):
            again = run_entries(update_from_entries, clone(state), sums, rows, rule, *scalars(device=device))
        assert_same_state(again, first)


class DenseAdam:
    """torch.optim.Adam over dense fp64 parameters, log θ among them, that makes every update on every latent."""

    def __init__(self, state: LatentState, rule: Rule):
        weights = (state.W_enc, state.W_dec, state.b_enc, state.threshold.log())
        self.parameters = [weight.clone().requires_grad_() for weight in weights]
        self.optimiser = torch.optim.Adam(self.parameters, rule.learning_rate, (rule.beta1, rule.beta2), rule.eps)

    def step(self, *gradients):
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        with torch.no_grad():
            self.parameters[1] /= self.parameters[1].norm(dim=1, keepdim=True)

    def weights(self) -> list:
        *weights, t = (parameter.detach() for parameter in self.parameters)
        return [*weights, t.exp()]

    def state(self) -> dict:
        moments = [self.optimiser.state[parameter] for parameter in self.parameters]
        found = dict(zip(LatentState._fields, (*self.weights(), *(m["exp_avg_sq"] for m in moments)), strict=False))
        if self.optimiser.defaults["betas"][0] > 0:
            found |= zip(LatentState._fields[-4:], (m["exp_avg"] for m in moments), strict=True)
        return found


def without(idle, transposed, sums):
    """The entries without those of the idle latents, nothing beyond the last."""
    lengths = transposed.offsets.diff()
    keep = ~idle.repeat_interleave(lengths)
    sums = LatentSums(*(part[:-2][keep] for part in sums[:3]), *sums[3:])
    offsets = torch.nn.functional.pad((lengths * ~idle).cumsum(0), (1, 0))
    return ByLatent(torch.arange(len(sums.dec)), offsets), sums


def dense_gradients(transposed, sums, rows, W_dec, threshold):
    """dW_enc, dW_dec (projected), db_enc and dL/dlog θ in fp64 by matrix products; and the sums with their `along`."""
    lengths = transposed.offsets.diff()
    coefficients = torch.zeros(2, len(lengths), len(rows[0]), dtype=torch.float64)
    latents = torch.arange(len(lengths)).repeat_interleave(lengths)
    coefficients[:, latents, sums.tokens.long()] = torch.stack((sums.dz, sums.dec)).double()
    dW_enc, dW_dec = coefficients[0] @ rows[1].double(), coefficients[1] @ rows[0].double()
    sums = sums._replace(along=(dW_dec * W_dec).sum(1).float())
    touched = lengths > 0
    dW_dec -= sums.along.double()[:, None] * W_dec
    db_enc, dthreshold = (total.double() * touched for total in (sums.db_enc, sums.dthreshold))
    return (dW_enc, dW_dec, db_enc, threshold * dthreshold), sums


@interpreted
def test_owed_decay_is_plain_dense_adam(small_tiles):
    """200 updates of a latent with entries at 3 in 40 of them, one that never has any, and one that always does, but
    for 3,000 more updates without any entry in the middle. Then `settle`.
    """
    N, F, d, rule = 3, 3, 4, Rule(1e-3, 0.999, 1e-8, True)
    start = random_state(F, d)
    start.last.zero_()
    start.W_dec.sign_().mul_(0.5)  # exactly of unit norm, so that dense Adam leaves an idle latent as it is
    for v in start[4:8]:
        v.zero_()
    actual, eager, exact = clone(start), clone(start), double(clone(start))
    adam = DenseAdam(exact, rule)
    ok, updates = scalars(step=0)
    for i in range(200):
        idle = torch.tensor([i % 40 > 2, False, False])
        transposed, sums = without(idle, *random_sums(N, F, active=0.5, seed=100 * i))
        rows = normal(N, d, seed=i), normal(N, d, seed=i + 1000)
        _, W_dec, _, threshold = adam.weights()
        gradients, sums = dense_gradients(transposed, sums, rows, W_dec, threshold)
        adam.step(*gradients)
        with sanitizer.sanitize(race=False):
            update_from_entries(actual, transposed, sums, *rows, rule, ok, updates)
        reference.update_from_entries(eager, transposed, sums, *rows, rule, ok, updates)
        reference.update_from_entries(exact, transposed, double(sums), *double(rows), rule, ok, updates)
        updates += 1
        if i == 100:
            for _ in range(3000):
                adam.step(*(torch.zeros_like(gradient) for gradient in gradients))
            updates += 3000
    assert actual.last[0] < 3200 - 30
    assert actual.last.tolist()[1:] == [0, 3200]
    for state in (actual, eager, exact):
        settle(state, updates, rule.beta2)
        assert (state.last == updates).all()
    assert_is_adam(adam, actual, eager, exact, updates=200)


def assert_is_adam(adam, actual, eager, exact, updates: int):
    for name, expected in adam.state().items():
        torch.testing.assert_close(getattr(exact, name), expected, rtol=1e-10, atol=1e-14, msg=name)
        # Two roundings an update add up like a random walk; with three latents, eager PyTorch may just be lucky.
        allowed = 2 * updates**0.5 * torch.finfo(torch.float32).eps
        for state in (actual, eager):
            assert errors(getattr(state, name), expected)["norm"] <= allowed, name


@interpreted
@pytest.mark.parametrize("source", ["entries", "dense"])
@EVERY_BETA1
def test_every_latent_touched_every_time_is_plain_dense_adam(small_tiles, beta1, source):
    """30 updates from nothing, of short lists and long ones."""
    lengths, N, d, rule = [1, 3, 4, 7], 7, 5, Rule(1e-3, 0.999, 1e-8, True, beta1)
    start = random_state(len(lengths), d, beta1=beta1)
    for name, tensor in tensors(start).items():
        if name.endswith(("_m", "_v")) or name == "last":
            tensor.zero_()
    actual, eager, exact = clone(start), clone(start), double(clone(start))
    adam, touched = DenseAdam(exact, rule), torch.ones(len(lengths), dtype=torch.int32)
    ok, updates = scalars(step=0)
    for i in range(30):
        transposed, sums = sums_of_lists(lengths, N, seed=1000 * i)
        rows = normal(N, d, seed=i), normal(N, d, seed=i + 1000)
        _, W_dec, _, threshold = adam.weights()
        gradients, sums = dense_gradients(transposed, sums, rows, W_dec, threshold)
        adam.step(*gradients)
        with sanitizer.sanitize(race=False):
            if source == "entries":
                update_from_entries(actual, transposed, sums, *rows, rule, ok, updates)
            else:
                single = (gradient.float() for gradient in gradients[:3])
                update_from_dense(actual, *single, sums.dthreshold, touched, rule, ok, updates)
        reference.update_from_entries(eager, transposed, sums, *rows, rule, ok, updates)
        reference.update_from_entries(exact, transposed, double(sums), *double(rows), rule, ok, updates)
        updates += 1
    assert_is_adam(adam, actual, eager, exact, updates=30)


def test_power_of_beta2_is_exact_after_many_updates(device):
    """In fp32, β2 to the power of 20,000 would be off by 3e-4."""
    state, (transposed, sums) = random_state(3, 2, device=device), random_sums(2, 3, device, active=1.0)
    rest = (RULE, *scalars(step=20_000, device=device))
    state.last.copy_(torch.tensor([0, 0, 10]))
    nothing = sums._replace(db_enc=torch.zeros_like(sums.db_enc))
    before = state.b_enc_v.clone()
    rows = normal(2, 2, device=device), normal(2, 2, device=device, seed=1)
    update_from_entries(state, transposed, nothing, *rows, *rest)
    touched = transposed.offsets.diff() > 0
    exponent = 20_001 - torch.tensor([0.0, 0.0, 10.0], dtype=torch.float64, device=device)
    exact = (before.double() * torch.pow(torch.full_like(exponent, RULE.beta2), exponent))[touched]
    assert_within_budget("b_enc_v", state.b_enc_v[touched], exact, exact.float())


def far_state(F, d):
    state = LatentState(
        *(torch.empty(F, d) for _ in range(2)), *(torch.zeros(F) for _ in range(2)),
        *(torch.empty(F, d) for _ in range(2)), *(torch.zeros(F) for _ in range(2)),
        torch.zeros(F, dtype=torch.int64), *(torch.empty(F, d, dtype=torch.bfloat16) for _ in range(2)),
    )  # fmt: skip
    near = random_state(1, d, low=True)
    for name, far in tensors(state).items():
        far[-1:] = getattr(near, name)
    return state, near


@interpreted
@pytest.mark.parametrize("source", ["entries", "long entries", "dense"])
def test_offsets_beyond_32_bits(source, monkeypatch):
    """The last latent of weights of 2³¹ + 2¹⁵ elements, and entries, tokens and gradients as far out."""
    F, d = 2**16 + 1, 2**15
    long = 2 if source == "long entries" else 2**30
    monkeypatch.setattr(gpu_update, "CONFIG", replace(SMALL, block_d=d, long=long, long_programs=1))
    state, near = far_state(F, d)
    ok, step = scalars()
    data = normal(2, d, seed=1)
    far_rows, totals = torch.empty(2, F, d), normal(3, 1, seed=2)
    far_rows[:, -1] = data
    last_program = sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] - 1])
    far_totals = [torch.zeros(F).index_fill_(0, torch.tensor(F - 1), total.item()) for total in totals]
    if source == "dense":
        touched = torch.ones(F, dtype=torch.int32)
        with last_program:
            update_from_dense(state, *far_rows, *far_totals[:2], touched, RULE, ok, step)
        update_from_dense(near, *data[:, None], *totals[:2], touched[:1], RULE, ok, step)
    else:
        capacity = 2**31 + 2
        dec, dz = (torch.empty(capacity) for _ in range(2))
        tokens, count = torch.empty(capacity, dtype=torch.int32), torch.zeros(F, dtype=torch.int32)
        dec[-2:], dz[-2:], tokens[-2:] = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 3.0]), F - 1
        offsets = torch.zeros(F + 1, dtype=torch.int64)
        offsets[-2:] = torch.tensor([capacity - 2, capacity])
        far_sums = LatentSums(dec, dz, tokens, *far_totals, count)
        near_sums = LatentSums(dec[-2:], dz[-2:], torch.zeros(2, dtype=torch.int32), *totals, count[:1])
        with last_program:
            update_from_entries(state, ByLatent(None, offsets), far_sums, *far_rows, RULE, ok, step)
        update_from_entries(near, ByLatent(None, torch.tensor([0, 2])), near_sums, *data[:, None], RULE, ok, step)
    assert_same_state(LatentState(**tensors(state, slice(-1, None))), near)
