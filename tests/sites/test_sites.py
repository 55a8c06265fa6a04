"""Sites of Gemma 2 and Gemma 3: names, capture, start-up probes. Splicing is in test_attach.py.

pytest tests/sites/test_sites.py
"""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gemmascope.activations import harvest
from gemmascope.errors import EnvironmentProblemError
from gemmascope.sites import INPUT_KINDS, KINDS, Capture, Site, all_sites, attach, probe, site_width, special_token_ids
from tests import tiny_models as tiny

pytest.importorskip("transformers")

MODELS = [
    pytest.param(tiny.gemma2, id="gemma2"),
    pytest.param(tiny.gemma3, id="gemma3"),
    pytest.param(tiny.gemma3_multimodal, id="gemma3-multimodal"),
]
every_model = pytest.mark.parametrize("build", MODELS)
RESID = Site(1, "resid")


def text_model(model):
    return getattr(model.model, "language_model", model.model)


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TestSite:
    @pytest.mark.parametrize(
        ("site", "name"),
        [
            (Site(20, "att"), "model.layers.20.self_attn.o_proj.input"),
            (Site(0, "mlp"), "model.layers.0.post_feedforward_layernorm.output"),
            (Site(3, "resid"), "model.layers.3.output"),
        ],
    )
    def test_names_are_those_of_deepmind(self, site, name):
        assert site.name == name
        assert Site.parse(name) == site

    @pytest.mark.parametrize(
        ("site", "transformer_lens", "nnsight"),
        [
            (Site(20, "att"), "blocks.20.attn.hook_z", "model.layers[20].self_attn.o_proj.input"),
            (Site(0, "mlp"), "blocks.0.hook_mlp_out", "model.layers[0].post_feedforward_layernorm.output"),
            (Site(3, "resid"), "blocks.3.hook_resid_post", "model.layers[3].output"),
        ],
    )
    def test_names_of_other_packages(self, site, transformer_lens, nnsight):
        assert (site.transformer_lens_name, site.nnsight_name) == (transformer_lens, nnsight)

    @given(st.builds(Site, st.integers(0, 999_999), st.sampled_from([*KINDS, *INPUT_KINDS])))
    def test_parse_inverts_every_name(self, site):
        for name in (str(site), site.name, site.transformer_lens_name, site.nnsight_name):
            assert Site.parse(name) == site
            assert Site.parse(name.replace("model.", "model.model.", 1)) == site  # nnsight around the model
            assert Site.parse(name.replace("model.", "model.language_model.", 1)) == site  # within a multimodal one

    @pytest.mark.parametrize(
        "name", ["", "layer_3", "layer_3/head", "layer_-1/att", "layer_03/att", "layer_٣/att", "layer_3/resid\n",
                 "model.layers.3", "model.layers.3.mlp.output", "xmodel.layers.3.output", "model.layers[3.output",
                 "model.layers[03].output", "model.layers[3].output[0]", "model.layers[3].output\n",
                 "blocks.3.hook_resid_pre", "blocks.3.attn.hook_q", "blocks.03.hook_mlp_out",
                 "blocks.3.hook_resid_post\n"]
    )  # fmt: skip
    def test_other_names_are_refused(self, name):
        with pytest.raises(
            ValueError,
            match=r"^site: expected layer_L/KIND with KIND one of att, mlp, resid, mlp_in, mlp_in_normed, or",
        ):
            Site.parse(name)

    def test_bad_fields(self):
        with pytest.raises(TypeError, match=r"^site: expected a Site or a str, got int$"):
            Site.parse(3)
        with pytest.raises(TypeError, match=r"^layer: expected an int, got float$"):
            Site(1.0, "att")
        with pytest.raises(ValueError, match=r"^layer: expected at least 0, got -1$"):
            Site(-1, "att")
        with pytest.raises(
            ValueError, match=r"^kind: expected one of att, mlp, resid, mlp_in, mlp_in_normed, got 'res'"
        ):
            Site(1, "res")


class TestFinding:
    @every_model
    def test_sites_and_widths(self, build):
        model = build()
        sites = all_sites(model)
        assert [str(site) for site in sites[:4]] == ["layer_0/att", "layer_0/mlp", "layer_0/resid", "layer_1/att"]
        assert len(sites) == 3 * tiny.LAYERS
        assert [site_width(model, site) for site in sites] == [24, 16, 16] * tiny.LAYERS

    @every_model
    def test_special_tokens_are_those_of_the_config(self, build):
        assert special_token_ids(build()) == (tiny.PAD, tiny.EOS, tiny.BOS)

    def test_special_tokens_may_be_lists_or_missing(self):
        model = tiny.gemma2(eos_token_id=[5, 7], bos_token_id=None)
        assert special_token_ids(model) == (0, 5, 7)

    def test_wrappers_and_the_base_model_are_looked_through(self):
        model = tiny.gemma2()
        assert all_sites(nn.Sequential(model)) == all_sites(model.model) == all_sites(model)

    def test_only_layers_that_run_are_sites(self):
        model = tiny.gemma2()
        model.config.num_hidden_layers = 2
        assert {site.layer for site in all_sites(model)} == {0, 1}
        with pytest.raises(ValueError, match=r"^site layer_2/att: expected a layer from 0 to 1, got 2$"):
            site_width(model, Site(2, "att"))

    def test_other_models_are_refused_naming_what_they_have(self):
        other = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)] * 3)})
        message = r"^model: expected exactly one stack .*found 0 in ModuleDict; candidates: blocks \(3 x Linear\)$"
        with pytest.raises(ValueError, match=message):
            all_sites(other)
        with pytest.raises(ValueError, match=r"found 0 in Linear; candidates: none$"):
            all_sites(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got str$"):
            all_sites("google/gemma-2-2b")

    @pytest.mark.parametrize("package", ["transformer_lens", "nnsight"])
    def test_models_of_other_packages_are_refused_by_name(self, package):
        """Even where they hold a stack of Gemma's layers; nothing of the package is imported."""
        base = type("Base", (nn.Module,), {"__module__": f"{package}.models"})
        model = type("Hooked", (base,), {})()
        model.original = tiny.gemma2()
        message = (
            rf"^model: expected a Gemma of transformers, got Hooked of {package}; .* names are understood as sites$"
        )
        for use in (all_sites, probe, lambda m: Capture(m, [RESID]), lambda m: attach(m, {RESID: nn.Identity()}),
                    lambda m: harvest(m, tiny.tokens(), [RESID])):  # fmt: skip
            with pytest.raises(TypeError, match=message):
                use(model)
        outside = type("Traced", (), {"__module__": f"{package}.models"})()  # nnsight's are no modules of PyTorch
        with pytest.raises(TypeError, match=rf"got Traced of {package}"):
            all_sites(outside)

    def test_two_stacks_are_refused_naming_both(self):
        two = nn.ModuleDict({"a": tiny.gemma2(), "b": tiny.gemma3()})
        message = r"found 2 .*a.model.layers \(3 x Gemma2DecoderLayer\), b.model.layers \(3 x Gemma3DecoderLayer\)$"
        with pytest.raises(ValueError, match=message):
            all_sites(two)

    def test_a_stack_without_config_is_refused(self):
        bare = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": tiny.gemma2().model.layers})})
        with pytest.raises(ValueError, match=r"^model: expected a config on decoder, found none$"):
            all_sites(bare)


class TestTensorParallel:
    MESSAGE = r"^site layer_1/att: expected o_proj on one device, found it sharded by tensor parallelism"

    def test_hooked_o_proj_is_refused(self):
        model = tiny.gemma2()
        model.model.layers[1].self_attn.o_proj._is_hooked = True  # what transformers' tp_plan leaves behind
        for use in (probe, lambda m: Capture(m, ["layer_1/att"]), lambda m: attach(m, {"layer_1/att": nn.Identity()})):
            with pytest.raises(EnvironmentProblemError, match=self.MESSAGE):
                use(model)
        assert site_width(model, Site(1, "mlp")) == tiny.WIDTH

    def test_only_a_split_of_the_input_features_is_refused(self):
        dist = pytest.importorskip("torch.distributed")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            model = tiny.gemma2()
            o_proj = model.model.layers[1].self_attn.o_proj
            weight = o_proj.weight.detach()
            o_proj.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))  # FSDP
            assert site_width(model, Site(1, "att")) == tiny.HEADS * tiny.HEAD_DIM
            o_proj.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
            with pytest.raises(EnvironmentProblemError, match=self.MESSAGE):
                site_width(model, Site(1, "att"))
        finally:
            dist.destroy_process_group()


class TestCapture:
    @every_model
    def test_the_model_can_be_rebuilt_from_its_sites(self, build):
        """z through W_O and its norm, the MLP of the sum, the stream, and at last the logits: all bit-equal."""
        model = build()
        text, ids = text_model(model), tiny.tokens()
        with torch.no_grad(), Capture(model, all_sites(model)) as capture:
            logits = model(ids).logits
        with torch.no_grad():
            stream = text.embed_tokens(ids)
            for index, layer in enumerate(text.layers):
                z = capture[Site(index, "att")]
                stream = stream + layer.post_attention_layernorm(layer.self_attn.o_proj(z))
                mlp = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(stream)))
                assert torch.equal(mlp, capture[Site(index, "mlp")])
                stream = stream + mlp
                assert torch.equal(stream, capture[Site(index, "resid")])
            rebuilt = model.lm_head(text.norm(stream))
            cap = text.config.final_logit_softcapping
            assert torch.equal(logits, rebuilt if cap is None else torch.tanh(rebuilt / cap) * cap)

    def test_hidden_states_would_have_been_wrong(self):
        """The reason for hooks: the last hidden state is the normed one."""
        model, ids, last = tiny.gemma2(), tiny.tokens(), Site(tiny.LAYERS - 1, "resid")
        with torch.no_grad(), Capture(model, [last]) as capture:
            hidden = model.model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(model.model.norm(capture[last]), hidden)
        assert (capture[last] - hidden).abs().max() > 1

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_captured_tensors_enter_autograd(self, mode):
        model = tiny.gemma2()
        with mode(), Capture(model, all_sites(model)) as capture:
            model.model(tiny.tokens(), use_cache=False)
        for site in capture.sites:
            x = capture[site]
            assert not x.is_inference()
            assert not x.requires_grad
            assert x.shape == (2, 9, tiny.width(site))
            weight = torch.ones(x.shape[-1], requires_grad=True)
            (x @ weight).square().sum().backward()
            assert weight.grad.isfinite().all()

    def test_the_latest_forward_counts(self):
        model = tiny.gemma2()
        with torch.no_grad(), Capture(model, ["layer_1/resid"]) as capture:
            model(tiny.tokens(seed=1))
            first = capture[RESID]
            model(tiny.tokens(rows=3, seed=2))
        assert (first.shape[0], capture["model.layers.1.output"].shape[0], hook_count(model)) == (2, 3, 0)

    def test_a_layer_that_returns_a_tuple(self):
        """transformers 4 did; the rest of the tuple must survive."""
        model, ids = tiny.gemma2(), tiny.tokens()
        layer = model.model.layers[1]
        with torch.no_grad(), Capture(model, [RESID]) as capture:
            model(ids)
            expected, run = capture[RESID], layer.forward
            layer.forward = lambda *args, **kwargs: (run(*args, **kwargs), "rest")
            seen = []
            layer.register_forward_hook(lambda module, args, output: seen.append(output[1:]) or output[0])
            model(ids)
            assert torch.equal(capture[RESID], expected)
        assert seen == [("rest",)]

    def test_reading_too_early_or_elsewhere(self):
        model = tiny.gemma2()
        capture = Capture(model, [RESID])
        with pytest.raises(ValueError, match=r"^site layer_0/att: expected one of layer_1/resid$"):
            capture[Site(0, "att")]
        early = r"^site layer_1/resid: expected a forward of the model before reading, found none completed$"
        with pytest.raises(ValueError, match=early):
            capture[RESID]
        with pytest.raises(TypeError, match=r"^sites: expected a list of sites, got str$"):
            Capture(model, "layer_1/resid")
        with capture, pytest.raises(ValueError, match=r"^Capture: expected to be entered once, found it active"):
            capture.__enter__()

    def test_a_forward_that_fails_leaves_nothing_to_read(self):
        model = tiny.gemma2()
        with torch.no_grad(), contextlib.suppress(ZeroDivisionError), Capture(model, [RESID]) as capture:
            model(tiny.tokens())
            model.model.layers[2].register_forward_pre_hook(lambda module, args: 1 / 0)
            model(tiny.tokens())
        with pytest.raises(ValueError, match="found none completed"):
            capture[RESID]

    def test_a_site_that_fires_never_or_twice(self):
        model = tiny.gemma2()
        with torch.no_grad(), Capture(model, all_sites(model)):
            model.config.num_hidden_layers = 2
            message = r"^site layer_2/att: .* once in a forward, found 0 times$"
            with pytest.raises(EnvironmentProblemError, match=message):
                model(tiny.tokens())
        model = tiny.gemma2()
        model.model.layers[1] = model.model.layers[0]
        message = r"^site layer_0/mlp: .* once in a forward, found 2 times$"
        with torch.no_grad(), Capture(model, ["layer_0/mlp"]), pytest.raises(EnvironmentProblemError, match=message):
            model(tiny.tokens(), use_cache=False)
        assert hook_count(model) == 0

    def test_gradient_checkpointing_is_noticed(self):
        model = tiny.gemma2().train()
        # Renamed in transformers 5.23.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with Capture(model, ["layer_1/att"]):
            loss = model(tiny.tokens(), use_cache=False).logits.sum()
            message = r"^site layer_1/att: expected to fire during a forward .* switch gradient checkpointing off$"
            with pytest.raises(EnvironmentProblemError, match=message):
                loss.backward()

    def test_shapes_are_checked(self):
        model = tiny.gemma2()
        model.config.head_dim = tiny.HEAD_DIM + 1
        message = r"^site layer_0/att: expected activations \[batch, seq, 26\], found \[2, 9, 24\]$"
        with Capture(model, ["layer_0/att"]), pytest.raises(EnvironmentProblemError, match=message):
            model(tiny.tokens())
        model = tiny.gemma2()
        model.model.layers[0].register_forward_hook(lambda module, args, output: {"hidden_states": output})
        message = r"^site layer_0/resid: expected a tensor, found dict$"
        with Capture(model, ["layer_0/resid"]), pytest.raises(EnvironmentProblemError, match=message):
            model(tiny.tokens())


class TestProbe:
    @every_model
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_passes_and_leaves_the_model_alone(self, build, dtype):
        model = build(dtype=dtype).train()
        model.lm_head.eval()
        ids, text = tiny.tokens(), text_model(model)
        before = [dict(layer.self_attn.__dict__) for layer in text.layers]
        training = [module.training for module in model.modules()]
        with torch.no_grad():
            clean = text(ids).last_hidden_state
        probe(model)
        assert [dict(layer.self_attn.__dict__) for layer in text.layers] == before
        assert [module.training for module in model.modules()] == training
        assert hook_count(model) == 0
        with torch.no_grad():
            assert torch.equal(text(ids).last_hidden_state, clean)

    def test_a_model_whose_scores_are_far_below_the_cap(self):
        """The cap changes no bit of bf16 until the probe scales the scores up."""
        probe(tiny.gemma2(initializer_range=0.01, dtype=torch.bfloat16))

    def test_a_stream_that_does_not_add_up(self):
        model = tiny.gemma2()
        model.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.25)
        with pytest.raises(EnvironmentProblemError, match=r"^layer_1: expected resid to equal .* difference of 0.25$"):
            probe(model)

    def test_widths_are_those_of_the_config(self):
        model = tiny.gemma2()
        model.config.num_attention_heads = 3
        with pytest.raises(EnvironmentProblemError, match=r"^site layer_0/att: .*seq, 36\], found \[1, 16, 24\]$"):
            probe(model)

    def test_attached_saes_are_refused(self):
        model = tiny.gemma2()
        message = r"^model: expected no SAE attached while probing, found one at layer_1/resid$"
        with attach(model, {RESID: nn.Identity()}), pytest.raises(ValueError, match=message):
            probe(model)
        probe(model)

    @pytest.mark.parametrize("failing_forward", [0, 1, 2])
    def test_everything_is_put_back_after_an_error(self, failing_forward):
        model = tiny.gemma2().train()
        before = [dict(layer.self_attn.__dict__) for layer in model.model.layers]
        calls = iter(range(9))

        def fail(module, args):
            if next(calls) == failing_forward:
                raise ZeroDivisionError

        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            probe(model)
        handle.remove()
        assert [dict(layer.self_attn.__dict__) for layer in model.model.layers] == before
        assert all(module.training for module in model.modules())
        assert hook_count(model) == 0


class TestSoftCap:
    """transformers 5.17 runs Gemma 2 with sdpa unless told otherwise, and its sdpa ignores the soft-cap silently."""

    REFUSED = (
        r"^attention: expected one that applies attn_logit_softcapping=50, found 'sdpa', which drops it; "
        r'load the model with attn_implementation="eager"$'
    )

    def assert_refused(self, model):
        for use in (probe, lambda model: Capture(model, [RESID]), lambda model: attach(model, {RESID: nn.Identity()})):
            with pytest.raises(EnvironmentProblemError, match=self.REFUSED):
                use(model)
        assert hook_count(model) == 0

    def test_the_default_attention_is_refused_where_it_is_sdpa(self):
        model = tiny.gemma2(attention=None)
        if model.config._attn_implementation == "sdpa":
            self.assert_refused(model)
        else:
            assert model.config._attn_implementation == "eager"
            probe(model)

    def test_sdpa_is_refused_in_every_version(self):
        model = tiny.gemma2()
        model.config._attn_implementation = "sdpa"
        self.assert_refused(model)

    def test_sdpa_without_a_cap_is_welcome(self):
        probe(tiny.gemma3(attention="sdpa"))
        probe(tiny.gemma2(attention=None, attn_logit_softcapping=None))

    def test_an_attention_that_drops_the_cap_under_another_name(self):
        from transformers import AttentionInterface
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

        model = tiny.gemma2()
        AttentionInterface.register("capless", lambda *args, softcap=None, **kw: eager_attention_forward(*args, **kw))
        try:
            model.config._attn_implementation = "capless"
            message = (
                r"^layer_0: expected attention 'capless' to apply attn_logit_softcapping=50, found the same output"
            )
            with pytest.raises(EnvironmentProblemError, match=message + r".*attn_implementation=\"eager\"$"):
                probe(model)
        finally:
            AttentionInterface._global_mapping.pop("capless")

    def test_a_layer_type_that_ignores_the_cap(self):
        model = tiny.gemma2()
        full = model.model.layers[1].self_attn
        run = full.forward

        def without_cap(*args, **kwargs):
            cap, full.attn_logit_softcapping = full.attn_logit_softcapping, None
            try:
                return run(*args, **kwargs)
            finally:
                full.attn_logit_softcapping = cap

        full.forward = without_cap
        with pytest.raises(EnvironmentProblemError, match=r"^layer_1: .* found the same output without it$"):
            probe(model)
