"""`accelerate`: the object stays its package's own, nothing it holds goes stale, and what cannot be taken is named."""

import copy
import pickle
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save
from torch import nn

from gemmascope import accelerate, decelerate
from gemmascope.saes import JumpReLUSAE
from tests.helpers import assert_bitwise_equal, normal
from tests.saes.parity import counted, made
from tests.saes.standins import circuit_tracer, dictionary_learning, saelens

D, F = 24, 160
MAKE = partial(saelens.JumpReLUSAE, D, F)


@pytest.fixture
def pair():
    """The same SAE as it was and accelerated."""
    return made(MAKE), accelerate(made(MAKE))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- what is left to the package


def test_gradients_are_the_packages_own(pair):
    theirs, ours = pair
    x = normal(33, D)
    with counted() as calls:
        for sae in pair:
            sae(x).square().sum().backward()
        for name, parameter in theirs.named_parameters():
            if name != "threshold":  # which gets none in either
                assert_close(dict(ours.named_parameters())[name].grad, parameter.grad)
        ours.requires_grad_(False)
        for sae in pair:
            given = x.clone().requires_grad_()
            sae(given).sum().backward()
            assert given.grad.any()
        frozen = ours(x)
    assert calls["encode"] == 1  # nothing required a gradient any more
    assert not frozen.requires_grad


def test_a_hook_at_the_input_may_ask_for_gradients(pair):
    ours = pair[1].requires_grad_(False)
    ours.hook_sae_input.add_hook(lambda x: x.clone().requires_grad_())
    assert ours(normal(3, D)).requires_grad


def test_under_a_compiler_and_a_transform(pair, monkeypatch):
    theirs, ours = pair
    x = normal(3, 5, D)
    with torch.no_grad(), counted() as calls:
        assert_close(torch.func.vmap(ours)(x), theirs(x))
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert_close(ours(x), theirs(x))
    assert calls["encode"] == 0


def test_errors_about_arguments_are_the_packages_own(pair):
    with torch.no_grad():
        for bad in (normal(3, D).long(), normal(3, D + 1)):
            for sae in pair:
                with pytest.raises((RuntimeError, ValueError)):
                    sae.decode(bad)
        assert_close(*(sae(normal(3, D).long()) for sae in pair))  # which SAELens casts


def test_options_of_dictionary_learning():
    x = normal(9, D)
    cases = [
        (partial(dictionary_learning.AutoEncoder, D, F), "forward", {"output_features": True}),
        (partial(dictionary_learning.GatedAutoEncoder, D, F), "encode", {"return_gate": True}),
        (partial(dictionary_learning.JumpReluAutoEncoder, D, F), "encode", {"output_pre_jump": True}),
        (partial(dictionary_learning.AutoEncoderTopK, D, F), "encode", {"use_threshold": True}),
        (partial(dictionary_learning.BatchTopKSAE, D, F), "encode", {"use_threshold": False}),
    ]
    for make, method, options in cases:
        theirs, ours = made(make), accelerate(made(make))
        with torch.no_grad():
            expected, found = (getattr(sae, method)(x, **options) for sae in (theirs, ours))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_linears_with_hooks_or_of_another_kind_are_called():
    ours, seen = accelerate(made(partial(dictionary_learning.AutoEncoder, D, F))), []
    handle = ours.encoder.register_forward_hook(lambda module, given, value: seen.append(value))
    with torch.no_grad(), counted() as calls:
        ours(normal(3, D))
        assert [value.shape for value in seen] == [(3, F)]
        handle.remove()
        ours.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        ours.decode(ours.encode(normal(3, D)))
    assert len(seen) == 2
    assert calls["encode"] == 0


def test_an_activation_put_in_later_is_used(pair):
    x, standard = normal(3, D), partial(saelens.StandardSAE, D, F)
    with torch.no_grad():
        for theirs, ours in (pair, (made(standard), accelerate(made(standard)))):
            before = ours.encode(x)
            theirs.activation_fn = ours.activation_fn = nn.Tanh()
            assert_close(ours.encode(x), theirs.encode(x))
            assert (ours.encode(x) - before).abs().max() > 0.1


# ---- hooks


@pytest.mark.parametrize("pre_activations", [False, True])
def test_hooks_see_the_same_values(pair, pre_activations):
    x, seen = normal(3, 5, D), {sae: {} for sae in pair}
    names = [name for name in saelens.HOOKS if pre_activations or name != "hook_sae_acts_pre"]
    for sae in pair:
        for name in names:
            getattr(sae, name).add_hook(lambda value, name=name, sae=sae: seen[sae].update({name: value}))
    with torch.no_grad(), counted() as calls:
        theirs, ours = (sae(x) for sae in pair)
    assert calls["encode"] == (not pre_activations)  # which are never stored, so that this is left to the package
    assert_close(ours, theirs)
    assert [*seen[pair[0]]] == [*seen[pair[1]]] == names
    for name, value in seen[pair[0]].items():
        assert_close(seen[pair[1]][name], value)


@pytest.mark.parametrize("name", saelens.HOOKS)
def test_what_a_hook_changes_is_used(pair, name):
    x = normal(3, 5, D)
    with torch.no_grad():
        plain = pair[0](x)
        for sae in pair:
            getattr(sae, name).add_hook(lambda value: value * (torch.arange(value.shape[-1]) % 2))
        theirs, ours = (sae(x) for sae in pair)
    assert_close(ours, theirs)
    assert (theirs - plain).abs().max() > 0.1


def test_a_latent_silenced_in_place(pair):
    x = normal(33, D)
    for sae in pair:
        sae.hook_sae_acts_post.add_hook(lambda f: f.index_fill_(-1, torch.arange(0, F, 2), 0.0))
    with torch.inference_mode():
        assert_close(*(sae(x) for sae in pair))
        theirs, ours = (sae.decode(sae.encode(x)) for sae in pair)
    assert_close(ours, theirs)


def test_the_error_term(pair):
    x = normal(9, D)
    for sae in pair:
        sae.use_error_term = True
    with torch.no_grad():
        assert_close(pair[1](x), x)
        assert_close(pair[1](x), pair[0](x))


# ---- nothing goes stale


def scale_data(sae):
    sae.W_enc.data *= 2  # of which neither the address nor the version of the parameter tells
    sae.W_dec.data.div_(2)


def update(sae):
    with torch.no_grad():
        sae.W_enc.mul_(2)
        sae.threshold.mul_(0.5)


def replace(sae):
    sae.W_enc = nn.Parameter(2 * sae.W_enc.detach().contiguous())
    sae.W_dec = nn.Parameter(sae.W_dec.detach().T.contiguous().T)


def load(sae):
    sae.load_state_dict({name: 2 * value for name, value in sae.state_dict().items()})


def load_and_assign(sae):
    sae.load_state_dict({name: (2 * value).contiguous() for name, value in sae.state_dict().items()}, assign=True)


def step(sae):
    optimiser = torch.optim.SGD(sae.parameters(), lr=0.1)
    sae(normal(9, D)).square().sum().backward()
    optimiser.step()


def to_double_and_back(sae):
    sae.double().float()


@pytest.mark.parametrize("change", [scale_data, update, replace, load, load_and_assign, step, to_double_and_back])
def test_changed_weights_are_used_at_once(pair, change):
    x = normal(33, D)
    with torch.no_grad():
        before = [sae(x) for sae in pair][1]
    for sae in pair:
        change(sae)
    with torch.no_grad(), counted() as calls:
        ours, theirs = pair[1](x), pair[0](x)
    assert_close(ours, theirs)
    assert calls["encode"] == 1
    assert pair[1].W_enc.T.is_contiguous()
    if change is not to_double_and_back:
        assert (ours - before).abs().max() > 1e-3
    decelerate(pair[1])
    for name, parameter in pair[0].named_parameters():
        assert_close(dict(pair[1].named_parameters())[name], parameter)


def test_weights_that_share_memory_stay_together():
    sae = made(partial(dictionary_learning.AutoEncoder, D, F))
    sae.encoder.weight = nn.Parameter(sae.encoder.weight.detach().contiguous())
    sae.decoder.weight = nn.Parameter(sae.encoder.weight.detach().T)  # already latent by latent
    accelerate(sae)
    sae.encoder.weight.data.mul_(2)
    assert_bitwise_equal("tied", sae.decoder.weight, sae.encoder.weight.T)
    sae = made(MAKE)
    sae.W_dec = nn.Parameter(sae.W_enc.detach().T)  # not latent by latent, and not to be parted
    theirs, ours = copy.deepcopy(sae), accelerate(sae)
    with torch.no_grad():
        assert_close(ours(normal(9, D)), theirs(normal(9, D)))
    ours.W_enc.data.mul_(2)
    assert_bitwise_equal("tied", ours.W_dec, ours.W_enc.T)
    decelerate(ours)
    assert_bitwise_equal("tied", ours.W_dec, ours.W_enc.T)


def test_a_weight_of_another_shape_is_not_laid_back(pair):
    theirs, ours = pair
    for sae in pair:
        sae.W_enc = nn.Parameter(torch.cat([sae.W_enc, sae.W_enc], 1).contiguous())
    decelerate(ours)
    assert_bitwise_equal("W_enc", ours.W_enc, theirs.W_enc)


# ---- saving, copying


def test_state_dict_and_saving(pair):
    theirs, ours = (sae.state_dict() for sae in pair)
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert_bitwise_equal(name, ours[name], value)
    ours["W_enc"].mul_(2)  # the parameter itself, as ever
    assert_bitwise_equal("W_enc", pair[1].W_enc, 2 * pair[0].W_enc)
    with pytest.raises(ValueError, match="contiguous"):
        save(ours)
    pair[1].process_state_dict_for_saving(ours)
    for name, value in load_safetensors(save(ours)).items():
        assert_bitwise_equal(name, value, ours[name])


def test_copies_and_pickles_are_accelerated_too(pair, monkeypatch):
    theirs, ours = pair
    module = ModuleType("sae_lens.saes.jumprelu_sae")
    module.JumpReLUSAE = saelens.JumpReLUSAE
    for name in ("sae_lens", "sae_lens.saes", "transformer_lens"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sae_lens.saes.jumprelu_sae", module)
    monkeypatch.setitem(sys.modules, "transformer_lens.hook_points", hooks := ModuleType("hook_points"))
    hooks.HookPoint = saelens.HookPoint
    x = normal(9, D)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        with torch.no_grad():
            assert_bitwise_equal("x_hat", again(x), ours(x))
        again.W_enc.data.zero_()
        assert ours.W_enc.any()
        assert type(decelerate(again)) is saelens.JumpReLUSAE
    assert type(pickle.loads(pickle.dumps(theirs))) is saelens.JumpReLUSAE


def test_again_and_back(pair):
    ours = pair[1]
    kind = type(ours)
    assert accelerate(ours, impl="reference") is ours
    assert type(ours) is kind
    assert decelerate(ours) is ours
    assert type(ours) is saelens.JumpReLUSAE
    assert ours.W_enc.is_contiguous()
    assert not any("accelerated" in name for name in vars(ours))
    with pytest.raises(TypeError, match=r"module: expected what accelerate returned, got JumpReLUSAE"):
        decelerate(ours)


# ---- models


def test_the_saes_of_a_model():
    saes = {f"blocks.{i}.hook_resid_post": made(MAKE, i) for i in range(2)}
    model, plain = saelens.HookedSAETransformer(saes), copy.deepcopy(saelens.HookedSAETransformer(saes))
    assert accelerate(model) is model
    assert all(type(sae).__name__ == "AcceleratedJumpReLUSAE" for sae in saes.values())
    with torch.no_grad():
        assert_close(model(normal(2, 5, D)), plain(normal(2, 5, D)))
    decelerate(model)
    assert {type(sae) for sae in saes.values()} == {saelens.JumpReLUSAE}


def test_a_set_of_transcoders_and_a_list():
    one = partial(circuit_tracer.SingleLayerTranscoder, D, F, torch.relu)
    both, plain = (
        circuit_tracer.TranscoderSet([made(one), made(one, 1)]),
        circuit_tracer.TranscoderSet([made(one), made(one, 1)]),
    )
    accelerate(both)
    assert type(both) is circuit_tracer.TranscoderSet
    x = normal(2, 5, D)
    with torch.no_grad():
        assert_close(both.decode(both.encode(x)), plain.decode(plain.encode(x)))
    holder = nn.ModuleList([made(MAKE), made(partial(dictionary_learning.AutoEncoder, D, F)), JumpReLUSAE(D, F)])
    holder.append(holder[0])
    accelerate(holder)
    assert type(holder[2]) is JumpReLUSAE
    assert type(decelerate(holder)[0]) is saelens.JumpReLUSAE


def test_of_a_model_all_or_none():
    model = nn.ModuleDict({"good": made(MAKE), "bad": made(partial(saelens.AbsTopKSAE, D, F, k=3))})
    with pytest.raises(ValueError, match=r"^bad: expected one of SAELens's .*JumpReLUSAE.*, got AbsTopKSAE"):
        accelerate(model)
    assert type(model["good"]) is saelens.JumpReLUSAE


# ---- what cannot be taken


@pytest.mark.parametrize("bad", [None, "sae", torch.zeros(3), nn.Linear(2, 3), JumpReLUSAE(2, 3)], ids=str)
def test_what_is_no_sae_of_another_package(bad):
    with pytest.raises(TypeError, match=r"^module: expected an? "):
        accelerate(bad)
    with pytest.raises(TypeError, match=r"^module: expected "):
        decelerate(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(saelens.JumpReLUTrainingSAE, D, F), r"got JumpReLUTrainingSAE \(save_inference_model "),
        (dictionary_learning.IdentityDict, r"expected one of dictionary_learning's AutoEncoder, .*, got IdentityDict"),
        (circuit_tracer.CrossLayerTranscoder, r"circuit-tracer's SingleLayerTranscoder, got CrossLayerTranscoder"),
        (
            partial(circuit_tracer.SingleLayerTranscoder, D, F, nn.Tanh()),
            r"activation_function: expected a ReLU, JumpReLU or TopK, got Tanh\(\)",
        ),
    ],
)
def test_kinds_that_are_not_taken(make, message):
    with pytest.raises(ValueError, match=message):
        accelerate(make())


class OwnEncoder(saelens.JumpReLUSAE):
    def encode(self, x):
        return 2 * super().encode(x)


class OwnName(saelens.JumpReLUSAE):
    """Changes nothing of what is computed."""


def test_classes_of_ones_own():
    with pytest.raises(ValueError, match=r"encode: expected the method of JumpReLUSAE, got that of OwnEncoder"):
        accelerate(OwnEncoder(D, F))
    sae = accelerate(OwnName(D, F))
    assert isinstance(sae, OwnName)
    assert type(decelerate(sae)) is OwnName


def test_a_method_of_the_objects_own():
    sae = made(MAKE)
    sae.forward = lambda x: x
    with pytest.raises(ValueError, match="forward: expected the method of JumpReLUSAE, got one of this object's own"):
        accelerate(sae)


def transposed(sae):
    sae.W_enc = nn.Parameter(sae.W_enc.detach().T)


def too_narrow(sae):
    sae.threshold = nn.Parameter(torch.ones(F - 1))


def missing(sae):
    del sae.threshold


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def no_parameter(sae):
    nn.utils.parametrize.register_parametrization(sae, "W_enc", Twice())


def of_two_dtypes(sae):
    sae.W_dec = nn.Parameter(sae.W_dec.detach().double())


def scaled(sae):
    sae.cfg.finetuning_scaling_factor = True


def other_activation(sae):
    sae.activation_fn = nn.GELU()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (transposed, rf"W_enc: expected shape \[{D}, {F}\], got \[{F}, {D}\]"),
        (too_narrow, rf"threshold: expected shape \[{F}\], got \[{F - 1}\]"),
        (missing, "threshold: expected a tensor, got no attribute of that name"),
        (no_parameter, "W_enc: expected a Parameter"),
        (of_two_dtypes, "expected dtype torch.float64, got torch.float32"),
        (scaled, "finetuning_scaling_factor: expected none"),
        (other_activation, r"activation_fn: expected a ReLU, got GELU"),
        (lambda sae: sae.to("meta"), "W_dec: expected a tensor that holds numbers, got one on the meta device"),
    ],
)
def test_objects_that_are_not_what_they_should_be(spoil, message):
    sae = made(MAKE)
    spoil(sae)
    kind = type(sae)
    with pytest.raises(ValueError, match=f"^module: .*{message}"):
        accelerate(sae)
    assert type(sae) is kind


def test_a_class_changed_since_is_not_given_back(pair):
    ours = pair[1]
    nn.utils.parametrize.register_parametrization(ours, "b_enc", nn.Identity())
    with pytest.raises(ValueError, match="module: expected the class that accelerate made, got Parametrized"):
        decelerate(ours)


def test_impl(pair):
    with pytest.raises(ValueError, match=r"impl: expected one of 'auto', .*, got 'fast'"):
        accelerate(pair[0], impl="fast")
    assert type(pair[0]) is saelens.JumpReLUSAE


def test_no_package_is_imported():
    code = (
        "import sys, gemmascope; from tests.saes.standins import saelens;"
        "gemmascope.accelerate(saelens.JumpReLUSAE(4, 8));"
        "print(*{'sae_lens', 'transformer_lens', 'dictionary_learning', 'sparsify', 'circuit_tracer'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
