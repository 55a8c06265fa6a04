"""Plans: what a run holds and takes, and the refusal of what cannot be."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from gemmascope.errors import EnvironmentProblemError
from gemmascope.suite import Loaded, SuiteConfig, make_plan
from gemmascope.suite.machine import Machine
from gemmascope.suite.memory import DEVICE, DISK, HOST, ModelSizes
from gemmascope.suite.model import architecture
from gemmascope.training import SAETrainer
from tests import tiny_models
from tests.suite.configs import config

transformers = pytest.importorskip("transformers")

GB, GIB = 10**9, 1 << 30
SHAPES = {
    "2b": {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256_000,
    },
    "9b": {
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "intermediate_size": 14_336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256_000,
    },
}


@pytest.fixture(scope="module")
def gemma():
    """{size: the published shapes of Gemma 2 on meta}."""
    return {
        size: architecture(transformers.Gemma2Config(**shape), f"google/gemma-2-{size}", torch.bfloat16)
        for size, shape in SHAPES.items()
    }


def gpu(device: float = 139, host: float = 1000, disk: float = 4000) -> Machine:
    """An H200 with so many GiB."""
    sizes = (int(each * GIB) for each in (device, host, disk))
    return Machine(torch.device("cuda:0"), "NVIDIA H200", *sizes, threads=16)


def cpu(host: float = 16, disk: float = 100, threads: int = 2) -> Machine:
    return Machine(torch.device("cpu"), f"{threads} threads", None, int(host * GIB), int(disk * GIB), threads)


def preset(size: str, width: str = "16k", **sections) -> SuiteConfig:
    base = {"text": {"dataset": "owner/name"}, "suite": {"training": {"compute_dtype": "bf16"}}}
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return SuiteConfig.preset(f"gemma-scope-{size}-{width}", **merged)


def of(plan, where: str) -> dict[str, int]:
    return {item.what: item.nbytes for item in plan.needs.at(where)}


def saes(plan, *parts: str) -> int:
    return sum(of(plan, DEVICE)[f"SAEs: {part}"] for part in parts)


LASTING = ("weights, fp32", "second moments, fp32", "bf16 copies")


# ---- the arithmetic of whole suites


def test_2b_at_all_sites(gemma):
    plan = make_plan(preset("2b"), gemma["2b"], machine=gpu())
    assert len(plan.specs) == 78
    assert plan.parameters == pytest.approx(5.67e9, rel=2e-3)
    weights = 26 * 2 * 16384 * (2048 + 2 * 2304)
    assert saes(plan, *LASTING) == pytest.approx(10 * weights, rel=1e-3)  # fp32, fp32, bf16: ten bytes a weight
    assert saes(plan, *LASTING[:2]) == pytest.approx(45.4 * GB, rel=2e-3)
    assert plan.model.parameters == 2_614_341_888
    assert of(plan, DEVICE)["language model"] == pytest.approx(2 * plan.model.parameters, rel=1e-3)
    assert plan.ring == DEVICE
    assert not plan.problems


def test_78_residual_saes_of_2b_take_58_9_gb(gemma):
    [spec, *_] = preset("2b").specs(gemma["2b"].sites)
    memory = SAETrainer.memory(spec.config, 2304, "cuda")
    assert 78 * (memory.weights + memory.second_moments + memory.copies) == pytest.approx(58.9 * GB, rel=1e-3)


def test_9b_at_all_sites(gemma):
    plan = make_plan(preset("9b"), gemma["9b"], machine=gpu(device=278))
    assert len(plan.specs) == 126
    assert plan.parameters == pytest.approx(15.5e9, rel=2e-3)
    assert saes(plan, *LASTING[:2]) == pytest.approx(124 * GB, rel=2e-3)
    assert plan.model.parameters == pytest.approx(9.24e9, rel=1e-3)
    assert not plan.problems


@pytest.mark.parametrize(("size", "gigabytes", "kilobytes"), [("2b", 91, 346), ("9b", 248, 946)])
def test_a_ring_of_262144_tokens(gemma, size, gigabytes, kilobytes):
    plan = make_plan(preset(size, activations={"ring_tokens": 2**18}), gemma[size], machine=gpu(1000))
    ring = of(plan, DEVICE)["ring of 262,144 tokens, bfloat16"]
    assert ring == pytest.approx(gigabytes * GB, rel=5e-3)
    assert sum(plan.model.widths.values()) * 2 == pytest.approx(kilobytes * 1000, rel=2e-3)
    fp32 = make_plan(
        preset(size, activations={"ring_tokens": 2**18, "dtype": "float32"}), gemma[size], machine=gpu(1000)
    )
    assert of(fp32, DEVICE)["ring of 262,144 tokens, float32"] == pytest.approx(2 * ring, rel=2e-3)


def test_an_sae_of_a_million_latents_on_one_h200(gemma):
    plan = make_plan(preset("2b", "1m", suite={"sites": ["layer_12/resid"]}), gemma["2b"], machine=gpu())
    assert saes(plan, *LASTING[:2]) == pytest.approx(38.7 * GB, rel=2e-3)
    assert not plan.problems


def test_the_same_sae_sizes_as_the_trainer_counts(gemma):
    plan = make_plan(preset("2b"), gemma["2b"], machine=gpu())
    each = [SAETrainer.memory(s.config, plan.model.widths[s.site], "cuda") for s in plan.specs]
    assert saes(plan, "batches of steps under way") == sum(memory.pending for memory in each)
    working = max(memory.activations + memory.entries + memory.scratch for memory in each)
    assert saes(plan, "activations, entries, scratch") == working


def test_checkpoints_and_saes_on_the_disk(gemma):
    plan = make_plan(preset("2b", checkpoint={"keep": 4}), gemma["2b"], machine=gpu())
    weights, lasting = saes(plan, "weights, fp32"), saes(plan, *LASTING)
    assert lasting > 2 * weights
    assert of(plan, DISK) == {"tokens of the text": 16 * GB, "5 checkpoints": 5 * lasting, "SAEs, folded": weights}
    assert of(plan, HOST)["a checkpoint being written"] == lasting


# ---- where the ring is


def test_the_ring_goes_to_the_host_where_the_device_has_no_room(gemma):
    plan = make_plan(preset("2b"), gemma["2b"], machine=gpu(device=78))
    assert plan.ring == HOST
    assert not plan.problems
    assert "ring of 131,072 tokens, bfloat16" in of(plan, HOST)
    assert "ring of 131,072 tokens, bfloat16" not in of(plan, DEVICE)
    batch = 4096 * sum(plan.model.widths.values()) * 2
    assert of(plan, DEVICE)["batches on their way"] == of(plan, HOST)["pinned batches"] == 2 * batch
    assert "note: the ring is on the host" in plan.text()


def test_a_ring_that_is_asked_for_is_not_moved(gemma):
    on_host = make_plan(preset("2b", activations={"ring": "host"}), gemma["2b"], machine=gpu())
    assert on_host.ring == HOST
    assert "note: the ring" not in on_host.text()
    on_device = make_plan(preset("2b", activations={"ring": "device"}), gemma["2b"], machine=gpu(device=78))
    assert on_device.ring == DEVICE
    assert len(on_device.problems) == 1
    assert 'activations.ring = "host"' in on_device.advice


# ---- what cannot be


def numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in re.findall(r"([0-9.,]+) GiB", text)]


def test_a_refusal_shows_its_arithmetic(gemma):
    plan = make_plan(preset("9b"), gemma["9b"], machine=gpu(device=139, host=200))
    assert len(plan.problems) == 2
    for problem, where in zip(plan.problems, (DEVICE, HOST), strict=True):
        sums = problem.partition(" got ")[2]
        total, *parts = numbers(sums)
        assert sum(parts) == pytest.approx(total, rel=5e-3)
        assert total == pytest.approx(plan.needs.total(where) / GIB, rel=5e-3)
    assert plan.problems[0].startswith("cuda:0: expected at most 132.0 GiB, 95% of what is free, got 201.4 GiB = ")
    assert plan.problems[1].startswith("memory of the host: expected at most 190.0 GiB")
    with pytest.raises(EnvironmentProblemError) as found:
        plan.refuse()
    assert all(problem in str(found.value) for problem in plan.problems)
    assert "what would fit: " in str(found.value)
    assert "\n" not in str(found.value)
    assert "does not fit: " in plan.text()


def test_advice_is_true(gemma):
    """What is said to fit, does; a little more does not."""
    machine = gpu(device=139, host=200)
    plan = make_plan(preset("9b"), gemma["9b"], machine=machine)
    advice = " ".join(plan.advice)
    d_sae = int(re.search(r"d_sae of at most (\d+)", advice)[1])
    count, total = re.search(r"the first (\d+) of (\d+) SAEs", advice).groups()
    assert int(total) == 126

    def fits(**suite) -> bool:
        return not make_plan(preset("9b", suite=suite), gemma["9b"], machine=machine).problems

    bf16 = {"training": {"compute_dtype": "bf16"}}
    assert fits(sae=[{"d_sae": d_sae}], **bf16)
    assert not fits(sae=[{"d_sae": 2 * d_sae}], **bf16)
    sites = [str(spec.site) for spec in plan.specs]
    assert fits(sites=sites[: int(count)], **bf16)
    assert not fits(sites=sites[: int(count) + 1], **bf16)


def test_advice_on_a_smaller_ring():
    loaded = tiny(tiny_models.gemma2())
    roomy = small(activations={"ring_tokens": "50M"}, text={"context": 32})
    plan = make_plan(roomy, loaded, machine=cpu(host=8), measure=Constant())
    [ring] = [int(each.rpartition(" ")[2]) for each in plan.advice if "ring_tokens" in each]
    fitting = small(activations={"ring_tokens": ring}, text={"context": 32})
    assert not make_plan(fitting, loaded, machine=cpu(host=8), measure=Constant()).problems
    twice = small(activations={"ring_tokens": 2 * ring + 64}, text={"context": 32})
    assert make_plan(twice, loaded, machine=cpu(host=8), measure=Constant()).problems


def test_advice_on_a_smaller_forward(gemma):
    plan = make_plan(
        preset("2b", "32k", text={"context": 8192}, activations={"forward_rows": 64}),
        gemma["2b"],
        machine=gpu(device=60),
    )
    [rows] = [int(each.rpartition(" ")[2]) for each in plan.advice if "forward_rows" in each]
    smaller = preset("2b", "32k", text={"context": 8192}, activations={"forward_rows": rows})
    assert not make_plan(smaller, gemma["2b"], machine=gpu(device=60)).problems


def test_a_narrower_sae_keeps_its_target(gemma):
    wide = preset("2b", suite={"sae": [{"d_sae": 2**14, "target_l0": 10_000}]})
    plan = make_plan(wide, gemma["2b"], machine=gpu(device=30))
    assert plan.problems
    assert not any("d_sae" in each for each in plan.advice)


def test_where_the_model_alone_does_not_fit(gemma):
    plan = make_plan(preset("9b"), gemma["9b"], machine=gpu(device=16))
    with pytest.raises(EnvironmentProblemError, match=r"; nothing like it would fit here$"):
        plan.refuse()


def test_a_full_disk(gemma):
    plan = make_plan(preset("2b", run={"out": "runs/big"}), gemma["2b"], machine=gpu(disk=100))
    [problem] = plan.problems
    assert problem.startswith("the disk of runs/big: expected at most 95.00 GiB")
    assert plan.advice


def test_the_logits_of_the_evaluation_count(gemma):
    loaded, machine = gemma["2b"], gpu(device=7.5)
    narrow = preset(
        "2b",
        suite={"sites": ["layer_0/att"], "sae": [{"d_sae": 16}], "batch_size": 64},
        activations={"ring_tokens": 1024, "forward_rows": 1},
    )
    plan = make_plan(narrow, loaded, machine=machine)
    assert plan.needs.total(DEVICE) < 0.95 * 7.5 * GIB < plan.needs.evaluation
    [problem] = plan.problems
    assert "when the SAEs are judged, most of it logits" in problem


def test_a_machine_that_does_not_say_refuses_nothing(gemma):
    unknown = dataclasses.replace(gpu(), device_bytes=None, host_bytes=None, disk_bytes=None)
    plan = make_plan(preset("9b"), gemma["9b"], machine=unknown)
    assert not plan.problems
    assert "free" not in plan.text()


# ---- time, with constants for measurements


class Constant:
    """Two seconds a forward; half a second a step of a wide SAE, a tenth of others."""

    def __init__(self):
        self.asked = []

    def forward(self, model, sites, rows, context):
        self.asked.append(("forward", len(sites), rows, context))
        return 2.0

    def step(self, config, width, device, impl, threads):
        self.asked.append(("step", width, config.d_sae, impl, threads))
        return 0.5 if config.d_sae == 128 else 0.1


def tiny(model) -> Loaded:
    return Loaded(model, None, {"dtype": "float32", "revision": None}, "tiny")


def small(**sections) -> SuiteConfig:
    suite = {
        "sites": ["layer_0/att", "resid"],
        "tokens": "1M",
        "batch_size": 250,
        "sae": [{"d_sae": 128, "target_l0": 4}, {"d_sae": 64, "target_l0": [4, 8]}],
    }
    base = {"suite": suite, "text": {"context": 101}, "activations": {"ring_tokens": 10_100, "forward_rows": 5}}
    return config(**{name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


def test_one_measurement_for_each_shape():
    measure = Constant()
    make_plan(small(), tiny(tiny_models.gemma2()), machine=cpu(), measure=measure)
    steps = [each for each in measure.asked if each[0] == "step"]
    assert measure.asked[0] == ("forward", 4, 5, 101)
    shapes = [(width, d_sae) for _, width, d_sae, *_ in steps]
    assert sorted(set(shapes)) == [(16, 64), (16, 128), (24, 64), (24, 128)]
    assert len(shapes) == 6  # target L0 4 and 8 at 64
    assert {each[3:] for each in steps} == {("auto", 1)}


@pytest.mark.parametrize(("threads", "side_by_side"), [(1, 1), (2, 2), (64, 12)])
def test_seconds_on_a_cpu(threads, side_by_side):
    plan = make_plan(small(), tiny(tiny_models.gemma2()), machine=cpu(threads=threads), measure=Constant())
    assert plan.tokens == 10**6
    # 100 rows of 101 tokens, the first of each left out: 40 batches of 250, none left over.
    forwards = 10**6 * 101 / 100 / (5 * 101)
    assert plan.seconds.forward == pytest.approx(2.0 * forwards)
    assert plan.seconds.steps == pytest.approx(4000 * (4 * 0.5 + 8 * 0.1) / side_by_side)
    assert plan.tokens_per_second == pytest.approx(10**6 / plan.seconds.total)


def test_an_sae_with_fewer_tokens_takes_fewer_steps():
    suite = {"sites": ["layer_0/att"], "sae": [{"d_sae": 64, "target_l0": 4, "tokens": "500k"}]}
    plan = make_plan(small(suite=suite), tiny(tiny_models.gemma2()), machine=cpu(), measure=Constant())
    assert plan.seconds.steps == pytest.approx(2000 * 0.1)


def test_nothing_is_measured_without_weights_or_room(gemma):
    class Never:
        forward = step = None

    assert make_plan(preset("2b"), gemma["2b"], machine=gpu(), measure=Never()).seconds is None
    plan = make_plan(small(), tiny(tiny_models.gemma2()), machine=cpu(host=0.5), measure=Never())
    assert plan.problems
    assert plan.seconds is None
    assert "time: not measured" in plan.text()


def test_a_plan_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("gemmascope.suite.measure.BUDGET", 0.0)
    made = small(run={"out": str(tmp_path / "run"), "device": "cpu"})
    plan = make_plan(made, tiny(tiny_models.gemma3()))
    assert not plan.problems
    assert plan.seconds.total > 0
    assert not (tmp_path / "run").exists()


# ---- text


def facts(text: str) -> dict[str, str]:
    """{name: value} of its aligned lines."""
    lines = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_the_text_of_a_plan():
    rows = SimpleNamespace(context=101, n_train=2000, n_held_out=133)
    loaded = tiny(tiny_models.gemma2())
    plan = make_plan(small(), loaded, rows, machine=cpu(), measure=Constant())
    text = plan.text()
    found = facts(text)
    assert found["model"] == "tiny, 3 layers, 8.1k parameters, float32, eager attention"
    assert found["text"] == "corpus/*.txt, rows of 101 tokens: 2,000 to train on, 133 held out"
    assert found["SAEs"] == "12 at 4 sites"
    assert found["tokens"] == "1M: 4,000 steps of 250, 5 passes over the text"
    assert found["recipe"] == "small, products in fp32"
    assert found["folder"] == "runs/suite"
    assert re.match(
        r"every 10 minutes \(about 250 steps\), on a signal and at the end; 0\.\d MiB each, 2 kept$",
        found["checkpoints"],
    )
    assert re.search(r"^ +16 +128 +3 +\S+ +L0 4 +layer_0 … layer_2 / resid$", text, re.MULTILINE)
    assert re.search(r"^ +24 +64 +2 +\S+ +L0 4, 8 +layer_0/att$", text, re.MULTILINE)
    assert "memory of the host (2 threads)" in text
    assert found["forwards of the model"] == "1.1 h, 42%"
    assert found["time, measured here"] == "2.7 h"
    assert re.fullmatch(r"\d+", found["tokens a second"])
    assert re.fullmatch(r"1\.0\d GiB of 16\.00 GiB free", re.findall(r"total +(.*)", text)[0])
    assert text.isprintable() or all(line.isprintable() for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 120


def test_the_text_of_a_plan_without_weights(gemma):
    text = make_plan(preset("2b"), gemma["2b"], machine=gpu()).text()
    found = facts(text)
    assert found["model"].startswith("google/gemma-2-2b, 26 layers, 2.61B parameters")
    assert found["text"] == "dataset owner/name, rows of 1,024 tokens, not tokenised yet"
    assert found["SAEs"] == "78 at 78 sites"
    assert found["parameters"] == "5.67B in all SAEs"
    assert found["tokens"] == "4B: 976,562 steps of 4,096"
    assert found["recipe"] == "gemma-scope, products in bf16"
    assert found["checkpoints"] == "every 10 minutes, on a signal and at the end; 52.83 GiB each, 2 kept"
    assert re.search(r"^2,304 +16,384 +52 +3\.93B +λ 0\.0006 +layer_0 … layer_25 / mlp, resid$", text, re.MULTILINE)
    assert "memory of cuda:0 (NVIDIA H200)" in text
    assert "time: not measured" in text


def test_checkpoints_by_steps():
    plan = make_plan(small(checkpoint={"steps": 50}), tiny(tiny_models.gemma2()), machine=cpu(), measure=Constant())
    assert facts(plan.text())["checkpoints"].startswith("every 50 steps (about 2.0 min), on a signal and at the end; ")


def test_notes(gemma):
    fp32 = make_plan(preset("2b", suite={"training": {}}), gemma["2b"], machine=gpu())
    assert any('compute_dtype = "bf16"' in note for note in fp32.notes())
    assert not list(make_plan(preset("2b"), gemma["2b"], machine=gpu()).notes())
    rows = SimpleNamespace(context=101, n_train=2000, n_held_out=133)
    plan = make_plan(small(), tiny(tiny_models.gemma2()), rows, machine=cpu(), measure=Constant())
    assert list(plan.notes()) == ["the text is read 5 times"]


def test_a_ring_that_is_filled_for_a_few_batches():
    """Rows of 101 hold 100 to train on: 40 of them 40 batches of 100, or 39 where a hundredth may be dropped."""

    def notes(tokens, **activations):
        suite = {"tokens": tokens, "batch_size": 100}
        config = small(text={"context": 101}, suite=suite, activations={"ring_tokens": 40 * 101, **activations})
        return list(make_plan(config, tiny(tiny_models.gemma2()), machine=cpu(), measure=Constant()).notes())

    said = "the model fills the ring 3 times, the last time for 1 of 40 batches; with suite.tokens = {} or "
    said += "activations.ring_tokens = {} it would do so 2 times"
    assert notes(8100) == [said.format(8000, 41 * 101)]
    assert not notes(8000)
    assert not notes(11900)  # 1 of 120 batches in vain
    assert not notes(4000)
    assert "for 3 of 39 batches" in notes(8100, drop_norm=3.0)[0]
    assert not notes(8200, ring_tokens=42 * 101, drop_norm=3.0)


def test_token_shards_before_there_are_any(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_bytes(b"x" * 4000)
    (tmp_path / "b.txt").write_bytes(b"x" * 100)
    loaded = tiny(tiny_models.gemma2())

    def shards(**text) -> int:
        made = small(text={"files": [f"{tmp_path}/**/*.txt"], "context": 101, **text})
        return of(make_plan(made, loaded, machine=cpu(), measure=Constant()), DISK)["tokens of the text"]

    assert shards() == 4100
    assert shards(max_tokens=500) == 2000
    rows = SimpleNamespace(context=101, n_train=10, n_held_out=2)
    plan = make_plan(small(), loaded, rows, machine=cpu(), measure=Constant())
    assert of(plan, DISK)["tokens of the text"] == 4 * 12 * 101


def test_sizes_of_a_multimodal_model():
    model = tiny_models.gemma3_multimodal()
    sizes = ModelSizes.of(tiny(model))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert (sizes.layers, sizes.hidden, sizes.vocabulary) == (tiny_models.LAYERS, tiny_models.WIDTH, tiny_models.VOCAB)
    assert len(sizes.widths) == 9
