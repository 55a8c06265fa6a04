"""The count of memory, against the tensors a state really holds, and the advice when there is not enough."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from gemmascope.activations import SiteStatistics
from gemmascope.kernels.entries import scratch_bytes, tokens_per_chunk
from gemmascope.saes import GatedSAE, JumpReLUSAE
from gemmascope.sites import Site
from gemmascope.training import SAESpec, Suite, TrainConfig
from gemmascope.training.checkpoint import Checkpoints
from gemmascope.training.memory import GIB, SuiteMemory, training_memory
from gemmascope.training.state import TrainState
from gemmascope.training.trainer import RUN_AHEAD, SAETrainer


@pytest.mark.parametrize("cls", [JumpReLUSAE, GatedSAE])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_weights_moments_and_copies_are_those_of_the_state(compute_dtype, cls):
    state = TrainState.start(cls(12, 40), compute_dtype)
    memory = training_memory(12, 40, 64, compute_dtype, kind="gated" if cls is GatedSAE else "jumprelu")
    assert memory.weights == sum(p.nbytes for p in state.sae.parameters())
    moments = [v for name, v in state.latents._asdict().items() if name.endswith("_v")]
    moments += [state.b_dec_v, *state.others_v.values()]
    assert memory.second_moments == sum(v.nbytes for v in moments)
    copies = [w for name, w in state.latents._asdict().items() if name.endswith("_low") and w is not None]
    assert memory.copies == sum(w.nbytes for w in copies)


def test_a_gated_sae_holds_more_and_its_advice_says_so():
    plain, gated = (SAETrainer.memory(TrainConfig.gemma_scope(kind=kind), 2304) for kind in ("jumprelu", "gated"))
    for name in ("weights", "second_moments", "activations", "entries", "scratch"):
        assert getattr(gated, name) > getattr(plain, name), name
    available = int(0.8 * gated.total)
    size = int(gated.advice(available).split("a batch_size of ")[1].split(" ")[0])
    smaller = TrainConfig.gemma_scope(kind="gated", batch_size=size)
    assert SAETrainer.memory(smaller, 2304).total < 0.9 * available


def test_batches_of_steps_under_way_are_counted():
    """A GPU is given `RUN_AHEAD` steps before the figures of the first are read, and each keeps its batch."""
    config = TrainConfig(d_sae=16384, compute_dtype="bf16")
    here, there = (SAETrainer.memory(config, 2304, device) for device in ("cpu", torch.device("cuda", 1)))
    assert here.pending == 0
    assert there.pending == RUN_AHEAD * config.batch_size * 2304 * 4 == there.total - here.total
    assert f"{there.pending / GIB:8.2f} GiB" in there.table()
    available = int(1.05 * there.total)
    size = int(there.advice(available).split("a batch_size of ")[1].split(" ")[0])
    assert SAETrainer.memory(replace(config, batch_size=size), 2304, "cuda").total < 0.9 * available


def test_prefixes_and_dead_latents_are_counted():
    options = {"d_sae": 16384, "k": 40, "compute_dtype": "bf16"}
    alone = SAETrainer.memory(TrainConfig().changed(kind="topk", aux_coefficient=0.0, **options), 2304)
    assert (alone.n_entries, alone.blocks) == (40 * 4096, 1)
    with_aux = SAETrainer.memory(TrainConfig().changed(kind="topk", **options), 2304)
    assert (with_aux.n_entries, with_aux.blocks) == (2 * (40 + 1152) * 4096, 2)
    prefixes = (4096, 8192, 16384)
    nested = SAETrainer.memory(TrainConfig().changed(kind="matryoshka", prefixes=prefixes, **options), 2304)
    assert nested.activations == 2 * with_aux.activations == 4 * alone.activations
    assert tokens_per_chunk(4096, 16384) == 4096
    assert nested.scratch == 4096 * (scratch_bytes(16384) + 4 * 512) + 24 * 16384
    wide = SAETrainer.memory(TrainConfig().changed(kind="topk", **options | {"d_sae": 131072}), 2304)
    chunk = tokens_per_chunk(4096, 131072)
    assert chunk < 4096
    assert wide.scratch == chunk * (scratch_bytes(131072) + 4 * 4096) + 128 * wide.n_entries + 24 * 131072
    size = int(nested.advice(int(0.9 * nested.total)).split("a batch_size of ")[1].split(" ")[0])
    smaller = TrainConfig().changed(kind="matryoshka", prefixes=prefixes, batch_size=size, **options)
    assert SAETrainer.memory(smaller, 2304).total < 0.81 * nested.total


SPECS = [
    SAESpec("a", Site(3, "resid"), TrainConfig(d_sae=16384, compute_dtype="bf16")),
    SAESpec("b", Site(3, "resid"), TrainConfig(d_sae=32768)),
    SAESpec("c", Site(3, "att"), TrainConfig(d_sae=16384, batch_size=1024)),
]
WIDTHS = {Site(3, "resid"): 2304, Site(3, "att"): 2048}


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_suite_holds_every_state_and_as_many_steps_as_are_computed_at_a_time(at_once):
    alone = [SAETrainer.memory(spec.config, WIDTHS[spec.site], "cuda") for spec in SPECS]
    found = SuiteMemory.of(alone, at_once)
    steps = sorted((each.activations + each.entries + each.scratch for each in alone), reverse=True)
    assert found.steps == sum(steps[:at_once])
    for name in ("weights", "second_moments", "copies", "pending"):
        assert getattr(found, name) == sum(getattr(each, name) for each in alone), name
    assert found.lasting == sum(each.total - each.pending for each in alone) - sum(steps)
    assert found.copies > 0


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_what_lasts_is_what_a_checkpoint_holds(compute_dtype):
    config = TrainConfig(d_sae=512, compute_dtype=compute_dtype)
    specs = [SAESpec(str(site), site, config) for site in WIDTHS]
    generator = torch.Generator().manual_seed(0)
    rows = {site: torch.randn(64, 48 + site.layer, generator=generator) for site in WIDTHS}
    statistics = {site: SiteStatistics.measure(x) for site, x in rows.items()}
    with closing(Suite(specs, statistics, model_name="m")) as suite:
        held = Checkpoints.bytes_of({spec.name: suite.snapshot()[0][spec.name] for spec in specs})
    counted = SuiteMemory.of((SAETrainer.memory(config, x.shape[1]) for x in rows.values()), 1).lasting
    counters = len(specs) * (512 * 16 + 4096)  # when each latent fired and was touched, and headers
    assert counted <= held <= counted + counters


def test_a_million_latents_fit_sixty_gigabytes():
    memory = training_memory(2304, 1 << 20, 4096, "bf16")
    assert memory.total < 60e9
    assert memory.weights > 19e9
    assert memory.scratch > tokens_per_chunk(4096, 1 << 20) * scratch_bytes(1 << 20) > 4 * GIB
    table = memory.table()
    assert f"{memory.total / GIB:8.2f} GiB" in table
    assert "524,288 entries" in table


def test_advice():
    memory = training_memory(2304, 16384, 65536, "bf16")
    assert memory.total > 2 * GIB
    assert "take about" in memory.advice(0)
    assert memory.advice(0).endswith("; make d_sae or batch_size smaller")
    assert memory.advice(200 * GIB).endswith("something else holds memory on this device")
    smaller = memory.advice(3 * GIB)
    tokens = int(smaller.split("a batch_size of ")[1].split(" ")[0])
    assert training_memory(2304, 16384, tokens, "bf16").total < 3 * GIB
    assert tokens in (8192, 16384, 32768)
    narrower = training_memory(2304, 1 << 20, 4096, "bf16").advice(40 * GIB)
    width = int(narrower.split("a d_sae of ")[1].split(" ")[0])
    assert training_memory(2304, width, 4096, "bf16").total < 40 * GIB
    assert training_memory(2304, 1 << 20, 4096, "bf16").advice(1000).endswith("; make d_sae and batch_size smaller")
