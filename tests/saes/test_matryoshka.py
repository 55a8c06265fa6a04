"""`MatryoshkaSAE`: its prefixes as SAEs, what they decode, files, wrong arguments."""

import pytest
import torch

from gemmascope import JumpReLUSAE, MatryoshkaSAE
from gemmascope.errors import BadFileError

D_MODEL, D_SAE, K, PREFIXES = 5, 23, 4, (3, 10, 23)
FP64 = {"rtol": 1e-12, "atol": 1e-13}


def random_sae(dtype=torch.float64, **options) -> MatryoshkaSAE:
    generator = torch.Generator().manual_seed(0)
    options = {"input_scale": 3.5, "threshold_init": 0.4, "generator": generator} | options
    sae = MatryoshkaSAE(D_MODEL, D_SAE, K, PREFIXES, **options)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae.to(dtype)


def random_x(*shape, dtype=torch.float64) -> torch.Tensor:
    return 3.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("m", PREFIXES)
def test_a_prefix_is_an_sae_of_the_first_latents(m):
    sae, x = random_sae(metadata={"site": "here"}), random_x(4, 10, D_MODEL)
    first, f = sae.prefix(m), sae.encode(x).detach()
    assert type(first) is JumpReLUSAE
    assert first.metadata == {"site": "here", "kind": "matryoshka", "k": K, "prefixes": list(PREFIXES), "prefix": m}
    assert (first.d_sae, first.input_scale, first.impl) == (m, 3.5, sae.impl)
    torch.testing.assert_close(first.encode(x).detach(), f[..., :m], **FP64)
    expected = 3.5 * (f[..., :m] @ sae.W_dec.detach()[:m] + sae.b_dec.detach())
    torch.testing.assert_close(first(x).detach(), expected, **FP64)
    torch.testing.assert_close(sae.decode(f, prefix=m).detach(), expected, **FP64)
    code = sae.encode_sparse(x)
    torch.testing.assert_close(sae.decode(code, prefix=m).detach(), expected.reshape(40, D_MODEL), **FP64)
    torch.testing.assert_close(sae.decode(f).detach(), sae(x).detach(), **FP64)
    assert not any(
        p.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
        for p in first.parameters()
        for q in sae.parameters()
    )
    assert first.W_enc.T.is_contiguous()


def test_files_and_what_is_released(tmp_path):
    sae, x = random_sae(torch.float32), random_x(30, D_MODEL, dtype=torch.float32)
    sae.save(tmp_path / "sae")
    again = MatryoshkaSAE.load(tmp_path / "sae")
    assert (again.k, again.prefixes) == (K, PREFIXES)
    assert torch.equal(again(x), sae(x))
    assert sae.released().metadata == {"kind": "matryoshka", "k": K, "prefixes": list(PREFIXES)}
    assert "prefixes=(3, 10, 23)" in repr(sae)
    for index, prefixes in enumerate((None, [], [3, 3], [4, 2], [0, 2], ["3"])):
        metadata = {"kind": "matryoshka", "k": K, "prefixes": prefixes}
        JumpReLUSAE(D_MODEL, D_SAE, metadata=metadata).save(tmp_path / str(index))
        with pytest.raises(BadFileError, match=r"metadata.prefixes: expected numbers that ascend"):
            MatryoshkaSAE.load(tmp_path / str(index))
    JumpReLUSAE(D_MODEL, D_SAE, metadata={"kind": "batchtopk", "k": K}).save(tmp_path / "other")
    with pytest.raises(BadFileError, match="expected the kind 'matryoshka', found 'batchtopk'"):
        MatryoshkaSAE.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("prefixes", "error", "message"),
    [
        ((3, 10), ValueError, r"prefixes: expected numbers that ascend to d_sae = 23, got \[3, 10\]"),
        ((10, 10, 23), ValueError, "prefixes: expected numbers that ascend"),
        ((), ValueError, "prefixes: expected numbers that ascend"),
        ((0, 23), ValueError, r"prefixes\[0\]: expected at least 1, got 0"),
        (23, TypeError, "prefixes: expected a tuple or a list, got int"),
    ],
)
def test_wrong_prefixes(prefixes, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaSAE(D_MODEL, D_SAE, K, prefixes)


def test_other_prefixes_than_its_own():
    sae = random_sae()
    with pytest.raises(ValueError, match="m: expected 3 or 10 or 23, got 4"):
        sae.prefix(4)
    with pytest.raises(ValueError, match="prefix: expected 3 or 10 or 23, got 4"):
        sae.decode(torch.zeros(2, D_SAE, dtype=torch.float64), prefix=4)
    with pytest.raises(TypeError, match=r"f: expected a torch\.Tensor or a SparseCode"):
        sae.decode("f", prefix=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"f: expected shape \[..., 23\]"):
        sae.decode(torch.zeros(2, 3, dtype=torch.float64), prefix=3)
