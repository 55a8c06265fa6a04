"""The shapes of Gemma 2 2B, on a CPU."""

from contextlib import closing

import pytest
import torch

from gemmascope.activations import SiteStatistics
from gemmascope.sites import Site
from gemmascope.training import Suite, TrainConfig
from gemmascope.training.spec import SAESpec

WIDTHS = {Site(12, "att"): 2048, Site(12, "mlp"): 2304, Site(12, "resid"): 2304}


@pytest.mark.slow
def test_a_step_at_the_three_sites_of_a_layer():
    generator = torch.Generator().manual_seed(0)
    batch = {site: torch.randn(512, width, generator=generator).bfloat16() for site, width in WIDTHS.items()}
    statistics = {
        site: SiteStatistics.measure(x, torch.ones(len(x), dtype=torch.bool), outlier_ratio=5.0)
        for site, x in batch.items()
    }
    config = TrainConfig.small(d_sae=16384, steps=100, batch_size=512, target_l0=64)
    with closing(Suite([SAESpec(str(site), site, config) for site in WIDTHS], statistics, model_name="2B")) as suite:
        before = {name: trainer.sae.W_dec.detach().clone() for name, trainer in suite.trainers.items()}
        suite.update(batch)
        suite.update(batch)
        for name, row in suite.report().items():
            assert row["skipped"] == 0
            assert 0 < row["l0"] < 16384
            assert row["fvu"] == row["fvu"]
            norms = suite.trainers[name].sae.W_dec.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
            assert not torch.equal(suite.trainers[name].sae.W_dec, before[name])
