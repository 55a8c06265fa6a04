"""`JumpReLUSAE` as a module: the formula, the threshold's dtype, the storage of W_enc, folding, gradients, errors."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmascope import JumpReLUSAE, SparseCode
from gemmascope.kernels import reference

D_MODEL, D_SAE = 5, 23
# Relative error allowed between two orders of summation of a few dozen fp64 terms.
FP64 = {"rtol": 1e-12, "atol": 1e-13}


def random_sae(dtype=torch.float64, seed=0, **options) -> JumpReLUSAE:
    """An SAE with nothing at its initial value; a fifth of the thresholds are 0."""
    generator = torch.Generator().manual_seed(seed)
    options = {"input_scale": 3.5, "generator": generator} | options
    sae = JumpReLUSAE(D_MODEL, D_SAE, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.threshold.clamp_(min=0)
        sae.threshold[::5] = 0
    return sae.to(dtype)


def random_x(*shape, dtype=torch.float64, seed=1) -> torch.Tensor:
    return 3.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_parameters(sae: JumpReLUSAE) -> reference.Parameters:
    return reference.Parameters(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)


# ---- construction


def test_initialisation_is_that_of_gemma_scope():
    sae = JumpReLUSAE(D_MODEL, D_SAE, threshold_init=0.25)
    shapes = {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()}
    assert shapes == {
        "W_enc": (D_MODEL, D_SAE),
        "W_dec": (D_SAE, D_MODEL),
        "b_enc": (D_SAE,),
        "b_dec": (D_MODEL,),
        "threshold": (D_SAE,),
    }
    assert (sae.d_model, sae.d_sae) == (D_MODEL, D_SAE)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert torch.equal(sae.threshold, torch.full((D_SAE,), 0.25))


def test_generator_decides_the_weights_and_the_global_one_is_left_alone():
    first, second, other = (JumpReLUSAE(4, 9, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first.W_dec, second.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    state = torch.get_rng_state()
    JumpReLUSAE(4, 9, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_metadata_is_the_modules_own():
    metadata = {"site": "model.layers.3.output"}
    sae = JumpReLUSAE(2, 3, metadata=metadata)
    metadata["site"] = "changed"
    assert sae.metadata == {"site": "model.layers.3.output"}


def test_representation_says_what_matters():
    assert "d_model=2, d_sae=3, input_scale=4, impl='reference'" in repr(
        JumpReLUSAE(2, 3, input_scale=4, impl="reference")
    )
    assert "folded" in repr(JumpReLUSAE(2, 3, pre_encoder_bias=False))


# ---- the formula


def test_one_latent_by_hand():
    sae = JumpReLUSAE(1, 1, input_scale=2.0)
    with torch.no_grad():
        for name, value in {"W_enc": 2.0, "b_enc": -1.0, "W_dec": 0.5, "b_dec": 1.0, "threshold": 3.0}.items():
            getattr(sae, name).fill_(value)
    # x/C - b_dec = 2.5, 2, 1.5; z = 4, 3, 2; z = θ is off; x̂ = C·(f·W_dec + b_dec)
    x = torch.tensor([[7.0], [6.0], [5.0]])
    assert sae.encode(x).flatten().tolist() == [4.0, 0.0, 0.0]
    assert sae(x).flatten().tolist() == [6.0, 2.0, 2.0]
    sae.pre_encoder_bias = False
    assert sae.encode(x).flatten().tolist() == [6.0, 5.0, 4.0]


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_encode_decode_and_forward_equal_the_reference(pre_encoder_bias):
    sae = random_sae(pre_encoder_bias=pre_encoder_bias)
    x = random_x(2, 7, D_MODEL)
    expected = reference.sae_forward(x.reshape(-1, D_MODEL) / 3.5, as_parameters(sae), pre_encoder_bias)
    f = sae.encode(x)
    assert 0 < expected.l0.sum() < expected.f.numel()
    torch.testing.assert_close(f, expected.f.reshape(2, 7, D_SAE), **FP64)
    torch.testing.assert_close(sae.decode(f), 3.5 * expected.x_hat.reshape(2, 7, D_MODEL), **FP64)
    assert torch.equal(sae(x), sae.decode(f))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encode_sparse_and_its_decoding_equal_the_dense_path(dtype):
    sae, x = random_sae(dtype), random_x(2, 7, D_MODEL, dtype=dtype)
    code, f = sae.encode_sparse(x), sae.encode(x)
    assert isinstance(code, SparseCode)
    assert not code.values.requires_grad
    torch.testing.assert_close(code.to_dense(), f.reshape(14, D_SAE))
    torch.testing.assert_close(sae.decode(code), sae.decode(f).reshape(14, D_MODEL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_activations_have_the_dtype_of_the_weights_and_the_output_that_of_x(dtype, x_dtype):
    sae, x = JumpReLUSAE(D_MODEL, D_SAE, dtype=dtype), random_x(3, D_MODEL, dtype=x_dtype)
    assert sae.encode(x).dtype == dtype
    assert sae(x).dtype == x_dtype
    assert sae.encode_sparse(x).values.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("shape", [(0, D_MODEL), (3, 0, D_MODEL)])
def test_empty_batch(shape):
    sae, x = random_sae(), torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    assert sae(x).shape == shape
    assert sae.encode(x).shape == (*shape[:-1], D_SAE)
    code = sae.encode_sparse(x)
    assert (code.n_tokens, code.nnz) == (0, 0)
    assert sae.decode(code).shape == (0, D_MODEL)
    sae(x).sum().backward()
    assert not any(parameter.grad.any() for parameter in sae.parameters())


def test_one_vector_without_a_batch():
    sae, x = random_sae(), random_x(1, D_MODEL)
    torch.testing.assert_close(sae(x[0]), sae(x)[0], **FP64)


def test_autocast_changes_nothing():
    sae, x = random_sae(torch.float32), random_x(50, D_MODEL, dtype=torch.float32)
    plain = sae.encode(x), sae(x), sae.fold().b_enc
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sae.encode(x), sae(x), sae.fold().b_enc
    for expected, actual in zip(plain, cast, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", ["reference", "pytorch", "auto"])
@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_changes_no_gradient(impl, sparse):
    """Wherever ``backward()`` is called."""
    x, found = random_x(50, D_MODEL, dtype=torch.float32), []
    for enabled, inside in ((False, False), (True, False), (True, True)):
        sae, given = random_sae(torch.float32, impl=impl), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            if sparse:
                code = sae.encode_sparse(given)
                loss = (sae.decode(code._replace(values=code.values.requires_grad_())) - x).square().sum()
            else:
                loss = (sae(given) - x).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([loss, *([] if sparse else [given.grad])])
        found[-1] += [p.grad for p in sae.parameters() if p.grad is not None]
    for cast in found[1:]:
        assert len(cast) == len(found[0]) > 2
        assert all(map(torch.equal, cast, found[0]))


# ---- thresholds below 0


@pytest.mark.parametrize("impl", ["reference", "pytorch", "auto"])
def test_a_threshold_below_zero_is_zero(impl):
    """As f = relu(z)·1[z > θ], by which Gemma Scope's files are read, has it."""
    sae = random_sae(torch.float32, impl=impl)
    with torch.no_grad():
        sae.threshold[1::3] = torch.tensor([-1e-3, -0.5, -1e30, -3.0]).repeat(2)
    x = random_x(60, D_MODEL, dtype=torch.float32)
    p = reference.Parameters(*(t.detach() for t in as_parameters(sae)))
    z = reference.sae_forward(x / 3.5, p).z
    expected = torch.relu(z) * (z > sae.threshold)
    assert ((z < 0) & (z > sae.threshold)).any()
    for f in (sae.encode(x), sae.encode_sparse(x).to_dense(), sae.jumprelu(x).f):
        assert torch.equal(f != 0, expected != 0)
        torch.testing.assert_close(f, expected)
    assert torch.equal(sae.jumprelu(x).l0, (expected != 0).sum(1).float())
    with torch.no_grad():
        x_hat = sae(x)
    torch.testing.assert_close(sae.fold()(x), x_hat)
    assert sae.fold().threshold.min() == 0


def test_a_threshold_below_zero_is_saved_as_zero(tmp_path):
    sae = random_sae(torch.float32)
    with torch.no_grad():
        sae.threshold[3] = -0.25
    sae.save(tmp_path / "sae")
    loaded = JumpReLUSAE.load(tmp_path / "sae")
    assert loaded.threshold[3] == 0
    assert sae.threshold[3] == -0.25
    x = random_x(20, D_MODEL, dtype=torch.float32)
    assert torch.equal(loaded(x), sae(x))


def test_a_threshold_below_zero_has_the_gradient_of_zero():
    sae, zero = random_sae(), random_sae()
    with torch.no_grad():
        sae.threshold[::2] = -0.25
        zero.threshold[::2] = 0
    x = random_x(60, D_MODEL)
    for each in (sae, zero):
        out = each.jumprelu(x, 0.5)
        (out.f.square().sum() + out.l0.sum()).backward()
    assert torch.equal(sae.threshold.grad, zero.threshold.grad)
    assert sae.threshold.grad[::2].all()


def test_projection():
    sae = random_sae(torch.float32)
    with torch.no_grad():
        sae.threshold[3], sae.W_dec[5] = -0.25, 0
    before = copy.deepcopy(sae)
    assert sae.project_() is sae
    assert torch.equal(sae.threshold, before.threshold.clamp(min=0))
    norm = before.W_dec.norm(dim=1, keepdim=True)
    assert torch.equal(sae.W_dec, before.W_dec / torch.where(norm > 0, norm, 1))
    for name in ("W_enc", "b_enc", "b_dec"):
        assert torch.equal(getattr(sae, name), getattr(before, name))


# ---- the defaults of the process


@pytest.fixture(params=["bfloat16", "float16", "float64", "meta"])
def other_default(request):
    """Another default dtype, or a default device on which nothing can be computed."""
    try:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))
        yield request.param
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_nothing_depends_on_the_defaults_of_the_process(other_default, tmp_path):
    sae = JumpReLUSAE(D_MODEL, D_SAE, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    other = JumpReLUSAE(D_MODEL, D_SAE, device="cpu")
    other.load_state_dict(sae.state_dict())
    sae.save(tmp_path / "sae")
    loaded = JumpReLUSAE.load(tmp_path / "sae")
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    expected = JumpReLUSAE(D_MODEL, D_SAE, generator=torch.Generator().manual_seed(0))
    for found in (sae, other, loaded, sae.fold()):
        for name, parameter in expected.named_parameters():
            assert torch.equal(getattr(found, name), parameter)
            assert getattr(found, name).dtype == torch.float32


def test_without_a_device_it_is_on_the_cpu():
    with torch.device("meta"):
        assert {p.device.type for p in JumpReLUSAE(D_MODEL, D_SAE).parameters()} == {"cpu"}
    assert {p.device.type for p in JumpReLUSAE(D_MODEL, D_SAE, device="meta").parameters()} == {"meta"}


# ---- what moving and copying keep


@pytest.mark.parametrize("moves", [["bfloat16"], ["half"], ["bfloat16", "float"], ["double", "half", "float"]])
def test_threshold_keeps_its_fp32_values_and_gradient(moves):
    sae = random_sae(torch.float32)
    sae(random_x(9, D_MODEL, dtype=torch.float32)).square().sum().backward()
    expected, W_dec = sae.threshold.detach().clone(), sae.W_dec.detach().clone()
    expected_grad = torch.randn(D_SAE)
    sae.threshold.grad = expected_grad.clone()
    for move in moves:
        getattr(sae, move)()
    assert sae.threshold.dtype == sae.threshold.grad.dtype == torch.float32
    assert torch.equal(sae.threshold, expected)
    assert torch.equal(sae.threshold.grad, expected_grad)
    assert not torch.equal(sae.W_dec.float(), W_dec)
    assert isinstance(sae.threshold, torch.nn.Parameter)


def test_threshold_is_fp64_with_fp64_weights():
    assert JumpReLUSAE(2, 3, dtype=torch.float64).threshold.dtype == torch.float64
    assert JumpReLUSAE(2, 3).double().threshold.dtype == torch.float64
    assert JumpReLUSAE(2, 3, dtype=torch.bfloat16).threshold.dtype == torch.float32


def test_threshold_parameter_survives_a_move_for_the_optimiser():
    sae = JumpReLUSAE(2, 3)
    threshold = sae.threshold
    assert sae.to(torch.bfloat16).threshold is threshold


def test_encoder_stays_latent_major():
    sae = random_sae(torch.float32)
    loaded = JumpReLUSAE(D_MODEL, D_SAE)
    loaded.load_state_dict(sae.state_dict())
    for copied in (sae, loaded, copy.deepcopy(sae), sae.fold(), sae.to(torch.bfloat16), sae.float(), sae.cpu()):
        assert copied.W_enc.shape == (D_MODEL, D_SAE)
        assert copied.W_enc.T.is_contiguous()
        assert copied.W_dec.is_contiguous()
    assert torch.equal(loaded.threshold, random_sae(torch.float32).threshold)


# ---- state dicts

KEYS = ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "input_scale", "pre_encoder_bias"]


def same_function(found, expected) -> bool:
    scalars = [(sae.input_scale, sae.pre_encoder_bias) for sae in (found, expected)]
    return scalars[0] == scalars[1] and all(map(torch.equal, found.parameters(), expected.parameters()))


def test_a_state_dict_holds_all_that_the_function_depends_on():
    sae = random_sae(torch.float32, pre_encoder_bias=False)
    found = sae.state_dict()
    assert list(found) == KEYS
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert (found["input_scale"].dtype, found["input_scale"].item()) == (torch.float64, 3.5)
    assert (found["pre_encoder_bias"].dtype, found["pre_encoder_bias"].item()) == (torch.bool, False)
    assert found["W_dec"].data_ptr() == sae.W_dec.data_ptr()
    assert set(dict(sae.named_parameters())) == set(KEYS[:5])
    assert not list(sae.buffers())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_loading_restores_the_function(assign, nested, strict):
    sae, other = random_sae(torch.float32, pre_encoder_bias=False), JumpReLUSAE(D_MODEL, D_SAE)
    ours, theirs = ((torch.nn.ModuleDict({"sae": s}) if nested else s) for s in (sae, other))
    assert list(ours.state_dict()) == ["sae." * nested + key for key in KEYS]
    result = theirs.load_state_dict(copy.deepcopy(ours.state_dict()), strict=strict, assign=assign)
    assert result == ([], [])
    assert same_function(other, sae)
    assert (type(other.input_scale), type(other.pre_encoder_bias)) == (float, bool)
    x = random_x(9, D_MODEL, dtype=torch.float32)
    assert torch.equal(other(x), sae(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_assigning_keeps_the_dtype_of_the_threshold_and_the_storage_of_the_encoder(dtype):
    source = {key: value.to(dtype) if key in KEYS[:5] else value for key, value in random_sae().state_dict().items()}
    source["W_enc"] = source["W_enc"].contiguous()
    for nested in (False, True):
        sae = JumpReLUSAE(D_MODEL, D_SAE)
        sae.b_enc.requires_grad_(False)
        sae.threshold.requires_grad_(False)
        module = torch.nn.ModuleList([sae]) if nested else sae
        module.load_state_dict({"0." * nested + key: value for key, value in source.items()}, assign=True)
        assert (sae.W_enc.dtype, sae.W_dec.dtype) == (dtype, dtype)
        assert sae.threshold.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(sae.threshold, source["threshold"].to(sae.threshold.dtype))
        assert sae.W_enc.T.is_contiguous()
        assert torch.equal(sae.W_enc, source["W_enc"])
        assert [p.requires_grad for p in sae.parameters()] == [True, False, True, True, False]


def test_loading_onto_meta_by_assignment():
    with torch.device("meta"):
        sae = JumpReLUSAE(D_MODEL, D_SAE)
        assert sae.state_dict()["input_scale"].device.type == "cpu"
    sae.load_state_dict(random_sae().state_dict(), assign=True)
    assert same_function(sae, random_sae())


def test_safetensors_can_hold_a_state_dict(tmp_path):
    sae, other = random_sae(torch.float32, pre_encoder_bias=False), JumpReLUSAE(D_MODEL, D_SAE)
    save_file({key: value.contiguous() for key, value in sae.state_dict().items()}, tmp_path / "sae.safetensors")
    other.load_state_dict(load_file(tmp_path / "sae.safetensors"))
    assert same_function(other, sae)
    assert other.W_enc.T.is_contiguous()


def test_keys_missing_and_unexpected():
    state = random_sae().state_dict()
    for key in KEYS:
        partial = {name: value for name, value in state.items() if name != key}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
            JumpReLUSAE(D_MODEL, D_SAE).load_state_dict(partial)
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "sae\.{key}"'):
            torch.nn.ModuleDict({"sae": JumpReLUSAE(D_MODEL, D_SAE)}).load_state_dict(
                {f"sae.{name}": value for name, value in partial.items()}
            )
        sae = JumpReLUSAE(D_MODEL, D_SAE, input_scale=2.0, pre_encoder_bias=False, dtype=torch.float64)
        before = getattr(copy.deepcopy(sae), key)
        assert sae.load_state_dict(partial, strict=False) == ([key], [])
        found = getattr(sae, key)
        assert torch.equal(found, before) if key in KEYS[:5] else found == before
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "scale"'):
        random_sae().load_state_dict(state | {"scale": state["input_scale"]})
    assert random_sae().load_state_dict(state | {"scale": state["input_scale"]}, strict=False) == ([], ["scale"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("W_enc", torch.zeros(D_SAE, D_MODEL), "size mismatch for sae.W_enc"),
        ("input_scale", torch.tensor(0.0), "sae.input_scale: expected a finite number > 0, got 0.0"),
        ("input_scale", torch.tensor(-1.0), "sae.input_scale: expected a finite number > 0, got -1.0"),
        ("input_scale", torch.tensor(torch.inf), "sae.input_scale: expected a finite number > 0, got inf"),
        ("input_scale", torch.tensor(torch.nan), "sae.input_scale: expected a finite number > 0, got nan"),
        ("input_scale", torch.tensor(2.0).bfloat16(), "sae.input_scale: expected float64, got bfloat16"),
        ("input_scale", torch.ones(1), r"sae.input_scale: expected a scalar, got shape \[1\]"),
        ("input_scale", 2.0, "sae.input_scale: expected a torch.Tensor, got float"),
        ("pre_encoder_bias", torch.tensor(1.0), "sae.pre_encoder_bias: expected bool, got float32"),
        ("pre_encoder_bias", torch.tensor([True]), r"sae.pre_encoder_bias: expected a scalar, got shape \[1\]"),
        ("pre_encoder_bias", True, "sae.pre_encoder_bias: expected a torch.Tensor, got bool"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_bad_values_in_a_state_dict(key, value, message, assign):
    module = torch.nn.ModuleDict({"sae": random_sae()})
    with pytest.raises(RuntimeError, match=rf"Error\(s\) in loading state_dict for [\s\S]*{message}"):
        module.load_state_dict(module.state_dict() | {f"sae.{key}": value}, assign=assign)
    assert (module["sae"].input_scale, module["sae"].pre_encoder_bias) == (3.5, True)


# ---- folding


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_folded_equals_unfolded(pre_encoder_bias):
    sae = random_sae(pre_encoder_bias=pre_encoder_bias, metadata={"layer": 3})
    before = copy.deepcopy(sae.state_dict())
    folded, x = sae.fold(), random_x(200, D_MODEL)
    assert folded.is_folded
    assert (folded.input_scale, folded.pre_encoder_bias, folded.metadata) == (1.0, False, {"layer": 3})
    assert not sae.is_folded
    torch.testing.assert_close(folded(x), sae(x), **FP64)
    torch.testing.assert_close(folded.encode(x), 3.5 * sae.encode(x), **FP64)
    assert torch.equal(folded.W_enc, sae.W_enc)
    assert torch.equal(folded.W_dec, sae.W_dec)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_folding_twice_changes_nothing():
    folded = random_sae().fold()
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), folded.fold().parameters(), strict=True))


# ---- gradients


@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_gradients_equal_the_written_backward(pre_encoder_bias):
    sae = random_sae(pre_encoder_bias=pre_encoder_bias, input_scale=1.0)
    x, bandwidth, l0_coefficient = random_x(40, D_MODEL), 0.7, 0.3
    out = sae.jumprelu(x, bandwidth)
    ((x - sae.decode(out.f)).square().sum(1) + l0_coefficient * out.l0).mean().backward()

    parameters = as_parameters(sae)
    forward = reference.sae_forward(x, parameters, pre_encoder_bias)
    below = (forward.z < sae.threshold) & (sae.threshold - forward.z < bandwidth / 2)
    assert below.any()
    expected = reference.sae_backward(x, parameters, forward, l0_coefficient, bandwidth, pre_encoder_bias)
    for name, parameter, gradient in zip(expected._fields, parameters, expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, **FP64, msg=lambda message, name=name: f"{name}: {message}"
        )


def test_gradient_reaches_x_through_scale_and_bias():
    sae = random_sae()
    x = random_x(6, D_MODEL).requires_grad_()
    sae(x).sum().backward()
    gate = sae.encode(x.detach()) != 0
    # C·(1ᵀW_decᵀ gated)·W_encᵀ/C
    expected = (gate * sae.W_dec.sum(1)) @ sae.W_enc.T
    torch.testing.assert_close(x.grad, expected.detach(), **FP64)


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_model": 2.0}, TypeError, "d_model: expected an int, got float"),
        ({"d_sae": True}, TypeError, "d_sae: expected an int, got bool"),
        ({"d_model": 0}, ValueError, "d_model: expected at least 1, got 0"),
        ({"d_sae": -3}, ValueError, "d_sae: expected at least 1, got -3"),
        ({"input_scale": "2"}, TypeError, "input_scale: expected a number, got str"),
        ({"input_scale": 0.0}, ValueError, "input_scale: expected a finite number > 0, got 0.0"),
        ({"input_scale": float("nan")}, ValueError, "input_scale: expected a finite number > 0, got nan"),
        ({"threshold_init": None}, TypeError, "threshold_init: expected a number, got NoneType"),
        (
            {"threshold_init": -1e-3},
            ValueError,
            "threshold_init: expected a finite number ≥ 0 and ≤ 3.40282e+38, got -0.001",
        ),
        (
            {"threshold_init": 1e39},
            ValueError,
            "threshold_init: expected a finite number ≥ 0 and ≤ 3.40282e+38, got 1e+39",
        ),
        (
            {"dtype": torch.int32},
            TypeError,
            "dtype: expected float16 or bfloat16 or float32 or float64, got int32",
        ),
        ({"dtype": "float32"}, TypeError, "dtype: expected a dtype, got str"),
        ({"pre_encoder_bias": 1}, TypeError, "pre_encoder_bias: expected a bool, got int"),
        ({"impl": None}, TypeError, "impl: expected a str, got NoneType"),
        ({"metadata": ["layer"]}, TypeError, "metadata: expected a dict, got list"),
        ({"generator": 3}, TypeError, "generator: expected a Generator, got int"),
        ({"device": 0}, TypeError, "device: expected a torch.device or its name, got int"),
        (
            {"device": "gpu"},
            ValueError,
            "device: expected the name of a device, such as 'cpu' or 'cuda:0', got 'gpu'",
        ),
    ],
)
def test_bad_construction(options, error, message):
    with pytest.raises(error) as caught:
        JumpReLUSAE(**({"d_model": 2, "d_sae": 3} | options))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(4, 3), ValueError, "x: expected shape [..., 5], got [4, 3]"),
        (torch.tensor(1.0), ValueError, "x: expected shape [..., 5], got []"),
        (torch.zeros(4, 5, dtype=torch.int64), TypeError, "x: expected a floating dtype, got int64"),
        (torch.zeros(4, 5, device="meta"), ValueError, "x: expected device cpu, got meta"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "encode_sparse", "forward", "jumprelu"])
def test_bad_input(method, x, error, message):
    with pytest.raises(error) as caught:
        getattr(JumpReLUSAE(D_MODEL, D_SAE), method)(x)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        ([1.0], TypeError, "f: expected a torch.Tensor or a SparseCode, got list"),
        (torch.zeros(4, 5), ValueError, "f: expected shape [..., 23], got [4, 5]"),
        (torch.tensor(1.0), ValueError, "f: expected shape [..., 23], got []"),
        (torch.zeros(4, 23, dtype=torch.complex64), TypeError, "f: expected a floating dtype, got complex64"),
        (torch.zeros(4, 23, dtype=torch.bool), TypeError, "f: expected a floating dtype, got bool"),
        (torch.zeros(4, 23, device="meta"), ValueError, "f: expected device cpu, got meta"),
    ],
)
def test_bad_activations(f, error, message):
    with pytest.raises(error) as caught:
        JumpReLUSAE(D_MODEL, D_SAE).decode(f)
    assert str(caught.value) == message


def test_unknown_implementation_is_named():
    sae = JumpReLUSAE(D_MODEL, D_SAE, impl="cuda")
    for method in (sae.encode, sae.encode_sparse):
        with pytest.raises(ValueError, match=r"impl: expected one of 'auto', .*'triton', got 'cuda'"):
            method(torch.zeros(2, D_MODEL))


def test_bad_bandwidth():
    with pytest.raises(ValueError, match="bandwidth: expected a finite number > 0, got 0"):
        JumpReLUSAE(D_MODEL, D_SAE).jumprelu(torch.zeros(2, D_MODEL), 0.0)
