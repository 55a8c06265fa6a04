"""`Transcoder`: its function, with and without skip, densely and by entries, and what it refuses."""

import pytest
import torch
from torch import Tensor

from gemmascope import Transcoder
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.formats.export import write
from gemmascope.kernels import density
from tests.formats.test_export import D_IN, D_OUT, D_SAE, FACTS, transcoder_config, transcoder_tensors
from tests.helpers import assert_within_budget, lattice, normal, transposed


def by_formula(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f and ŷ in the dtype of the tensors."""
    x = x.to(tensors["W_enc"].dtype)
    z = x @ tensors["W_enc"] + tensors["b_enc"]
    f = z * (z > tensors["threshold"])
    y = f @ tensors["W_dec"] + tensors["b_dec"]
    return f, y + x @ tensors["W_skip"].T if "W_skip" in tensors else y


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.double() for key, tensor in tensors.items()}


@pytest.fixture(params=[False, True], ids=["plain", "skip"])
def tensors(request):
    return transcoder_tensors(skip=request.param)


@pytest.mark.parametrize("shape", [(D_IN,), (1, D_IN), (2, 3, D_IN), (0, D_IN)])
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_the_formula(tensors, shape, grad):
    transcoder, x = Transcoder(tensors), normal(*shape, seed=9)
    with torch.set_grad_enabled(grad):
        found = transcoder.encode(x), transcoder.decode(transcoder.encode(x), x), transcoder(x)
    f, y = by_formula(doubled(tensors), x.double())
    eager = by_formula(tensors, x)
    for name, actual, exact, plain in zip(("f", "decoded", "y"), found, (f, y, y), (*eager, eager[1]), strict=True):
        assert actual.requires_grad == grad
        assert_within_budget(name, actual, exact, plain)


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_both_routes_are_one_function(tensors, monkeypatch, sparse_below):
    """On numbers whose sums are exact, to the bit."""
    exact = {key: lattice(*tensor.shape, seed=n) for n, (key, tensor) in enumerate(tensors.items())}
    transcoder, x = Transcoder(exact | {"threshold": exact["threshold"].abs()}), lattice(50, D_IN, seed=9)
    monkeypatch.setattr(density, "decode_dense_above", lambda device: sparse_below)
    expected = transcoder(x).detach()
    dense, sparse = transcoder.encode(x).detach(), transcoder.encode_sparse(x)
    assert torch.equal(dense, sparse.to_dense())
    assert 0 < len(sparse.indices) < dense.numel()
    with torch.no_grad():
        assert torch.equal(transcoder(x), expected)
        assert torch.equal(transcoder.decode(sparse, x), expected)
        assert torch.equal(transcoder.decode(dense, x), expected)


def test_decode_without_x_leaves_the_skip_out():
    tensors = transcoder_tensors()
    plain = Transcoder({key: tensor for key, tensor in tensors.items() if key != "W_skip"})
    f = plain.encode(normal(5, D_IN))
    assert torch.equal(Transcoder(tensors).decode(f), plain.decode(f))


def test_gradients_are_those_of_the_formula(tensors):
    """But that of the threshold, which is the straight-through one of the kernels."""
    transcoder, x = Transcoder(doubled(tensors)), normal(9, D_IN, dtype=torch.float64).requires_grad_()
    weights = {key: tensor.clone().requires_grad_() for key, tensor in doubled(tensors).items()}
    target = normal(9, D_OUT, dtype=torch.float64, seed=7)
    found = torch.autograd.grad((transcoder(x) - target).square().sum(), (x, *transcoder.parameters()))
    loss = (by_formula(weights, x)[1] - target).square().sum()
    names = [name for name, _ in transcoder.named_parameters()]
    expected = torch.autograd.grad(loss, (x, *(weights[name] for name in names)), allow_unused=True)
    for name, actual, wanted in zip(("x", *names), found, expected, strict=True):
        if name != "threshold":
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_a_threshold_at_z_does_not_fire():
    one = {"W_enc": torch.ones(1, 2), "W_dec": torch.ones(2, 1), "b_enc": torch.zeros(2), "b_dec": torch.zeros(1)}
    transcoder = Transcoder(one | {"threshold": torch.tensor([2.0, 1.5])})
    assert transcoder.encode(torch.tensor([2.0])).tolist() == [0.0, 2.0]


def test_a_threshold_below_0_counts_as_0(tensors):
    """One's own optimiser may take it there; its gradient arrives all the same."""
    transcoder, x = Transcoder(tensors | {"threshold": torch.zeros(D_SAE)}), normal(50, D_IN)
    with torch.no_grad():
        expected = transcoder.encode(x)
        transcoder.threshold.fill_(-1)
        assert torch.equal(transcoder.encode(x), expected)
    f = transcoder.encode(x)
    assert torch.equal(f, expected)
    assert (x @ tensors["W_enc"] + tensors["b_enc"] < 0).any()
    transcoder.jumprelu(x, bandwidth=4.0).l0.sum().backward()
    assert transcoder.threshold.grad is not None
    assert transcoder.threshold.grad.all()


def test_nan_stays_visible(tensors):
    x = normal(3, D_IN)
    x[1, 2] = torch.nan
    with torch.no_grad():
        y = Transcoder(tensors)(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_dtype_and_layout(tensors):
    transcoder = Transcoder(tensors | {"W_enc": transposed(tensors["W_enc"])})
    assert transcoder.W_enc.T.is_contiguous()
    half = transcoder.to(torch.bfloat16)
    assert {name: p.dtype for name, p in half.named_parameters() if p.dtype != torch.bfloat16} == {
        "threshold": torch.float32
    }
    assert half(normal(2, D_IN)).dtype == torch.float32
    assert half.encode(normal(2, D_IN)).dtype == torch.bfloat16


def test_autocast_changes_no_bit(tensors):
    transcoder, x = Transcoder(tensors), normal(6, D_IN)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = transcoder(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(transcoder(x), expected)


def test_sizes_and_text(tensors):
    transcoder = Transcoder(tensors, metadata=FACTS)
    assert (transcoder.d_in, transcoder.d_sae, transcoder.d_out) == (D_IN, D_SAE, D_OUT)
    assert transcoder.metadata == FACTS
    assert ("no skip" in repr(transcoder)) == ("W_skip" not in tensors)


def test_state_dict_round_trip(tensors):
    transcoder, x = Transcoder(tensors), normal(3, D_IN)
    other = Transcoder({key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    other.load_state_dict(transcoder.state_dict())
    assert torch.equal(other(x), transcoder(x))


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load(tmp_path, tensors, dtype, device):
    transcoder = Transcoder(tensors, metadata=FACTS)
    transcoder.save(tmp_path / "it")
    loaded, x = Transcoder.load(tmp_path / "it", device=device, dtype=dtype), normal(7, D_IN)
    expected = transcoder if dtype is None else Transcoder(tensors).to(dtype)
    assert torch.equal(loaded(x), expected(x))
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in expected.parameters()]
    assert loaded.metadata == {key: FACTS[key] for key in ("model", "site", "site_out", "layer")} | {"l0": 21.4}


def test_a_dtype_in_which_a_weight_is_inf(tmp_path, tensors):
    Transcoder(tensors | {"W_dec": tensors["W_dec"] * 1e6}).save(tmp_path / "it")
    with pytest.raises(ValueError, match="dtype: expected one that holds W_dec, got float16, in which it is Inf"):
        Transcoder.load(tmp_path / "it", dtype=torch.float16)


def test_load_of_circuit_tracer(tmp_path, tensors):
    write("circuit-tracer", tensors, transcoder_config(), tmp_path / "set")
    x = normal(7, D_IN)
    assert torch.equal(Transcoder.load(tmp_path / "set" / "layer_3.safetensors")(x), Transcoder(tensors)(x))


def test_saved_thresholds_are_at_least_0(tmp_path, tensors):
    transcoder = Transcoder(tensors)
    with torch.no_grad():
        transcoder.threshold.fill_(-1)
    transcoder.save(tmp_path / "it")
    assert not Transcoder.load(tmp_path / "it").threshold.any()


def test_refusals(tmp_path, tensors):
    transcoder = Transcoder(tensors)
    for call, message in (
        (lambda: transcoder(torch.zeros(2, D_IN + 1)), "x: expected shape [..., 4], got [2, 5]"),
        (lambda: transcoder.decode(torch.zeros(2, 3)), "f: expected shape [..., 7], got [2, 3]"),
        (lambda: transcoder(torch.zeros(2, D_IN, device="meta")), "x: expected device cpu, got meta"),
        (lambda: Transcoder(tensors | {"W_dec": torch.zeros(1, 5)}), "tensors: W_dec: expected shape [7, 5], got"),
        (lambda: Transcoder({}), "tensors: expected the tensors W_enc, "),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)
    for call, message in (
        (lambda: transcoder(torch.zeros(2, D_IN, dtype=torch.int64)), "x: expected a floating dtype, got int64"),
        (lambda: transcoder([1.0]), "x: expected a torch.Tensor, got list"),
        (lambda: transcoder.decode([1.0]), "f: expected a torch.Tensor or a SparseCode, got list"),
        (lambda: Transcoder([]), "tensors: expected "),
        (lambda: Transcoder(tensors, metadata=[]), "metadata: expected "),
        (lambda: Transcoder.load(tmp_path, dtype=torch.int8), "dtype: expected "),
        (lambda: Transcoder.load(3), "path: expected a str or an os.PathLike, got int"),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(message)
    with pytest.raises(BadFileError):
        Transcoder.load(tmp_path)


def test_decode_wants_the_input_of_its_code():
    transcoder = Transcoder(transcoder_tensors())
    with pytest.raises(ValueError, match=r"x: expected the input of f, got shape \[3, 4\]"):
        transcoder.decode(torch.zeros(2, D_SAE), torch.zeros(3, D_IN))


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(EnvironmentProblemError, match="device: expected one of the 0 GPUs"):
        Transcoder.load(tmp_path, device="cuda")
