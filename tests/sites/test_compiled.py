"""Models that `torch.compile` has seen: with hooks they give what eager ones do, without them the compiled code runs.

pytest tests/sites/test_compiled.py
"""

import pytest
import torch
from torch import nn

from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation import evaluate_splice
from gemmascope.sites import Capture, Site, attach
from tests import tiny_models as tiny
from tests.sites.test_attach import ATT, MLP, RESID, Constant, hook_count, logits, random_sae

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def own_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def forward_of_layers(model):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")
    return model


class Around(nn.Module):
    """A model within a compiled function that knows nothing of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.run = torch.compile(lambda ids: self.model(ids), backend="eager")

    def __call__(self, ids):
        return self.run(ids)


WAYS = [whole, in_place, forward, layers, forward_of_layers, Around]


@pytest.mark.parametrize("compiled", WAYS)
def test_hooks_set_after_the_first_run(compiled):
    model, ids = tiny.gemma2(), tiny.tokens()
    clean, expected, captured = logits(model, ids), {}, {}
    for value in (0.0, 1.0):
        with attach(model, dict.fromkeys((RESID, ATT, MLP), Constant(value))), Capture(model, [ATT, MLP]) as capture:
            expected[value] = logits(model, ids)
        captured[value] = capture[MLP]
    model = compiled(model)
    assert torch.equal(logits(model, ids), clean)
    for value in (0.0, 1.0, 0.0):  # each splice is its own, whatever was compiled under the one before
        with attach(model, dict.fromkeys((RESID, ATT, MLP), Constant(value))), Capture(model, [MLP]) as capture:
            assert torch.equal(logits(model, ids), expected[value])
            assert torch.equal(logits(model, ids), expected[value])
        assert torch.equal(capture[MLP], captured[value])
        assert torch.equal(logits(model, ids), clean)
    assert hook_count(model) == 0


@pytest.mark.parametrize("compiled", [whole, layers])
def test_the_cost_of_a_splice(compiled):
    model, ids, mean = tiny.gemma2(), tiny.tokens(), torch.ones(16)
    expected = evaluate_splice(model, ids, RESID, Constant(), mean)
    model = compiled(model)
    logits(model, ids)
    assert evaluate_splice(model, ids, RESID, Constant(), mean) == expected


def test_what_was_compiled_is_put_back():
    model = in_place(tiny.gemma2())
    call = model._compiled_call_impl
    outer, inner = attach(model, {RESID: nn.Identity()}), attach(model, {ATT: nn.Identity()})
    assert model._compiled_call_impl is not call
    outer.detach()
    assert model._compiled_call_impl is not call  # the other one is attached still
    inner.detach()
    assert model._compiled_call_impl is call
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_compiled_while_attached():
    model, ids = tiny.gemma2(), tiny.tokens()
    clean = logits(model, ids)
    with attach(model, {RESID: Constant()}):
        expected = logits(model, ids)
        model.compile(backend="eager")
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), clean)


class Counting:
    """A backend that counts the graphs it runs, and the products in them."""

    def __init__(self):
        self.compiled = self.run = self.products = 0

    def __call__(self, graph, inputs):
        self.compiled += 1
        products = sum("linear" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            self.run += 1
            self.products += products
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_what_lies_between_the_saes_is_compiled(first):
    model, ids = tiny.gemma2(), tiny.tokens()
    saes = {site: random_sae(site) for site in (RESID, ATT, MLP)}
    with attach(model, saes):
        expected = logits(model, ids)
    clean, backend = logits(model, ids), Counting()
    compiled = torch.compile(model, backend=backend)
    if first == "compile":
        assert torch.equal(logits(compiled, ids), clean)
    for _ in range(2):
        with attach(model, saes):
            assert torch.equal(logits(compiled, ids), expected)
            so_far = backend.compiled
            backend.run = backend.products = 0
            assert torch.equal(logits(compiled, ids), expected)
            assert backend.compiled == so_far
            # Seven a layer and the logits; PyTorch 2.11 leaves the product behind the hook of att out.
            assert 7 * len(model.model.layers) <= backend.products <= 7 * len(model.model.layers) + 1
        assert torch.equal(logits(compiled, ids), clean)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_gradients_of_what_is_compiled():
    model, ids = tiny.gemma2(), tiny.tokens()
    sae, found = random_sae(RESID), []
    for run in (model, torch.compile(model, backend=Counting())):
        with attach(model, {RESID: sae}):
            loss = run(ids).logits.square().mean()
        found.append(torch.autograd.grad(loss, [sae.W_dec, model.model.embed_tokens.weight]))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one)


def test_what_is_captured_or_measured_is_not_compiled():
    model, ids, mean, backend = tiny.gemma2(), tiny.tokens(), torch.ones(16), Counting()
    expected = evaluate_splice(model, ids, RESID, Constant(), mean)
    compiled = torch.compile(model, backend=backend)
    with attach(model, {MLP: random_sae(MLP)}), Capture(model, [RESID]):
        logits(compiled, ids)
    assert evaluate_splice(compiled, ids, RESID, Constant(), mean) == expected
    assert backend.run == 0
    logits(compiled, ids)
    assert backend.run > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # within torch
def test_by_inductor():
    model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(RESID)
    with attach(model, {RESID: sae}):
        expected = logits(model, ids)
        torch.testing.assert_close(logits(torch.compile(model), ids), expected)


def test_a_forward_that_goes_around_the_layers():
    """As the replay of a CUDA graph does."""
    model, ids = tiny.gemma2(), tiny.tokens()
    output = model(ids)
    message = r"^site layer_1/resid: expected to fire once .* did not go through the model's own layers"
    model.forward = lambda ids: output
    for use in (attach(model, {RESID: Constant()}), Capture(model, [Site(1, "resid")])):
        with use, pytest.raises(EnvironmentProblemError, match=message):
            model(ids)
