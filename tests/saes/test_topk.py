"""`TopKSAE`: which latents fire, ties and NaN, the sparse and the dense way, files, state dicts, wrong arguments."""

import copy
import json

import pytest
import torch

from gemmascope import JumpReLUSAE, SparseCode, TopKSAE
from gemmascope.errors import BadFileError
from gemmascope.saes.topk import top_latents

D_MODEL, D_SAE, K = 5, 23, 4
FP64 = {"rtol": 1e-12, "atol": 1e-13}


def random_sae(dtype=torch.float64, seed=0, k=K, **options) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(D_MODEL, D_SAE, k, dtype=torch.float64, **{"input_scale": 3.5, "generator": generator} | options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae.to(dtype)


def random_x(*shape, dtype=torch.float64, seed=1) -> torch.Tensor:
    return 3.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected_f(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    """The formula, token by token and latent by latent."""
    W_enc, b_enc, b_dec = (getattr(sae, name).detach().double() for name in ("W_enc", "b_enc", "b_dec"))
    x = x.double() / sae.input_scale
    z = (x - b_dec if sae.pre_encoder_bias else x) @ W_enc + b_enc
    f = torch.zeros_like(z)
    for n, row in enumerate(z.tolist()):
        for j in sorted(range(len(row)), key=lambda j: (-row[j], j))[: sae.k]:
            f[n, j] = max(row[j], 0)
    return f


# ---- the formula


@pytest.mark.parametrize("pre_encoder_bias", [False, True])
@pytest.mark.parametrize("k", [1, K, D_SAE - 1, D_SAE])
def test_formula(k, pre_encoder_bias):
    sae, x = random_sae(k=k, pre_encoder_bias=pre_encoder_bias), random_x(40, D_MODEL)
    expected = expected_f(sae, x)
    code = sae.encode_sparse(x)
    assert isinstance(code, SparseCode)
    torch.testing.assert_close(code.to_dense(), expected, **FP64)
    assert torch.equal(code.l0(), (expected > 0).sum(1))
    x_hat = sae.input_scale * (expected @ sae.W_dec.detach() + sae.b_dec.detach())
    for result in (sae.decode(code), sae.decode(expected), sae(x)):
        torch.testing.assert_close(result.detach(), x_hat, **FP64)
    if k >= D_SAE - 1:
        assert (code.l0() < k).any(), "some z are below 0 and do not fire"


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


def test_gradients_are_those_of_the_chosen_entries():
    sae, x = random_sae(), random_x(9, D_MODEL).requires_grad_()
    weight = random_x(9, D_SAE, seed=2)
    chosen = expected_f(sae, x.detach()) > 0
    (sae.encode(x) * weight).sum().backward()
    z = (x.detach() / 3.5 - sae.b_dec.detach()) @ sae.W_enc.detach()
    assert z.shape == weight.shape
    dz = weight * chosen
    torch.testing.assert_close(sae.b_enc.grad, dz.sum(0), **FP64)
    torch.testing.assert_close(x.grad, dz @ sae.W_enc.detach().T / 3.5, **FP64)
    torch.testing.assert_close(sae.W_enc.grad, (x.detach() / 3.5 - sae.b_dec.detach()).T @ dz, **FP64)


def test_no_tokens():
    sae = random_sae()
    code = sae.encode_sparse(random_x(0, D_MODEL))
    assert (code.n_tokens, code.nnz) == (0, 0)
    with torch.no_grad():
        assert sae(random_x(0, D_MODEL)).shape == (0, D_MODEL)
    assert sae(random_x(0, D_MODEL)).shape == (0, D_MODEL)


def test_folding_is_the_same_function():
    sae, x = random_sae(), random_x(40, D_MODEL)
    folded = sae.fold()
    assert folded.is_folded
    assert not sae.is_folded
    assert folded.k == K
    torch.testing.assert_close(folded(x), sae(x), **FP64)
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * 3.5, **FP64)


# ---- ties, NaN, Inf


def test_of_equals_those_of_smaller_number_fire():
    z = torch.tensor([[1.0, 2, 2, 2, 3, 2], [2, 2, 2, 2, 2, 2], [5, 4, 3, 2, 1, 0], [0, 0, -1, 0, 7, 0]])
    assert top_latents(z, 3).tolist()[:3] == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]
    assert 4 in top_latents(z, 3)[3]  # which of the zeros come with it makes no difference


@pytest.mark.parametrize("k", [1, 3, 17])
def test_ties_by_a_stable_sort(k):
    z = torch.randint(1, 6, (50, 17), generator=torch.Generator().manual_seed(0)).float()
    expected = [sorted(sorted(range(17), key=lambda j: (-row[j], j))[:k]) for row in z.tolist()]
    assert top_latents(z, k).tolist() == expected


def test_ties_of_a_whole_sae():
    sae = TopKSAE(2, 6, 2, pre_encoder_bias=False)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.copy_(torch.tensor([0.0, 1, 1, 1, -1, 1]))
        x = torch.ones(3, 2)
        assert sae.encode(x).tolist() == [[0, 1, 1, 0, 0, 0]] * 3
    assert sae.encode(x).tolist() == [[0, 1, 1, 0, 0, 0]] * 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_input_stays_visible(bad):
    sae = random_sae()
    with torch.no_grad():
        sae.W_enc.abs_()  # so that −Inf makes every z −Inf
    x = random_x(3, D_MODEL)
    x[1, 2] = bad
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            f, x_hat = sae.encode(x), sae(x)
        assert not f[1].isfinite().all()
        assert not x_hat[1].isfinite().all()
        assert f[[0, 2]].isfinite().all()
        assert x_hat[[0, 2]].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so itself
def test_compiled_it_is_the_same():
    sae, x = random_sae(torch.float32), random_x(6, D_MODEL, dtype=torch.float32)
    compiled = torch.compile(sae.encode, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sae.encode(x))


def test_autocast_changes_nothing():
    sae, x = random_sae(torch.float32), random_x(6, D_MODEL, dtype=torch.float32)
    before = sae(x), sae.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        after = sae(x), sae.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- files and state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("folded", [False, True])
def test_files_round_trip(tmp_path, dtype, folded):
    sae = random_sae(dtype, metadata={"site": "model.layers.3.output"})
    sae = sae.fold() if folded else sae
    sae.save(tmp_path / "a")
    again = TopKSAE.load(tmp_path / "a")
    assert (again.k, again.input_scale, again.pre_encoder_bias) == (K, sae.input_scale, sae.pre_encoder_bias)
    assert again.metadata == sae.metadata
    for (name, a), (_, b) in zip(sae.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert again.W_enc.T.is_contiguous()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architecture"], config["k"]) == ("topk", K)


def test_a_npz_holds_no_topk(tmp_path):
    with pytest.raises(ValueError, match=r"^sae: expected a JumpReLU SAE for a .npz file, got a TopK one: write a"):
        random_sae(torch.float32).fold().save(tmp_path / "params.npz")
    assert list(tmp_path.iterdir()) == []


def test_state_dict_carries_k():
    sae = random_sae()
    state = copy.deepcopy(sae.state_dict())
    assert state.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "input_scale", "pre_encoder_bias", "k"}
    other = TopKSAE(D_MODEL, D_SAE, 9, dtype=torch.float64)
    other.load_state_dict(state)
    assert other.k == K
    x = random_x(6, D_MODEL)
    assert torch.equal(other(x), sae(x))
    for value in (torch.tensor(0), torch.tensor(D_SAE + 1), torch.tensor(2.0), torch.tensor([2]), 2):
        with pytest.raises(RuntimeError, match="k: expected "):
            other.load_state_dict(state | {"k": value})
    with pytest.raises(RuntimeError, match=r'Missing key.* "k"'):
        other.load_state_dict({key: value for key, value in state.items() if key != "k"})
    assert other.k == K


def test_a_jumprelu_file_is_refused(tmp_path):
    JumpReLUSAE(2, 3).save(tmp_path / "a")
    with pytest.raises(BadFileError) as caught:
        TopKSAE.load(tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path}/a: expected a TopK SAE, found a JumpReLU SAE: gemmascope.load_sae opens both"
    )


# ---- arguments


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k: expected at least 1, got 0"),
        (4, ValueError, "k: expected at most 3, got 4"),
        (1.0, TypeError, "k: expected an int, got float"),
        (True, TypeError, "k: expected an int, got bool"),
    ],
)
def test_k(k, error, message):
    with pytest.raises(error) as caught:
        TopKSAE(2, 3, k)
    assert str(caught.value) == message


@pytest.mark.parametrize("call", ["encode", "encode_sparse", "forward"])
def test_rows_of_another_width(call):
    sae = random_sae()
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad), pytest.raises(ValueError, match=r"^x: expected shape \[..., 5\], got"):
            getattr(sae, call)(random_x(2, 4))


def test_representation_says_k():
    assert "k=2, d_model=2, d_sae=3" in repr(TopKSAE(2, 3, 2))
