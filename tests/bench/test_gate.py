"""The gate of the benchmarks can fail, at every tensor it looks at; the inputs are what they say."""

import dataclasses
import itertools

import pytest
import torch

from bench.arithmetic import OPERAND_DTYPES
from bench.contenders import Contender
from bench.ours import Ours, WithheldError
from bench.peers.pytorch import Products
from bench.timing import gate, inputs, work
from bench.timing.inputs import construct
from gemmascope.kernels.dispatch import choose
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.state import TrainState
from gemmascope.training.step import sparse_step

CPU = torch.device("cpu")
D, F = 16, 96
IMPLS = ("reference", "pytorch")


@pytest.fixture
def narrow_gate(monkeypatch):
    """The gate compares the first and last 20 of the 96 latents."""
    monkeypatch.setattr(gate, "GATE_LATENTS", 20)
    monkeypatch.setattr(gate, "GATE_DENSITY", 0.1)


def check(route="sparse", dtype="fp32", impl="pytorch", beta1=0.0):
    base = JumpReLUSAE(D, F, impl=impl, threshold_init=0.1, generator=torch.Generator().manual_seed(0))
    return gate.step_gate(route, base, inputs.activations(80, D, CPU, seed=0), dtype, 64, beta1)


@pytest.mark.parametrize("beta1", [0.0, 0.7])
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_the_step_gate_is_green(route, dtype, beta1, narrow_gate):
    assert 0 < check(route, dtype, beta1=beta1) <= 1


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_the_step_gate_is_green_for_kernels_with_a_first_moment(route, impl, narrow_gate):
    try:
        choose(impl, CPU, torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    assert 0 < check(route, impl=impl, beta1=0.7) <= 1


def without_tensor(name):
    """A step after which one tensor is as before."""

    def broken(route, state, x, loss, rule, capacity):
        owner = state.sae if name == "b_dec" else state if name == "b_dec_m" else state.latents
        before = getattr(owner, name).detach().clone()
        figures = original(route, state, x, loss, rule, capacity)
        with torch.no_grad():
            getattr(owner, name).copy_(before)
        return figures

    return broken


def touching_all(route, state, x, loss, rule, capacity):
    figures = original(route, state, x, loss, rule, capacity)
    state.latents.last.fill_(1)
    return figures


original = gate.take


def with_nan(route, state, *rest):
    figures = original(route, state, *rest)
    state.latents.W_enc[3, 2] = torch.nan
    return figures


MISTAKES = {
    "NaN": (with_nan, "W_enc is inf"),
    "bandwidth": (lambda r, s, x, loss, *rest: original(r, s, x, Loss(0.02, 1.2e-2), *rest), "threshold"),
    "coefficient": (lambda r, s, x, loss, *rest: original(r, s, x, Loss(0.04, 1e-2), *rest), "threshold"),
    "one token less": (lambda r, s, x, *rest: original(r, s, x[1:], *rest), ""),
    "rounded activations": (lambda r, s, x, *rest: original(r, s, (8 * x).round() / 8, *rest), ""),
    "W_dec stays": (without_tensor("W_dec"), "W_dec"),
    "b_enc stays": (without_tensor("b_enc"), "b_enc"),
    "b_dec stays": (without_tensor("b_dec"), "b_dec"),
    "W_enc_v stays": (without_tensor("W_enc_v"), "W_enc_v"),
    "quiet latents move": (touching_all, "latents without an entry"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("mistake", "place"), MISTAKES.values(), ids=MISTAKES)
def test_the_step_gate_turns_red(mistake, place, dtype, narrow_gate, monkeypatch):
    monkeypatch.setattr(gate, "take", mistake)
    with pytest.raises(gate.RedGateError, match=rf"sparse step, {dtype}: error of {place}.* times its budget"):
        check(dtype=dtype)


def another_beta1(route, state, x, loss, rule, capacity):
    return original(route, state, x, loss, rule._replace(beta1=0.71), capacity)


def forgetting_decay(route, state, x, loss, rule, capacity):
    """As if every latent had been touched in the update before."""
    state.last.fill_(int(state.updates))
    return original(route, state, x, loss, rule, capacity)


def as_if_first(route, state, x, loss, rule, capacity):
    """The correction of the first update, and no decay."""
    state.last.zero_()
    state.updates.zero_()
    return original(route, state, x, loss, rule, capacity)


MISTAKES_OF_MOMENTS = {
    "W_enc_m stays": (without_tensor("W_enc_m"), "W_enc_m"),
    "threshold_m stays": (without_tensor("threshold_m"), "threshold_m"),
    "b_dec_m stays": (without_tensor("b_dec_m"), "b_dec_m"),
    "another β1": (another_beta1, ""),
    "no decay": (forgetting_decay, ""),
    "counted as the first": (as_if_first, "latents without an entry"),
    "W_dec stays": (without_tensor("W_dec"), "W_dec"),
    "quiet latents move": (
        lambda r, s, *rest: (original(r, s, *rest), s.last.fill_(int(s.updates))),
        "latents without an entry",
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("mistake", "place"), MISTAKES_OF_MOMENTS.values(), ids=MISTAKES_OF_MOMENTS)
def test_the_step_gate_turns_red_at_first_moments(mistake, place, dtype, narrow_gate, monkeypatch):
    monkeypatch.setattr(gate, "take", mistake)
    with pytest.raises(gate.RedGateError, match=rf"sparse step, {dtype}: error of {place}.* times its budget"):
        check(dtype=dtype, beta1=0.7)


def test_the_gate_of_first_moments_is_not_that_of_a_first_step(narrow_gate, monkeypatch):
    """It begins with moments of every kind, and with latents that were touched at different times."""
    seen = []

    def looked_at(route, state, *rest):
        seen.append(
            ({name: m.clone() for name, m in state.tensors().items() if name.endswith("_m")}, state.last.clone())
        )
        return original(route, state, *rest)

    monkeypatch.setattr(gate, "take", looked_at)
    check(beta1=0.7)
    [(moments, last)] = seen
    assert set(moments) == {"W_enc_m", "W_dec_m", "b_enc_m", "threshold_m", "b_dec_m"}
    assert all(m.any() for m in moments.values())
    assert set(last.tolist()) == set(range(gate.GATE_UPDATES + 1))
    check()
    assert seen[1][0] == {}
    assert not seen[1][1].any()


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def given(request):
    return construct(D, F, 32, 6, CPU, dtype=request.param)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_operator_gate_is_green(impl, given):
    assert 0 <= gate.operator_gate(impl, given) <= 1


SCALED = {
    "encode": lambda result: result._replace(values=result.values * 1.05),
    "infer": lambda result: result * 1.05,
    "module": lambda result: result * 1.05,
    "decode": lambda result: result + 0.1,
    "decode_backward": lambda result: (result[0], result[1] * 1.05),
    "jumprelu": lambda result: result._replace(l0=result.l0 + 1),
    "jumprelu_backward": lambda result: (*result[:2], torch.zeros_like(result[2])),
}


PLACES = {"encode": "(encode|infer)"}  # inference begins with it


@pytest.mark.parametrize("operator", SCALED)
def test_the_operator_gate_turns_red(operator, given, monkeypatch):
    right = getattr(Ours, operator)

    def wrong(self):
        result = right(self)
        return SCALED[operator](result) if self.impl == "pytorch" else result

    monkeypatch.setattr(Ours, operator, wrong)
    with pytest.raises(
        gate.RedGateError, match=rf"pytorch, {given.dtype}: error of {PLACES.get(operator, operator)}(\[\d\])? is"
    ):
        gate.operator_gate("pytorch", given)


@pytest.mark.parametrize("operator", ["infer", "decode"])
def test_the_operator_gate_sees_nan_that_finite_results_follow(operator, given, monkeypatch):
    right = getattr(Ours, operator)
    monkeypatch.setattr(Ours, operator, lambda self: right(self) * (torch.nan if self.impl == "pytorch" else 1))
    with pytest.raises(gate.RedGateError, match=rf"error of {operator} is inf times"):
        gate.operator_gate("pytorch", given)


def test_a_share_of_a_budget():
    assert gate.share_of(0.0, 0.0) == gate.share_of(0.0, 1.0) == 0
    assert gate.share_of(1.0, 2.0) == 0.5
    assert gate.share_of(1.0, 0.0) == gate.share_of(torch.nan, 2.0) == gate.share_of(1.0, torch.nan) == torch.inf


class Peer(Contender):
    """The reference by another name, off by a factor in one output."""

    parts = ("infer",)

    def __init__(self, wrong=None):
        self.wrong = wrong

    def set_up(self, given):
        self.given = given

    def outputs(self):
        found = gate.exact_outputs(self.given)
        if self.wrong:
            found[self.wrong] = found[self.wrong] * 1.01
        return found


def test_agreement_names_what_differs(given):
    exact = gate.exact_outputs(given)
    assert set(gate.agreement(Peer(), given, exact)) == {
        "x_hat",
        "module",
        "loss",
        "W_enc",
        "b_enc",
        "W_dec",
        "b_dec",
        "threshold",
    }
    for name in exact:
        with pytest.raises(gate.RedGateError, match=rf"{name} differs by 0.01 of its norm; 0.0001 is allowed"):
            gate.agreement(Peer(name), given, exact)


def test_a_module_may_have_a_tolerance_of_its_own(given):
    exact, peer = gate.exact_outputs(given), Peer("module")
    peer.module_tolerance = 0.02
    assert gate.agreement(peer, given, exact)["module"] == pytest.approx(0.01)
    peer.wrong = "x_hat"
    with pytest.raises(gate.RedGateError, match="x_hat differs"):
        gate.agreement(peer, given, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_our_module_is_the_one_a_user_calls(impl, given):
    ours = Ours(impl)
    ours.set_up(given)
    ours.before("module")
    sae, dtype = ours.released, OPERAND_DTYPES[given.dtype]
    assert type(sae) is JumpReLUSAE
    assert (sae.impl, sae.W_dec.dtype, sae.W_enc.T.is_contiguous()) == (impl, dtype, True)
    x_hat = ours.module()
    assert not x_hat.requires_grad
    with torch.no_grad():
        assert torch.equal(x_hat, sae(given.x.to(dtype)))


def test_a_contender_may_bring_its_own_formula(given):
    peer = Peer("x_hat")
    peer.exact = lambda given: {name: 1.01 * value for name, value in gate.exact_outputs(given).items()}
    peer.outputs = lambda: {"x_hat": 1.01 * gate.exact_outputs(given)["x_hat"]}
    assert gate.agreement(peer, given, {})["x_hat"] < 1e-12


@pytest.mark.parametrize("value", [torch.ones(3), torch.full((2,), torch.nan)])
def test_other_shapes_and_nan_are_not_agreement(value, given):
    peer = Peer()
    peer.outputs = lambda: {"x_hat": value}
    with pytest.raises(gate.RedGateError, match="x_hat differs"):
        gate.agreement(peer, given, {"x_hat": torch.ones(2)})


def test_agreement_is_judged_on_decided_tokens(monkeypatch):
    monkeypatch.setattr(gate, "AGREEMENT_LATENTS", 40)
    monkeypatch.setattr(gate, "decided", lambda sae, x, bandwidth, tokens, dtype: x[torch.arange(len(x)) != 1][:tokens])
    small = gate.agreement_inputs(D, F, 100, CPU, "fp32", 0.7, 5)
    every = construct(D, 40, gate.drawn(5), 5, CPU)
    assert torch.equal(small.x, every.x[[0, 2, 3, 4, 5]])
    assert torch.equal(small.sae.threshold, every.sae.threshold)
    assert small.l0 == 5


@pytest.mark.parametrize(("dtype", "near"), [("fp32", 1e-7), ("bf16", 1.02e-6), ("tf32", 1.04e-6)])
def test_tokens_at_a_decision_are_undecided(dtype, near):
    given = construct(D, F, 32, 6, CPU)
    sae, half = given.sae.double(), given.loss.bandwidth / 2
    z = ((given.x.double() - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    for distance, clear in ((0, False), (half, False), (-half, False), (near, False), (1e-5, True)):
        sae.threshold.data = z.amax(0) + 1  # no other latent is near
        sae.threshold.data[7] = z[3, 7] + distance
        found = gate.decided(sae, given.x, given.loss.bandwidth, 31, dtype)
        assert (found[3] == given.x[3]).all() == clear
        if not clear:
            with pytest.raises(gate.RedGateError, match="of 32 tokens 31 are clear of every decision, 32 are needed"):
                gate.decided(sae, given.x, given.loss.bandwidth, 32, dtype)


def test_gates_launch_what_is_timed():
    """A launch of the encoder depends on the tokens: up to 16, up to 128, more."""
    encode_config = pytest.importorskip("gemmascope.kernels.gpu.encode_gemm").encode_config
    for tokens, dtype, tf32 in itertools.product(
        (1, 8, 16, 17, 64, 128, 129, 512, 4096), (torch.float32, torch.bfloat16), (False, True)
    ):
        gated, timed = (encode_config("sm_90", dtype, n, True, tf32) for n in (gate.gate_tokens(tokens), tokens))
        assert gated == timed


@pytest.mark.parametrize("beta1", [0.0, 0.7])
@pytest.mark.parametrize("impl", IMPLS)
def test_forward_and_backward_are_the_step(impl, beta1, given):
    """In halves the step leaves the same latents, and the gradient of b_dec that moves it."""
    given = dataclasses.replace(given, rule=given.rule._replace(beta1=beta1))
    whole, halves = Ours(impl), Ours(impl)
    for contender in (whole, halves):
        contender.set_up(given)
        contender.before("step")
        contender.state = TrainState.start(contender.state.sae, given.dtype, first_moments=beta1 > 0)
        with torch.no_grad():
            for name, value in contender.state.sae.named_parameters():
                value.copy_(getattr(given.sae, name))
        contender.inputs = dataclasses.replace(given, rule=given.rule._replace(learning_rate=1e-3))
    figures = whole.step()
    loss = halves.forward()
    halves.backward()
    assert torch.equal(loss, figures.loss)
    for found, expected in zip(halves.state.latents, whole.state.latents, strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)
    v = (1 - given.rule.beta2) * halves.db_dec.square()
    torch.testing.assert_close(v, whole.state.b_dec_v, rtol=1e-6, atol=0)


def test_withheld_updates_are_found(given):
    ours = Ours("pytorch")
    ours.set_up(given)
    ours.step()
    ours.check_made()
    sparse_step(ours.state, given.x * torch.nan, given.loss, given.rule, ours.capacity)
    with pytest.raises(WithheldError, match="updates were withheld"):
        ours.check_made()


def test_products_are_the_dense_mathematics(given):
    products = Products()
    products.set_up(given)
    sae = given.sae.fold()
    expected = gate.exact_outputs(given)["x_hat"]
    band = 1e-5 if given.dtype == "fp32" else 1e-2
    assert gate.relative_error(products.decode().float() + sae.b_dec, expected) < band


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_the_inputs_are_what_they_say(skew, dtype):
    given = construct(64, 2048, 512, 20, CPU, skew=skew, dtype=dtype)
    sae, x = given.sae, given.x
    active = (x - sae.b_dec) @ sae.W_enc + sae.b_enc > sae.threshold
    assert active.sum(1).double().mean() == pytest.approx(20, rel=0.01)
    assert x.square().sum(1).mean() == pytest.approx(1.0, rel=0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2048), rtol=0, atol=1e-2)
    share = active.double().mean(0)
    assert share.std() / share.mean() > (1 if skew else 0)  # unequal
    if dtype == "bf16":
        assert all(torch.equal(t, t.bfloat16().float()) for t in (x, sae.W_enc, sae.W_dec))
        assert not sae.b_dec.any()
    else:
        assert sae.b_dec.any()
    assert torch.equal(construct(64, 2048, 512, 20, CPU, skew=skew, dtype=dtype).x, x)


def test_latents_of_the_inputs_explain_them():
    """Unlike noise on random weights: the rows of W_dec that were put in are found again."""
    given = construct(512, 2048, 128, 16, CPU)
    x_hat = gate.exact_outputs(given)["x_hat"]
    noise = torch.randn(given.x.shape, generator=torch.Generator().manual_seed(1)) / 512**0.5
    of_noise = gate.exact_outputs(dataclasses.replace(given, x=noise))["x_hat"]
    assert gate.relative_error(x_hat, given.x) < 0.6 < gate.relative_error(of_noise, noise)


def test_size_counts_entries():
    given = construct(D, F, 32, 6, CPU)
    given = dataclasses.replace(given, loss=Loss(6e-4, 0.05))
    size = work.measure_size(given)
    z = (given.x - given.sae.b_dec) @ given.sae.W_enc + given.sae.b_enc
    active = z > given.sae.threshold
    entries = active | ((z - given.sae.threshold).abs() < 0.025)
    assert size == (32, D, F, active.sum(), entries.sum(), entries.any(0).sum(), 4, 1)
    assert work.measure_size(dataclasses.replace(given, rule=given.rule._replace(beta1=0.7))) == size._replace(
        moments=2
    )
    assert size.entries > size.active


def test_work_by_hand():
    size = work.Size(n=2, d=3, f=64, active=4, entries=6, touched=5, itemsize=2)
    assert work.operator_work("encode_entries", size) == (2 * 2 * 3 * 64, 2 * (6 + 192) + 32 + 120)
    assert work.operator_work("residual_pass", size) == (2 * 3 * 10, 2 * 3 * 8 + 24 + 72)
    assert work.operator_work("by_latent", size) == (0, 72 + 512)
    assert work.operator_work("latent_pass", size) == (120, 216 + 28 * 64)
    assert work.operator_work("encoder_times", size) == (2 * 192, 2 * 192 + 256)
    assert work.operator_work("update_from_entries", size) == (72 + 450, 72 + 72 + 36 * 15)
    assert work.operator_work("update_from_entries", size._replace(itemsize=4))[1] == 144 + 72 + 32 * 15
    assert work.operator_work("update_from_entries", size._replace(moments=2)) == (72 + 540, 72 + 72 + 52 * 15)
    assert work.part_work("forward", size) == (768 + 60, 396 + 152 + 144)
    assert work.part_work("step", size) == tuple(
        a + b for a, b in zip(work.part_work("forward", size), work.part_work("backward", size), strict=True)
    )
    assert work.part_work("encode", size) == (768, 396 + 32)
    assert work.part_work("decode", size) == (24, 6 * 6 + 32)
    assert work.part_work("infer", size) == (768 + 24, 396 + 32 + 36 + 32)
    assert work.part_work("module", size) == work.part_work("infer", size)
    assert work.part_work("decode_backward", size) == (48, 6 * (8 + 64) + 48)
    assert work.part_work("jumprelu", size) == (256, 512)
    assert work.part_work("jumprelu_backward", size) == (1024, 768)
