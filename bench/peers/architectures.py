"""The other kinds of SAE by SAELens and dictionary_learning: their own classes, losses and optimisers.

What they leave is judged as they leave it: gated and ReLU SAEs and TopK by their own `encode`, BatchTopK and Matryoshka
by the threshold that the package itself followed in training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.dictionary_learning import sparsity_warmup
from bench.peers.saelens import shared_options
from bench.trainers import Setting, Trainer
from gemmascope.saes.base import BaseSAE

# What a kind does otherwise than ours.
OF_SAELENS = {
    "gated": "the auxiliary loss trains the decoder too and the L1 penalty sees its norms",
    "relu": "the L1 penalty sees the norms of the decoder",
    "topk": "AuxK of weight 1 that is not divided by the variance, z times the norms of the decoder",
    "batchtopk": "as topk; the threshold is a moving average of the smallest z that fires",
    "matryoshka": "as batchtopk, prefixes of one weight",
}
OF_DICTIONARY_LEARNING = {
    "gated": "Adam's second moment over 1,000 steps",
    "relu": "Adam with β1 = 0.9 and a decoder of unit norm",
    "topk": "Adam with β1 = 0.9, clipped gradients, AuxK for latents dead after 10 million tokens",
    "batchtopk": "as topk; the threshold is a moving average of the smallest z that fires",
    "matryoshka": "as batchtopk, the mean over groups twice, so that AuxK weighs more",
}


class Foreign(nn.Module):
    """A trained module of others, on activations as harvested: encode and decode as `evaluate_sae` asks for them."""

    def __init__(self, encode, decode, W_dec: Tensor, input_scale: float):
        super().__init__()
        self._encode, self._decode, self.W_dec, self.input_scale = encode, decode, W_dec, input_scale

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self._encode(x / self.input_scale)

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        return self._decode(f) * self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class SAELensArchitecture(Trainer):
    name, requires = "saelens", ("sae-lens",)
    differs = "linear warm-up, clipped gradients, decoder neither projected nor renormalised"
    defaults = "Adam with β1 = 0.9, then a constant rate"

    def __init__(self, kind: str):
        self.kind, self.fixes_l0 = kind, kind in ("topk", "batchtopk", "matryoshka")
        self.differs = f"{self.differs}, {OF_SAELENS[kind]}"

    def start(self, setting: Setting, start: BaseSAE, sample: Tensor) -> None:
        import sae_lens.saes as theirs
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        config = setting.config
        title = {"gated": "Gated", "relu": "Standard", "topk": "TopK", "batchtopk": "BatchTopK"}.get(self.kind)
        title = title or "MatryoshkaBatchTopK"
        options: dict[str, Any] = {"k": config.k}
        if self.kind in ("gated", "relu"):
            coefficient, warm_up = config.loss.l0_coefficient, config.l0_warmup_steps
            options = {"l1_coefficient": coefficient, "l1_warm_up_steps": warm_up}
        if self.kind == "matryoshka":
            options["matryoshka_widths"] = list(config.prefixes)
        given = getattr(theirs, f"{title}TrainingSAEConfig")(start.d_model, start.d_sae, device="cpu", **options)
        sae = getattr(theirs, f"{title}TrainingSAE")(given)
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_dec"):
                getattr(sae, name).copy_(getattr(start, name))
        rate, shared = config.learning_rate, {}
        if setting.recipe == "shared":
            shared = shared_options(config)
        trainer = SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=rate,
            lr_end=rate,
            lr_warm_up_steps=config.lr_warmup_steps,
            dead_feature_window=max(1, config.dead_after_tokens // config.batch_size),
            **shared,
        )
        self.trainer, self.begin = SAETrainer(trainer, sae, iter(())), start

    def update(self, x: Tensor) -> None:
        self.trainer.step(x.float() / self.begin.input_scale)
        self.trainer.n_training_steps += 1

    def sae(self) -> Foreign:
        sae: Any = self.trainer.sae
        encode = sae.encode
        if self.kind in ("batchtopk", "matryoshka"):
            threshold = float(sae.topk_threshold)

            def encode(x: Tensor) -> Tensor:
                z = sae.encode_with_hidden_pre(x)[1]
                return torch.where(z > threshold, z, 0)

        return Foreign(encode, sae.decode, sae.W_dec.detach().clone(), self.begin.input_scale)


class DictionaryLearningArchitecture(Trainer):
    name, requires = "dictionary_learning", ("dictionary-learning",)
    differs = "linear warm-up"
    defaults = "then a constant rate"

    def __init__(self, kind: str):
        self.kind, self.fixes_l0 = kind, kind in ("topk", "batchtopk", "matryoshka")
        self.differs = f"{self.differs}, {OF_DICTIONARY_LEARNING[kind]}"

    def start(self, setting: Setting, start: BaseSAE, sample: Tensor) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.gdm import GatedSAETrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.standard import StandardTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        config, shared = setting.config, setting.recipe == "shared"
        decay_start = config.steps - config.lr_decay_steps if shared and config.lr_decay_steps else None
        options: dict[str, Any] = {
            "steps": config.steps,
            "activation_dim": start.d_model,
            "dict_size": start.d_sae,
            "layer": 0,
            "lm_name": "",
            "lr": config.learning_rate,
            "warmup_steps": config.lr_warmup_steps,
            "decay_start": decay_start,
            "seed": config.seed,
            "device": "cpu",
        }
        made = {"gated": GatedSAETrainer, "relu": StandardTrainer, "topk": TopKTrainer, "batchtopk": BatchTopKTrainer}
        if self.kind in ("gated", "relu"):
            warm_up = sparsity_warmup(config, decay_start)
            options |= {"l1_penalty": config.loss.l0_coefficient, "sparsity_warmup_steps": warm_up}
        else:
            # By default from step 1,000 on, which a short run does not reach.
            options |= {"k": config.k, "threshold_start_step": config.steps // 2}
        if self.kind == "matryoshka":
            sizes = [b - a for a, b in zip((0, *config.prefixes), config.prefixes, strict=False)]
            options["group_fractions"] = [size / start.d_sae for size in sizes]
        trainer: Any = made.get(self.kind, MatryoshkaBatchTopKTrainer)
        self.trainer, self.begin, self.steps = trainer(**options), start, 0
        ae = self.trainer.ae
        with torch.no_grad():
            if self.kind == "matryoshka":
                ae.W_enc.copy_(start.W_enc)
                ae.W_dec.copy_(start.W_dec)
            else:
                ae.encoder.weight.copy_(start.W_enc.T)
                ae.decoder.weight.copy_(start.W_dec.T)
                if ae.encoder.bias is not None:
                    ae.encoder.bias.zero_()
            bias = {"gated": "decoder_bias", "relu": "bias"}.get(self.kind, "b_dec")
            getattr(ae, bias).copy_(start.b_dec)

    def update(self, x: Tensor) -> None:
        self.trainer.update(self.steps, x.float() / self.begin.input_scale)
        self.steps += 1

    def sae(self) -> Foreign:
        ae = self.trainer.ae
        W_dec = ae.W_dec if self.kind == "matryoshka" else ae.decoder.weight.T
        return Foreign(ae.encode, ae.decode, W_dec.detach().clone(), self.begin.input_scale)
