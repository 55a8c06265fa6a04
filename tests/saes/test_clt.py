"""`CrossLayerTranscoder`: its function, densely and by entries, and what it refuses."""

import math

import pytest
import torch

from gemmascope import CrossLayerTranscoder, Transcoder
from gemmascope.kernels import density
from gemmascope.saes.scaled_clt import ScaledCLT
from tests.helpers import assert_within_budget, lattice, normal

D_IN, D_SAE, D_OUT, N = (7, 5, 6), (20, 9, 14), (4, 6, 3), 30


def clt_tensors(skip=False, make=normal, d_in=D_IN, d_sae=D_SAE, d_out=D_OUT):
    layers, seed = [], 0
    for layer in range(len(d_in)):
        shapes = {
            "W_enc": (d_in[layer], d_sae[layer]),
            "b_enc": (d_sae[layer],),
            "threshold": (d_sae[layer],),
            "W_dec": (d_sae[layer], sum(d_out[layer:])),
            "b_dec": (d_out[layer],),
        }
        if skip:
            shapes["W_skip"] = (d_out[layer], d_in[layer])
        tensors = {}
        for key, shape in shapes.items():
            tensors[key] = make(*shape, seed=(seed := seed + 1))
        tensors["threshold"] = tensors["threshold"].abs()
        layers.append(tensors)
    return layers


def inputs(make=normal, d_in=D_IN, shape=(N,)):
    return [make(*shape, d, seed=100 + layer) for layer, d in enumerate(d_in)]


def by_formula(layers, xs, d_out=D_OUT):
    """f and ŷ of each layer: ŷ_l' = Σ_{l ≤ l'} f_l·W_dec^{l→l'} + b_dec^l' (+ x·W_skipᵀ)."""
    fs, ys = [], []
    for target in range(len(xs)):
        y = layers[target]["b_dec"]
        for source in range(target + 1):
            tensors, x = layers[source], xs[source]
            z = x @ tensors["W_enc"] + tensors["b_enc"]
            f = z * (z > tensors["threshold"])
            start = sum(d_out[source:target])
            y = y + f @ tensors["W_dec"][:, start : start + d_out[target]]
            if source == target:
                fs.append(f)
        skip = layers[target].get("W_skip")
        ys.append(y if skip is None else y + xs[target] @ skip.T)
    return fs, ys


def doubled(layers):
    return [{key: tensor.double() for key, tensor in tensors.items()} for tensors in layers]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_the_formula(skip, grad):
    layers, xs = clt_tensors(skip), inputs()
    clt = CrossLayerTranscoder(layers)
    with torch.set_grad_enabled(grad):
        fs, ys = clt.encode(xs), clt(xs)
        decoded = clt.decode(fs, xs)
    exact = by_formula(doubled(layers), [x.double() for x in xs])
    eager = by_formula(layers, xs)
    for layer in range(3):
        assert_within_budget("f", fs[layer], exact[0][layer], eager[0][layer])
        for found in (ys, decoded):
            assert_within_budget("y", found[layer], exact[1][layer], eager[1][layer])
            assert found[layer].requires_grad == grad


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize("skip", [False, True])
def test_both_routes_are_one_function(skip, sparse_below, monkeypatch):
    """On numbers whose sums are exact, to the bit."""
    clt, xs = CrossLayerTranscoder(clt_tensors(skip, lattice)), inputs(lattice)
    monkeypatch.setattr(density, "decode_dense_above", lambda device: sparse_below)
    expected, codes = clt(xs), clt.encode_sparse(xs)
    for code, f in zip(codes, clt.encode(xs), strict=True):
        assert torch.equal(code.to_dense(), f.detach())
        assert 0 < code.nnz < f.numel()
    with torch.no_grad():
        for found in (clt(xs), clt.decode(codes, xs)):
            for one, two in zip(found, expected, strict=True):
                assert torch.equal(one, two)
    without = clt.decode(codes)
    assert torch.equal(without[1], expected[1].detach()) == (not skip)


def test_any_number_of_dimensions_and_precision():
    clt = CrossLayerTranscoder(clt_tensors())
    xs = [x.bfloat16() for x in inputs(shape=(2, 3, 5))]
    assert [(y.shape, y.dtype) for y in clt(xs)] == [((2, 3, 5, d), torch.bfloat16) for d in D_OUT]
    assert [f.shape for f in clt.encode(xs)] == [(2, 3, 5, d) for d in D_SAE]
    assert [y.shape for y in clt([x[:0, 0] for x in xs])] == [(0, 5, d) for d in D_OUT]


def test_the_parts_of_a_decoder():
    layers = clt_tensors()
    clt = CrossLayerTranscoder(layers)
    assert torch.equal(clt.decoder(0, 2), layers[0]["W_dec"][:, 10:13])
    assert torch.equal(clt.decoder(1, 1), layers[1]["W_dec"][:, :6])
    assert clt.decoder(0, 0).untyped_storage().data_ptr() == clt.sources[0].W_dec.data_ptr()
    assert (clt.n_layers, clt.d_sae, clt.d_out) == (3, sum(D_SAE), [4, 6, 3])
    for source, target in ((1, 0), (3, 3), (0, 3)):
        with pytest.raises(ValueError, match=r"(source|target): expected"):
            clt.decoder(source, target)


def test_one_layer_is_a_transcoder():
    [tensors] = clt_tensors(True, lattice, D_IN[:1], D_SAE[:1], D_OUT[:1])
    [x] = inputs(lattice, D_IN[:1])
    assert torch.equal(CrossLayerTranscoder([tensors])([x])[0], Transcoder(tensors)(x))


def test_latents_do_not_write_to_layers_before():
    clt, xs = CrossLayerTranscoder(clt_tensors()), inputs()
    before = clt(xs)
    after = clt([xs[0], xs[1] + 1, xs[2]])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad):
    clt, xs = CrossLayerTranscoder(clt_tensors()), inputs()
    xs[1][4, 2] = bad
    first, *rest = clt(xs)
    assert first.isfinite().all()
    for y in rest:
        assert not y[4].isfinite().all()
        assert y[:4].isfinite().all()


def test_dtypes():
    clt = CrossLayerTranscoder(clt_tensors())
    halved = clt.to(torch.bfloat16)
    assert {p.dtype for name, p in halved.named_parameters() if "threshold" in name} == {torch.float32}
    assert {p.dtype for name, p in halved.named_parameters() if "threshold" not in name} == {torch.bfloat16}
    assert halved(inputs())[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "layers: expected at least one layer"),
        (lambda t: t[1].pop("b_dec"), r"layers\[1\]: expected the tensors .* fewer: b_dec"),
        (lambda t: t[1].update(b=t[1]["b_dec"]), r"layers\[1\]: expected the tensors .* fewer: b$"),
        (lambda t: t[0].update(W_dec=t[0]["W_dec"][:, 1:]), r"\[20, 13\] for outputs 4 \+ 6 \+ 3 wide, got \[20, 12\]"),
        (lambda t: t.reverse(), r"layers\[0\]\['W_dec'\]: expected shape \[14, 13\]"),
        (lambda t: t[2].update(b_enc=t[2]["b_enc"][1:]), r"layers\[2\]\['b_enc'\]: expected shape \[14\], got \[13\]"),
        (lambda t: t[2].update(W_skip=t[2]["W_enc"]), r"layers\[2\]\['W_skip'\]: expected shape \[3, 6\], got"),
        (lambda t: t[2].update(b_dec=torch.zeros(1, 3)), r"layers\[2\]\['b_dec'\]: expected a vector"),
        (lambda t: t[2].update(b_dec=[0.0]), r"layers\[2\]\['b_dec'\]: expected a torch.Tensor, got list"),
        (lambda t: t[1].update(b_enc=t[1]["b_enc"].half()), r"layers\[1\]\['b_enc'\]: expected one float dtype"),
        (lambda t: t[1]["W_enc"].fill_(math.nan), r"layers\[1\]: W_enc: expected finite"),
        (lambda t: t[1]["threshold"].fill_(-1), r"layers\[1\]: threshold: expected values ≥ 0"),
    ],
)
def test_other_tensors_are_refused(change, message):
    layers = clt_tensors()
    change(layers)
    with pytest.raises(ValueError, match=message):
        CrossLayerTranscoder(layers)


def test_bad_arguments():
    clt, xs = CrossLayerTranscoder(clt_tensors()), inputs()
    fs = clt.encode(xs)
    for call, error, message in (
        (lambda: clt(xs[:2]), ValueError, "xs: expected activations of 3 layers, got 2"),
        (lambda: clt(xs[0]), TypeError, "xs: expected a list of tensors"),
        (lambda: clt([xs[0], xs[2], xs[1]]), ValueError, r"xs\[1\]: expected shape \[..., N, 5\], got \[30, 6\]"),
        (lambda: clt([xs[0], xs[1][:3], xs[2]]), ValueError, r"xs\[1\]: expected the tokens of layer 0"),
        (lambda: clt.encode([x.int() for x in xs]), TypeError, r"xs\[0\]: expected a floating dtype"),
        (lambda: clt.decode(fs[:2]), ValueError, "fs: expected activations of 3 layers, got 2"),
        (lambda: clt.decode([fs[0], fs[1][:3], fs[2]]), ValueError, r"fs: expected the same tokens .*\[3, 30\]"),
        (lambda: clt.decode([fs[0], fs[2], fs[1]]), ValueError, r"f: expected shape \[..., 9\]"),
        (lambda: CrossLayerTranscoder({}), TypeError, "layers: expected"),
        (lambda: CrossLayerTranscoder(clt_tensors(), metadata=[1]), TypeError, "metadata: expected"),
        (
            lambda: ScaledCLT([3], [3, 3], 5, input_scales=[1.0], output_scales=[1.0]),
            ValueError,
            "d_outs: expected one",
        ),
        (lambda: ScaledCLT([3], [3], 5, input_scales=[1.0], output_scales=[0.0]), ValueError, r"output_scales\[0\]"),
        (lambda: ScaledCLT([3], [3], 5, input_scales=[-1.0], output_scales=[1.0]), ValueError, "input_scale: expected"),
    ):
        with pytest.raises(error, match=message):
            call()
