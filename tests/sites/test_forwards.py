"""Each forward has a state of its own: recomputed, in threads, one within another, on copies, with modules replaced.

pytest tests/sites/test_forwards.py
"""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemmascope.activations import harvest
from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation import language_model_loss
from gemmascope.sites import Capture, Site, all_sites, attach, detach_all, probe
from tests import tiny_models as tiny
from tests.sites.test_attach import ATT, MLP, RESID, Constant, hook_count, logits, random_sae
from tests.sites.test_sites import every_model

pytest.importorskip("transformers")

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def checkpointing(model, reentrant):
    # Renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of checkpoints under no_grad
class TestCheckpointing:
    @REENTRANT
    @pytest.mark.parametrize("site", [ATT, MLP], ids=str)
    def test_is_refused_within_what_is_computed_again(self, site, reentrant):
        model = tiny.gemma2().train()
        checkpointing(model, reentrant)
        message = rf"^site {site}: expected .* found gradient checkpointing, .*; switch gradient checkpointing off$"
        with attach(model, {site: random_sae(site)}), pytest.raises(EnvironmentProblemError, match=message):
            model(tiny.tokens(), use_cache=False)
        with attach(model, {site: random_sae(site)}):
            logits(model, tiny.tokens())

    @REENTRANT
    def test_gives_the_right_gradient_at_resid(self, reentrant):
        """There the hook is outside of what is computed again."""
        model, gradients = tiny.gemma2().train(), []
        for prepare in (lambda: None, lambda: checkpointing(model, reentrant)):
            prepare()
            sae = random_sae(RESID)
            with attach(model, {RESID: sae}):
                loss = model(tiny.tokens(), use_cache=False).logits.logsumexp(-1).sum()
                logits(model, tiny.tokens(seed=5))
            loss.backward()
            gradients.append(sae.W_dec.grad)
        torch.testing.assert_close(*gradients)

    def test_of_torch_by_hand(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        layer = model.model.layers[0]
        run = layer.forward
        layer.forward = lambda *args, **kwargs: checkpoint(lambda x: run(x, **kwargs), *args, use_reentrant=False)
        message = r"^site layer_0/att: .* found gradient checkpointing, .*; switch gradient checkpointing off$"
        with attach(model, {ATT: Constant()}), pytest.raises(EnvironmentProblemError, match=message):
            model(ids)
        with attach(model, {ATT: Constant()}):
            without_gradients = logits(model, ids)
        layer.forward = run
        with attach(model, {ATT: Constant()}):
            assert torch.equal(logits(model, ids), without_gradients)


def test_threads_have_their_own_special_tokens():
    model, results = tiny.gemma2(), {}
    inputs = [tiny.tokens(seed=seed) for seed in range(4)]
    for seed, ids in enumerate(inputs):
        ids[:, 2 + seed] = tiny.EOS
    meet = threading.Barrier(len(inputs), timeout=60)

    def meeting(x):
        if threading.current_thread() is not threading.main_thread():
            meet.wait()  # every thread has begun its forward before any goes on
        return torch.zeros_like(x)

    with attach(model, {ATT: Constant(), RESID: meeting}), Capture(model, [RESID]):
        expected = [logits(model, ids) for ids in inputs]

        def work(index):
            with torch.no_grad():
                results[index] = model(inputs[index]).logits

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    assert all(torch.equal(results[index], expected[index]) for index in range(4))


@every_model
def test_a_forward_within_another(build):
    model, ids, other = build(), tiny.tokens(), tiny.tokens(rows=3, length=6, seed=2)
    ids[:, 4] = tiny.EOS
    inner = []

    def sae(x):
        if not inner:
            inner.append(None)
            inner[0] = logits(model, other)
        return torch.zeros_like(x)

    with torch.no_grad(), attach(model, {RESID: Constant()}), Capture(model, [RESID, MLP]) as capture:
        expected, expected_inner = logits(model, ids), logits(model, other)
        model(ids)
        expected_mlp = capture[MLP]
    with torch.no_grad(), attach(model, {RESID: sae}), Capture(model, [RESID, MLP]) as capture:
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(capture[MLP], expected_mlp)
    assert torch.equal(inner[0], expected_inner)


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_are_attached_to_copies(self, how):
        model, ids, sae = tiny.gemma2(), tiny.tokens(), random_sae(RESID)
        clean = logits(model, ids)
        with attach(model, {RESID: sae, ATT: Constant()}), Capture(model, [RESID]):
            expected = logits(model, ids)
            if how == "deepcopy":
                other = copy.deepcopy(model)
            elif how == "pickle":
                other = pickle.loads(pickle.dumps(model))
            else:
                torch.save(model, file := io.BytesIO())
                other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)  # noqa: TID251
            assert torch.equal(logits(other, ids), expected)
            nn.init.constant_(sae.b_dec, 7.0)  # the copy has its own
            logits(model, tiny.tokens(seed=3))
            assert torch.equal(logits(other, ids), expected)
        assert torch.equal(logits(model, ids), clean)
        assert torch.equal(logits(other, ids), expected)
        detach_all(other)
        assert torch.equal(logits(other, ids), clean)
        attach(other, {RESID: nn.Identity()}).detach()

    def test_of_one_layer_leave_the_model_behind(self):
        model = tiny.gemma2()
        with attach(model, {RESID: nn.Identity()}):
            file = pickle.dumps(model.model.layers[1])
        assert len(file) < 1.2 * len(pickle.dumps(model.model.layers[1])) + 2000


class TestDetachAll:
    def test_without_the_handle(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        clean = logits(model, ids)
        first = attach(model, {RESID: Constant()})
        attach(model, {ATT: Constant(), MLP: Constant()})
        with Capture(model, [RESID]) as capture:
            detach_all(model)
            assert torch.equal(logits(model, ids), clean)
            capture[RESID]  # whoever records goes on
        assert hook_count(model) == 0
        with attach(model, {RESID: Constant()}):
            first.detach()  # must not take the other one's place
            assert not torch.equal(logits(model, ids), clean)
        detach_all(model)
        assert torch.equal(logits(model, ids), clean)
        with pytest.raises(TypeError, match=r"^model: expected a Module, got str$"):
            detach_all("model")


class Adapter(nn.Module):
    """In the place of a linear layer, which it holds, as libraries of adapters put theirs."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.weight = base.weight

    def forward(self, x):
        return self.base_layer(x) + 0.1 * x.sum(-1, keepdim=True)


class TestReplacedModules:
    MESSAGE = (
        r"^site layer_0/att: expected the module that was there .* \(an adapter added or merged\?\); set them again"
    )

    @pytest.mark.parametrize("use", [lambda m: attach(m, {ATT: Constant()}), lambda m: Capture(m, [ATT])])
    def test_an_adapter_added_and_one_merged(self, use):
        model, ids = tiny.gemma2(), tiny.tokens()
        attention = model.model.layers[0].self_attn
        linear, adapter = attention.o_proj, Adapter(attention.o_proj)
        for before, after in ((linear, adapter), (adapter, linear)):
            attention.o_proj = before
            with use(model):
                logits(model, ids)
                attention.o_proj = after
                with pytest.raises(EnvironmentProblemError, match=self.MESSAGE):
                    logits(model, ids)
                attention.o_proj = before
                logits(model, ids)
        assert hook_count(model) == 0

    def test_a_layer_that_is_replaced_or_left_out(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        message = r"^site layer_1/resid: expected the module that was there when the hooks were set"
        with attach(model, {RESID: Constant()}):
            model.model.layers[1] = copy.deepcopy(model.model.layers[0])
            with pytest.raises(EnvironmentProblemError, match=message):
                logits(model, ids)
        model = tiny.gemma2()
        with attach(model, {MLP: Constant()}):
            model.config.num_hidden_layers = 2
            with pytest.raises(
                EnvironmentProblemError, match=r"^site layer_2/mlp: .* once in a forward, found 0 times$"
            ):
                logits(model, ids)


class Offload:
    """What accelerate's CPU offload does: weights on meta, loaded for each forward of their module."""

    def __init__(self, module):
        self.execution_device = torch.device("cpu")
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        run = module.forward

        def forward(*args, **kwargs):
            self.put(module, self.weights)
            try:
                return run(*args, **kwargs)
            finally:
                self.put(module, {name: weight.to("meta") for name, weight in self.weights.items()})

        module.forward, module._hf_hook = forward, self
        self.put(module, {name: weight.to("meta") for name, weight in self.weights.items()})

    def put(self, module, weights):
        for name, weight in weights.items():
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)


class TestOffloadedWeights:
    def test_run_where_they_are_loaded(self):
        model, ids, sites = tiny.gemma2().requires_grad_(False), tiny.tokens(), [ATT, MLP, RESID]
        expected, loss = harvest(model, ids, sites), language_model_loss(model, ids)
        with attach(model, dict.fromkeys(sites, Constant())):
            spliced = logits(model, ids)
        for module in model.modules():
            if module._parameters:
                Offload(module)
        assert all(parameter.is_meta for parameter in model.parameters())
        probe(model)
        harvested = harvest(model, ids, sites)
        assert all(torch.equal(harvested[site], expected[site]) for site in sites)
        assert language_model_loss(model, ids) == loss
        with attach(model, dict.fromkeys(sites, Constant())):
            assert torch.equal(logits(model, ids), spliced)
        assert language_model_loss(model, ids) == loss

    def test_that_nothing_loads_are_refused(self):
        model, ids = tiny.gemma2().to("meta"), tiny.tokens()
        message = r"^model: expected weights with values, found them on the device meta; load them first$"
        for use in (probe, lambda m: harvest(m, ids, [RESID]), lambda m: language_model_loss(m, ids)):
            with pytest.raises(EnvironmentProblemError, match=message):
                use(model)
        message = r"^site layer_1/resid: expected activations with values, found them on the device meta"
        for use in (attach(model, {RESID: Constant()}), Capture(model, [RESID])):
            with use, pytest.raises(EnvironmentProblemError, match=message):
                model(ids.to("meta"))


def test_data_parallel_is_refused():
    with pytest.raises(
        EnvironmentProblemError, match=r"^model: .* found it in DataParallel, which runs copies of them"
    ):
        all_sites(nn.DataParallel(tiny.gemma2()))


@pytest.mark.parametrize("first_use", ["before", "after"])
def test_hidden_states_are_the_spliced_ones(first_use):
    """What records them stays on the layers from its first use on, so it may stand before or after the splice."""
    model, ids = tiny.gemma2(), tiny.tokens()
    if first_use == "before":
        model(ids, output_hidden_states=True)
    for _ in range(2):
        with torch.no_grad(), attach(model, {RESID: Constant()}), Capture(model, [RESID, Site(0, "resid")]) as capture:
            states = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(states[1], capture[Site(0, "resid")])
        assert torch.equal(states[2], capture[RESID])
        assert (states[2][:, 1:] == 0).all()
    assert not (model(ids, output_hidden_states=True).hidden_states[2][:, 1:] == 0).any()
