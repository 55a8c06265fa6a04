"""`BatchTopKSAE`: what fires in training and by the threshold, files, what is released, its calibration."""

import copy

import pytest
import torch

from gemmascope import BatchTopKSAE, JumpReLUSAE, load_sae
from gemmascope.errors import BadFileError
from gemmascope.training import calibrate
from gemmascope.training.calibrate import calibrate_threshold

D_MODEL, D_SAE, K = 5, 23, 4
FP64 = {"rtol": 1e-12, "atol": 1e-13}


def random_sae(dtype=torch.float64, seed=0, k=K, **options) -> BatchTopKSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = BatchTopKSAE(
        D_MODEL, D_SAE, k, **{"input_scale": 3.5, "threshold_init": 0.4, "generator": generator} | options
    )
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae.to(dtype)


def random_x(*shape, dtype=torch.float64, seed=1) -> torch.Tensor:
    return 3.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def z_of(sae, x):
    return (x / sae.input_scale - sae.b_dec.detach()) @ sae.W_enc.detach() + sae.b_enc.detach()


def test_training_and_inference():
    sae, x = random_sae(), random_x(40, D_MODEL)
    z = z_of(sae, x)
    border = z.flatten().sort(descending=True).values[K * 40 - 1]
    assert border > 0.5
    code = sae.encode_batch(x)
    torch.testing.assert_close(code.to_dense(), torch.where(z >= border, z, 0), **FP64)
    assert code.nnz == K * 40
    assert code.l0().unique().numel() > 3  # tokens differ
    torch.testing.assert_close(sae.encode(x).detach(), torch.where(z > 0.4, z, 0), **FP64)
    assert f"k={K}" in repr(sae)


def test_what_is_not_finite_stays():
    sae, x = random_sae(torch.float32), random_x(6, D_MODEL, dtype=torch.float32)
    x[2, 1] = torch.nan
    assert sae.encode_batch(x).to_dense()[2].isnan().any()
    with torch.no_grad():
        sae.b_enc[3] = -torch.inf
    dense = sae.encode_batch(random_x(6, D_MODEL, dtype=torch.float32)).to_dense()
    assert dense[:, 3].isnan().all()


def test_released_is_a_folded_jumprelu_of_the_same_function():
    sae, x = random_sae(metadata={"site": "here"}), random_x(30, D_MODEL)
    plain = sae.released()
    assert type(plain) is JumpReLUSAE
    assert plain.is_folded
    assert plain.metadata == {"site": "here", "kind": "batchtopk", "k": K}
    assert plain.impl == sae.impl
    torch.testing.assert_close(plain(x).detach(), sae(x).detach(), rtol=1e-10, atol=1e-10)
    before = sae.W_dec.detach().clone()
    with torch.no_grad():
        plain.W_dec.zero_()
    assert torch.equal(sae.W_dec, before)
    assert sae.metadata == {"site": "here"}


def test_files(tmp_path):
    sae, x = random_sae(torch.float32), random_x(30, D_MODEL, dtype=torch.float32)
    sae.save(tmp_path / "sae")
    again = BatchTopKSAE.load(tmp_path / "sae")
    assert again.k == K
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.encode_batch(x).values, sae.encode_batch(x).values)
    assert type(load_sae(tmp_path / "sae")) is JumpReLUSAE
    JumpReLUSAE(D_MODEL, D_SAE).save(tmp_path / "other")
    with pytest.raises(BadFileError, match="metadata: expected the kind 'batchtopk', found None"):
        BatchTopKSAE.load(tmp_path / "other")
    JumpReLUSAE(D_MODEL, D_SAE, metadata={"kind": "batchtopk", "k": 0}).save(tmp_path / "bad")
    with pytest.raises(BadFileError, match=r"metadata.k: expected an int of at least 1, found 0"):
        BatchTopKSAE.load(tmp_path / "bad")


def test_state_dict_and_copies():
    sae, other = random_sae(), random_sae(seed=3, k=2)
    other.load_state_dict(sae.state_dict())
    assert other.k == K
    assert copy.deepcopy(sae).k == K
    with pytest.raises(RuntimeError, match="k: expected 1 to d_sae = 23, got 24"):
        other.load_state_dict(sae.state_dict() | {"k": torch.tensor(24)})


def test_wrong_k():
    for k, error in ((0, ValueError), (D_SAE + 1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="k: expected"):
            BatchTopKSAE(D_MODEL, D_SAE, k)  # pyright: ignore[reportArgumentType]


# ---- the threshold


@pytest.mark.parametrize("held", [1, 1 << 20])
@pytest.mark.parametrize("k", [None, 1, 7])
def test_calibrated_threshold_is_the_order_statistic(monkeypatch, held, k):
    monkeypatch.setattr(calibrate, "_HELD", held)
    sae = random_sae(torch.float32)
    batches = [random_x(n, D_MODEL, dtype=torch.float32, seed=n) for n in (17, 1, 30)]
    x = torch.cat(batches)
    z = sae.preactivations(x)
    before = (z > 0.4).sum().item() / 48
    found = calibrate_threshold(sae, lambda: batches, k)
    wanted = (k or K) * 48
    assert found.threshold == z.flatten().sort(descending=True).values[wanted]
    assert found.l0_before == before
    assert found.l0_after == (k or K)
    assert found.n_tokens == 48
    assert (sae.threshold == found.threshold).all()
    assert sae.encode_sparse(x).nnz == wanted


def test_calibration_with_ties_and_too_few():
    sae = random_sae(torch.float32)
    x = random_x(1, D_MODEL, dtype=torch.float32).expand(10, -1)
    positive = int((sae.preactivations(x)[0] > 0).sum())
    assert positive > 6
    found = calibrate_threshold(sae, lambda: [x], 6)
    assert found.l0_after == 6  # ten times the same six
    with torch.no_grad():  # latents 1 and 2 are the same
        sae.W_enc[:, 2], sae.b_enc[2] = sae.W_enc[:, 1], sae.b_enc[1].clone().add_(0)
        sae.b_enc[1:3] += 100.0
    assert calibrate_threshold(sae, lambda: [x], 1).l0_after == 0  # of equals at the border none fires
    assert calibrate_threshold(sae, lambda: [x], 2).l0_after == 2
    found = calibrate_threshold(sae, lambda: [x], D_SAE)
    assert found.threshold == 0
    assert found.l0_after == (sae.preactivations(x)[0] > 0).sum()


def test_what_calibration_refuses():
    sae, x = random_sae(torch.float32), random_x(9, D_MODEL, dtype=torch.float32)
    with pytest.raises(ValueError, match="batches: expected at least one token, got none"):
        calibrate_threshold(sae, list)
    with pytest.raises(ValueError, match="batches: expected activations whose latents are finite"):
        calibrate_threshold(sae, lambda: [torch.full_like(x, torch.nan)])
    with pytest.raises(ValueError, match="k: expected"):
        calibrate_threshold(sae, lambda: [x], 0)
    with pytest.raises(TypeError, match="sae: expected a BatchTopKSAE"):
        calibrate_threshold(JumpReLUSAE(D_MODEL, D_SAE), lambda: [x])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="batches: expected a function without arguments, got list"):
        calibrate_threshold(sae, [x])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"batches: expected shape \[n, 5\] each, got \[9, 4\]"):
        calibrate_threshold(sae, lambda: [x[:, :4]])
    once = iter([x])
    with pytest.raises(ValueError, match="batches: expected the same activations when called again"):
        calibrate_threshold(sae, lambda: once)
    assert (sae.threshold == 0.4).all()
