"""A language model over bytes that has learnt to use its BOS, and SAEs of four of its sites: half a minute on a CPU."""

from pathlib import Path
from typing import NamedTuple

import torch

from gemmascope.activations import batches, harvest
from gemmascope.activations.packing import as_encoder
from gemmascope.activations.python_docs import python_documentation
from gemmascope.demo import small_gemma
from gemmascope.demo.byte_tokenizer import BOS, byte_tokenizer
from gemmascope.demo.small_gemma import LanguageModelConfig
from gemmascope.saes import JumpReLUSAE
from gemmascope.sites import Site
from gemmascope.suite.excerpts import Excerpts
from gemmascope.training import SAETrainer, TrainConfig, train

CONTEXT, D_MODEL, D_SAE, L0 = 48, 64, 256, 6.0
SITES = (Site(0, "resid"), Site(1, "resid"), Site(1, "mlp"), Site(1, "att"))


class Checked(NamedTuple):
    model: Path
    """Folder."""
    saes: dict[Site, JumpReLUSAE]
    """Unfolded, as the trainer has them."""
    paths: dict[Site, Path]
    """Of the folded ones, in Gemma Scope's layout."""


def make(folder: Path) -> Checked:
    excerpts = Excerpts.of(python_documentation()[:80], as_encoder(byte_tokenizer()), (BOS,), 10**9)
    rows = excerpts.rows(CONTEXT, 90_000, bos=True)
    config = LanguageModelConfig(n_layers=2, d_model=D_MODEL, steps=250, warmup_steps=20)
    model = small_gemma.build(config)
    small_gemma.train(model, rows, config)
    small_gemma.save(model, folder / "model")

    activations = harvest(model, rows[:: len(rows) // 520], SITES)
    recipe = TrainConfig.small(d_sae=D_SAE, steps=150, batch_size=256, target_l0=L0)
    trainers = {site: SAETrainer(recipe, x, metadata={"site": site.name}) for site, x in activations.items()}
    train(trainers, batches(activations, recipe.batch_size, recipe.steps, 0))
    saes = {site: trainers[site].sae for site in SITES}
    paths = {}
    for site, sae in saes.items():
        paths[site] = folder / "saes" / site.kind / f"layer_{site.layer}" / f"width_{D_SAE}" / f"average_l0_{L0:.0f}"
        sae.fold().save(paths[site] / "params.npz")
    return Checked(folder / "model", saes, paths)


def rescaled(sae: JumpReLUSAE, factor: float) -> JumpReLUSAE:
    """The folded SAE that fits ``factor`` times the activations that ``sae`` fits."""
    scaled = sae.fold()
    with torch.no_grad():
        for tensor in (scaled.b_enc, scaled.b_dec, scaled.threshold):
            tensor.mul_(factor)
    return scaled
