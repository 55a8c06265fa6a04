"""The report of a run, from made-up results in the schema that `gemmascope demo` writes."""

import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import rich.console
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmascope import reporting
from gemmascope.errors import BadFileError
from gemmascope.reporting import page
from gemmascope.reporting.results import COLUMNS, PLOTS, beats_pca, title_of, write_frequencies
from gemmascope.sites import Site

LAYERS, SITES, WIDTH = range(4), ("att", "mlp", "resid"), 512


def make_results(beaten=()):
    generator = np.random.default_rng(0)
    saes = []
    for layer in LAYERS:
        for site in SITES:
            fvu, ablation = generator.uniform(0.02, 0.11), generator.uniform(0.08, 2.4)
            name = f"layer_{layer}/{site}"
            saes.append(
                {
                    "site": site,
                    "layer": layer,
                    "width": WIDTH,
                    "l0": generator.uniform(3, 12),
                    "fvu": fvu,
                    "pca_fvu": fvu * (0.5 if name in beaten else 4),
                    "pair_table_fvu": generator.uniform(0.03, 0.6),
                    "median_fvu": generator.uniform(0.03, 0.1),
                    "pca_median_fvu": generator.uniform(0.2, 0.6),
                    "top_error_share": generator.uniform(0.01, 0.09),
                    "top_variance_share": generator.uniform(0.1, 0.9),
                    "delta_loss": generator.uniform(0.004, 0.15),
                    "ablation_delta_loss": ablation,
                    "loss_recovered": generator.uniform(0.87, 0.99),
                    "dead_fraction": generator.uniform(0.1, 0.6),
                    "high_freq_fraction": generator.uniform(0, 0.02),
                    "path": f"saes/{site}/layer_{layer}/width_{WIDTH}/average_l0_5/params.npz",
                }
            )
    return {
        "model": {
            "layers": 4,
            "d_model": 128,
            "parameters": 1_012_345,
            "text": "Python's own documentation",
            "tokens": 512_000,
            "loss": 1.769,
            "bigram_loss": 2.358,
            "steps": 500,
            "seconds": 39.1,
            "held_out_rows": 128,
            "held_out": "128 of 1,056 held-out rows [by the seed]",
        },
        "saes": saes,
        "environment": {"python": "3.11.7", "torch": "2.13.0", "device": "cpu"},
        "seconds": {"model": 39.1, "harvest": 7.9, "train": 44.6, "evaluate": 13.0},
    }


def write_run(folder, results):
    generator = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with (folder / "train_log.jsonl").open("w", encoding="utf-8") as log:
        for step in range(10, 601, 10):
            for sae in results["saes"]:
                row = {"step": step, "site": f"layer_{sae['layer']}/{sae['site']}", "loss": 0.3, "dead": 0.2}
                decay = np.exp(-step / 80) * generator.uniform(0.9, 1.1)
                row |= {"l0": sae["l0"] + 250 * decay, "fvu": sae["fvu"] + 1.5 * decay, "lr": 3e-3}
                log.write(json.dumps(row | {"l0_coefficient": 1e-2}) + "\n")
    frequencies = {}
    for sae in results["saes"]:
        values = 10 ** generator.normal(-2.6, 0.7, sae["width"])
        values[generator.random(sae["width"]) < sae["dead_fraction"]] = 0
        frequencies[f"layer_{sae['layer']}/{sae['site']}"] = np.minimum(values, 1).astype(np.float32)
    np.savez(folder / "frequencies.npz", **frequencies)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo", make_results(beaten=("layer_1/mlp",)))
    reporting.write_plots(folder)
    reporting.write_html(folder)
    return folder


def printed(renderable, width):
    console = rich.console.Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_table_fits_100_columns_and_marks_who_beats_pca(run):
    results = reporting.read_results(run)
    text = printed(reporting.final_table(results), 100)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(SITES)]
    assert "…" not in text
    assert len(rows) == len(results["saes"])
    for row, sae in zip(rows, results["saes"], strict=True):
        assert row[:3] == [sae["site"], str(sae["layer"]), str(WIDTH)]
        assert row[3:6] == [f"{sae['l0']:.1f}", f"{sae['fvu']:.3f}", f"{sae['pca_fvu']:.3f}"]
        assert row[6] == ("✗" if (sae["layer"], sae["site"]) == (1, "mlp") else "✓")
        assert row[8:10] == [f"{sae['median_fvu']:.3f}", f"{sae['pca_median_fvu']:.3f}"]
    assert "11 of 12 SAEs beat PCA of the same rank" in text
    assert "All figures are of held-out text: 128 of 1,056 held-out rows [by the seed]." in " ".join(text.split())
    assert "loss 1.769 nats a token, bigram baseline 2.358" in text


def test_equal_to_pca_does_not_beat_it():
    assert not beats_pca({"fvu": 0.1, "pca_fvu": 0.1})


def test_unmeasured_values_show_as_a_dash(tmp_path):
    results = make_results()
    results["saes"] = results["saes"][:1]
    results["saes"][0] |= {"loss_recovered": None, "delta_loss": None}
    del results["saes"][0]["pair_table_fvu"]
    write_run(tmp_path, results)
    read = reporting.read_results(tmp_path)
    row = next(line for line in printed(reporting.final_table(read), 100).splitlines() if "att" in line)
    assert row.split().count("–") == 2
    reporting.write_plots(tmp_path)
    assert ">–<" in reporting.write_html(tmp_path).read_text(encoding="utf-8")


def test_plots_are_four_opaque_png_files(run):
    from matplotlib import image

    paths = sorted((run / "plots").iterdir())
    assert [path.name for path in paths] == sorted(f"{name}.png" for name in PLOTS)
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[0] > 500
        assert pixels.shape[1] > 900
        assert pixels[0, 0].min() == 1.0, "white up to the corner"
        assert pixels.std() > 0.05, "something is drawn"


def test_plots_show_what_was_measured(run):
    from matplotlib.patches import StepPatch

    from gemmascope.reporting import plots

    saes = reporting.read_results(run)["saes"]
    log, frequencies = reporting.read_log(run), reporting.read_frequencies(run)
    curves = plots.training_curves(saes, log)
    assert [len(axes.lines) for axes in curves.axes] == [len(LAYERS)] * 2 * len(SITES)
    last = {row["site"]: row["fvu"] for row in log}
    drawn = sorted(line.get_ydata()[-1] for axes in curves.axes[: len(SITES)] for line in axes.lines)
    assert drawn == sorted(last.values())

    figure = plots.firing_frequencies(saes, frequencies)
    patches = [patch for axes in figure.axes for patch in axes.patches]
    heights = [
        patch.get_data().values.sum() if isinstance(patch, StepPatch) else patch.get_height() for patch in patches
    ]
    assert sum(heights) == len(saes) * WIDTH, "every latent is in one bar"

    (axes,) = plots.loss_increases(saes).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{site} {layer}" for site in SITES for layer in LAYERS
    ]
    low, high = axes.get_xlim()
    for sae in saes:
        assert low < sae["delta_loss"] < high
        assert low < sae["ablation_delta_loss"] < high


@pytest.mark.parametrize("layers", [1, 12])
def test_plots_of_few_and_many_layers(tmp_path, layers):
    results = make_results()
    template = results["saes"][2]
    results["saes"] = [template | {"layer": layer, "delta_loss": -0.01 * layer} for layer in range(layers)]
    assert len(reporting.write_plots(write_run(tmp_path, results))) == 4


def suite_results(layers, sites, targets):
    """Several SAEs a site, outliers left out, warnings and a parked SAE."""
    generator = np.random.default_rng(0)
    saes = []
    for layer in range(layers):
        for site in sites:
            for target in targets:
                fvu = generator.uniform(0.05, 0.35)
                saes.append(
                    {
                        "name": f"layer_{layer}/{site}/target_l0_{target}",
                        "site": site,
                        "layer": layer,
                        "width": 16384,
                        "seed": 0,
                        "target_l0": float(target),
                        "l0_coefficient": 8e-3,
                        "gamma": 1.75,
                        "outliers": 27,
                        "l0": target * generator.uniform(0.9, 1.1),
                        "fvu": fvu,
                        "pca_fvu": 2 * fvu,
                        "random_fvu": 0.777,
                        "delta_loss": generator.uniform(0.01, 0.6),
                        "ablation_delta_loss": generator.uniform(0.5, 5),
                        "loss_recovered": 0.88,
                        "dead_fraction": 0.05,
                        "high_freq_fraction": 0.01,
                        "fvu_all": 0.654,
                        "delta_loss_all": 0.597,
                        "path": f"saes/{site}/layer_{layer}/width_16k/average_l0_{target}/params.npz",
                    }
                )
    return {
        "model": {"name": "google/gemma-3-270m", "loss": 3.9},
        "saes": saes,
        "warnings": ["layer_9/resid: <27> of 16,311 tokens hold 71 % of the variance"],
        "parked": {"layer_3/att/target_l0_20": "the loss was not finite"},
    }


def write_suite(folder, results):
    generator = np.random.default_rng(1)
    (folder / "results.json").write_text(json.dumps(results))
    saes = results["saes"]
    sites = {sae["name"]: Site(sae["layer"], sae["site"]) for sae in saes}
    with reporting.TrainLog(folder / "train_log.jsonl", sites) as log:
        for step in (20, 40, 60):
            figures = {sae["name"]: {"l0": sae["l0"] * 60 / step, "fvu": sae["fvu"] * 60 / step} for sae in saes}
            log.append(step, figures)
    frequencies = np.minimum(10 ** generator.normal(-2.6, 0.7, (len(saes), 200)), 1) * (generator.random(200) > 0.1)
    write_frequencies(
        folder, {sae["name"]: torch.from_numpy(row).float() for sae, row in zip(saes, frequencies, strict=True)}
    )
    return folder


def test_a_suite_of_several_saes_a_site(tmp_path):
    from gemmascope.reporting import plots

    run = write_suite(tmp_path, suite_results(3, SITES, (20, 80)))
    read = reporting.read_results(run)
    text = printed(reporting.final_table(read), 100)
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(SITES)]
    assert [row[3] for row in rows] == ["20", "80"] * 9
    head = next(line for line in text.splitlines() if "layer" in line).split()
    assert head[:9] == ["site", "layer", "width", "target", "L0", "FVU", "PCA", "✓", "random"]
    assert "outl." in head
    sentences = " ".join(text.split())
    assert "18 of 18 a random dictionary of the same L0. Farthest from its target L0 is layer_" in sentences
    assert "In the report alone: Fire on > 10 %" in sentences
    assert "Parked: layer_3/att/target_l0_20." in sentences
    assert "bigram" not in text

    saes, log, frequencies = read["saes"], reporting.read_log(run), reporting.read_frequencies(run)
    curves = plots.training_curves(saes, log)
    assert [len(axes.lines) for axes in curves.axes] == [6] * 6
    assert {line.get_linestyle() for axes in curves.axes for line in axes.lines} == {"-", "--"}
    assert [text.get_text() for text in curves.legends[0].texts][3:] == ["target L0 20", "target L0 80"]
    (axes,) = plots.l0_against_fvu(saes).axes
    assert sum(len(line.get_xdata()) == 2 and line.get_color() != plots.LIGHT for line in axes.lines) == 9
    (axes,) = plots.loss_increases(saes).axes
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == [
        "att 0, target L0 20", "att 0, target L0 80", "att 1, target L0 20"
    ]  # fmt: skip
    assert len(plots.firing_frequencies(saes, frequencies).axes) == 9

    shown = "\n".join(Page(reporting.write_html(run).read_text(encoding="utf-8")).text)
    for expected in (
        *("Sparse autoencoders on google/gemma-3-270m", "Warnings of the run", "<27> of 16,311 tokens"),
        *("1 SAE was parked", "layer_3/att/target_l0_20", "the loss was not finite"),
        *("Target L0", "FVU of a random dictionary", "0.777", "γ", "1.75", "Outliers", "27"),
        *("FVU, all tokens", "0.654", "ΔLM loss, all tokens", "+0.597", "layer_2/resid/target_l0_80"),
    ):
        assert expected in shown
    for absent in ("Bigram", "bigram", "L0 coefficient", "Seed", "small Gemma"):
        assert absent not in shown


def test_78_sites_with_two_saes_each_stay_readable(tmp_path):
    from gemmascope.reporting import plots

    run = write_suite(tmp_path, suite_results(26, SITES, (20, 80)))
    read = reporting.read_results(run)
    saes, log, frequencies = read["saes"], reporting.read_log(run), reporting.read_frequencies(run)
    assert len(frequencies) == len(saes) == 156
    figures = [
        plots.training_curves(saes, log),
        plots.l0_against_fvu(saes),
        plots.firing_frequencies(saes, frequencies),
        plots.loss_increases(saes),
    ]
    for figure in figures:
        width, height = figure.get_size_inches()
        assert width < 13
        assert height < 25
    titles = [figure._suptitle.get_text() for figure in figures]
    assert titles[0].endswith("(shown: 16 of 26 layers)")
    assert titles[2].endswith("(shown: 12 of 26 layers)")
    assert [len(figure.axes) for figure in figures] == [6, 3, 36, 3]
    marks = [line for axes in figures[1].axes for line in axes.lines if line.get_marker() not in ("None", "")]
    assert len(marks) == 2 * 156, "every SAE and its control"
    drawn = sum(len(line.get_xdata()) for axes in figures[3].axes for line in axes.lines if len(line.get_xdata()) > 2)
    assert drawn == 3 * 3 * 26, "two curves and that of mean ablation"


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, {}], ["", "no. 2"]),
        (
            [{"target_l0": 20.0, "l0_coefficient": 1.0}, {"target_l0": 5.0, "l0_coefficient": 2.0}],
            ["target L0 5", "target L0 20"],
        ),
        (
            [{"width": 512, "seed": 1}, {"width": 512, "seed": 0}, {"width": 64, "seed": 0}],
            ["width 64, seed 0", "width 512, seed 0", "width 512, seed 1"],
        ),
        ([{"l0_coefficient": 1e-3}, {"l0_coefficient": None}], ["", "λ 0.001"]),
    ],
    ids=["nothing", "targets", "widths and seeds", "coefficients"],
)
def test_what_tells_the_saes_of_a_site_apart(changes, labels):
    from gemmascope.reporting import plots

    saes = [{"site": "att", "layer": 0, "width": 8} | each for each in changes]
    assert list(plots.variants(saes)) == labels


def test_titles():
    assert title_of({"model": {"name": "a"}, "title": "My suite"}) == "My suite"
    assert title_of({"model": {"name": "a"}}) == "Sparse autoencoders on a"
    assert title_of({"model": {"name": 3}}) == "Sparse autoencoders on a language model"


def test_frequencies_of_an_sae_named_like_an_argument(tmp_path):
    write_frequencies(tmp_path, {"file": torch.tensor([0.5, 0.0]), "layer_0/att": torch.tensor([1.0])})
    read = reporting.read_frequencies(tmp_path)
    assert {name: values.tolist() for name, values in read.items()} == {"file": [0.5, 0.0], "layer_0/att": [1.0]}


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_page_needs_nothing_but_itself(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_page_shows_every_number_explains_it_and_reloads(run):
    text = "\n".join(Page((run / "report.html").read_text(encoding="utf-8")).text)
    for sae in reporting.read_results(run)["saes"]:
        for key, _, heading, form, optional in COLUMNS:
            if optional:
                continue
            assert format(sae[key], form) in text
            assert text.count(heading) >= 2, f"{heading}: once in the table, once explained"
        assert sae["path"] in text
    assert "0.59 nats" in text
    assert "11 of 12 SAEs beat PCA" in text
    assert "All figures are of held-out text: 128 of 1,056 held-out rows [by the seed]." in text
    assert "JumpReLUSAE.load(" in text
    assert "1,012,345" in text
    assert "2.13.0" in text


def test_page_escapes_what_it_shows(tmp_path):
    attack = "<script>alert('x')</script>\"&"
    results = make_results()
    results["saes"] = results["saes"][:1]
    results["saes"][0] |= {"site": attack, "path": attack}
    results["model"] |= {"text": attack, attack: 1, "list": [attack]}
    results["environment"] = {attack: attack}
    results["seconds"] = {attack: 1.0}
    page = Page(reporting.write_html(write_run(tmp_path, results)).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert attack in "".join(page.text), "shown literally"


def test_plots_and_page_replace_old_ones_and_leave_no_scratch_files(tmp_path):
    write_run(tmp_path, make_results())
    (tmp_path / "report.html").write_text("old")
    reporting.write_html(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") != "old"
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"results.json", "train_log.jsonl", "frequencies.npz", "report.html", "plots"} | {
        f"{name}.png" for name in PLOTS
    }


def test_log_keeps_the_last_row_of_a_step_and_drops_a_cut_line(tmp_path):
    rows = [{"step": 2, "site": "a", "l0": 1.0}, {"step": 1, "site": "a"}, {"step": 2, "site": "a", "l0": 3.0}]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "si')
    assert reporting.read_log(tmp_path) == [rows[1], rows[2]]


def changed(**changes):
    results = make_results()
    results["saes"][0] |= changes
    return results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "results.json: expected JSON, found", id="cut"),
        pytest.param([], "expected an object with the object 'model'", id="list"),
        pytest.param({"model": {}}, "expected a list 'saes' of 1 to 1000", id="no saes"),
        pytest.param({"model": {}, "saes": [3]}, r"saes\[0\]: expected an object with the string 'site'", id="row"),
        pytest.param(changed(layer="0"), "expected an integer 'layer', found '0'", id="layer"),
        pytest.param(changed(fvu="low"), "expected a number 'fvu', found 'low'", id="text"),
        pytest.param(changed(fvu=None), "expected a number 'fvu', found none", id="missing"),
        pytest.param({"model": {"loss": "1"}, "saes": [3]}, "model: expected a number 'loss', found '1'", id="loss"),
        pytest.param(changed(l0=float("inf")), "expected JSON, found the constant Infinity", id="infinite"),
        pytest.param(changed(l0=1e31), "expected a number 'l0', found 1e\\+31", id="too large"),
        pytest.param(changed(l0=-(10**31)), "expected a number 'l0', found -1000", id="too small"),
        pytest.param(changed(layer=-1), "expected an integer 'layer', found -1", id="negative"),
        pytest.param(changed(width=2**31), "expected an integer 'width', found 2147483648", id="too wide"),
        pytest.param(changed(path="\ud800"), "expected Unicode text, found half of a surrogate pair", id="surrogate"),
        pytest.param(make_results() | {"seconds": [1]}, r"expected an object 'seconds', found \[1\]", id="seconds"),
        pytest.param(changed(name=3), "expected a string 'name', found 3", id="name"),
        pytest.param(make_results() | {"title": 3}, "expected a string 'title', found 3", id="title"),
        pytest.param(
            make_results() | {"warnings": "x"}, "expected a list of strings 'warnings', found 'x'", id="warned"
        ),
        pytest.param(make_results() | {"warnings": [3]}, r"list of strings 'warnings', found \[3\]", id="warning"),
        pytest.param(make_results() | {"parked": {"a": 3}}, "expected an object of strings 'parked'", id="parked"),
        pytest.param({"model": {}, "saes": [{}] * 1001}, "expected a list 'saes' of 1 to 1000", id="many"),
        pytest.param(
            {"model": {}, "saes": [make_results()["saes"][0] | {"site": str(i)} for i in range(9)]},
            "expected at most 8 different sites, found more",
            id="sites",
        ),
    ],
)
def test_bad_results(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadFileError, match=message):
        reporting.read_results(tmp_path)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=100)
@given(value=ANYTHING)
def test_whatever_is_given_is_named(value):
    with pytest.raises(TypeError, match=r"^results: expected what read_results returns, got "):
        reporting.final_table(value)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["site", "layer", "width", *(key for key, *_ in COLUMNS)]), value=ANYTHING)
def test_whatever_a_row_holds_is_shown_or_refused(tmp_path, key, value):
    results = make_results()
    results["saes"] = results["saes"][:2]
    results["saes"][0][key] = value
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    try:
        read = reporting.read_results(tmp_path)
    except BadFileError:
        return
    printed(reporting.final_table(read), 100)
    assert page.sae_table(read["saes"])


def test_missing_and_bad_companions(tmp_path):
    with pytest.raises(BadFileError, match=r"results.json: expected a file, found none"):
        reporting.read_results(tmp_path)
    with pytest.raises(BadFileError, match=r"train_log.jsonl: expected a file, found none"):
        reporting.read_log(tmp_path)
    with pytest.raises(BadFileError, match=r"frequencies.npz: expected a file, found none"):
        reporting.read_frequencies(tmp_path)
    (tmp_path / "train_log.jsonl").write_text('[1]\n{"step": 1, "site": "a"}\n')
    with pytest.raises(BadFileError, match="line 1: expected an object with 'step' and 'site'"):
        reporting.read_log(tmp_path)
    (tmp_path / "train_log.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(BadFileError, match="line 1: expected an object"):
        reporting.read_log(tmp_path)
    (tmp_path / "frequencies.npz").write_bytes(b"PK not a zip")
    with pytest.raises(BadFileError, match=r"frequencies.npz: expected a .npz file, found damage"):
        reporting.read_frequencies(tmp_path)
    ones = np.ones(3, np.float32)
    for array, message in (
        (np.array([{}], dtype=object), "expected float16, float32 or float64, found pickled objects"),
        (ones.astype(np.float64), r"a: expected float32 \[width\], found float64 \[3\]"),
        (ones[None], r"a: expected float32 \[width\], found float32 \[1, 3\]"),
        (2 * ones, "a: expected frequencies from 0 to 1, found others"),
        (-ones, "a: expected frequencies from 0 to 1, found others"),
        (np.nan * ones, "a: expected frequencies from 0 to 1, found others"),
    ):
        np.savez(tmp_path / "frequencies.npz", a=array)
        with pytest.raises(BadFileError, match=message):
            reporting.read_frequencies(tmp_path)


def test_frequencies_that_would_inflate_are_refused_before_they_do(tmp_path):
    path = tmp_path / "frequencies.npz"
    np.savez_compressed(path, a=np.zeros(30_000_000, np.float32))
    assert path.stat().st_size < 200_000
    with pytest.raises(BadFileError, match=r"frequencies.npz: .*expected at most"):
        reporting.read_frequencies(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": "1", "site": "a"}\n',
        b'{"step": true, "site": "a"}\n',
        b'{"step": 1, "site": ["a"]}\n',
        b'{"step": 1, "site": "a", "fvu": "low"}\n',
        b'{"step": 1e400, "site": "a"}\n',
        b'{"step": 1, "site": "a", "fvu": 1e400}\n',
        b'{"step": ' + b"9" * 5000 + b', "site": "a"}\n',
        b"[" * 60_000 + b"\n",
        b'{"step": 1, "site": "' + b"a" * 70_000,
    ],
    ids=lambda line: line[:24].decode(),
)
def test_a_line_that_is_no_row(tmp_path, line):
    (tmp_path / "train_log.jsonl").write_bytes(b'{"step": 1, "site": "a", "fvu": null, "l0": NaN}\n' + line)
    with pytest.raises(BadFileError, match=r"train_log.jsonl: line 2: expected an object with 'step' and 'site'"):
        reporting.read_log(tmp_path)


def test_figures_of_extremes(tmp_path):
    """The largest numbers that are let through, names that matplotlib would take for formulas, curves of nothing."""
    results = make_results()
    extremes = {"fvu": 1e-30, "pca_fvu": 1e30, "l0": 1e30, "delta_loss": -1e30, "ablation_delta_loss": 1e30}
    results["saes"] = [
        sae | extremes | {"site": site, "layer": layer, "width": 2**31 - 1, "path": "x" * 5000}
        for sae, site, layer in zip(results["saes"], ("a$b$", r"$\x$", "att"), (0, 7, 2**31 - 1), strict=False)
    ]
    write_run(tmp_path, make_results())
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = [{"step": step, "site": "layer_2147483647/att", "fvu": math.nan, "l0": 1e30} for step in (-(10**30), 10**30)]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(reporting.write_plots(tmp_path)) == 4
    reporting.write_html(tmp_path)


def test_results_of_an_unfinished_run_are_refused(tmp_path):
    write_run(tmp_path, make_results())
    (tmp_path / "stages.json").write_text("{}")
    for read in (reporting.read_results, reporting.write_plots, reporting.write_html):
        with pytest.raises(BadFileError, match="expected a finished run, found 'results' not done"):
            read(tmp_path)


@pytest.mark.parametrize(
    "function",
    [
        reporting.read_results, reporting.read_log, reporting.read_frequencies, reporting.write_plots,
        reporting.write_html,
    ],
)  # fmt: skip
def test_what_is_no_path(function):
    with pytest.raises(TypeError, match=r"run_dir: expected a str or an os.PathLike, got int"):
        function(3)
