"""`accelerate`: the SAEs of other packages compute the same as before, in the budget of their own fp32."""

import copy
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from gemmascope import accelerate
from gemmascope.saes import foreign
from tests.helpers import assert_bitwise_equal, assert_same_not_finite, assert_within_budget, normal
from tests.saes.parity import assert_same_function, counted, made
from tests.saes.standins import circuit_tracer, dictionary_learning, saelens, sparsify

D, F, OUT = 24, 160, 16

AUTOENCODERS = {
    "saelens standard": partial(saelens.StandardSAE, D, F),
    "saelens jumprelu": partial(saelens.JumpReLUSAE, D, F),
    "saelens jumprelu folded": partial(saelens.JumpReLUSAE, D, F, apply_b_dec_to_input=False),
    "saelens jumprelu normalised": partial(saelens.JumpReLUSAE, D, F, normalize=True, apply_b_dec_to_input=False),
    "saelens topk": partial(saelens.TopKSAE, D, F, k=5),
    "saelens topk rescaled": partial(saelens.TopKSAE, D, F, k=5, rescale=True),
    "saelens gated": partial(saelens.GatedSAE, D, F),
    "dictionary AutoEncoder": partial(dictionary_learning.AutoEncoder, D, F),
    "dictionary AutoEncoderNew": partial(dictionary_learning.AutoEncoderNew, D, F),
    "dictionary Gated": partial(dictionary_learning.GatedAutoEncoder, D, F),
    "dictionary JumpRelu": partial(dictionary_learning.JumpReluAutoEncoder, D, F),
    "dictionary JumpRelu centred": partial(dictionary_learning.JumpReluAutoEncoder, D, F, apply_b_dec_to_input=True),
    "dictionary TopK": partial(dictionary_learning.AutoEncoderTopK, D, F),
    "dictionary BatchTopK": partial(dictionary_learning.BatchTopKSAE, D, F),
    "circuit-tracer relu": partial(circuit_tracer.SingleLayerTranscoder, D, F, torch.relu),
    "circuit-tracer topk": lambda: circuit_tracer.SingleLayerTranscoder(D, F, circuit_tracer.SignedTopK(5)),
    "circuit-tracer jumprelu": lambda: circuit_tracer.SingleLayerTranscoder(
        D, F, circuit_tracer.JumpReLU(1.7 + 0.2 * torch.randn(F))
    ),
}
TRANSCODERS = {
    "relu": partial(saelens.Transcoder, D, F, OUT),
    "skip": partial(saelens.SkipTranscoder, D, F, OUT),
    "jumprelu": partial(saelens.JumpReLUTranscoder, D, F, OUT),
    "jumprelu skip": partial(saelens.JumpReLUSkipTranscoder, D, F, OUT),
}


@pytest.mark.parametrize("shape", [(0, D), (1, D), (33, D), (3, 5, D)], ids=str)
@pytest.mark.parametrize("make", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_same_function(make, shape):
    f, x_hat = assert_same_function(make, normal(*shape, seed=3))
    assert f.shape == (*shape[:-1], F)
    assert x_hat.shape == shape


@pytest.mark.parametrize("make", TRANSCODERS.values(), ids=TRANSCODERS)
def test_same_function_of_transcoders(make):
    f, x_hat = assert_same_function(make, normal(3, 11, D, seed=3))
    assert (f.shape, x_hat.shape) == ((3, 11, F), (3, 11, OUT))


@pytest.mark.parametrize("impl", ["reference", "pytorch"])
@pytest.mark.parametrize("name", ["saelens jumprelu", "saelens gated", "saelens topk"])
def test_by_other_implementations(name, impl):
    assert_same_function(AUTOENCODERS[name], normal(33, D, seed=4), impl=impl)


def test_attention_heads_are_joined_and_split():
    x = normal(2, 3, 4, D // 4, seed=5)
    _, x_hat = assert_same_function(partial(saelens.JumpReLUSAE, D, F, hook_z=D // 4), x)
    assert x_hat.shape == x.shape


def test_matryoshka_with_all_and_with_some_groups():
    def make(active: int):
        sae = dictionary_learning.MatryoshkaBatchTopKSAE(D, F, group_sizes=(40, 50, 70))
        sae.active_groups = active
        return sae

    for active, latents in ((3, F), (2, 90), (1, 40)):
        f, _ = assert_same_function(partial(make, active), normal(33, D, seed=6))
        assert f[:, :latents].any()
        assert not f[:, latents:].any()
    f, _ = assert_same_function(partial(make, 3), normal(3, 11, D, seed=6))
    assert f.shape == (3, 11, F)


@pytest.mark.parametrize("sparse", [True, False])
def test_products_where_many_latents_fire_and_entries_where_few_do(sparse):
    sae = accelerate(made(partial(saelens.JumpReLUSAE, D, F)))
    sae.threshold.data.fill_(2.0 if sparse else 0.0)
    with torch.no_grad(), counted() as calls:
        f = sae.encode(normal(33, D))
        assert (0 < f.count_nonzero() < 0.1 * f.numel()) == sparse
        sae.decode(f)
        sae(normal(33, D))
    assert calls == {"encode": 2, "decode": 2 if sparse else 0, "preactivations": 0}


def test_a_call_and_its_halves_are_the_same_bits():
    for make in AUTOENCODERS.values():
        sae, x = accelerate(made(make)), normal(33, D)
        with torch.no_grad():
            assert_bitwise_equal(type(sae).__name__, sae.decode(sae.encode(x)), sae(x))


def test_thresholds_below_zero_let_nothing_negative_through():
    def make():
        sae = saelens.JumpReLUSAE(D, F)
        sae.threshold.data.fill_(-0.5)
        return sae

    f, _ = assert_same_function(make, normal(33, D))
    assert (f >= 0).all()


def test_a_gate_without_magnitude_is_no_nan():
    def make():
        sae = saelens.GatedSAE(D, F)
        sae.r_mag.data.fill_(-95.0)  # e^95 is infinite in fp32
        sae.b_mag.data[::2] = 0.0
        return sae

    f, _ = assert_same_function(make, normal(33, D))
    assert f.isfinite().all()
    assert f.any()


def test_circuit_tracer_keeps_what_is_negative():
    def make(activation):
        return circuit_tracer.SingleLayerTranscoder(D, F, copy.deepcopy(activation))

    for activation in (
        circuit_tracer.JumpReLU(torch.full((F,), -0.5)),
        circuit_tracer.SignedTopK(F - 3),
        circuit_tracer.JumpReLU(torch.tensor(-0.5)),
    ):
        f, _ = assert_same_function(partial(make, activation), normal(33, D))
        assert (f < 0).any()


@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_in_entries(skip):
    def make():
        return circuit_tracer.SingleLayerTranscoder(D, F, circuit_tracer.JumpReLU(1.7 + 0.2 * torch.randn(F)), skip)

    theirs, ours, x = made(make), accelerate(made(make)), normal(9, D, seed=7)
    exact = made(make).double()
    with torch.no_grad():
        assert_within_budget("forward", ours(x), exact(x.double()), theirs(x))
        for zeroed in ({}, {"zero_positions": slice(2, 5)}, {"zero_positions": slice(0, 0)}):
            sparse, rows = ours.encode_sparse(x, **zeroed)
            expected, expected_rows = theirs.encode_sparse(x, **zeroed)
            assert sparse.is_coalesced()
            assert sparse.shape == expected.shape
            assert torch.equal(sparse.indices(), expected.indices())
            assert_bitwise_equal("rows", rows, expected_rows)
            goal = exact.encode_sparse(x.double(), **zeroed)[0].values()
            assert_within_budget("values", sparse.values(), goal, expected.values())
        assert_bitwise_equal("pre", ours.encode(x, apply_activation_function=False), theirs.encode(x, False))
        with pytest.raises(TypeError, match="zero_position"):
            ours.encode_sparse(x, zero_position=slice(1))
        for given, options in (((), {"inputs": x}), ((x, x), {})):
            with pytest.raises(TypeError, match=r"unexpected keyword argument 'inputs'|too many positional"):
                ours.decode(ours.encode(x), *given, **options)


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify(activation, transcode, monkeypatch):
    module = ModuleType("sparsify.sparse_coder")
    module.EncoderOutput = sparsify.EncoderOutput
    monkeypatch.setitem(sys.modules, "sparsify.sparse_coder", module)
    make = partial(sparsify.SparseCoder, D, F, activation=activation, transcode=transcode)
    theirs, exact, ours, x = made(make), made(make).double(), accelerate(made(make)), normal(33, D, seed=8)
    with torch.no_grad(), counted() as calls:
        found, plain, goal = ours(x), theirs(x), exact(x.double())
        code, same, best = ours.encode(x), theirs.encode(x), exact.encode(x.double())
    assert calls == {"encode": 0, "decode": 1, "preactivations": 2}
    assert type(found) is sparsify.ForwardOutput
    assert type(code) is sparsify.EncoderOutput
    for name in ("sae_out", "fvu"):
        assert_within_budget(name, getattr(found, name), getattr(goal, name), getattr(plain, name))
    assert_within_budget("pre_acts", code.pre_acts, best.pre_acts, same.pre_acts)
    assert torch.equal(code.top_indices.sort(1).values, same.top_indices.sort(1).values)
    assert code.top_indices.dtype == torch.int64
    assert_within_budget("top_acts", *(each.top_acts.sort(1).values for each in (code, best, same)))
    for wrong in (-1, F, 2**32 + 1):
        with torch.no_grad(), pytest.raises(ValueError, match="indices"):
            ours.decode(code.top_acts, torch.full_like(code.top_indices, wrong))


def test_bf16_is_closer_to_the_exact_function_than_its_own_arithmetic():
    make, x = partial(saelens.JumpReLUSAE, D, F), normal(33, D, seed=9).bfloat16()
    theirs, ours = made(make).bfloat16(), accelerate(made(make).bfloat16())
    exact = made(make).bfloat16().double()
    with torch.no_grad():
        found, plain, goal = ours(x), theirs(x), exact(x.double())
        assert ours.encode(x).dtype == found.dtype == torch.bfloat16
    assert (found.double() - goal).norm() <= (plain.double() - goal).norm()


def test_inside_autocast_the_same_bits():
    for name in ("saelens jumprelu", "saelens standard", "dictionary AutoEncoder", "saelens topk"):
        sae, x = accelerate(made(AUTOENCODERS[name])), normal(33, D)
        with torch.no_grad():
            plain = sae(x), sae.encode(x)
            with torch.autocast("cpu", torch.bfloat16):
                inside = sae(x), sae.encode(x)
        for one, other in zip(inside, plain, strict=True):
            assert_bitwise_equal(name, one, other)


def test_what_is_not_a_number_stays_visible():
    for make in AUTOENCODERS.values():
        theirs, ours, x = made(make), accelerate(made(make)), normal(5, D)
        x[2, 3] = torch.nan
        with torch.no_grad():
            assert_same_not_finite(type(theirs).__name__, ours(x), theirs(x))
            assert ours(x)[2].isnan().all()


def test_infinite_inputs():
    theirs, ours, x = (
        made(partial(saelens.JumpReLUSAE, D, F)),
        accelerate(made(partial(saelens.JumpReLUSAE, D, F))),
        normal(3, D),
    )
    x[1, 2] = torch.inf
    with torch.no_grad():
        f, z = ours.encode(x), theirs.pre(x)
        assert torch.equal(f.isnan(), z == -torch.inf)
        assert torch.equal(f == torch.inf, z == torch.inf)
        assert f[1].isnan().any()
        assert_bitwise_equal("others", f[0] != 0, theirs.encode(x)[0] != 0)


def test_inference_mode():
    sae, x = accelerate(made(partial(saelens.JumpReLUSAE, D, F))), normal(5, D)
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().clone().contiguous())
    with torch.inference_mode():
        inside = sae(x)
    sae(x).sum().backward()  # the weights that were laid out in there are no tensors of inference
    with torch.no_grad():
        assert_bitwise_equal("x_hat", inside.clone(), sae(x))


def test_pieces_of_z_do_not_show(monkeypatch):
    make, x = AUTOENCODERS["saelens topk"], normal(33, D)
    with torch.no_grad():
        whole = accelerate(made(make)).encode(x)
        monkeypatch.setattr(foreign, "Z_ELEMENTS", 4 * F)
        assert_bitwise_equal("code", accelerate(made(make)).encode(x) != 0, whole != 0)
