"""`GatedSAE`: its formula, the JumpReLU SAE that it is, gradients, NaN, folding, files and state dicts."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmascope import GatedSAE, JumpReLUSAE, load_sae

D_MODEL, D_SAE = 5, 23
FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "b_mag", "r_mag")


def random_sae(dtype=torch.float64, seed=0, **options) -> GatedSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = GatedSAE(D_MODEL, D_SAE, dtype=torch.float64, **{"input_scale": 3.5, "generator": generator} | options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae.to(dtype)


def random_x(*shape, dtype=torch.float64, seed=1) -> torch.Tensor:
    return 3.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected_f(sae: GatedSAE, x: torch.Tensor) -> torch.Tensor:
    """Equations 5 to 7 of arXiv 2404.16014, W_mag and W_gate as matrices of their own."""
    W_gate, b_gate, r, b_mag, b_dec = (
        getattr(sae, name).detach().double() for name in ("W_enc", "b_gate", "r_mag", "b_mag", "b_dec")
    )
    centred = x.double() / sae.input_scale - (b_dec if sae.pre_encoder_bias else 0)
    W_mag = W_gate * r.exp()
    return (centred @ W_gate + b_gate > 0) * torch.relu(centred @ W_mag + b_mag)


def set_values(sae, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.tensor(value))
    return sae


@pytest.mark.parametrize("pre_encoder_bias", [False, True])
def test_formula(pre_encoder_bias):
    sae, x = random_sae(pre_encoder_bias=pre_encoder_bias), random_x(40, D_MODEL)
    expected, code = expected_f(sae, x), sae.encode_sparse(x)
    torch.testing.assert_close(code.to_dense(), expected, **FP64)
    x_hat = sae.input_scale * (expected @ sae.W_dec.detach() + sae.b_dec.detach())
    for result in (sae.decode(code), sae.decode(expected), sae(x)):
        torch.testing.assert_close(result.detach(), x_hat, **FP64)
    jumprelu = sae.to_jumprelu()
    torch.testing.assert_close(jumprelu.encode(x).detach(), expected, **FP64)
    assert jumprelu.threshold.gt(0).any()
    assert jumprelu.threshold.eq(0).any(), "some θ are clamped"


def test_by_hand():
    """e^r = 2, b_mag = −1: θ = −1 − 2·b_gate = 1 for b_gate = −1; x = 1 lies on the gate's edge and x = 3/2 beyond it.

    For b_gate = 1 the gate opens at −1, where m = −3, so that θ is 0.
    """
    sae = GatedSAE(1, 2, pre_encoder_bias=False, dtype=torch.float64)
    set_values(sae, W_enc=[[1.0, 1.0]], r_mag=[math.log(2)] * 2, b_mag=[-1.0, -1.0], b_enc=[-1.0, 1.0])
    x = torch.tensor([[1.0], [1.5], [0.25], [-0.5]], dtype=torch.float64)
    exact = torch.tensor([[0, 1], [2, 2], [0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(sae.encode(x).detach(), exact)
    torch.testing.assert_close(sae.encode_sparse(x).to_dense(), exact)
    jumprelu = sae.to_jumprelu()
    torch.testing.assert_close(jumprelu.threshold.tolist(), [1.0, 0.0])
    assert jumprelu.metadata == {"kind": "gated"}


# Numbers of few bits, of which every product and sum below is exact: the edges are met, not nearly met.
exact_numbers = st.integers(-16, 16).map(lambda n: n / 8)
powers = st.sampled_from([0.0625, 0.5, 1.0, 2.0, 16.0])


@given(
    rows=st.lists(st.tuples(exact_numbers, exact_numbers, exact_numbers, powers), min_size=1, max_size=6),
    tokens=st.lists(exact_numbers, min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_merge_gates_alike_to_the_edge(rows, tokens, dtype):
    """With a π of exactly 0, an m of 0 and a θ that would be negative among them: the same latents fire."""
    weights, b_gate, b_mag, scales = zip(*rows, strict=True)
    sae = GatedSAE(1, len(rows), pre_encoder_bias=False, dtype=dtype, impl="reference")
    set_values(sae, W_enc=[list(weights)], b_enc=list(b_gate), b_mag=list(b_mag), r_mag=[math.log(s) for s in scales])
    jumprelu, x = sae.to_jumprelu(), torch.tensor(tokens, dtype=dtype)[:, None]
    # exp(log s) may be an ulp off s, which moves an edge that is not at a π of 0 exactly.
    rounding = 1e-5 if dtype == torch.float32 else 1e-13
    near = ((x @ sae.W_enc + sae.b_enc).abs() < rounding) & (sae.r_mag != 0)
    f, merged = sae.encode(x).detach(), jumprelu.encode(x).detach()
    torch.testing.assert_close(torch.where(near, 0, f), torch.where(near, 0, merged), rtol=rounding, atol=50 * rounding)
    untouched = sae.r_mag == 0
    assert torch.equal((f > 0)[:, untouched], (merged > 0)[:, untouched])


@pytest.mark.parametrize("size", [-20, -6, 0, 6, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_merge_with_large_and_small_r(size, dtype):
    sae, x = random_sae(dtype), random_x(200, D_MODEL, dtype=dtype)
    with torch.no_grad():
        sae.r_mag.add_(size)
        sae.b_mag.mul_(math.exp(size))
    f, merged = sae.encode_sparse(x).to_dense(), sae.to_jumprelu().encode_sparse(x).to_dense()
    scale = f.abs().amax(0)
    assert f.count_nonzero() > 100
    assert ((f - merged).abs() <= 64 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_with_and_without_gradients_the_same_latents_fire(dtype):
    sae, x = random_sae(dtype), random_x(7, 11, D_MODEL, dtype=dtype)
    with torch.no_grad():
        sparse, x_hat = sae.encode(x), sae(x)
    dense, dense_x_hat = sae.encode(x), sae(x)
    assert dense.requires_grad
    assert not sparse.requires_grad
    assert torch.equal(sparse, dense)
    assert (sparse.shape, sparse.dtype, x_hat.shape, x_hat.dtype) == ((7, 11, D_SAE), dtype, x.shape, dtype)
    budget = 4 * torch.finfo(dtype).eps * dense_x_hat.detach().abs().max().double()
    assert (x_hat.double() - dense_x_hat.detach().double()).abs().max() <= budget


def test_gradients_pass_the_gate_but_do_not_move_it():
    sae, x = random_sae(pre_encoder_bias=False), random_x(9, D_MODEL).requires_grad_()
    weight = random_x(9, D_SAE, seed=2)
    (sae.encode(x) * weight).sum().backward()
    assert sae.b_gate.grad is None
    dm = weight * (expected_f(sae, x.detach()) > 0)
    dy, y = dm * sae.r_mag.detach().exp(), x.detach() / sae.input_scale @ sae.W_enc.detach()
    for ours, exact in (
        (sae.b_mag.grad, dm.sum(0)),
        (sae.r_mag.grad, (dy * y).sum(0)),
        (sae.W_enc.grad, (x.detach() / sae.input_scale).T @ dy),
        (x.grad, dy @ sae.W_enc.detach().T / sae.input_scale),
    ):
        assert ours is not None
        torch.testing.assert_close(ours, exact, **FP64)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_input_stays_visible(value):
    sae, x = random_sae(torch.float32), random_x(6, D_MODEL, dtype=torch.float32)
    with torch.no_grad():
        sae.W_enc[2] = 1.0
    bad = x.clone()
    bad[3, 2] = value
    dense, sparse = sae.encode(bad).detach(), sae.encode_sparse(bad).to_dense()
    for f in (dense, sparse):
        assert not f[3].isfinite().any()
        assert torch.equal(f[:3], sae.encode(x).detach()[:3])
    assert torch.equal(dense.isnan(), sparse.isnan())


@pytest.mark.parametrize("pre_encoder_bias", [False, True])
def test_fold_and_release(pre_encoder_bias):
    sae, x = random_sae(pre_encoder_bias=pre_encoder_bias, metadata={"site": "resid"}), random_x(30, D_MODEL)
    before, folded, left = copy.deepcopy(sae.state_dict()), sae.fold(), sae.released()
    assert isinstance(folded, GatedSAE)
    assert isinstance(left, JumpReLUSAE)
    assert folded.is_folded
    assert left.is_folded
    assert left.metadata == {"site": "resid", "kind": "gated"}
    for other in (folded, left):
        torch.testing.assert_close(other.encode(x).detach(), sae.input_scale * sae.encode(x).detach(), **FP64)
        torch.testing.assert_close(other(x).detach(), sae(x).detach(), **FP64)
    with torch.no_grad():  # copies, all of them
        for other in (folded, left, sae.to_jumprelu()):
            for parameter in other.parameters():
                parameter.zero_()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_saved_as_the_jumprelu_sae_that_it_is(tmp_path, dtype):
    sae, x = random_sae(dtype), random_x(30, D_MODEL, dtype=dtype)
    sae.save(tmp_path / "gated")
    sae.released().save(tmp_path / "folded.npz")
    found, expected = load_sae(tmp_path / "gated"), sae.to_jumprelu()
    assert isinstance(found, JumpReLUSAE)
    assert found.metadata["kind"] == "gated"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(found.encode(x), expected.encode(x))
    assert JumpReLUSAE.load(tmp_path / "folded.npz").is_folded
    with pytest.raises(TypeError, match="GatedSAE: files hold the JumpReLU SAE that it is: open them with JumpReLUSAE"):
        GatedSAE.load(tmp_path / "gated")


def test_state_dict():
    sae, other = random_sae(), GatedSAE(D_MODEL, D_SAE, dtype=torch.float64)
    state = sae.state_dict()
    assert state.keys() == {*NAMES, "input_scale", "pre_encoder_bias"}
    other.load_state_dict(state)
    x = random_x(8, D_MODEL)
    assert torch.equal(other(x), sae(x))
    assert torch.equal(copy.deepcopy(sae)(x), sae(x))


def test_begins_as_the_paper_says():
    sae = GatedSAE(D_MODEL, D_SAE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    for name in ("b_enc", "b_dec", "b_mag", "r_mag"):
        assert not getattr(sae, name).any()
    assert sae.b_gate is sae.b_enc
    x = random_x(50, D_MODEL, dtype=torch.float32)
    torch.testing.assert_close(sae.encode(x), torch.relu(x @ sae.W_enc))
