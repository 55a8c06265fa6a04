"""What a step does around its operators, by Triton: against the same in plain PyTorch, in fp64 and fp32."""

import math

import pytest
import torch

from gemmascope.kernels.entries import COPIES, ROOM, Objective, Penalty, Rule
from gemmascope.kernels.implementations import operator
from gemmascope.kernels.reference import conclusion as reference
from tests.helpers import assert_bitwise_equal, assert_within_budget, errors, normal, shape_cases
from tests.kernels import sanitizer
from tests.kernels.entries import batch, double
from tests.kernels.test_update import random_state

pytest.importorskip("triton")
from gemmascope.kernels.gpu import centring, conclusion, finishing, tokens
from gemmascope.kernels.gpu.centring import centre
from gemmascope.kernels.gpu.conclusion import conclude
from gemmascope.kernels.gpu.finishing import finish
from gemmascope.kernels.gpu.tokens import token_pass

PENALTIES = {
    "l0": Penalty(0.3, "linear"),
    "quadratic": Penalty(0.3, "quadratic", 0.25, 4.0),
    "batch": Penalty(0.3, "quadratic", 0.25, 4.0, of_batch=True),
    "tanh": Penalty(0.3, "none", tanh_scale=4.0),
    "l1": Penalty(0.3, "none", tanh_scale=0.0),
    "frequency": Penalty(0.3, "linear", frequency_scale=0.1),
    "all": Penalty(0.3, "quadratic", 0.25, 4.0, frequency_scale=0.1, tanh_scale=4.0),
}
OBJECTIVE = Objective(0.5)
FIGURES = ("loss", "squared_error", "fvu", "median_fvu", "l0", "n_entries", "stalled", "made", "skipped")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(centring, "CONFIG", centring.CentreConfig(3, block_n=4, block_d=8, block_f=4, num_warps=1))
    monkeypatch.setattr(tokens, "CONFIG", tokens.TokenConfig(block_n=4, block_d=8, block_e=8, num_warps=1))
    monkeypatch.setattr(conclusion, "CONFIG", conclusion.ConcludeConfig(block_f=4, warps_f=1, block=8, num_warps=1))
    config = finishing.FinishConfig(block_f=4, block_d=8, block_n=2, lanes=4, num_warps=1)
    monkeypatch.setattr(finishing, "CONFIG", config)


def on(penalty, device):
    return penalty._replace(coefficient=torch.tensor(penalty.coefficient, dtype=torch.float64, device=device))


# ---- centre


def check_centre(N, d, dtype, bias, device):
    x, b_dec = normal(N, d, device=device) + 3, normal(d, seed=1, device=device) if bias else None
    actual, eager = centre(x, b_dec, None, dtype), reference.centre(x, b_dec, None, dtype)
    exact = reference.centre(x.double(), None if b_dec is None else b_dec.double(), None, torch.float64)
    assert_bitwise_equal("centred", actual.x, eager.x)
    assert_within_budget("sums", actual.column_sums.sum(0), exact.column_sums[0], eager.column_sums[0])
    norm = torch.linalg.vector_norm(actual.norms)
    exact = torch.linalg.vector_norm(eager.x.double()) if dtype == torch.bfloat16 else exact.norms[0]
    assert_within_budget("norm", norm, exact, eager.norms[0])


@pytest.mark.parametrize(("N", "d"), shape_cases(12, 8, empty=False))
@pytest.mark.parametrize("bias", [True, False])
def test_centre(small_tiles, N, d, bias, device):
    check_centre(N, d, torch.float32, bias, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centre_as_shipped(dtype, device):
    check_centre(300, 257, dtype, True, device)


def test_what_is_not_finite_stays(small_tiles, device):
    x = normal(5, 9, device=device)
    x[2, 3] = math.nan
    found = centre(x, None, None, torch.float32)
    assert found.column_sums.sum(0).isnan().nonzero().tolist() == [[3]]
    assert torch.linalg.vector_norm(found.norms).isnan()


@pytest.mark.parametrize("F", [1, 4, 5, 97])
@pytest.mark.parametrize(("N", "d"), [(1, 1), (9, 17)])
def test_thresholds_below_0_become_0(small_tiles, N, d, F, device):
    special = torch.tensor([-1e-38, -math.inf, math.inf, math.nan, 0.0], device=device)
    threshold = torch.cat([normal(F, device=device), special])[-F:].contiguous()
    expected, x = threshold.clone(), normal(N, d, device=device)
    reference.centre(x, None, expected, torch.float32)
    with sanitizer.sanitize(race=True):
        found = centre(x, None, threshold, torch.float32)
    assert_bitwise_equal("threshold", threshold, expected)
    for actual, alone in zip(found, centre(x, None, None, torch.float32), strict=True):
        assert_bitwise_equal("centred", actual, alone)


# ---- tokens


def check_tokens(N, F, d, penalty, device, dtype=torch.float32, capacity=None):
    given = batch(N, F, d, dtype, device, capacity)
    x, W_dec = given.x + 2, given.W_dec
    exact_centred = reference.centre(x.double(), None, None, torch.float64)
    centred = centre(x, None, None, torch.float32)
    out = operator("residual_pass", "reference")(given.entries, x, W_dec, given.b_dec)
    entries = given.entries._replace(z=given.entries.z.nan_to_num())  # what plain PyTorch reads beyond the last
    actual = token_pass(given.entries, x, centred, out, on(penalty, device))
    eager = reference.token_pass(entries, x, reference.centre(x, None, None, torch.float32), out, penalty)
    exact = reference.token_pass(double(entries), x.double(), exact_centred, double(out), penalty)
    for name in ("s", "spread", "shares"):
        assert_within_budget(name, *(getattr(each, name) for each in (actual, exact, eager)))
    for name, total in (
        ("f_norms", torch.linalg.vector_norm),
        ("tanh_sums", torch.sum),
        ("residual_sums", lambda t: t.sum(0)),
    ):
        if getattr(eager, name) is None:
            assert getattr(actual, name) is None
        else:
            assert_within_budget(name, *(total(getattr(each, name)) for each in (actual, exact, eager)))
    if penalty.of_l0 == "linear":
        assert_bitwise_equal("s", actual.s, eager.s)
    return actual


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(("N", "d"), [(1, 1), (5, 7), (13, 17), (8, 16)])
def test_tokens(small_tiles, N, d, penalty, device):
    check_tokens(N, 11, d, penalty, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_as_shipped(dtype, device):
    check_tokens(35, 20, 130, PENALTIES["all"], device, dtype)


def test_entries_that_are_missing_are_not_read(small_tiles, device):
    check_tokens(9, 11, 5, PENALTIES["tanh"], device, capacity=12)


def test_a_residual_of_zero_is_no_share(small_tiles, device):
    """Also of a token that is alone, whose spread is 0."""
    given = batch(1, 5, 3, device=device)
    out = operator("residual_pass", "reference")(given.entries, given.x, given.W_dec, given.b_dec)
    out = out._replace(squared_error=torch.zeros_like(out.squared_error))
    found = token_pass(given.entries, given.x, centre(given.x, None, None, torch.float32), out, PENALTIES["l0"])
    assert (found.spread.item(), found.shares.item()) == (0, 0)


@pytest.mark.parametrize("a", [1e-30, 1e-3, 0.2499, 0.2501, 1.0, 30.0, -0.1, -2.0])
def test_tanh_has_no_cancellation(a, device):
    given = batch(1, 1, 1, device=device)
    entries = given.entries._replace(
        z=torch.tensor([a], device=device),
        latents=torch.tensor([1 << 30], dtype=torch.int32, device=device),
        tokens=torch.zeros(1, dtype=torch.int32, device=device),
        offsets=torch.tensor([0, 1], device=device),
    )
    out = operator("residual_pass", "reference")(entries, given.x, given.W_dec, given.b_dec)
    centred = centre(given.x, None, None, torch.float32)
    found = token_pass(entries, given.x, centred, out._replace(squared_error=out.l0 * 0), PENALTIES["tanh"])
    exact = math.tanh(4.0 * torch.tensor(a).double().item())
    assert found.tanh_sums is not None
    assert abs(found.tanh_sums.item() - exact) <= 2e-7 * abs(exact)


# ---- conclude


class Given:
    """What a step of N tokens concludes from; one copy in two places where there are copies."""

    def __init__(self, device, N=13, F=11, d=5, penalty=PENALTIES["l0"], low=False):
        self.penalty, self.objective = penalty, OBJECTIVE._replace(ste_to_z=penalty.of_l0 == "quadratic")
        rows = normal(N, d, device=device) + 1
        given = batch(N, F, d, device=device)
        self.latents = random_state(F, d, low, device)
        self.out = operator("residual_pass", "reference")(given.entries, rows, given.W_dec, given.b_dec)
        self.centred = reference.centre(rows, None, None, torch.float32)
        entries = given.entries._replace(z=given.entries.z.nan_to_num())
        self.tokens = reference.token_pass(entries, rows, self.centred, self.out, penalty)
        self.lists = operator("by_latent", "reference")(given.entries, F)
        self.count = torch.arange(F, dtype=torch.int32, device=device) % 4
        self.n_entries, self.capacity = given.entries.offsets[-1], len(given.entries.z)
        self.column = 1 if low else None
        self.stalled, self.skipped, self.updates = (torch.tensor(n, device=device) for n in (0, 3, 41))

    def by(self, run, cast=lambda value: value, **changes):
        """The conclusion and what became of the counters, by ``run`` on the arguments as ``cast`` makes them."""
        given = {**vars(self), **changes}
        stalled, skipped = given["stalled"].clone(), given["skipped"].clone()
        lists = given["lists"]
        found = run(
            cast(given["latents"]), cast(given["out"].squared_error), cast(given["out"].l0), cast(given["tokens"]),
            cast(given["centred"].norms), lists, given["count"], given["n_entries"], given["capacity"],
            given["penalty"], given["objective"], given["column"], stalled, skipped, given["updates"],
        )  # fmt: skip
        return found, int(stalled), int(skipped)

    def agree(self, **changes):
        """The figures, checked: by the kernels as good as in plain fp32, decisions the same."""
        device = self.stalled.device
        on_device = {"penalty": on(changes.get("penalty", self.penalty), device)}
        actual, *counters = self.by(conclude, **changes | on_device)
        eager, *expected = self.by(reference.conclude, **changes)
        exact, *_ = self.by(reference.conclude, double, **changes)
        assert counters == expected
        assert (actual.ok, actual.number) == (eager.ok, eager.number)
        assert (actual.ok.dtype, actual.number.dtype) == (torch.int32, torch.int64)
        for i, name in enumerate(FIGURES):
            figures = (each.figures[i] for each in (actual, exact, eager))
            assert_within_budget(name, *(figure.float() for figure in figures))
        return dict(zip(FIGURES, actual.figures.tolist(), strict=True))


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(("N", "F"), [(1, 1), (2, 3), (7, 8), (8, 9), (25, 33)])
def test_figures(small_tiles, N, F, penalty, device):
    figures = Given(device, N, F, penalty=penalty).agree()
    assert (figures["made"], figures["stalled"], figures["skipped"]) == (1, 0, 3)


def test_figures_as_shipped(device):
    Given(device, 60, 40, penalty=PENALTIES["all"], low=True).agree(column=None)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17])
def test_the_median_is_that_of_torch(small_tiles, n, device):
    given = Given(device, n)
    for seed in range(3):
        shares = normal(n, seed=seed, device=device).abs().mul(10.0 ** (seed - 1))
        shares[: n // 3] = 0.5
        for special in (None, math.inf, math.nan):
            if special is not None:
                shares[n // 2] = special
            figure = given.by(conclude, tokens=given.tokens._replace(shares=shares))[0].figures[3]
            assert_bitwise_equal("median", figure, shares.median().double())


def test_what_is_not_finite_is_skipped_and_counted(small_tiles, device):
    given = Given(device)
    for value in (math.nan, math.inf, 3e38):
        error = given.out.squared_error.clone()
        error[2:5] = value
        found, stalled, skipped = given.by(conclude, out=given.out._replace(squared_error=error))
        assert (found.ok, stalled, skipped) == (0, 0, 4)
        assert not found.figures[0].isfinite()


@pytest.mark.parametrize("what", ["x", "f", "theta", "nan theta", "s", "error"])
def test_what_an_update_could_not_bear_is_skipped(small_tiles, what, device):
    """Each part of the bound by itself, with a loss that is finite."""
    given, huge = Given(device), 1e30
    changes = {
        "x": {"centred": given.centred._replace(norms=given.centred.norms * huge)},
        "f": {"tokens": given.tokens._replace(f_norms=given.tokens.f_norms * huge)},
        "s": {"tokens": given.tokens._replace(s=given.tokens.s - huge)},
        "error": {"out": given.out._replace(squared_error=given.out.squared_error + huge)},
    }
    for name, value in (("theta", huge), ("nan theta", math.nan)):
        threshold = given.latents.threshold.clone()
        threshold[given.lists.offsets.diff().argmax()] = value
        changes[name] = {"latents": given.latents._replace(threshold=threshold)}
    figures = {}
    for run in (conclude, reference.conclude):
        found, stalled, skipped = given.by(run, **changes[what])
        assert (found.ok, stalled, skipped) == (0, 0, 4)
        assert found.figures[0].isfinite()
        figures[run] = found.figures
    assert given.by(conclude)[0].ok == 1


def test_a_threshold_that_was_not_touched_does_not_matter(small_tiles, device):
    given = Given(device)
    threshold, idle = given.latents.threshold.clone(), int(given.lists.offsets.diff().argmin())
    assert given.lists.offsets.diff()[idle] == 0
    threshold[idle] = 1e30
    assert given.by(conclude, latents=given.latents._replace(threshold=threshold))[0].ok == 1


def test_entries_without_room_stall(small_tiles, device):
    given = Given(device)
    found, *counters = given.by(conclude, capacity=int(given.n_entries) - 1)
    assert (found.ok, *counters) == (0, ROOM, 3)
    assert given.by(conclude, capacity=int(given.n_entries))[0].ok == 1
    for value in (math.nan, math.inf):
        error = torch.full_like(given.out.squared_error, value)
        found, *counters = given.by(conclude, capacity=0, out=given.out._replace(squared_error=error))
        assert (found.ok, *counters) == (0, 0, 4)  # room would not help


def test_what_stalls_is_kept_and_not_counted(small_tiles, device):
    given = Given(device)
    error = torch.full_like(given.out.squared_error, math.nan)
    for changes in ({}, {"out": given.out._replace(squared_error=error)}):
        found, *counters = given.by(conclude, stalled=torch.tensor(ROOM, device=device), **changes)
        assert (found.ok, *counters) == (0, ROOM, 3)


@pytest.mark.parametrize("weight", ["W_enc", "W_dec"])
@pytest.mark.parametrize("latent", [0, 10])
def test_a_copy_that_differs_stalls(small_tiles, weight, latent, device):
    given = Given(device, low=True)
    assert given.by(conclude)[1] == 0
    changed = getattr(given.latents, weight).clone()
    changed[latent, 1] += 1
    latents = given.latents._replace(**{weight: changed})
    for column, expected in ((1, COPIES), (2, 0), (None, 0)):
        place = None if column is None else torch.tensor(column, dtype=torch.float64, device=device)
        for run in (conclude, reference.conclude):
            assert given.by(run, latents=latents, column=place)[1] == expected


def test_touched_latents_in_place_of_lists(small_tiles, device):
    given = Given(device)
    flags = (given.lists.offsets.diff() > 0).to(torch.int32)
    threshold = given.latents.threshold.clone()
    threshold[flags == 0] = 1e30
    changes = {"lists": flags, "capacity": None, "latents": given.latents._replace(threshold=threshold)}
    given.agree(**changes)
    assert given.by(conclude, **changes)[0].ok == 1
    threshold[flags.argmax()] = 1e30
    assert given.by(conclude, **changes)[0].ok == 0


# ---- finish


@pytest.mark.parametrize("ok", [1, 0])
@pytest.mark.parametrize("encoder", [0, 1, 4, 11])
@pytest.mark.parametrize(("F", "d", "parts"), [(1, 1, 1), (3, 7, 2), (9, 17, 5), (8, 16, 4)])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_finish(small_tiles, F, d, parts, encoder, ok, beta1, device):
    def start():
        counters = torch.arange(F, device=device) * 100, torch.tensor(9, device=device)
        return normal(d, seed=1, device=device), normal(d, seed=2, device=device).abs(), *counters

    def first():
        return normal(d, seed=4, device=device) if beta1 else None

    rule = Rule(torch.tensor(1e-2, dtype=torch.float64, device=device), 0.99, 1e-2, False, beta1)
    of_encoder = normal(encoder, d, seed=3, device=device) if encoder else None
    given = normal(parts, d, device=device), of_encoder, torch.arange(F, dtype=torch.int32, device=device) % 3, 7
    rest = torch.tensor(ok, dtype=torch.int32, device=device), torch.tensor(10, device=device)
    actual, eager, exact = start(), start(), double(start())
    moments = first(), first(), double(first())
    finish(*actual, *given, rule, *rest, moments[0])
    reference.finish(*eager, *given, rule, *rest, moments[1])
    reference.finish(*exact, *double(given), rule, *rest, moments[2])
    for i, name in enumerate(("b_dec", "b_dec_v")):
        assert_within_budget(name, actual[i], exact[i], eager[i])
        assert torch.equal(actual[i], start()[i]) != bool(ok)
    if beta1:
        assert_within_budget("b_dec_m", moments[0], moments[2], moments[1])
        assert torch.equal(moments[0], first()) != bool(ok)
    for i, name in enumerate(("tokens_since_fired", "updates"), start=2):
        assert_bitwise_equal(name, actual[i], eager[i])
    assert int(actual[3]) == 9 + ok


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_the_bias_moves_by_plain_adam(small_tiles, beta1, device):
    """60 updates from nothing by torch.optim.Adam in fp64."""
    d, rule = 17, Rule(1e-2, 0.99, 1e-8, False, beta1)
    b_dec, v = normal(d, device=device), torch.zeros(d, device=device)
    m = torch.zeros(d, device=device) if beta1 else None
    expected = b_dec.double().requires_grad_()
    adam = torch.optim.Adam([expected], 1e-2, (beta1, 0.99), 1e-8)
    since, updates = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(0, device=device)
    ok, fired = torch.ones((), dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32, device=device)
    for i in range(60):
        sums = normal(3, d, seed=i + 1, device=device)
        finish(b_dec, v, since, updates, sums, None, fired, 7, rule, ok, updates + 1, m)
        expected.grad = sums.double().sum(0) * (2 / 7)
        adam.step()
    state, allowed = adam.state[expected], 2 * 60**0.5 * torch.finfo(torch.float32).eps
    for name, actual, exact in (("b_dec", b_dec, expected), ("v", v, state["exp_avg_sq"]), ("m", m, state["exp_avg"])):
        assert actual is None or errors(actual, exact)["norm"] <= allowed, name
    assert int(updates) == 60
