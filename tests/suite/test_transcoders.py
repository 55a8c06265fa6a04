"""Transcoders beside SAEs in one run: trained from one forward, stopped and gone on with, judged, and exported."""

import hashlib
import os
import signal

import pytest
import torch
from torch import Tensor, nn

from gemmascope import Transcoder
from gemmascope.activations import harvest
from gemmascope.evaluation import (
    delta_loss,
    evaluate_transcoder,
    language_model_loss,
    linear_fvu,
    mean_ablation_loss,
)
from gemmascope.formats.files import read_json
from gemmascope.reporting import read_results, write_html
from gemmascope.reporting.page import reload_code
from gemmascope.sites import Site
from gemmascope.suite import export_saes
from gemmascope.suite.config import SuiteConfig
from gemmascope.suite.run import train_suite
from gemmascope.training import Suite
from tests.suite.configs import blocks, sites_of
from tests.suite.small_runs import tables

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")

SAE = {"d_sae": 32, "target_l0": 4, "sites": ["layer_0/mlp"]}
PLAIN = {"d_sae": 48, "target_l0": 6, "sites": ["mlp_in_normed"], "target": "mlp"}
SKIP = {"d_sae": 40, "target_l0": 6, "sites": ["layer_1/mlp_in"], "target": "mlp", "skip": True}
ACROSS = {"d_sae": 24, "target_l0": 5, "sites": ["layer_2/att"], "target": "resid"}
GATED = {"d_sae": 40, "kind": "gated", "l0_coefficient": 0.1, "sites": ["layer_1/att"], "target": "resid", "skip": True}
OF_K = {"d_sae": 40, "k": 5, "sites": ["layer_1/att"], "target": "resid"}  # norms of mlp_in and mlp hardly differ
TOPK = OF_K | {"kind": "topk", "skip": True}
BATCHTOPK = OF_K | {"kind": "batchtopk"}
MATRYOSHKA = OF_K | {"kind": "matryoshka", "prefixes": [10, 40]}
NAMES = [
    "layer_0/mlp/width_32/target_l0_4",
    "layer_0/mlp_in_normed/to_mlp/width_48/target_l0_6",
    "layer_1/mlp_in/to_mlp/width_40/target_l0_6",
    "layer_1/mlp_in_normed/to_mlp/width_48/target_l0_6",
    "layer_2/att/to_resid/width_24/target_l0_5",
    "layer_2/mlp_in_normed/to_mlp/width_48/target_l0_6",
]


def config(model_folder, text_file, out, *each, **sections):
    made = tables(model_folder, text_file, out)
    made["suite"] = {"tokens": 24 * 120, "batch_size": 120, "sae": list(each or (SAE, PLAIN, SKIP, ACROSS))}
    for name, section in sections.items():
        made[name] |= section
    return SuiteConfig.from_dict(made)


def hashes(folder):
    files = sorted([*folder.rglob("params.npz"), *folder.rglob("params.safetensors")])
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
    out = tmp_path_factory.mktemp("runs") / "transcoders"
    return out, train_suite(config(model_folder, text_file, out))


@pytest.fixture(scope="module")
def model(model_folder) -> nn.Module:
    from transformers import Gemma2ForCausalLM

    return Gemma2ForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    ids = torch.randint(32, 127, (8, 32), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 256
    return ids


def test_what_a_run_leaves(finished):
    out, results = finished
    assert [row["name"] for row in results["saes"]] == NAMES
    rows = {row["name"]: row for row in read_results(out)["saes"]}
    skipping = rows[NAMES[2]]
    assert skipping["path"].startswith("saes/mlp_in_to_mlp/layer_1/width_40/average_l0_")
    assert skipping["path"].endswith("/params.safetensors")
    assert (skipping["site"], skipping["site_out"], skipping["target_l0"]) == ("mlp_in", "mlp", 6)
    for name in NAMES[1:]:
        found = Transcoder.load(out / rows[name]["path"])
        assert (found.W_skip is not None) == (name == NAMES[2])
        assert found.d_sae == rows[name]["width"]
        assert read_json((out / rows[name]["path"]).with_name("config.json"))["l0"] == pytest.approx(rows[name]["l0"])
        assert 0 < rows[name]["linear_fvu"] < 1
        assert rows[name]["fvu"] > 0
        assert rows[name]["tokens"] == rows[NAMES[0]]["tokens"]
    across = Transcoder.load(out / rows[NAMES[4]]["path"])
    assert (across.d_in, across.d_out) == (24, 16)
    assert Transcoder.load(out / rows[NAMES[3]]["path"]).metadata["site"] == Site(1, "mlp_in_normed").name


def test_a_report_shows_them(finished):
    out, _ = finished
    page = write_html(out).read_text()
    assert "FVU of a linear map" in page
    assert "that fits the training tokens best" in page
    [row] = [row for row in read_results(out)["saes"] if row["name"] == NAMES[2]]
    namespace = {"x": torch.zeros(3, 16)}
    exec(reload_code(out, [row]), namespace)
    assert namespace["f"].shape == (3, 40)
    assert namespace["y_hat"].shape == (3, 16)


def test_figures_are_those_of_the_files(finished, model, held_out):
    """FVU and Δloss by hand: x through the file's transcoder, put where the MLP's output was by hooks of one's own."""
    out, results = finished
    row = results["saes"][2]
    transcoder = Transcoder.load(out / row["path"])
    x, y = harvest(model, held_out, [Site(1, "mlp_in"), Site(1, "mlp")]).values()
    with torch.no_grad():
        error = (transcoder(x).double() - y.double()).square().sum()
    fvu = error / (y.double() - y.double().mean(0)).square().sum()
    metrics = evaluate_transcoder(transcoder, x, y)
    assert metrics.fvu == pytest.approx(fvu.item(), rel=1e-6)
    assert metrics.l0 == pytest.approx((transcoder.encode(x) != 0).sum(1).double().mean().item())

    layer, seen, skipped = model.get_submodule("model.layers.1"), [], held_out == 256
    handles = [
        layer.get_submodule("pre_feedforward_layernorm").register_forward_hook(lambda m, a, o: seen.append(o)),
        layer.get_submodule("post_feedforward_layernorm").register_forward_hook(
            lambda m, a, o: torch.where(skipped[..., None], o, transcoder(seen.pop()))
        ),
    ]
    ids = held_out[:, 2:, None]  # what BOS predicts is not scored

    def loss() -> float:
        with torch.no_grad():
            logits = model(held_out, use_cache=False).logits.log_softmax(-1)
        return -logits[:, 1:-1].gather(2, ids).mean().item()

    spliced = loss()
    for handle in handles:
        handle.remove()
    assert spliced - loss() != pytest.approx(0, abs=1e-4)
    assert delta_loss(model, held_out, {Site(1, "mlp"): transcoder}) == pytest.approx(spliced - loss(), abs=1e-5)


def test_a_linear_map_is_a_control():
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(400, 5, generator=generator) for _ in range(2))
    A, b = torch.randn(5, 3, generator=generator), torch.randn(3, generator=generator)
    assert linear_fvu(x, x @ A + b, other, other @ A + b) < 1e-9
    assert linear_fvu(x, (x @ A).abs(), other, (other @ A).abs()) > 0.5
    with pytest.raises(ValueError, match=r"^inputs: expected the 399 tokens of its targets, got 400$"):
        linear_fvu(x, x @ A, other, other[1:] @ A)


def test_stopped_and_gone_on_with_to_the_same_bits(finished, model_folder, text_file, tmp_path, monkeypatch):
    update = Suite.update

    def stopped(self, batch):
        update(self, batch)
        if next(iter(self.trainers.values())).step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Suite, "update", stopped)
        assert train_suite(config(model_folder, text_file, tmp_path / "run")) is None
    train_suite(config(model_folder, text_file, tmp_path / "run"))
    assert hashes(tmp_path / "run") == hashes(finished[0])
    assert len(hashes(finished[0])) == len(NAMES)


def test_an_sae_is_the_same_beside_transcoders(finished, model_folder, text_file, tmp_path):
    """They share the forward and the order of tokens, and no more."""
    alone = tmp_path / "alone"
    train_suite(config(model_folder, text_file, alone, SAE))
    beside = hashes(finished[0])
    assert [beside[path] for path in hashes(alone)] == list(hashes(alone).values())


def test_all_layers_go_to_circuit_tracer(finished, model_folder, text_file, tmp_path):
    run, out = tmp_path / "run", tmp_path / "circuit-tracer"
    results = train_suite(config(model_folder, text_file, run, PLAIN))
    assert results is not None
    export_saes([run], "circuit-tracer", out)
    text = (out / "config.yaml").read_text()
    assert "ln2.hook_normalized" in text
    assert "hook_mlp_out" in text
    for row in results["saes"]:
        ours, theirs = Transcoder.load(run / row["path"]), Transcoder.load(out / f"layer_{row['layer']}.safetensors")
        assert theirs.metadata["site"] == Site(row["layer"], "mlp_in_normed").name
        for name, tensor in ours.tensors.items():
            assert torch.equal(tensor, theirs.tensors[name]), name


DROP = 1.2


@pytest.fixture(scope="module")
def filtered(tmp_path_factory, model_folder, text_file):
    out = tmp_path_factory.mktemp("runs") / "filtered"
    each = (SAE, ACROSS | {"sites": ["layer_1/att"]}, TOPK, BATCHTOPK, MATRYOSHKA, GATED)
    made = config(model_folder, text_file, out, *each, activations={"drop_norm": DROP})
    return out, train_suite(made), made


def of_rows(out, made, model, which="held_out"):
    """The run's held-out text, x and y of its tokens, and which are outliers at neither site. Or its "train" text, of
    which thresholds are calibrated."""
    from gemmascope.suite.prepare import prepare
    from gemmascope.suite.run import spread

    rows = prepare(made, out, begun=True).rows
    if which == "train":
        tokens = rows.train(spread(rows.n_train, made.evaluate.train_rows))
    else:
        tokens = rows.held_out(spread(rows.n_held_out, made.evaluate.rows))
    statistics = read_results(out)["statistics"]
    found = harvest(model, tokens, [Site(1, "att"), Site(1, "resid")])
    kept = [x.norm(dim=1) <= DROP * statistics[str(site)]["median_norm"] for site, x in found.items()]
    return tokens, *found.values(), kept


def test_tokens_that_are_outliers_at_either_site_are_left_out(filtered, model):
    """By training, by the L0 that names the files and by every figure, and the figures of all tokens stand beside."""
    out, results, made = filtered
    held_out, x, y, kept = of_rows(out, made, model)
    both = kept[0] & kept[1]
    assert 0 < both.sum() < min(kept[0].sum(), kept[1].sum())
    for row in results["saes"][1:]:
        transcoder = Transcoder.load(out / row["path"])
        metrics, of_all = evaluate_transcoder(transcoder, x[both], y[both]), evaluate_transcoder(transcoder, x, y)
        assert (row["tokens"], row["tokens_all"], row["outliers"]) == (both.sum(), len(x), (~both).sum())
        assert (row["l0"], row["fvu"]) == (pytest.approx(metrics.l0), pytest.approx(metrics.fvu, rel=1e-5))
        assert (row["l0_all"], row["fvu_all"]) == (pytest.approx(of_all.l0), pytest.approx(of_all.fvu, rel=1e-5))
        assert read_json((out / row["path"]).with_name("config.json"))["l0"] == pytest.approx(row["l0"])
        positions = held_out != 256
        positions[positions.clone()] = both
        spliced = {Site(1, "resid"): transcoder}
        assert row["delta_loss"] == pytest.approx(delta_loss(model, held_out, spliced, positions=positions), abs=1e-5)
        assert row["delta_loss_all"] == pytest.approx(delta_loss(model, held_out, spliced), abs=1e-5)
        assert row["delta_loss"] != row["delta_loss_all"]
    page = write_html(out).read_text()
    assert "FVU, all tokens" in page


def test_transcoders_of_which_k_fire(filtered, model):
    """On a token of the text that θ is calibrated on; on the held-out text, so small, about as many."""
    out, results, made = filtered
    _, x, y, kept = of_rows(out, made, model, "train")
    both = kept[0] & kept[1]
    rows = {row["kind"]: row for row in results["saes"][2:]}
    assert list(rows) == ["topk", "batchtopk", "matryoshka", "gated"]
    gated = rows.pop("gated")
    for kind, row in rows.items():
        assert row["name"] == f"layer_1/att/to_resid/{kind}/width_40/k_5"
        assert row["path"].startswith(f"saes/att_to_resid/layer_1/width_40/{kind}/average_l0_")
        assert row["k"] == 5
        found = Transcoder.load(out / row["path"])
        assert evaluate_transcoder(found, x[both], y[both]).l0 == pytest.approx(5, abs=0.02)
        assert row["l0"] == pytest.approx(5, rel=0.25)
        assert found.threshold.unique().numel() == 1
        assert (found.W_skip is not None) == (kind == "topk")
    assert gated["name"] == "layer_1/att/to_resid/gated/width_40/l0_coefficient_0.1"
    assert gated["path"].startswith("saes/att_to_resid/layer_1/width_40/gated/average_l0_")
    found = Transcoder.load(out / gated["path"])
    assert found.W_skip is not None
    assert found.W_skip.any()
    assert found.threshold.unique().numel() > 1
    assert 0 < gated["l0"] < 40


def test_a_loss_with_some_positions_spliced(finished, model, held_out):
    """As if by hand: what is elsewhere keeps what the MLP wrote, whatever the batches are."""
    out, results = finished
    transcoder = Transcoder.load(out / results["saes"][2]["path"])
    positions = torch.rand(held_out.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    layer, seen, rows = model.get_submodule("model.layers.1"), [], iter(positions & (held_out != 256))
    handles = [
        layer.get_submodule("pre_feedforward_layernorm").register_forward_hook(lambda m, a, o: seen.append(o)),
        layer.get_submodule("post_feedforward_layernorm").register_forward_hook(
            lambda m, a, o: torch.where(next(rows)[None, :, None], transcoder(seen.pop()), o)
        ),
    ]
    losses = []
    for row in held_out:
        with torch.no_grad():
            logits = model(row[None], use_cache=False).logits.log_softmax(-1)
        losses.append(-logits[0, 1:-1].gather(1, row[2:, None]).mean().item())
    for handle in handles:
        handle.remove()
    clean = language_model_loss(model, held_out)
    spliced = {Site(1, "mlp"): transcoder}
    for batch_size in (None, 3):
        found = delta_loss(model, held_out, spliced, batch_size=batch_size, clean_loss=clean, positions=positions)
        assert found == pytest.approx(sum(losses) / len(losses) - clean, abs=1e-5)
    nowhere = torch.zeros_like(positions)
    assert delta_loss(model, held_out, spliced, positions=nowhere) == 0
    everywhere = torch.ones_like(positions)
    assert delta_loss(model, held_out, spliced, positions=everywhere) == delta_loss(model, held_out, spliced)
    mean = torch.zeros(16)
    ablated = [
        mean_ablation_loss(model, held_out, Site(1, "mlp"), mean, positions=each)
        for each in (None, nowhere, everywhere)
    ]
    assert ablated[0] == ablated[2] != ablated[1] == clean
    with pytest.raises(ValueError, match=r"^positions: expected shape \[8, 32\], got \[8, 31\]"):
        delta_loss(model, held_out, spliced, positions=positions[:, 1:])


def test_which_sites_a_block_means():
    found = blocks(SAE, PLAIN | {"sites": ["layer_0-1/mlp_in"]}, sites=["mlp"])
    with pytest.raises(ValueError, match=r"^suite.sites: expected sites of some block, got"):
        found.specs(sites_of(3))
    found = blocks({"d_sae": 32, "target_l0": 4}, PLAIN | {"sites": ["layer_0-1/mlp_in"]}, sites=["mlp"])
    specs = found.specs(sites_of(3))
    assert [(spec.site, spec.target) for spec in specs if spec.target] == [
        (Site(0, "mlp_in"), Site(0, "mlp")),
        (Site(1, "mlp_in"), Site(1, "mlp")),
    ]
    inputs = {spec.site for spec in specs if spec.target}
    assert found.selected_sites(sites_of(3)) == tuple(sorted({Site(i, "mlp") for i in range(3)} | inputs))
    everything = blocks({"d_sae": 8, "target_l0": 2, "sites": ["*"]})
    assert {spec.site for spec in everything.specs(sites_of(2))} == set(sites_of(2))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (PLAIN | {"target": "mlp_in"}, r"^suite.sae\[0\].target: expected 'att' or 'mlp' or 'resid', got 'mlp_in'$"),
        ({**PLAIN, "sites": ()}, r"^suite.sae\[0\].sites: expected those that the transcoders read"),
        (SAE | {"skip": True}, r"^suite.sae\[0\].skip: expected a target"),
        (PLAIN | {"init_from": "x"}, r"^suite.sae\[0\].init_from: expected none with a target"),
        (GATED | {"resample_steps": [9]}, r"^suite.sae\[0\].resample_steps: expected none with a target, got \[9\]$"),
    ],
)  # fmt: skip
def test_bad_blocks_are_refused_by_name(block, message):
    with pytest.raises(ValueError, match=message):
        blocks(block, **({} if block["sites"] else {"sites": ["mlp"]}))


def test_bad_runs_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^suite.sae\[0\].target: expected another site than layer_0/mlp itself"):
        blocks(PLAIN | {"sites": ["layer_0/*"]}).specs(sites_of(1))
    with pytest.raises(ValueError, match=r"^suite.training.skip: expected a target in every block"):
        blocks(PLAIN, SAE, training={"skip": True})
    with pytest.raises(ValueError, match=r"^suite.sae\[0\].sites\[0\]: expected sites among"):
        blocks(SAE | {"sites": ["mlp_in"]}).specs(sites_of(1))
