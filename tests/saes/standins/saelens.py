"""Stand-ins for SAELens."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.saes.standins.parts import drawn, of


@of("transformer_lens.hook_points")
class HookPoint(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def add_hook(self, function):
        """function(value) → None, or what takes its place."""
        return self.register_forward_hook(lambda module, given, value: function(value))


HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output")


@of("sae_lens.saes.sae")
class SAE(nn.Module):
    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, **options):
        super().__init__()
        settings = {
            "apply_b_dec_to_input": True,
            "normalize": False,
            "hook_z": None,
            "k": 0,
            "rescale": False,
        } | options
        self.cfg = SimpleNamespace(**settings, rescale_acts_by_decoder_norm=settings["rescale"])
        self.W_enc, self.W_dec = drawn(d_in, d_sae, scale=d_in**-0.5), drawn(d_sae, d_out or d_in, scale=0.1)
        self.b_enc, self.b_dec = drawn(d_sae, scale=0.1), drawn(d_out or d_in, scale=0.1)
        self.activation_fn, self.use_error_term, self.d_head = nn.ReLU(), False, self.cfg.hook_z
        for name in HOOKS:
            setattr(self, name, HookPoint())

    def process_sae_in(self, x: Tensor) -> Tensor:
        x = self.hook_sae_input(x.to(self.W_enc.dtype).flatten(-2) if self.d_head else x.to(self.W_enc.dtype))
        if self.cfg.normalize:
            self.norm = x.norm(dim=-1, keepdim=True)
            x = x / self.norm
        return x - self.b_dec * self.cfg.apply_b_dec_to_input

    def run_time_activation_norm_fn_out(self, x: Tensor) -> Tensor:
        return x * self.__dict__.pop("norm") if self.cfg.normalize else x

    def reshape_fn_out(self, x: Tensor, d_head: int | None) -> Tensor:
        return x.unflatten(-1, (-1, d_head)) if d_head else x

    def pre(self, x: Tensor) -> Tensor:
        return self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        return self.hook_sae_acts_post(self.activation_fn(self.pre(x)))

    def decode(self, feature_acts: Tensor) -> Tensor:
        x_hat = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    def forward(self, x: Tensor) -> Tensor:
        x_hat = self.decode(self.encode(x))
        return self.hook_sae_output(x_hat + (x - x_hat).detach() if self.use_error_term else x_hat)

    def process_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> None:
        pass


@of("sae_lens.saes.standard_sae")
class StandardSAE(SAE):
    pass


@of("sae_lens.saes.jumprelu_sae")
class JumpReLUSAE(SAE):
    def __init__(self, *sizes: int, **options):
        super().__init__(*sizes, **options)
        self.threshold = nn.Parameter(1.7 + 0.2 * torch.randn(sizes[1]))

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre(x)
        return self.hook_sae_acts_post(self.activation_fn(pre) * (pre > self.threshold))


@of("sae_lens.saes.topk_sae")
class TopK(nn.Module):
    def __init__(self, k: int):
        super().__init__()
        self.k, self.use_sparse_activations = k, False

    def forward(self, x: Tensor) -> Tensor:
        values, latents = x.topk(self.k, dim=-1)
        return torch.zeros_like(x).scatter(-1, latents, values.relu())


@of("sae_lens.saes.topk_sae")
class TopKSAE(SAE):
    def __init__(self, *sizes: int, **options):
        super().__init__(*sizes, **options)
        self.activation_fn = TopK(self.cfg.k)

    def norms(self) -> Tensor | float:
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else 1.0

    def encode(self, x: Tensor) -> Tensor:
        return self.hook_sae_acts_post(self.activation_fn(self.pre(x) * self.norms()))

    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts / self.norms())


@of("sae_lens.saes.abstopk_sae")
class AbsTopKSAE(TopKSAE):
    """Keeps negative values."""


@of("sae_lens.saes.gated_sae")
class GatedSAE(SAE):
    def __init__(self, *sizes: int, **options):
        super().__init__(*sizes, **options)
        del self.b_enc
        self.r_mag, self.b_mag = drawn(sizes[1], scale=0.3), drawn(sizes[1])
        self.b_gate = nn.Parameter(-1.5 + 0.3 * torch.randn(sizes[1]))

    def encode(self, x: Tensor) -> Tensor:
        x = self.process_sae_in(x)
        magnitude = self.hook_sae_acts_pre(x @ (self.W_enc * self.r_mag.exp()) + self.b_mag)
        return self.hook_sae_acts_post((x @ self.W_enc + self.b_gate > 0) * torch.relu(magnitude))


@of("sae_lens.saes.transcoder")
class Transcoder(SAE):
    def process_sae_in(self, x: Tensor) -> Tensor:
        return self.hook_sae_input(x.to(self.W_enc.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@of("sae_lens.saes.transcoder")
class SkipTranscoder(Transcoder):
    def __init__(self, *sizes: int, **options):
        super().__init__(*sizes, **options)
        self.W_skip = drawn(sizes[2], sizes[0], scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.W_skip.T


@of("sae_lens.saes.transcoder")
class JumpReLUTranscoder(JumpReLUSAE, Transcoder):
    pass


@of("sae_lens.saes.transcoder")
class JumpReLUSkipTranscoder(JumpReLUTranscoder, SkipTranscoder):
    pass


@of("sae_lens.saes.jumprelu_sae")
class JumpReLUTrainingSAE(SAE):
    pass


@of("sae_lens.analysis.hooked_sae_transformer")
class Wrapper(nn.Module):
    """Where an SAE sits in a model of SAELens: not as a submodule."""

    def __init__(self, sae: SAE):
        super().__init__()
        self.__dict__["sae"] = sae

    def forward(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))


@of("sae_lens.analysis.hooked_sae_transformer")
class HookedSAETransformer(nn.Module):
    def __init__(self, saes: dict[str, SAE]):
        super().__init__()
        self.wrappers = nn.ModuleList([Wrapper(sae) for sae in saes.values()])
        self.acts_to_saes = saes

    def forward(self, x: Tensor) -> Tensor:
        for wrapper in self.wrappers:
            x = wrapper(x)
        return x
