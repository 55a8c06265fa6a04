"""Files of `gemmascope dashboards` as the packages that they are for read them: delphi's loader, circuit-tracer's class
and its own pages in Chromium, and SAEDashboard's classes and converter, which make what Neuronpedia imports.

Nothing of these packages is replaced. circuit-tracer's page asks other hosts for its libraries: it is served with those
addresses changed to copies of d3, d3-jetpack and dagre, and without three others, which no feature of ours needs.
Neuronpedia's importer is no package: tests/dashboards/test_writers.py has what it asks for.
"""

import contextlib
import gzip
import itertools
import json
import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from torch import Tensor

from gemmascope.dashboards import circuit_tracer, delphi, neuronpedia
from gemmascope.dashboards.codes import Piece
from gemmascope.dashboards.collect import Collector
from gemmascope.dashboards.overview import Overview, TableOf, Text, Vocabulary, table_path, write_overview
from gemmascope.dashboards.table import LatentTable, Sizes
from gemmascope.kernels import SparseCode
from gemmascope.sites import Site
from tests import chromium
from tests.dashboards import plain

ROWS, CONTEXT, LATENTS, WORDS, BOS = 24, 128, 7, 50, 0
SILENT, ALWAYS = 5, 6
WINDOW = 32
LAYER = 1
SIZES = Sizes(top=4, strata=3, of_stratum=2, window=WINDOW, bins=64, logits=3, related=2)
ODD = {3: "\n", 4: "日本", 5: '"', 6: "<b>", 7: "\\", 8: "\u202e"}
STRINGS = {BOS: "<bos>"} | {token: ODD.get(token, f" w{token}") for token in range(1, WORDS)}


class Example(NamedTuple):
    """Rows of text, and the activations [rows, context, latents] on them, all of which float16 holds."""

    tokens: Tensor
    f: Tensor
    counted: Tensor


def example() -> Example:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, WORDS, (ROWS, CONTEXT), generator=generator, dtype=torch.int32)
    tokens[:, 0] = BOS
    values = torch.randint(1, 512, (ROWS, CONTEXT, LATENTS), generator=generator) / 8
    fires = torch.rand(ROWS, CONTEXT, LATENTS, generator=generator) < torch.linspace(0.002, 0.1, LATENTS)
    fires[:, 5::WINDOW, ALWAYS] = True
    fires[..., SILENT] = False
    fires[:, 0] = False
    return Example(tokens, values * fires, tokens != BOS)


MADE = example()


def write(folder: Path, model: str = "made/tiny-it") -> Overview:
    collector = Collector(LATENTS, CONTEXT, SIZES)
    collector.add(SparseCode.from_dense(MADE.f[MADE.counted]), MADE.counted, 0)
    found = collector.found()._asdict()
    together = found.pop("together")
    numbers = torch.arange(LATENTS * 3).view(LATENTS, 3)
    ones = torch.ones(LATENTS)
    table = LatentTable(
        **found,
        **together._asdict(),
        promoted=(WORDS - 1 - numbers).int(),
        promoted_logit=2.5 - numbers / 8,
        suppressed=(numbers + 1).int(),
        suppressed_logit=-2.5 + numbers / 8,
        near=torch.tensor([[(j + 1) % LATENTS, (j + 2) % LATENTS] for j in range(LATENTS)], dtype=torch.int32),
        near_cosine=torch.tensor([[0.5, 0.25]] * LATENTS),
        decoder_norm=ones,
        encoder_norm=ones * 2,
        encoder_bias=ones * -1,
        alignment=ones / 2,
        threshold=ones / 8,
    )
    site = Site(LAYER, "resid")
    of = TableOf(f"layer_{LAYER}/resid/width_7", site, site, "jumprelu", LATENTS, table.n_sampled, {})
    return write_overview(
        folder,
        model=model,
        what="made up",
        seed=0,
        sizes=SIZES,
        text=Text(MADE.tokens, MADE.counted),
        vocabulary=Vocabulary(STRINGS),
        n_vocabulary=WORDS,
        saes=[(of, table.save(table_path(folder, 0)))],
    )


@pytest.fixture(scope="module")
def overview(tmp_path_factory) -> Overview:
    return write(tmp_path_factory.mktemp("overview"))


# ---- delphi


def codes(f: Tensor, cut: int = 1000) -> list[Piece]:
    """In two pieces, as they come from the disk."""
    row, position, latent = f.nonzero().T
    token, value = row * CONTEXT + position, f[row, position, latent]
    before = token < cut
    return [Piece(token[part], latent[part].int(), value[part]) for part in (before, ~before)]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("delphi.latents", exc_type=ImportError)


@pytest.fixture(scope="module")
def cache(theirs, tmp_path_factory) -> Path:
    """A cache beside the model, of which delphi takes the tokenizer by the name in config.json."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("delphi")
    words = tokenizers.models.WordLevel({string: token for token, string in STRINGS.items()}, unk_token="<bos>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "gemma2"}')
    overview = write(folder / "overview", model=str(folder / "model"))
    delphi.write(folder / delphi.LATENTS / "sae", LATENTS, overview, lambda: codes(MADE.f))
    return folder / delphi.LATENTS


def records(theirs, cache: Path, latents: list[int] | None = None, **constructor) -> dict[int, Any]:
    from delphi.config import ConstructorConfig, SamplerConfig

    found = theirs.LatentDataset(
        cache,
        SamplerConfig(n_examples_train=6, n_examples_test=4, n_quantiles=2),
        ConstructorConfig(**{"min_examples": 1, "n_non_activating": 3, "example_ctx_len": WINDOW} | constructor),
        latents=None if latents is None else {"sae": torch.tensor(latents)},
    )
    assert torch.equal(found.tokens, MADE.tokens.long())
    return {record.latent.latent_index: record for record in found}


def windows(x: Tensor) -> Tensor:
    return x.reshape(-1, WINDOW)


def pairs(tokens, activations) -> list[tuple]:
    return sorted((a.tolist(), t.tolist()) for t, a in zip(tokens, activations, strict=True))


@pytest.mark.parametrize("latents", [None, [0, 3, SILENT, ALWAYS]])
def test_delphi_reads_all_that_fires(theirs, cache, latents):
    found = records(theirs, cache, latents)
    assert found.keys() == {*(range(LATENTS) if latents is None else latents)} - {SILENT}
    for latent, record in found.items():
        f, tokens = windows(MADE.f[..., latent]), windows(MADE.tokens)
        fires = f.amax(1) > 0
        given = [example.tokens for example in record.examples], [example.activations for example in record.examples]
        assert pairs(*given) == pairs(tokens[fires], f[fires])
        maxima = [example.max_activation for example in record.examples]
        assert maxima == sorted(maxima, reverse=True)
        assert record.max_activation == f.max()
        assert record.per_token_frequency == (f > 0).sum().item() / f.numel()
        assert record.per_context_frequency == fires.sum().item() / len(fires)
        silent = [window.tolist() for window in tokens[~fires]]
        assert len(record.not_active) == (0 if latent == ALWAYS else 3)
        assert all(each.tokens.tolist() in silent for each in record.not_active)
        of_all = {id(example) for example in record.examples}
        assert 0 < len(record.train) <= 6
        assert 0 < len(record.test) <= 4
        for each in (*record.train, *record.test):
            assert id(each) in of_all
            assert torch.equal(each.normalized_activations, (each.activations * 10 / f.max()).ceil())


def test_delphi_centres_examples(theirs, cache):
    """Around the largest activation of each window but the first and the last of a row: 24 tokens before it."""
    before = WINDOW - WINDOW // 4
    for latent, record in records(theirs, cache, [4, ALWAYS], center_examples=False).items():
        expected = []
        for row in range(ROWS):
            for start in range(WINDOW, CONTEXT - WINDOW, WINDOW):
                f = MADE.f[row, start : start + WINDOW, latent]
                if f.max() > 0:
                    at = start + int(f.argmax())
                    expected.append((f.max().item(), MADE.tokens[row, at - before : at - before + WINDOW].tolist()))
        given = [(each.activations[before].item(), each.tokens.tolist()) for each in record.examples]
        assert sorted(given) == sorted(expected)
        assert expected


def test_delphi_reads_the_numbers_of_wide_saes(theirs, tmp_path):
    """uint32, since one file has more than 65,536 latents."""
    from delphi.latents.loader import TensorBuffer

    overview = write(tmp_path / "overview")
    made = [Piece(torch.tensor([130, 131]), torch.tensor([65536, 7], dtype=torch.int32), torch.tensor([1.5, 2.5]))]
    path, _ = delphi.write(tmp_path / "cache", 65537, overview, lambda: made, splits=1)
    locations, activations, tokens = TensorBuffer(str(path), "sae").load()
    assert locations.tolist() == [[1, 2, 65536], [1, 3, 7]]
    assert activations.tolist() == [1.5, 2.5]
    assert torch.equal(tokens, MADE.tokens.long())


# ---- circuit-tracer


@pytest.fixture(scope="module")
def features(overview, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    circuit_tracer.write(overview, folder)
    return folder


def test_circuit_tracer_has_a_class_of_these_files(features):
    """All keys that it has, of the types that it has, and no others; numbers as its graphs number their nodes."""
    models = pytest.importorskip("circuit_tracer.frontend.feature_models", exc_type=ImportError)
    from circuit_tracer.frontend.graph_models import Node

    for latent in range(LATENTS):
        node = Node.feature_node(LAYER, 0, latent)
        text = (features / "resid-width_7" / f"{node.feature}.json").read_text(encoding="utf-8")
        found = models.Model.model_validate_json(text, strict=True)
        assert found.model_dump() == json.loads(text)
        assert found.index == node.feature
        assert found.transcoder_id == node.layer
        assert len(found.quantile_values) == (0 if latent == SILENT else 100)
        shown = [each for quantile in found.examples_quantiles for each in quantile.examples]
        assert bool(shown) == (latent != SILENT)
        assert all(len(each.tokens) == len(each.tokens_acts_list) == WINDOW for each in shown)
        expected = plain.of_latent(MADE.f[..., latent], MADE.counted, SIZES).top
        for each, (row, position, value, acts) in zip(shown, expected, strict=False):  # the first quantile
            at = each.train_token_ind
            assert each.tokens_acts_list == acts
            assert acts[at] == value
            tokens = MADE.tokens[row, position - at : position - at + WINDOW].tolist()
            assert each.tokens == [STRINGS[token] for token in tokens]


# The scripts that its page takes from other hosts, and what stands for each here.
LIBRARIES = {
    "d3.js": ["d3-collection-1.0.7/dist/d3-collection.js", "d3-7.9.0/dist/d3.js"],
    "jetpack_2024-07-20.js": ["d3-jetpack-2.3.0/build/d3-jetpack.cjs"],
    "dagre.min.js": ["dagre-0.8.5/dist/dagre.min.js"],
    "hotserver-client-ws.js": [],
    "npy_v0.js": [],
    "pako.min.js": [],
}
# d3-jetpack adds its methods to the d3 that it is given by AMD's `define`. The version that the page asks for is not
# published: what its `conventions` has beyond the published one is added, the drawing of axes, which no test looks at.
BEFORE = """window.define = (names, made) => {
    const own = {};
    made(own, ...names.slice(1).map(() => d3));
    const { conventions } = own;
    own.conventions = given => {
        const found = conventions(given);
        found.drawAxis = svg => svg.append('g.y').call(found.yAxis);
        return found;
    };
    Object.assign(d3, own);
};
window.define.amd = true;"""
AFTER = "delete window.define"


def frontend(folder: Path) -> Path:
    """circuit-tracer's pages, with the scripts of other hosts from here."""
    package = pytest.importorskip("circuit_tracer.frontend.local_server", exc_type=ImportError)
    files = [file for each in LIBRARIES.values() for file in each]
    web = [Path(place) / "web" for place in sys.path if all((Path(place) / "web" / file).is_file() for file in files)]
    if not web:
        pytest.skip("needs d3, d3-jetpack and dagre of the npm registry")
    shutil.copytree(str(package.DEFAULT_FRONTEND_DIR), folder)
    replaced = []

    def here(script: re.Match) -> str:
        replaced.append(script[1].rpartition("/")[2])
        found = ""
        for file in LIBRARIES[replaced[-1]]:
            name = Path(file).stem + ".js"
            shutil.copy(web[0] / file, folder / name)
            own = f"<script src='./{name}'></script>"
            found += f"<script>{BEFORE}</script>{own}<script>{AFTER}</script>" if "jetpack" in name else own
        return found

    page = folder / "index.html"
    page.write_text(re.sub(r"<script src='(https://[^']*)'></script>", here, page.read_text("utf-8")), "utf-8")
    assert sorted(replaced) == sorted(LIBRARIES)
    return folder


def write_graph(folder: Path, latent: int, activation: float) -> str:
    """A graph of one latent, as circuit-tracer writes them; the name of the latent's node."""
    from circuit_tracer.frontend.graph_models import Metadata, Model, Node, QParams
    from circuit_tracer.frontend.utils import add_graph_metadata

    metadata = Metadata(
        slug="made", scan="./data/resid-width_7", transcoder_list=[], prompt_tokens=[" a", " b"], prompt=" a b"
    )
    feature = Node.feature_node(LAYER, 1, latent, influence=0.5, activation=activation)
    nodes = [Node.token_node(1, 2), feature, Node.logit_node(1, 3, " c", 2, True, 0.5)]
    links = [{"source": a.node_id, "target": b.node_id, "weight": 1.0} for a, b in itertools.pairwise(nodes)]
    params = QParams(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos="")
    graph = Model(metadata=metadata, qParams=params, nodes=nodes, links=links)
    (folder / "made.json").write_text(graph.model_dump_json(), encoding="utf-8")
    add_graph_metadata(metadata.model_dump(), str(folder))
    return feature.node_id


@contextlib.contextmanager
def served(data: Path, pages: Path):
    """The address of circuit-tracer's own server."""
    from circuit_tracer.frontend.local_server import serve

    server = serve(str(data), str(pages), port=0)
    try:
        yield f"http://localhost:{server.httpd.server_address[1]}"
    finally:
        server.httpd.shutdown()
        server.stop()


SHOWN = """[...document.querySelectorAll('.example-quantile')].map(quantile => ({
    title: quantile.textContent.trim(),
    examples: [...quantile.parentNode.querySelectorAll('.ctx-container')].map(one =>
        [...one.querySelectorAll('span.token')].map(span =>
            [span.textContent, span.__data__.act, span.style.background != '', span.className.includes('train')]))
}))"""


@pytest.mark.skipif(chromium.PROGRAM is None, reason=chromium.WHY_NOT)
def test_circuit_tracer_shows_these_files(features, tmp_path):
    """Its page shows a graph from its own server, whose ``scan`` is a folder of ours: the examples of a chosen latent,
    its logits, and where its activation is among all."""
    pages = frontend(tmp_path / "pages")
    latent = 3
    found = json.loads((features / "resid-width_7" / f"{circuit_tracer.cantor(LAYER, latent)}.json").read_text("utf-8"))
    f = MADE.f[..., latent]
    activation = f[f > 0].quantile(0.6, interpolation="nearest").item()
    node = write_graph(features, latent, activation)
    with served(features, pages) as address, chromium.browser() as browser:
        page = browser.page(f"{address}/index.html?slug=made&clickedId={node}")
        page.wait("document.querySelectorAll('.example-quantile').length && /pct/.test(document.body.textContent)")
        shown = page.run(SHOWN)
        label, said = (
            page.run(f"document.querySelector('.feature-title > {tag}').textContent") for tag in ("a", "span")
        )
        rows = "[...document.querySelectorAll('.feature-example-logits .ctx-container')]"
        logits = page.run(f"{rows}.map(row => [...row.querySelectorAll('span.token')].map(span => span.textContent))")
        bars = page.run("document.querySelectorAll('.histogram-placeholder rect.bar').length")
        assert all("favicon" in problem.get("url", "") for problem in page.problems())
    assert logits == [found["top_logits"], found["bottom_logits"]]
    assert bars == len(found["histogram"])
    assert [each["title"] for each in shown] == [each["quantile_name"] for each in found["examples_quantiles"]]
    for theirs, ours in zip(shown, found["examples_quantiles"], strict=True):
        assert theirs["examples"] == [merged(each) for each in ours["examples"]]
    assert label.endswith(f"{LAYER}/{latent}")
    percentile, share = re.fullmatch(r"Act: [\d.]+ (\d+)pct, Freq: ([\d.]+)%", said).groups()
    at_most = (f[f > 0] <= activation).float().mean().item() * 100
    width = 64 / SIZES.bins  # in which a bin's activations are taken for evenly spread
    in_bin = ((f > 0) & ((f - activation).abs() < width)).sum().item() / (f > 0).sum().item() * 100
    assert abs(int(percentile) - at_most) <= in_bin + 1
    assert share == f"{(f > 0).sum().item() / MADE.counted.sum().item() * 100:.3f}"


def merged(example: dict[str, Any]) -> list[list[Any]]:
    """Tokens, activation, coloured, chosen: it shows neighbours of one activation as one."""
    found, at = [], 0
    for act, group in itertools.groupby(
        zip(example["tokens_acts_list"], example["tokens"], strict=True), lambda x: x[0]
    ):
        tokens = [token for _, token in group]
        found.append(["".join(tokens), act, act > 0, at <= example["train_token_ind"] < at + len(tokens)])
        at += len(tokens)
    return found


# ---- SAEDashboard, for Neuronpedia


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


class Imported(NamedTuple):
    """The line of the source, those of features, and those of activations, by latent."""

    source: dict[str, Any]
    features: dict[int, dict[str, Any]]
    activations: dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def imported(overview, tmp_path_factory) -> Imported:
    folder = tmp_path_factory.mktemp("neuronpedia")
    neuronpedia.write(overview, folder, created=datetime(2026, 1, 2, tzinfo=UTC))
    [path] = folder.rglob("source.jsonl")
    of, source = path.parent, json.loads(path.read_text("utf-8"))
    features = {int(line["index"]): line for line in lines(of / "features" / "batch-0.jsonl.gz")}
    activations: dict[int, list[dict[str, Any]]] = {latent: [] for latent in features}
    for line in lines(of / "activations" / "batch-0.jsonl.gz"):
        activations[int(line["index"])].append(line)
    return Imported(source, features, activations)


def converted(latents: list[int]) -> dict[int, dict[str, Any]]:
    """What SAEDashboard's generators and converter say of the same text, activations and logits, as its runner calls
    them: whole rows, of which the first token is dropped."""
    pytest.importorskip("sae_dashboard.feature_data", exc_type=ImportError)
    from sae_dashboard.components import ActsHistogramData, LogitsHistogramData, LogitsTableData
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.feature_data import FeatureData
    from sae_dashboard.layout import Column, SaeVisLayoutConfig
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
    from sae_dashboard.sequence_data_generator import SequenceDataGenerator

    sequences = SequencesConfig(buffer=None, n_quantiles=SIZES.strata, top_acts_group_size=20, quantile_group_size=2)
    column = Column(
        sequences, ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3)
    )
    config = SaeVisConfig("blocks.1.hook_resid_post", latents, feature_centric_layout=SaeVisLayoutConfig([column]))
    generator = SequenceDataGenerator(config, MADE.tokens.long(), torch.zeros(1, WORDS))
    found = {}
    for latent in latents:
        f = MADE.f[..., latent]
        fires = f[f > 0]
        numbers = list(range(latent * 3, latent * 3 + 3))
        found[latent] = FeatureData(
            acts_histogram_data=ActsHistogramData.from_data(
                fires, 50, "5 ticks", f"ACTIVATIONS<br>DENSITY = {len(fires) / f.numel():.3%}"
            ),
            logits_histogram_data=LogitsHistogramData.from_data(torch.linspace(-1, 1, 50), 50, "5 ticks", None),
            logits_table_data=LogitsTableData(
                bottom_token_ids=[number + 1 for number in numbers],
                bottom_logits=[-2.5 + number / 8 for number in numbers],
                top_token_ids=[WORDS - 1 - number for number in numbers],
                top_logits=[2.5 - number / 8 for number in numbers],
            ),
            sequence_data=generator.get_sequences_data(f, torch.zeros(WORDS), torch.tensor([]), torch.zeros(1)),
        )

    model = SimpleNamespace(cfg=SimpleNamespace(d_vocab=WORDS))  # nothing else of it is asked for
    run = NeuronpediaRunnerConfig("set", "", "", n_prompts_total=ROWS, n_tokens_in_prompt=CONTEXT)
    run.model_id, run.layer = "tiny-it", LAYER
    text = NeuronpediaConverter.convert_to_np_json(model, SaeVisData(config, found), run, STRINGS)
    return {feature["feature_index"]: feature for feature in json.loads(text)["features"]}


OF_SOURCE = {"n_prompts_total": "num_prompts", "n_tokens_in_prompt": "num_tokens_in_prompt", "dataset": "dataset"}
OF_ACTIVATION = {"bin_min": "binMin", "bin_max": "binMax", "bin_contains": "binContains", "tokens": "tokens"}
OF_ACTIVATION |= {"values": "values", "qualifying_token_index": "qualifyingTokenIndex"}
OF_ACTIVATION |= {"dfa_values": "dfaValues", "dfa_maxValue": "dfaMaxValue", "dfa_targetIndex": "dfaTargetIndex"}


def fits(hint: Any, value: Any) -> None:
    pytest.importorskip("pydantic").TypeAdapter(hint).validate_python(value, strict=True)


def test_sae_dashboard_holds_what_we_write(imported):
    """Every field of its classes is there, of its type; what its encoder writes of them is what was given."""
    module = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_converter", exc_type=ImportError)
    made = module.NeuronpediaDashboardFeature, module.NeuronpediaDashboardActivation
    of_feature, of_activation = (get_type_hints(each.__init__) for each in made)
    assert of_activation.keys() == OF_ACTIVATION.keys()
    source, features, activations = imported
    given = []
    for latent, line in features.items():
        found = {name: line[name] for name in of_feature.keys() - OF_SOURCE.keys() - {"feature_index", "activations"}}
        found |= {name: source[own] for name, own in OF_SOURCE.items()} | {"feature_index": int(line["index"])}
        for name, value in found.items():
            fits(of_feature[name], value)
        found["activations"] = [{name: one[own] for name, own in OF_ACTIVATION.items()} for one in activations[latent]]
        for one in found["activations"]:
            for name, value in one.items():
                fits(of_activation[name], value)
        given.append(found)
    batch = module.NeuronpediaDashboardBatch(model_id="tiny-it", layer=LAYER, sae_set="set", features=given)
    written = json.loads(json.dumps(batch, cls=module.NpEncoder))["features"]
    for one in (one for each in given for one in each["activations"]):
        for name in [name for name in one if one[name] is None]:  # which it leaves out
            del one[name]
    assert written == given


def test_sae_dashboard_says_the_same(imported):
    _, features, activations = imported
    latents = [latent for latent in features if latent != SILENT]
    assert not activations[SILENT]
    for latent, theirs in converted(latents).items():
        ours = features[latent]
        for name in theirs.keys() - OF_SOURCE.keys() - {"feature_index", "activations"}:
            assert isinstance(ours[name], type(theirs[name])), name
        for name in ("pos_str", "pos_values", "neg_str", "neg_values"):
            assert ours[name] == theirs[name]
        f = MADE.f[..., latent]
        tokens = int(MADE.counted.sum())
        assert theirs["frac_nonzero"] == pytest.approx(ours["frac_nonzero"] * tokens / f.numel(), abs=5.1e-6)
        assert sum(ours["freq_hist_data_bar_heights"]) == sum(theirs["freq_hist_data_bar_heights"]) == (f > 0).sum()
        compare([one for one in theirs["activations"] if one["bin_min"] == -1], activations[latent], f)


def compare(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], f: Tensor) -> None:
    """The largest activations: the same tokens in the same surroundings, of which they have the whole row but its first
    token. Of intervals each has its own; what ours say of themselves is compared with the activations."""
    groups = {key: list(group) for key, group in itertools.groupby(ours, lambda one: (one["binMin"], one["binMax"]))}
    top, *intervals = groups
    largest = f.max().item()
    assert top == (-1, largest)
    assert {(one["bin_min"], one["bin_max"], one["bin_contains"]) for one in theirs} == {(-1, largest, -1)}
    assert len(groups[top]) == min(SIZES.top, int((f.reshape(-1, WINDOW).amax(1) > 0).sum()))
    by_value = sorted((one["values"][one["qualifying_token_index"]] for one in theirs), reverse=True)
    assert groups[top][0]["maxValue"] == by_value[0] == largest
    for one in groups[top]:
        assert one["binContains"] == -1
        assert any(is_part(one, other) for other in theirs)
    for (low, high), group in ((each, groups[each]) for each in intervals):
        inside = (f >= low) & (f < high) & (f > 0)
        for one in group:
            assert one["binContains"] == pytest.approx((inside.sum() / MADE.counted.sum()).item(), rel=1e-6)
            assert low <= one["values"][one["qualifyingTokenIndex"]] < high


def is_part(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    at = theirs["qualifying_token_index"] - ours["qualifyingTokenIndex"]  # where ours begins in theirs
    skipped = max(-at, 0)  # the first token of the row
    own = slice(skipped, None)
    part = slice(at + skipped, at + WINDOW)
    return (
        ours["tokens"][:skipped] in ([], [STRINGS[BOS]])
        and ours["tokens"][own] == theirs["tokens"][part]
        and ours["values"][own] == theirs["values"][part]
    )
