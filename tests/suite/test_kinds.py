"""Every kind of SAE through `gemmascope train`: from the block of a config to the file, the table and the page."""

import dataclasses
import io
import json
import warnings

import numpy as np
import pytest
import torch

from gemmascope import JumpReLUSAE, TopKSAE, load_sae
from gemmascope.activations import TokenRows, harvest
from gemmascope.errors import BadFileError
from gemmascope.evaluation import evaluate_sae
from gemmascope.kernels import preactivations
from gemmascope.reporting import final_table, plots, read_results, write_html
from gemmascope.reporting.table import aims_of
from gemmascope.saes.base import BaseSAE
from gemmascope.sites import Site
from gemmascope.suite import measure
from gemmascope.suite.config import ModelSection, SuiteConfig
from gemmascope.suite.export import export_saes
from gemmascope.suite.measure import Stopwatch, narrowed
from gemmascope.suite.memory import ModelSizes
from gemmascope.suite.model import load_model
from gemmascope.suite.plan import _parameters
from gemmascope.suite.run import plan_suite, spread, train_suite
from gemmascope.training import TrainConfig
from gemmascope.training.config import KINDS
from gemmascope.training.kinds import new_sae
from tests.suite.configs import blocks, sites_of
from tests.suite.small_runs import config

# Relative, of what folding makes of a threshold and of z.
ROUNDING = 1e-4
BLOCKS = {
    "jumprelu": {"target_l0": [4, 6]},
    "relu": {"l0_coefficient": [0.3]},
    "gated": {"l0_coefficient": [0.3]},
    "topk": {"k": [4, 6], "aux_coefficient": 0.1, "aux_k": 3},
    "batchtopk": {"k": [4]},
    "matryoshka": {"k": [4], "prefixes": [8, 32]},
}


def block(kind: str, **numbers) -> dict:
    return {"kind": kind, "d_sae": 32, **BLOCKS[kind], **numbers}


def is_made(kind: str) -> bool:
    (spec, *_) = blocks(block(kind), sites=["layer_1/resid"]).specs(sites_of(2))
    try:
        new_sae(spec.config, 16)
    except NotImplementedError:
        return False
    return True


MADE = tuple(filter(is_made, KINDS))
BY_BATCH = ("batchtopk", "matryoshka")


# ---- blocks and names


def names(*each, **suite) -> list[str]:
    return [spec.name for spec in blocks(*each, sites=["layer_1/resid"], **suite).specs(sites_of(2))]


def test_names():
    assert names(*(block(kind) for kind in KINDS)) == [
        "layer_1/resid/width_32/target_l0_4",
        "layer_1/resid/width_32/target_l0_6",
        "layer_1/resid/relu/width_32/l0_coefficient_0.3",
        "layer_1/resid/gated/width_32/l0_coefficient_0.3",
        "layer_1/resid/topk/width_32/k_4",
        "layer_1/resid/topk/width_32/k_6",
        "layer_1/resid/batchtopk/width_32/k_4",
        "layer_1/resid/matryoshka/width_32/k_4",
    ]


def test_names_of_saes_that_differ_in_a_number_of_their_kind():
    prefixes = [block("matryoshka"), block("matryoshka", prefixes=[4, 16, 32])]
    assert names(*prefixes) == [
        "layer_1/resid/matryoshka/width_32/k_4/prefixes_8-32",
        "layer_1/resid/matryoshka/width_32/k_4/prefixes_4-16-32",
    ]
    without = block("topk", k=4) | {"aux_coefficient": 0}
    assert names(block("topk", k=4), without) == [
        "layer_1/resid/topk/width_32/k_4/aux_coefficient_0.1",
        "layer_1/resid/topk/width_32/k_4/aux_coefficient_0",
    ]


def test_the_numbers_of_a_block_reach_the_recipe():
    made = blocks(block("topk"), block("matryoshka"), sites=["layer_1/resid"])
    topk, _, matryoshka = (spec.config for spec in made.specs(sites_of(2)))
    assert (topk.kind, topk.k, topk.aux_k, topk.aux_coefficient) == ("topk", 4, 3, 0.1)
    assert (topk.loss.sparsity, topk.loss.l0_coefficient, topk.loss.target_l0) == ("none", 0.0, None)
    assert (matryoshka.kind, matryoshka.k, matryoshka.prefixes) == ("matryoshka", 4, (8, 32))
    assert SuiteConfig.from_dict(json.loads(json.dumps(made.to_dict()))).specs(sites_of(2)) == made.specs(sites_of(2))


def test_a_kind_for_all_blocks():
    assert names({"d_sae": 32, "k": 3}, training={"kind": "topk"}) == ["layer_1/resid/topk/width_32/k_3"]


def test_the_published_recipe_takes_every_kind():
    published = blocks(block("gated"), block("topk"), sites=["layer_1/resid"], recipe="gemma-scope", tokens="100M")
    gated, *topk = (spec.config for spec in published.specs(sites_of(2)))
    assert {each.learning_rate for each in (gated, *topk)} == {7e-5}
    assert (gated.loss.sparsity, gated.loss.l0_coefficient) == ("l1", 0.3)
    assert [each.k for each in topk] == [4, 6]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"kind": "topk"}, "k: expected one, or several, with kind = 'topk', got none"),
        ({"kind": "topk", "k": 33}, "k: expected at most 32, got 33"),
        ({"kind": "topk", "k": [4, 4]}, "k[1]: expected each once, got 4 twice"),
        ({"kind": "topk", "k": 0}, "k: expected at least 1, got 0"),
        ({"kind": "topk", "k": 4, "target_l0": 4}, "target_l0: expected k in its place with kind = 'topk', got 4"),
        ({"kind": "topk", "k": 4, "l0_coefficient": 0.1}, "l0_coefficient: expected k in its place with kind = 'topk'"),
        ({"kind": "topk", "k": 4, "prefixes": [8, 32]}, "prefixes: expected none with kind='topk', got [8, 32]"),
        ({"kind": "topk", "k": 4, "sparsity": "l0"}, "sparsity: expected 'none' with kind='topk', got 'l0'"),
        ({"kind": "topk", "k": 4, "aux_k": 0}, "aux_k: expected at least 1, got 0"),
        ({"kind": "gated", "target_l0": 4}, "target_l0: expected l0_coefficient in its place with kind = 'gated'"),
        ({"kind": "gated", "l0_coefficient": 0.1, "k": 4}, "k: expected l0_coefficient in its place"),
        ({"kind": "gated", "l0_coefficient": 0.1, "aux_k": 4}, "aux_k: expected none with kind = 'gated', got 4"),
        ({"k": 4}, "k: expected target_l0 or l0_coefficient in its place with kind = 'jumprelu', got 4"),
        ({"kind": "matryoshka", "k": 4}, "prefixes: expected some with kind='matryoshka', got []"),
        ({"kind": "matryoshka", "k": 4, "prefixes": [16, 8, 32]}, "prefixes: expected numbers that ascend to d_sae ="),
        ({"kind": "matryoshka", "k": 4, "prefixes": [8, 16]}, "prefixes: expected numbers that ascend to d_sae ="),
        ({"kind": "vanilla"}, "kind: expected 'jumprelu' or 'relu' or 'gated'"),
    ],
)
@pytest.mark.parametrize("recipe", ["small", "gemma-scope"])
def test_what_a_block_cannot_be(numbers, message, recipe):
    with pytest.raises(ValueError) as found:
        blocks({"d_sae": 32, **numbers}, sites=["resid"], recipe=recipe, tokens="100M")
    assert str(found.value).startswith(f"suite.sae[0].{message}")


def test_with_the_small_recipe_an_l1_penalty_has_a_weight():
    message = r"^suite\.sae\[0\]\.l0_coefficient: expected one, or several, with kind = 'gated', got none"
    with pytest.raises(ValueError, match=message):
        blocks({"d_sae": 32, "kind": "gated"}, sites=["resid"])


# ---- plans


def test_a_plan_tells_the_kinds(model_folder, text_file, tmp_path):
    found = plan_suite(of_all(model_folder, text_file, tmp_path / "run")).text()
    aims = "L0 4, 6; relu λ 0.3" + ("; gated λ 0.3" if "gated" in MADE else "")
    (line,) = (line for line in found.splitlines() if aims in line)
    assert ("topk k 4, 6" in line) == ("topk" in MADE)


def test_parameters_of_each_kind():
    for kind in MADE:
        (spec, *_) = blocks(block(kind), sites=["layer_1/resid"]).specs(sites_of(2))
        made = new_sae(spec.config, 16)
        fixed = 32 if kind != "jumprelu" and hasattr(made, "threshold") else 0  # thresholds that are not learnt
        assert (
            _parameters(spec, ModelSizes(2, 0, 0, 16, 32, 2, 64, 4, widths={spec.site: 16}))
            == sum(each.numel() for each in made.parameters()) - fixed
        )


@pytest.mark.parametrize("kind", MADE)
def test_a_step_of_each_kind_is_measured(kind, monkeypatch):
    """A wide one at a part of its width."""
    monkeypatch.setattr(measure, "MOST_WEIGHTS", 16 * 256)
    spec = blocks(
        {**block(kind), "d_sae": 512, **({"prefixes": [8, 512]} if kind == "matryoshka" else {})}, sites=["resid"]
    )
    recipe = dataclasses.replace(spec.specs(sites_of(1))[0].config, batch_size=64)
    assert Stopwatch().step(recipe, 16, torch.device("cpu"), "auto", threads=1) > 0


def test_narrower():
    wide = TrainConfig.small(kind="matryoshka", k=40, d_sae=64, prefixes=(1, 8, 64))
    narrow = narrowed(wide, 32)
    assert (narrow.d_sae, narrow.k, narrow.prefixes) == (32, 32, (1, 4, 32))
    assert narrowed(wide, 64) == wide
    assert narrowed(TrainConfig.small(d_sae=64, target_l0=40), 32).loss.target_l0 == 32


# ---- a whole run


def of_all(model_folder, text_file, out, kinds=MADE, **sections) -> SuiteConfig:
    given = {"sites": ["layer_1/resid"], "sae": [block(kind) for kind in kinds]}
    return config(model_folder, text_file, out, suite=given, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
    out = tmp_path_factory.mktemp("runs") / "kinds"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return out, train_suite(of_all(model_folder, text_file, out))


def activations(out, model_folder, which: str, count: int) -> torch.Tensor:
    """Those of the run's rows that it read itself."""
    rows, loaded = TokenRows.open(out / "tokens"), load_model(ModelSection(str(model_folder)), "cpu")
    tokens = (
        rows.train(spread(rows.n_train, count)) if which == "train" else rows.held_out(spread(rows.n_held_out, count))
    )
    site = Site(1, "resid")
    return harvest(loaded.model, tokens, [site])[site]


def rows_of(finished, kind: str) -> list[dict]:
    return [row for row in finished[1]["saes"] if row["kind"] == kind]


def test_each_kind_is_trained_and_judged(finished):
    results = finished[1]
    assert [row["kind"] for row in results["saes"]] == [
        kind for kind in MADE for _ in range(2 if kind in ("jumprelu", "topk") else 1)
    ]
    for row in results["saes"]:
        assert 0 < row["l0"] <= 32
        assert 0 < row["fvu"] < 1.5
        assert row["k"] == (BLOCKS[row["kind"]].get("k") and json.loads(row["name"].rpartition("k_")[2].split("/")[0]))
        assert (row["l0_coefficient"] is None) == ("k" in BLOCKS[row["kind"]])
    assert not results["parked"]


@pytest.mark.parametrize("kind", MADE)
def test_the_file_of_each_kind(finished, kind):
    """Opens as what it is and says as what it was trained."""
    out, _ = finished
    for row in rows_of(finished, kind):
        sae = load_sae(out / row["path"])
        assert type(sae) is (TopKSAE if kind == "topk" else JumpReLUSAE)
        assert sae.is_folded
        assert sae.kind == kind == sae.metadata["kind"]
        assert sae.metadata["average_l0"] == pytest.approx(row["l0"])
        folder = f"saes/resid/layer_1/width_32/{'' if kind == 'jumprelu' else f'{kind}/'}"
        if kind == "topk":
            assert row["path"] == f"{folder}k_{row['k']:g}/params.safetensors"
            assert sae.metadata["k"] == sae.k == row["k"]
            assert row["l0"] <= row["k"]
        else:
            assert row["path"].replace("_2/", "/") == f"{folder}average_l0_{round(row['l0'])}/params.npz"
        assert sae.metadata.get("prefixes") == BLOCKS[kind].get("prefixes")
    assert len({row["path"] for row in finished[1]["saes"]}) == len(finished[1]["saes"])


@pytest.mark.skipif(set(MADE) != set(KINDS), reason="of all kinds")
@pytest.mark.parametrize("kind", BY_BATCH)
def test_the_threshold_of_a_batch_kind_is_calibrated(finished, model_folder, kind):
    """On the training rows of the controls, by one θ for all latents."""
    x = activations(finished[0], model_folder, "train", 24)
    for row in rows_of(finished, kind):
        sae = load_sae(finished[0] / row["path"])
        assert isinstance(sae, JumpReLUSAE)
        calibration = sae.metadata["calibration"]
        assert sae.threshold.unique().tolist() == pytest.approx([calibration["threshold"]])
        assert calibration["tokens"] == len(x)
        z, theta = preactivations(x, sae.W_enc, sae.b_enc), sae.threshold[0]
        above, at_least = ((z > theta * factor).sum().item() for factor in (1 + ROUNDING, 1 - ROUNDING))
        assert above <= 4 * len(x) <= at_least, "but for equals at the border, of which none fires, k do"
        for l0 in (calibration["l0_after"], evaluate_sae(sae, x).l0):
            assert above <= round(l0 * len(x)) <= at_least
        assert calibration["l0_after"] <= 4
        assert calibration["l0_before"] != calibration["l0_after"]
        assert row["l0"] == pytest.approx(4, rel=0.3), "on other text"


def test_the_table_the_page_and_the_plots_tell_the_kinds(finished, tmp_path):
    import rich.console

    out, _ = finished
    read = read_results(out)
    console = rich.console.Console(width=100, record=True, file=io.StringIO())
    console.print(final_table(read))
    text = console.export_text()
    head = next(line for line in text.splitlines() if "layer" in line).split()
    assert head[:4] == ["site", "layer", "kind", "width"]
    told = [line.split()[2] for line in text.splitlines() if line.strip().startswith("resid")]
    assert told == [row["kind"] for row in read["saes"]]
    cells = [" ".join(line.split()[4:6]) for line in text.splitlines() if line.strip().startswith("resid")]
    assert cells == [
        f"{name} {row[key]:g}"
        for row in read["saes"]
        for key, name in (("target_l0", "target"), ("k", "k"), ("l0_coefficient", "λ"))
        if row.get(key) is not None and not (key == "l0_coefficient" and row.get("target_l0"))
    ]
    assert {cell.split()[0] for cell in cells} == {"target", "k", "λ"}
    assert max(map(len, text.splitlines())) <= 100
    page = write_html(out).read_text()
    for kind in MADE:
        assert f"<td class=name data-name=Kind>{kind}</td>" in page
    assert "JumpReLU sparse autoencoders" not in page
    assert "load_sae" in page
    figure = plots.l0_against_fvu(read["saes"])
    markers = {line.get_marker() for line in figure.axes[0].lines if line.get_markerfacecolor() != "white"}
    assert {plots.KIND_STYLES[kind][0] for kind in MADE} <= markers
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert set(MADE) <= labels
    assert any(label.startswith("relu, λ 0.3") for label in plots.variants(read["saes"]))


@pytest.mark.parametrize(
    ("saes", "expected"),
    [
        ([{"target_l0": 20.0, "l0_coefficient": 0.3}, {"target_l0": 40.0}], ("target", ["20", "40"])),
        ([{"k": 20, "l0_coefficient": None}, {"k": None}], ("k", ["20", "–"])),
        ([{"l0_coefficient": 0.04}, {"l0_coefficient": 0.4}], ("λ", ["0.04", "0.4"])),
        ([{"l0_coefficient": 0.04}, {"l0_coefficient": 0.04}], None),
        ([{"k": 8}, {"l0_coefficient": 0.04}, {}], ("sparse by", ["k 8", "λ 0.04", "–"])),
        ([{}], None),
    ],
)
def test_the_table_says_what_makes_each_sparse(saes, expected):
    assert aims_of(saes) == expected


def test_titles_and_legends_of_plots_of_one_site_are_not_cut_off():
    row = {"site": "resid", "layer": 2, "width": 512, "l0": 5.0, "fvu": 0.1, "pca_fvu": 0.3}
    saes = [row | {"name": f"{kind} {k}", "kind": kind, "k": k} for kind in ("topk", "matryoshka") for k in (5, 2000)]
    log = [
        {"sae": sae["name"], "site": "resid", "step": step, "fvu": 0.5, "l0": 5.0} for sae in saes for step in (1, 2)
    ]
    fired = {sae["name"]: np.full(512, 0.01, dtype=np.float32) for sae in saes}
    for figure in (plots.training_curves(saes, log), plots.firing_frequencies(saes, fired)):
        figure.canvas.draw()
        page = figure.bbox
        assert figure._suptitle is not None
        for each in (figure.legends[0], figure._suptitle):
            box = each.get_window_extent()
            assert page.x0 <= box.x0 < box.x1 <= page.x1, each
        assert len(figure.legends[0].get_texts()) >= 4


def test_a_run_of_jumprelu_alone_does_not_speak_of_kinds():
    rows = [{"site": "resid", "layer": 1, "width": 8, "kind": "jumprelu"} | {"l0": 1.0, "fvu": 0.5, "pca_fvu": 0.6}]
    table = final_table({"model": {}, "saes": rows})
    assert "kind" not in [column.header for column in table.columns]


def test_a_kind_that_is_none_is_refused(finished, tmp_path):
    results = json.loads((finished[0] / "results.json").read_text())
    results["saes"][0]["kind"] = "<b>"
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(BadFileError, match=r"saes\[0\]: expected a 'kind' of jumprelu, relu, gated"):
        read_results(tmp_path)


def test_a_run_is_exported_with_its_kinds(finished, tmp_path):
    exported = export_saes([finished[0]], "safetensors", tmp_path / "out")
    assert len(exported.entries) == len(finished[1]["saes"])
    card = (tmp_path / "out" / "README.md").read_text()
    for entry, row in zip(exported.entries, finished[1]["saes"], strict=True):
        sae = load_sae(tmp_path / "out" / entry.folder)
        assert isinstance(sae, BaseSAE)
        assert sae.kind == row["kind"]
        assert (row["kind"] in entry.folder) == (row["kind"] != "jumprelu")
    assert "Trained as" in card


@pytest.mark.parametrize("kind", MADE)
def test_what_is_saved_is_what_was_trained(finished, kind, model_folder):
    """The figures of the row are those of the file."""
    out, _ = finished
    x = activations(out, model_folder, "held_out", 12)
    for row in rows_of(finished, kind):
        found = evaluate_sae(load_sae(out / row["path"]), x)
        assert (found.l0, found.fvu) == pytest.approx((row["l0"], row["fvu"]), rel=1e-5)
