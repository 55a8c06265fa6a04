"""`gemmascope dashboards` as a user meets it: runs, folders, every kind, what is refused, what goes on after a kill.

pytest tests/suite/test_dashboards.py
"""

import json
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemmascope import JumpReLUSAE, TopKSAE, Transcoder
from gemmascope.__main__ import main
from gemmascope.dashboards.overview import Overview
from gemmascope.dashboards.table import Examples, Sizes
from gemmascope.formats.files import read_json
from gemmascope.saes import load_sae
from gemmascope.sites import Capture, Site
from gemmascope.suite import DashboardConfig, dashboards, load_model, make_dashboards
from gemmascope.suite.config import ModelSection
from tests.dashboards import plain
from tests.suite.small_runs import write_text
from tests.tiny_models import WIDTH

ROWS = 12
SIZES = Sizes(top=4, strata=3, of_stratum=2, window=8, bins=8, logits=3, related=3)
RESID = Site(1, "resid")


def settings(sources, out, **changes):
    return DashboardConfig([*sources], out=out, **({"sequences": ROWS, "sizes": SIZES} | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory, undisturbed):
    out = tmp_path_factory.mktemp("dashboards") / "run"
    return out, make_dashboards(settings([undisturbed], out))


def listed(examples: Examples, *at: int) -> list[plain.Example]:
    row, position, value, window = (part[at].tolist() for part in examples)
    return [found for found in zip(row, position, value, window, strict=True) if found[0] >= 0]


def assert_is_what_the_model_says(overview: Overview, name: str, f: Tensor) -> None:
    """f: the activations of the SAE of that name [rows, context, d_sae], one row of the model after another."""
    table, counted = overview.table(name), overview.text.counted
    assert table.fired.sum() > 0
    for j in range(table.d_sae):
        expected = plain.of_latent(f[..., j], counted, SIZES)
        assert table.fired[j] == expected.fired
        assert table.total[j].item() == pytest.approx(expected.total, rel=1e-5)
        assert table.largest[j].item() == pytest.approx(expected.largest, rel=1e-5)
        assert table.histogram[j].sum() == expected.fired
        assert table.stratum_cells[j].sum() == sum(expected.cells)
        for found, exact in zip(listed(table.top, j), expected.top, strict=True):
            assert found[2:] == (pytest.approx(exact[2], rel=1e-4), pytest.approx(exact[3], rel=1e-4, abs=1e-5))


def activations(model, tokens: Tensor, site: Site) -> Tensor:
    with Capture(model, [site]) as capture, torch.no_grad():
        model(tokens.long())
    return capture[site]


# ---- a run


def test_a_run_needs_nothing_else(made, undisturbed, model_folder):
    out, results = made
    overview = Overview.open(out)
    own = read_json(undisturbed / "results.json")["saes"]
    assert [of.name for of in overview.saes] == [row["name"] for row in results["rows"]] == [r["name"] for r in own]
    model = load_model(ModelSection(str(model_folder)), "cpu").model
    for of, row in zip(overview.saes, own, strict=True):
        x = activations(model, overview.text.tokens, of.reads)
        assert_is_what_the_model_says(overview, of.name, load_sae(undisturbed / row["path"]).encode(x).detach())


def test_results_say_what_they_are_of(made):
    out, results = made
    assert results == read_json(out / "results.json")
    assert results["seed"] == 0
    assert results["version"] == Overview.open(out).version
    assert results["tokens"] == Overview.open(out).n_tokens
    for row in results["rows"]:
        table = Overview.open(out).table(row["name"])
        assert row["l0"] == table.fired.sum().item() / table.n_tokens
        assert row["dead"] == (table.fired == 0).float().mean().item()
        assert row["largest"] == table.largest.max().item()
        assert row["width"] == table.d_sae
    assert not (out / "pass").exists()


def files(folder: Path) -> dict[str, bytes]:
    """All but what depends on the time."""
    own = ("stages.json", "results.json", "run.lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in own and "tokens" not in path.parts
    }


def test_with_more_threads_they_are_made_anew_and_say_so(made, undisturbed, tmp_path, another_thread, capsys):
    out = tmp_path / "dashboards"
    shutil.copytree(made[0], out)
    make_dashboards(settings([undisturbed], out))
    assert f"{out / 'results.json'}: made anew, in another environment: {another_thread}\n" in capsys.readouterr().err


def test_once_finished_nothing_is_computed_again(made, undisturbed, monkeypatch, capsys):
    out, results = made
    before = files(out)
    for name in ("watch", "complete", "write_overview"):
        monkeypatch.setattr(dashboards, name, None)
    assert make_dashboards(settings([undisturbed], out)) == results
    assert files(out) == before
    assert "finished before; start over with --fresh" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"max_sae_bytes": 1}, {"max_state_bytes": 1}], ids=str)
def test_groups_that_fit_into_memory_give_the_same(made, undisturbed, tmp_path, changes):
    make_dashboards(settings([undisturbed], tmp_path / "one", **changes))
    assert files(tmp_path / "one") == files(made[0])


# ---- killed


@pytest.mark.parametrize("stops", [(1,), (4, 3)], ids=str)
def test_interrupted_and_gone_on_with(undisturbed, tmp_path, monkeypatch, stops):
    """A forward of 5 rows, saved after each, and groups of one SAE."""
    monkeypatch.setattr("gemmascope.dashboards.watch.TOKENS", 5 * 32)
    monkeypatch.setattr(dashboards, "SAVE_SECONDS", 0.0)
    watch, counts, stop = dashboards.watch, [], None

    def counted(*args):
        counts.append(1)
        if stop is not None and len(counts) == stop:
            raise KeyboardInterrupt
        return watch(*args)

    monkeypatch.setattr(dashboards, "watch", counted)
    whole = tmp_path / "whole"
    writers = ["delphi"]
    make_dashboards(settings([undisturbed], whole, max_sae_bytes=1, writers=writers))
    forwards = len(counts)
    assert forwards == 4 * 3
    out, done = tmp_path / "stopped", 0
    for stop in [*stops, None]:
        counts.clear()
        if stop is None:
            make_dashboards(settings([undisturbed], out, max_sae_bytes=1, writers=writers))
            assert len(counts) == forwards - done
        else:
            with pytest.raises(KeyboardInterrupt):
                make_dashboards(settings([undisturbed], out, max_sae_bytes=1, writers=writers))
            done += stop - 1
    assert files(out) == files(whole)


@pytest.mark.parametrize("count", [3, 8])
def test_killed_and_gone_on_with(undisturbed, tmp_path, worker, count):
    arguments = ["dashboards", str(undisturbed), "--out", str(tmp_path / "made"), "--sequences", str(ROWS)]
    job = {"arguments": arguments, "output": str(tmp_path)}
    assert worker(**job, signals=[["replacing", count, signal.SIGKILL]]) == {"signal": signal.SIGKILL}
    assert worker(**job) == {"exit": 0}
    whole = tmp_path / "whole"
    make_dashboards(settings([undisturbed], whole, sizes=Sizes()))
    assert files(tmp_path / "made") == files(whole)


def test_a_signal_saves_and_ends_it(undisturbed, tmp_path, monkeypatch):
    watch = dashboards.watch

    def stopped(*args):
        row = watch(*args)
        signal.raise_signal(signal.SIGTERM)
        return row

    monkeypatch.setattr("gemmascope.dashboards.watch.TOKENS", 5 * 32)
    monkeypatch.setattr(dashboards, "watch", stopped)
    assert make_dashboards(settings([undisturbed], tmp_path / "out")) is None
    monkeypatch.setattr(dashboards, "watch", watch)
    saved = [name for name in read_json(tmp_path / "out" / "stages.json") if name.startswith("pass/")]
    assert saved == ["pass/0/5"]
    make_dashboards(settings([undisturbed], tmp_path / "out"))
    make_dashboards(settings([undisturbed], tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ---- files for others


def test_writers_later_and_at_once_write_the_same(undisturbed, tmp_path):
    writers = list(dashboards.WRITERS)
    later, once = tmp_path / "later", tmp_path / "once"
    make_dashboards(settings([undisturbed], later))
    make_dashboards(settings([undisturbed], later, writers=writers))
    make_dashboards(settings([undisturbed], once, writers=writers))
    found = {key: value for key, value in files(later).items() if not key.startswith("neuronpedia")}
    expected = {key: value for key, value in files(once).items() if not key.startswith("neuronpedia")}
    assert found == expected
    assert {key.partition("/")[0] for key in files(once)} >= set(writers)
    overview = Overview.open(once)
    assert len(list((once / "circuit-tracer").rglob("*.json"))) == sum(of.d_sae for of in overview.saes)
    assert not (once / "codes").exists()
    assert len(list((once / "neuronpedia").rglob("source.jsonl"))) == len(overview.saes)


def test_what_is_of_other_saes_is_removed(undisturbed, tmp_path, model_folder, text_file):
    make_dashboards(settings([undisturbed], tmp_path, writers=["circuit-tracer"]))
    make_dashboards(settings([undisturbed], tmp_path, seed=1))
    assert not (tmp_path / "circuit-tracer").exists()
    assert len(list((tmp_path / "tables").iterdir())) == 4
    one = undisturbed / read_json(undisturbed / "results.json")["saes"][0]["path"]
    section = ModelSection(str(model_folder))
    make_dashboards(settings([one], tmp_path, model=section, text=[text_file], context=32, site="layer_0/mlp"))
    assert len(list((tmp_path / "tables").iterdir())) == 1


# ---- folders


def saved(folder: Path, kind: str) -> Path:
    generator = torch.Generator().manual_seed(len(kind))
    if kind == "topk":
        TopKSAE(WIDTH, 24, 3, generator=generator, metadata={"site": str(RESID)}).save(folder)
    elif kind == "transcoder":
        n = WIDTH
        tensors = {
            "W_enc": torch.randn(n, 24, generator=generator),
            "W_dec": torch.randn(24, n, generator=generator),
            "b_enc": torch.zeros(24),
            "b_dec": torch.zeros(n),
            "threshold": torch.full((24,), 0.5),
        }
        Transcoder(tensors, metadata={"site": Site(1, "mlp_in").name, "site_out": Site(1, "mlp").name}).save(folder)
    else:
        options = {"threshold_init": 0.5, "generator": generator, "metadata": {"site": str(RESID), "kind": kind}}
        JumpReLUSAE(WIDTH, 24, pre_encoder_bias=False, **options).save(folder)
    return folder


KINDS = ("jumprelu", "relu", "gated", "batchtopk", "matryoshka", "topk", "transcoder")


def test_every_kind_from_folders(tmp_path, model_folder, text_file):
    saes = [saved(tmp_path / "saes" / kind, kind) for kind in KINDS]
    section = ModelSection(str(model_folder))
    config = settings(saes, tmp_path / "out", model=section, text=[text_file], context=24)
    results = make_dashboards(config)
    assert results is not None
    overview = Overview.open(tmp_path / "out")
    assert overview.text.context == 24
    assert [of.kind for of in overview.saes] == [*KINDS[:-1], "jumprelu"]
    model = load_model(section, "cpu").model
    for folder, of in zip(saes, overview.saes, strict=True):
        sae = Transcoder.load(folder) if folder.name == "transcoder" else load_sae(folder)
        x = activations(model, overview.text.tokens, of.reads)
        assert_is_what_the_model_says(overview, of.name, sae.encode(x).detach())
    assert str(overview.saes[-1].reads) == "layer_1/mlp_in"
    assert str(overview.saes[-1].writes) == "layer_1/mlp"
    assert overview.table(overview.saes[-1].name).alignment.isnan().all()


def test_a_window_is_at_most_the_context(tmp_path, model_folder, text_file):
    sae = saved(tmp_path / "sae", "jumprelu")
    section = ModelSection(str(model_folder))
    make_dashboards(settings([sae], tmp_path / "out", model=section, text=[text_file], context=6))
    assert Overview.open(tmp_path / "out").sizes.window == 6


# ---- the command


def run(*arguments) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return main(["dashboards", *map(str, arguments)])


def test_the_command(undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    options = ("--sequences", ROWS, "--top", 3, "--window", 6, "--out", tmp_path / "out")
    assert run(undisturbed, *options, "--writers", "circuit-tracer,delphi") == 0
    printed = capsys.readouterr().out
    overview = Overview.open(tmp_path / "out")
    assert all(of.name in printed for of in overview.saes)
    assert (overview.sizes.top, overview.sizes.window) == (3, 6)
    assert (tmp_path / "out" / "delphi").is_dir()
    assert run(undisturbed, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["name"] == overview.saes[0].name


def test_too_little_text_is_said(undisturbed, tmp_path, capsys):
    assert run(undisturbed, "--out", tmp_path / "out", "--json") == 0
    [warning] = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.endswith("rows of text, not from 2,048: there are no more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--writers", "site,delph"], "writers: expected site, neuronpedia, delphi, circuit-tracer, got 'delph'"),
        (["--top", 0], "top: expected at least 1, got 0"),
        (["--window", 0], "window: expected at least 1, got 0"),
        (["--sequences", 0], "sequences: expected at least 1, got 0"),
        (["--seed", -1], "seed: expected at least 0, got -1"),
        (["--dtype", "bfloat16"], "model: expected --model beside --revision and --dtype, got none"),
    ],
)
def test_what_is_refused(undisturbed, tmp_path, capsys, arguments, message):
    assert run(undisturbed, "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_left_alone(undisturbed, tmp_path, capsys):
    write_text(tmp_path / "a.jsonl", 1)
    assert run(undisturbed, "--out", tmp_path) == 2
    assert "expected a new folder or that of an earlier run of dashboards" in capsys.readouterr().err


def test_wrong_arguments(undisturbed):
    with pytest.raises(TypeError, match="writers: expected a list of names, got str"):
        DashboardConfig([undisturbed], writers="delphi")
    with pytest.raises(TypeError, match="sizes: expected"):
        DashboardConfig([undisturbed], sizes=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_state_bytes: expected at least 1, got 0"):
        DashboardConfig([undisturbed], max_state_bytes=0)
    with pytest.raises(ValueError, match="saes: expected at least one"):
        DashboardConfig([])
    assert DashboardConfig([undisturbed]).folder == undisturbed / "dashboards"
    assert DashboardConfig(["a"]).folder == Path("runs/dashboards")
    assert DashboardConfig(["a"], out="b/evaluation").folder == Path("b/evaluation")
