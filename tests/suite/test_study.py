"""`gemmascope study` as a user meets it: all studies of a run, what is missing for some, what goes on after a kill."""

import csv
import json
import shutil
import signal

import pytest
import torch

from gemmascope import JumpReLUSAE
from gemmascope.__main__ import main
from gemmascope.activations import Document
from gemmascope.demo.byte_tokenizer import byte_tokenizer
from gemmascope.formats.files import read_json
from gemmascope.reporting import read_frequencies
from gemmascope.sites import Site
from gemmascope.studies import COLUMNS, STUDIES
from gemmascope.studies.frequency import histogram
from gemmascope.suite import EvaluateConfig, StudyConfig, evaluate, evaluate_saes, study, study_saes
from gemmascope.suite.config import ModelSection
from gemmascope.suite.conversations import ROLES, TEMPLATE, Markers, conversation_rows
from tests.suite.small_runs import write_model
from tests.tiny_models import WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*never fired:RuntimeWarning")

SETTINGS = {"sequences": 8, "draws": 20, "control_tokens": 256}
RESID = Site(1, "resid")
# As Gemma's, in bytes that are no special tokens.
CHAT = (
    "{{ bos_token }}{% for turn in messages %}<turn>{{ 'model' if turn['role'] == 'assistant' else turn['role'] }}\n"
    "{{ turn['content'] | trim }}<end>\n{% endfor %}"
)


def saved(folder, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"threshold_init": 0.5, "generator": generator, "metadata": {"site": RESID.name}}
    JumpReLUSAE(WIDTH, width, pre_encoder_bias=False, **options).save(folder)
    return folder


def talking(path, several=True):
    lines = []
    for number in range(40):  # of which about half are judged on
        source = f"talk {number % 2}" if several else "talk"
        text = f"<turn>user\nsay {number}<end>\n<turn>model\n{number} is the number<end>\n"
        lines.append(json.dumps({"name": str(number), "source": source, "text": text}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("second") / "tiny-gemma-it", seed=4)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, undisturbed, second):
    """All studies of a run, in a folder."""
    out = tmp_path_factory.mktemp("studies") / "all"
    section = ModelSection(name=str(second))
    return out, study_saes(["all"], StudyConfig([undisturbed], out=out, second_model=section, **SETTINGS))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, undisturbed):
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return out, evaluate_saes(EvaluateConfig([undisturbed], out=out, **SETTINGS))


def rows_of(found, **wanted):
    return [row for row in found["rows"] if all(row[key] == value for key, value in wanted.items())]


# ---- all of a run


def test_all_that_can_be_made(made, evaluated):
    out, found = made
    assert list(found.done) == [name for name in STUDIES if name not in ("width-ladder", "subsets")]
    assert found.left_out["width-ladder"].startswith("saes: expected several widths of one kind at one site, got")
    assert found.left_out["subsets"].startswith("text: expected documents of several sources, got 1")
    for name, each in found.done.items():
        assert each == read_json(out / f"{name}.json")
        with (out / f"{name}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert tuple(table[0]) == COLUMNS
        assert len(table) == len(each["rows"])
        assert {row["sae"] for row in table} == {row["name"] for row in evaluated[1]["saes"]}
        assert (each["seed"], each["draws"], each["model"]) == (0, 20, "tiny-gemma")
        assert each["text"]["sequences"] == 8
        assert each["version"]
    assert not any((out / "blocks").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def without_outliers(tmp_path_factory, undisturbed, second):
    """Those of which a token in a few is one, and an evaluation with them."""
    out, section = tmp_path_factory.mktemp("studies") / "inliers", ModelSection(name=str(second))
    settings = SETTINGS | {"outliers": 1.1}
    config = StudyConfig([undisturbed], out=out, second_model=section, without_outliers=True, **settings)
    evaluated = evaluate_saes(EvaluateConfig([undisturbed], out=out.with_name("beside"), **settings))
    return out, study_saes(["all"], config), evaluated


@pytest.mark.parametrize("ending", ["", "_inliers"])
def test_figures_are_those_of_an_evaluation(made, evaluated, without_outliers, ending):
    """Those that read them, and those that measure: in fp32, by position, on one's own model."""
    found, of_evaluation = (without_outliers[1:]) if ending else (made[1], evaluated[1])
    own = {row["name"]: row for row in of_evaluation["saes"]}
    for name, series in (("sparsity-fidelity", "SAE"), ("bf16", "all fp32"), ("transfer", "own: text")):
        for sae, figures in own.items():
            (loss,) = rows_of(found.done[name], sae=sae, figure="ΔLM loss", series=series)
            (fvu,) = rows_of(found.done[name], sae=sae, figure="FVU", series=series)
            for row, key in ((loss, "delta_loss"), (fvu, "fvu")):
                exact = name != "transfer"  # by document and role, in another order
                expected = figures[key + ending]
                assert row["y"] == (expected if exact else pytest.approx(expected, rel=1e-12))
                assert [row["low"], row["high"]] == pytest.approx(figures[f"{key}_interval{ending}"], rel=1e-12)
                assert row["L0"] == pytest.approx(figures["l0" + ending], rel=1e-12)
            assert fvu["n"] == figures["tokens" + ending]
            (pca,) = rows_of(found.done["sparsity-fidelity"], sae=sae, series="PCA of rank L0")
            assert (pca["y"], pca["n"]) == (figures["pca_fvu" + ending], figures["control_tokens" + ending])
    positions = found.done["position"]
    for sae, figures in own.items():
        rows = rows_of(positions, sae=sae, figure="ΔLM loss", series="SAE")
        assert sum(row["n"] for row in rows) == figures["predictions"]
        mean = sum(row["y"] * row["n"] for row in rows) / figures["predictions"]
        assert mean == pytest.approx(figures["delta_loss" + ending], rel=1e-9)


def test_studies_without_outliers_lie_beside_the_others(made, without_outliers, undisturbed, tmp_path, capsys):
    """By their names; the plot and the line say it; those that count all tokens are left out, or refused by name."""
    out, found, evaluated = without_outliers
    assert all(row["outliers"] > 0 for row in evaluated["saes"])
    assert set(found.done) == {"sparsity-fidelity", "position", "transfer", "bf16"}
    for name, each in found.done.items():
        assert each == read_json(out / f"{name}-no-outliers.json")
        assert not (out / f"{name}.json").exists()
        assert each["tokens"] == "inliers"
        assert each["conclusion"].endswith("; without tokens of over 1.1 times the median norm")
        assert each["plot"]["title"].endswith(", no outliers")
        assert made[1].done[name]["tokens"] == "text"
        assert "without" not in made[1].done[name]["conclusion"]
        assert "outliers" not in made[1].done[name]["plot"]["title"]
    for name in ("frequency", "uniformity"):
        assert found.left_out[name] == "it counts all tokens, outliers too: leave --no-outliers out"
    arguments = [
        str(undisturbed),
        "--no-outliers",
        "--sequences",
        "8",
        "--control-tokens",
        "256",
        "--out",
        str(tmp_path),
    ]
    assert main(["study", "frequency", *arguments]) == 2
    assert "frequency: it counts all tokens, outliers too: leave --no-outliers out" in capsys.readouterr().err
    assert main(["study", "sparsity-fidelity", *arguments]) == 0
    assert "; without tokens of over 5 times the median norm" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("sparsity*")) == [
        f"sparsity-fidelity-no-outliers.{ending}" for ending in ("csv", "json", "png", "svg")
    ]


def test_with_more_threads_a_study_is_made_anew_and_says_so(made, undisturbed, tmp_path, another_thread, capsys):
    out = tmp_path / "studies"
    shutil.copytree(made[0], out)
    study_saes(["position"], StudyConfig([undisturbed], out=out, **SETTINGS))
    assert f"{out / 'position.json'}: made anew, in another environment: {another_thread}\n" in capsys.readouterr().err


def test_frequencies_are_those_of_the_file(made, evaluated):
    for name, frequency in read_frequencies(evaluated[0]).items():
        rows = rows_of(made[1].done["frequency"], sae=name, series="SAE")
        assert [(row["x"], row["y"]) for row in rows] == histogram(torch.from_numpy(frequency))


def test_bf16_is_near_and_not_the_same(made):
    found = made[1].done["bf16"]
    shifts = found["facts"]["shifts"]
    assert set(shifts) == {"SAE bf16", "SAE and model bf16"}
    for each in shifts.values():
        assert all(0 < abs(shift["fvu"]) < 0.05 for shift in each.values())


def test_another_model_is_another(made):
    found = made[1].done["transfer"]
    assert found["second_model"] == "tiny-gemma-it"
    own, second = (rows_of(found, figure="FVU", series=f"{which}: text") for which in ("own", "second"))
    assert all(a["y"] != b["y"] for a, b in zip(own, second, strict=True))
    assert found["conclusion"].startswith("in tiny-gemma-it, text: ΔLM loss")


def test_once_made_nothing_is_computed_again(made, undisturbed, second, monkeypatch, capsys):
    out, found = made
    monkeypatch.setattr(study, "measure", None)
    monkeypatch.setattr(evaluate, "measure", None)
    section = ModelSection(name=str(second))
    again = study_saes(["all"], StudyConfig([undisturbed], out=out, second_model=section, **SETTINGS))
    assert again == found
    assert capsys.readouterr().err.count("made before") == len(found.done)


def test_an_evaluation_that_is_there_is_read(undisturbed, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    whole = evaluate_saes(EvaluateConfig([run], **SETTINGS))
    monkeypatch.setattr(evaluate, "measure", None)
    found = study_saes(["sparsity-fidelity"], StudyConfig([run], **SETTINGS))
    assert found.done["sparsity-fidelity"]["rows"][0]["y"] == whole["saes"][0]["delta_loss"]
    assert f"{run / 'evaluation'}: read" in capsys.readouterr().err
    assert not (run / "studies" / "evaluation").exists()
    monkeypatch.undo()
    study_saes(["sparsity-fidelity"], StudyConfig([run], **(SETTINGS | {"sequences": 4})))
    assert (run / "studies" / "evaluation" / "results.json").is_file(), "another text is another evaluation"
    assert read_json(run / "evaluation" / "results.json") == whole


def test_killed_in_the_middle(worker, undisturbed, tmp_path):
    options = ["--sequences", "8", "--draws", "20", "--control-tokens", "256"]
    command = ["study", "position", str(undisturbed), *options]

    def run(out, **job):
        return worker(arguments=[*command, "--out", str(out)], output=str(tmp_path), **job)

    assert run(tmp_path / "whole") == {"exit": 0}
    out = tmp_path / "killed"
    for event, count in (("writing", 3), ("writing", 8), ("replacing", 4)):
        assert run(out, signals=[[event, count, signal.SIGKILL]]) == {"signal": 9}, (event, count)
    assert run(out) == {"exit": 0}
    for name in ("position.csv", "position.json", "position.svg"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# ---- other SAEs and texts


def test_a_ladder_and_sources(tmp_path, model_folder):
    for width in (24, 48):
        saved(tmp_path / "saes" / f"width_{width}", width)
    options = {"model": ModelSection(name=str(model_folder)), "text": [talking(tmp_path / "talk.jsonl")]}
    config = StudyConfig([tmp_path / "saes"], out=tmp_path / "out", context=32, **options, **SETTINGS)
    found = study_saes(["subsets", "width-ladder"], config)
    assert list(found.done) == ["width-ladder", "subsets"]
    assert {row["width"] for row in found.done["width-ladder"]["rows"]} == {24, 48}
    series = {row["series"] for row in found.done["subsets"]["rows"]}
    assert series == {"talk 0", "talk 1", "all", "talk 0: mean ablation", "talk 1: mean ablation"}


def test_conversations_in_another_model(tmp_path, model_folder, second):
    sae = saved(tmp_path / "sae")
    options = {"model": ModelSection(name=str(model_folder)), "second_model": ModelSection(name=str(second))}
    text = [talking(tmp_path / "talk.jsonl", several=False)]
    config = StudyConfig([sae], out=tmp_path / "out", context=64, text=text, **options, **SETTINGS)
    found = study_saes(["transfer"], config).done["transfer"]
    assert found["facts"]["roles"] == list(ROLES)
    spoken = {row["series"]: row["n"] for row in rows_of(found, figure="FVU")}
    assert set(spoken) == {f"{which}: {role}" for which in ("own", "second") for role in ROLES}
    assert spoken["own: user"] == spoken["second: user"] < spoken["own: model"]


# ---- conversations


def test_markers_of_a_template():
    tokenizer = byte_tokenizer()
    assert Markers.of(tokenizer) is None
    tokenizer.chat_template = CHAT
    found = Markers.of(tokenizer)
    assert found == Markers("<turn>user\n", "<turn>model\n", "<end>\n")
    turns = found.turns("before<turn>user\nhi<end>\n<turn>model\nyes<end>")
    assert [(role, text) for role, text in turns if role != TEMPLATE] == [(0, "hi"), (1, "yes")]
    assert "".join(text for _, text in turns) == "before<turn>user\nhi<end>\n<turn>model\nyes<end>"
    assert not found.tell("nobody speaks")
    for template in ("{{ raise_exception('no') }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "x"):
        tokenizer.chat_template = template
        assert Markers.of(tokenizer) is None, template


def test_rows_of_conversations():
    tokenizer = byte_tokenizer()
    markers = Markers("<u>", "<m>", "<e>")
    texts = {3: "<u>hi<e><m>yes<e>", 4: "plain", 7: f"<m>{'x' * 40}"}
    documents = [(number, Document(str(number), text, "talk")) for number, text in texts.items()]
    tokens, owners, roles = conversation_rows(documents, tokenizer, markers, 24, 10)
    assert tokens.shape == owners.shape == roles.shape == (2, 24)
    text = "<u>hi<e><m>yes<e>"
    assert tokens[0, : 1 + len(text)].tolist() == [tokenizer.bos_token_id, *text.encode()]
    assert roles[0].tolist() == [2, 2, 2, 2, 0, 0, *[2] * 6, 1, 1, 1, 2, 2, 2, *[-1] * 6]
    assert owners[0].tolist() == [-1, *[3] * 17, *[-1] * 6]
    assert roles[1].tolist() == [2, 2, 2, 2, *[1] * 20]
    assert owners[1].tolist() == [-1, *[7] * 23]
    assert len(conversation_rows(documents, tokenizer, markers, 24, 1)[0]) == 1


# ---- what is refused


def test_what_is_refused(undisturbed, tmp_path, model_folder):
    config = StudyConfig([undisturbed], out=tmp_path / "out", **SETTINGS)
    with pytest.raises(ValueError, match=r"^study: expected sparsity-fidelity, .* or all, got 'speed'"):
        study_saes(["speed"], config)
    with pytest.raises(ValueError, match=r"^names: expected a list of"):
        study_saes("position", config)
    with pytest.raises(ValueError, match=r"^transfer: second_model: expected --second-model, got none"):
        study_saes(["transfer"], config)
    with pytest.raises(TypeError, match=r"^second_model: expected a ModelSection, got str"):
        StudyConfig([undisturbed], second_model="google/gemma-2-2b-it")


def test_a_second_model_of_another_shape(undisturbed, tmp_path):
    from tests.tiny_models import gemma2

    wide = tmp_path / "wide"
    gemma2(hidden_size=24, vocab_size=257, bos_token_id=256, eos_token_id=None, pad_token_id=None).save_pretrained(wide)
    byte_tokenizer().save_pretrained(wide)
    section = ModelSection(name=str(wide))
    config = StudyConfig([undisturbed], out=tmp_path / "out", second_model=section, **SETTINGS)
    with pytest.raises(ValueError, match=r"^second_model: expected the shape of tiny-gemma, found another one at"):
        study_saes(["transfer"], config)


# ---- the command


def test_command(undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--sequences", "8", "--draws", "20", "--control-tokens", "256", "--out", str(out)]
    assert main(["study", "uniformity", str(undisturbed), *options]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("uniformity: r_L0 ")
    assert "random directions" in shown
    for ending in ("csv", "json", "svg", "png"):
        assert (out / f"uniformity.{ending}").is_file()
        assert f"uniformity.{ending}" in shown
    first = (out / "uniformity.svg").read_bytes()
    assert main(["study", "uniformity", str(undisturbed), *options]) == 0
    assert capsys.readouterr().out == shown
    assert (out / "uniformity.svg").read_bytes() == first
    (out / "uniformity.svg").unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == shown
    assert (out / "uniformity.svg").read_bytes() == first
    few = ["--sequences", "100000", "--draws", "20", "--control-tokens", "256", "--out", str(tmp_path / "few")]
    assert main(["study", "uniformity", str(undisturbed), *few]) == 0
    assert "Note: judged on" in capsys.readouterr().out
    assert main(["study", "width-ladder", str(undisturbed), *options]) == 2
    assert "width-ladder: saes: expected several widths" in capsys.readouterr().err


def test_list(capsys):
    assert main(["study", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all("arXiv 2408.05147" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "study: expected NAME SAE..., or --list, got too little"),
        (["position"], "study: expected NAME SAE..., or --list, got too little"),
        (["speed", "x"], "study: expected sparsity-fidelity,"),
        (["position", "x", "--dtype", "float32"], "model: expected --model beside --revision and --dtype, got none"),
    ],
)
def test_command_that_is_wrong(capsys, arguments, message):
    assert main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err
