"""Contenders of others compute what they are said to: against the fp64 reference, in the budget of eager PyTorch."""

import importlib.metadata
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from bench.cases import make
from bench.contenders import UnavailableError
from bench.peers import __main__ as peers
from bench.timing.gate import exact_outputs
from bench.timing.inputs import construct
from gemmascope.saes import JumpReLUSAE
from gemmascope.training.config import Loss
from gemmascope.training.losses import loss_and_gradients
from gemmascope.training.state import TrainState
from gemmascope.training.step import reference_step
from tests.helpers import assert_within_budget

CPU = torch.device("cpu")
PACKAGES = {
    "saelens": "sae-lens",
    "saelens_autocast": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}
GRADIENTS = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


@pytest.fixture
def inputs():
    """With a window wide enough to hold entries, and a λ that is felt beside them."""
    return replace(construct(24, 96, 64, 6, CPU), loss=Loss(l0_coefficient=0.02, bandwidth=0.05))


def eager_outputs(inputs) -> dict[str, torch.Tensor]:
    sae = inputs.sae
    out = loss_and_gradients(sae, inputs.x, inputs.loss)
    found = {name: getattr(out.gradients, name) for name in GRADIENTS}
    x_hat = sae(inputs.x)
    return found | {"x_hat": x_hat, "module": x_hat, "loss": out.loss}


def assert_agrees(contender, inputs, expected: set[str]) -> None:
    """Every output within twice the error that our reference has in fp32 of the same thing."""
    contender.set_up(inputs)
    found, exact, eager = contender.outputs(), exact_outputs(inputs), eager_outputs(inputs)
    assert set(found) == expected
    for name, value in found.items():
        assert_within_budget(name, value.float(), exact[name], eager[name].detach().float())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", {"x_hat", "module", "loss"} | GRADIENTS),
        ("embedding_bag", {"x_hat"}),
        ("torch_sparse", {"x_hat"}),
    ],
)
def test_plain_pytorch_agrees_with_the_reference(name, expected, inputs):
    assert_agrees(make(name), inputs, expected)


@pytest.mark.parametrize("beta1", [0.0, 0.7])
def test_the_dense_step_is_the_same_update_as_ours(beta1, inputs):
    """Of tokens that come again, so that no latent with a first moment is without an entry."""
    inputs = replace(inputs, rule=inputs.rule._replace(beta1=beta1))
    dense = make("dense")
    dense.set_up(inputs)
    assert ("drift on" in dense.differs) == (beta1 > 0)
    states = [
        TrainState.start(JumpReLUSAE(24, 96, impl="reference", dtype=dtype), first_moments=beta1 > 0)
        for dtype in (torch.float64, torch.float32)
    ]
    for state in states:
        with torch.no_grad():
            for name, value in state.sae.named_parameters():
                value.copy_(getattr(inputs.sae, name))
        for _ in range(2):
            reference_step(state, inputs.x.to(state.sae.W_dec.dtype), inputs.loss, inputs.rule)
    for _ in range(2):
        dense.step()
    exact, eager = (state.sae for state in states)
    W_enc, b_enc, W_dec, b_dec, log_threshold = dense.parameters
    for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        assert_within_budget(name, value, getattr(exact, name), getattr(eager, name))
    assert_within_budget("threshold", log_threshold.exp(), exact.threshold, eager.threshold)


def test_the_dense_step_moves_every_parameter(inputs):
    dense = make("dense")
    dense.set_up(inputs)
    before = [parameter.detach().clone() for parameter in dense.parameters]
    dense.step()
    assert all((p != old).any() for p, old in zip(dense.parameters, before, strict=True))


@pytest.mark.parametrize("name", ["dense", "embedding_bag", "torch_sparse"])
def test_decoding_what_was_encoded_is_inference(name, inputs):
    contender = make(name)
    contender.set_up(inputs)
    contender.before("decode")
    assert torch.equal(contender.decode(), contender.infer())


def test_calling_the_dense_module_is_inference(inputs):
    dense = make("dense")
    dense.set_up(inputs)
    assert torch.equal(dense.module(), dense.infer())
    assert dense.sae.W_dec.data_ptr() == dense.W_dec.data_ptr()


def test_gradients_of_embedding_bag_are_ours(inputs):
    contender, ours = make("embedding_bag"), make("ours_pytorch")
    for one in (contender, ours):
        one.set_up(inputs)
        one.before("decode_backward")
    (values, W_dec), (our_values, our_W_dec, *_) = contender.decode_backward(), ours.decode_backward()
    assert torch.allclose(values, our_values, rtol=1e-5, atol=1e-6)
    assert torch.allclose(W_dec, our_W_dec, rtol=1e-5, atol=1e-6)


def test_bf16_contenders_hold_bf16_operands():
    inputs = construct(24, 96, 64, 6, CPU, dtype="bf16")
    contender = make("dense")
    contender.set_up(inputs)
    assert contender.infer().dtype == torch.bfloat16
    assert set(contender.outputs()) == {"x_hat", "module", "loss"}


@pytest.mark.parametrize(
    ("name", "taken", "reason"),
    [
        ("dictionary_learning", (0.0,), "its trainer has Adam's β1 at 0 and takes no 0.7"),
        ("sparsify", (0.0, 0.9), "its trainer has Adam's β1 at 0.9 and takes no 0.7"),
    ],
)
def test_a_trainer_that_cannot_have_a_first_moment_says_so(name, taken, reason):
    contender = make(name)
    for beta1 in taken:
        contender.check_beta1(beta1)
    with pytest.raises(UnavailableError, match=reason):
        contender.check_beta1(0.7)


@pytest.mark.parametrize("name", ["ours", "dense", "dense_compiled", "saelens", "saelens_autocast"])
def test_these_have_whatever_first_moment_is_asked_for(name):
    for beta1 in (0.0, 0.7, 0.9):
        make(name).check_beta1(beta1)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UnavailableError, match=f"{PACKAGES[name]} is not installed"):
        make(name).check_available(CPU)


def test_the_check_goes_on_after_a_package_that_fails(monkeypatch, capsys):
    def missing(self, device):
        raise UnavailableError("not here")

    monkeypatch.setattr("bench.contenders.Contender.check_available", missing)
    assert peers.check_packages() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.endswith("cannot be used: not here") for line in lines)


@pytest.mark.filterwarnings("ignore")
class TestPackages:
    """Skipped where a package is not installed; `make bench-peers` makes an environment with all of them."""

    @pytest.fixture(autouse=True)
    def _packages(self, request):
        package = PACKAGES[request.node.callspec.params["name"]]
        # Not imported here: sparsify chooses its decoder when it is.
        if find_spec({"eai-sparsify": "sparsify"}.get(package, package.replace("-", "_"))) is None:
            pytest.skip(f"{package} is not installed")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("saelens", {"x_hat", "loss"} | GRADIENTS),
            ("dictionary_learning", {"x_hat", "W_dec", "b_enc"}),
        ],
    )
    def test_jumprelu_agrees_with_the_reference(self, name, expected, inputs):
        assert_agrees(make(name), inputs, expected)

    @pytest.mark.parametrize("name", ["saelens"])
    def test_its_adam_has_the_first_moment_that_is_asked_for(self, name, inputs):
        for asked, found in ((0.0, 0.9), (0.7, 0.7)):
            contender = make(name)
            contender.set_up(replace(inputs, rule=inputs.rule._replace(beta1=asked)))
            assert contender.trainer.optimizer.defaults["betas"][0] == found
            assert ("with a first moment" in contender.differs) == (not asked)

    @pytest.mark.parametrize("name", ["dictionary_learning", "sparsify"])
    def test_its_adam_has_the_one_that_is_said(self, name, inputs):
        contender = make(name)
        contender.set_up(inputs)
        optimiser = {
            "dictionary_learning": lambda: contender.trainer.optimizer,
            "sparsify": lambda: contender.training.optimiser,
        }[name]()
        assert optimiser.defaults["betas"][0] == contender.only_beta1

    @pytest.mark.parametrize("name", ["saelens"])
    def test_the_comparison_would_notice_another_loss(self, name, inputs):
        contender = make(name)
        contender.set_up(inputs)
        found = contender.outputs()
        other = Loss(l0_coefficient=1.01 * inputs.loss.l0_coefficient, bandwidth=inputs.loss.bandwidth)
        gradient = loss_and_gradients(inputs.sae, inputs.x, other).gradients.threshold
        error = (found["threshold"] - gradient).norm() / gradient.norm()
        assert error > 1e-4

    @pytest.mark.parametrize("name", ["sparsify"])
    def test_topk_agrees_with_plain_pytorch(self, name, inputs):
        contender = make(name)
        contender.set_up(inputs)
        found, exact = contender.outputs(), contender.exact(inputs)
        assert set(found) == set(exact) == {"x_hat", "module", "loss"} | GRADIENTS - {"threshold"}
        for key, value in found.items():
            assert (value.double() - exact[key]).norm() <= 1e-6 * exact[key].norm(), key

    @pytest.mark.parametrize("name", ["sparsify"])
    def test_topk_keeps_k_latents(self, name, inputs):
        contender = make(name)
        contender.set_up(inputs)
        values, latents = contender.encode()
        assert values.shape == latents.shape == (64, inputs.k)

    @pytest.mark.parametrize("name", PACKAGES)
    def test_a_step_moves_every_parameter_and_forward_and_backward_do_not(self, name, inputs):
        contender = make(name)
        contender.set_up(inputs)
        trained = {
            "saelens": lambda: contender.training_sae,
            "saelens_autocast": lambda: contender.training_sae,
            "dictionary_learning": lambda: contender.trainer.ae,
            "sparsify": lambda: contender.coder,
        }[name]()
        start = {key: value.detach().clone() for key, value in trained.named_parameters()}
        contender.before("backward")
        contender.backward()
        assert all(value.grad is not None for value in trained.parameters())
        assert all(torch.equal(value, start[key]) for key, value in trained.named_parameters())
        contender.step()
        assert all((value != start[key]).any() for key, value in trained.named_parameters())

    @pytest.mark.parametrize("name", ["saelens", "dictionary_learning", "sparsify"])
    def test_calling_the_module_is_inference(self, name, inputs):
        contender = make(name)
        contender.set_up(inputs)
        x_hat = contender.module()
        assert not x_hat.requires_grad
        assert torch.allclose(x_hat, contender.infer(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", PACKAGES)
    def test_inputs_are_not_written_to(self, name, inputs):
        x, weights = inputs.x.clone(), {key: value.detach().clone() for key, value in inputs.sae.named_parameters()}
        contender = make(name)
        contender.set_up(inputs)
        for part in contender.parts:
            contender.before(part)
            getattr(contender, part)()
        assert torch.equal(inputs.x, x)
        assert all(torch.equal(value, weights[key]) for key, value in inputs.sae.named_parameters())
