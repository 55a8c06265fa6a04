"""The tree of a run's settings: what it takes, what it refuses, and which SAEs it means."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from gemmascope.sites import Site
from gemmascope.suite import SuiteConfig
from gemmascope.suite.config import RECIPE_FIELDS, ModelSection, SAEBlock, SuiteSection, TextSection
from gemmascope.suite.settings import overridden
from gemmascope.training import Loss, TrainConfig
from tests.suite.configs import MINIMAL, blocks, config, sites_of, tables

EXAMPLE = """\
[model]
name = "google/gemma-2-2b"        # hub id or folder of any Gemma 2 or 3; revision, dtype, attention
[text]
files = ["corpus/**/*.txt"]       # UTF-8 text, .jsonl with a field, .gz; or dataset = "…", split, column
context = 1024
[suite]
sites = ["resid", "layer_12/*", "layer_5/att"]
tokens = "500M"
[[suite.sae]]
d_sae = 16384
target_l0 = [20, 80]              # one SAE each; or l0_coefficient
"""


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    return path


def test_twelve_lines_make_a_run(example):
    config = SuiteConfig.read(example)
    assert config.model == ModelSection("google/gemma-2-2b")
    assert config.text == TextSection(("corpus/**/*.txt",))
    assert config.suite.tokens == 500_000_000
    specs = config.specs(sites_of(26))
    assert len(specs) == 2 * (26 + 2 + 1)
    assert [spec.name for spec in specs[:2]] == [
        "layer_0/resid/width_16384/target_l0_20",
        "layer_0/resid/width_16384/target_l0_80",
    ]
    assert {spec.site for spec in specs} == set(config.selected_sites(sites_of(26)))
    assert [str(site) for site in config.selected_sites(sites_of(26))][5:7] == ["layer_5/att", "layer_5/resid"]
    assert specs[0].config.steps == config.steps == 500_000_000 // 1024


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_files(path):
    """Each of the commands that a file's comments name."""
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"gemmascope train ([^`\n]*)", path.read_text())
    ]
    assert commands
    for words in commands:
        options = [words[index : index + 2] for index, word in enumerate(words) if word in ("--set", "--preset")]
        overrides = [value for option, value in options if option == "--set"]
        preset = next((value for option, value in options if option == "--preset"), None)
        assert SuiteConfig.read(path, overrides, preset=preset).specs(sites_of(26))


def test_overrides_come_last(example):
    config = SuiteConfig.read(example, ["suite.sae.d_sae=4096", "run.out=runs/a", "suite.sae.target_l0=7"])
    assert (config.suite.sae[0].d_sae, config.suite.sae[0].target_l0, config.run.out) == (4096, (7.0,), "runs/a")


def test_a_missing_file_is_wrong_usage(tmp_path):
    with pytest.raises(ValueError, match=r"^config: expected a file, found none: ") as found:
        SuiteConfig.read(tmp_path / "absent.toml")
    assert type(found.value) is ValueError


def test_the_same_in_python(example):
    suite = SuiteSection((SAEBlock(16384, target_l0=[20, 80]),), "500M", ["resid", "layer_12/*", "layer_5/att"])  # type: ignore
    made = SuiteConfig(ModelSection("google/gemma-2-2b"), TextSection(("corpus/**/*.txt",)), suite)
    assert made == SuiteConfig.read(example)


FULL = {
    "model": {"name": "m", "revision": "abc", "dtype": "bfloat16", "attention": "sdpa"},
    "text": {
        "dataset": "owner/name",
        "split": "validation",
        "column": "content",
        "dataset_revision": "main",
        "context": 64,
        "held_out_every": 4,
        "max_tokens": "3M",
        "max_tokens_per_source": 60_000,
    },
    "activations": {"ring_tokens": "64k", "dtype": "float32", "drop_norm": 3, "forward_rows": 2, "ring": "host"},
    "suite": {
        "tokens": "1.5B",
        "sites": ["*"],
        "batch_size": 2048,
        "recipe": "gemma-scope",
        "seed": 3,
        "training": {"compute_dtype": "bf16", "bandwidth": 0.01},
        "sae": [
            {"d_sae": 64, "target_l0": [5, 8.5], "seed": 4},
            {
                "d_sae": 32,
                "sites": "mlp",
                "l0_coefficient": 1e-3,
                "tokens": "1B",
                "init_from": "saes/{kind}/{layer}",
                "label": "again",
                "learning_rate": 1e-3,
                "threshold_parametrisation": "raw",
            },
        ],
    },
    "checkpoint": {"minutes": 2.5, "steps": 100, "keep": 3},
    "evaluate": {"rows": 7, "train_rows": 9, "loss_rows": 3},
    "run": {"out": "o", "device": "cpu", "impl": "reference", "log_every": 5, "trackers": ["trackio", "wandb"]},
}


@pytest.mark.parametrize("given", [MINIMAL, FULL], ids=["minimal", "full"])
def test_there_and_back_through_json(given):
    made = SuiteConfig.from_dict(given)
    assert SuiteConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_every_setting_arrives():
    made = SuiteConfig.from_dict(FULL)
    for name, section in FULL.items():
        for key, value in section.items():
            if key not in ("sae", "max_tokens", "ring_tokens", "tokens", "sites", "trackers"):
                assert getattr(getattr(made, name), key) == value
    first, *_, last = made.specs([Site(3, "mlp")])
    assert (first.config.compute_dtype, first.config.loss.bandwidth, first.config.seed) == ("bf16", 0.01, 4)
    assert (last.config.learning_rate, last.config.loss.bandwidth, last.config.seed) == (1e-3, 0.01, 3)
    assert (last.config.steps, last.init_from) == (10**9 // 2048, "saes/mlp/3")
    assert last.name == "layer_3/mlp/width_32/l0_coefficient_0.001/again"


def test_identity_is_what_decides_the_numbers():
    first, other = config(), config(run={"out": "elsewhere"}, checkpoint={"minutes": 1}, activations={"ring": "host"})
    assert first.identity() == other.identity()
    for section, change in [
        ("text", {"context": 512}),
        ("activations", {"ring_tokens": 65536}),
        ("suite", {"seed": 1}),
        ("model", {"dtype": "bfloat16"}),
    ]:
        assert config(**{section: change}).identity() != first.identity()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("modle.name=x", "modle: expected a known key, perhaps model, got 'modle'"),
        ("model.nmae=x", "model.nmae: expected a known key, perhaps name, got 'nmae'"),
        ("suite.sae[0].d_sea=4", "suite.sae[0].d_sea: expected a known key, perhaps d_sae, got 'd_sea'"),
        ("suite.training.bandwith=1", "suite.training.bandwith: expected a known key, perhaps bandwidth"),
        ("suite.sae.numbers={}", "suite.sae[0].numbers: expected one of"),
        # wrong types
        ("model=5", "model: expected a table, got int"),
        ("suite.sae=5", "suite.sae: expected [[suite.sae]] blocks, got int"),
        ("suite.sae=[5]", "suite.sae[0]: expected a table, got int"),
        ("suite.training=5", "suite.training: expected a table, got int"),
        ("model.name=5", "model.name: expected a str, got int"),
        ("text.context=true", "text.context: expected an int, got bool"),
        ("text.context=64.0", "text.context: expected an int, got float"),
        ("suite.seed=true", "suite.seed: expected an int, got bool"),
        ("suite.tokens=true", "suite.tokens: expected an int, or a str such as"),
        ("suite.tokens=1979-05-27", "suite.tokens: expected an int, or a str such as"),
        ("suite.sites=5", "suite.sites: expected a list of str, got int"),
        ("suite.sites=[5]", "suite.sites[0]: expected a str, got int"),
        ("suite.sae.d_sae=[5]", "suite.sae[0].d_sae: expected an int, got list"),
        ("suite.sae.target_l0=[true]", "suite.sae[0].target_l0[0]: expected a number, got bool"),
        ("suite.sae.target_l0=many", "suite.sae[0].target_l0: expected a number, got str"),
        ("suite.sae.seed=[0.5]", "suite.sae[0].seed[0]: expected an int, got float"),
        ("suite.sae.learning_rate=fast", "suite.sae[0].learning_rate: expected a number, got str"),
        ("suite.training.learning_rate=fast", "suite.training.learning_rate: expected a number, got str"),
        ("suite.training.ste_to_z=1", "suite.training.ste_to_z: expected a bool, got int"),
        ("run.device=3", "run.device: expected a str, got int"),
        # numbers that are none, or out of range
        ("suite.sae.target_l0=nan", "suite.sae[0].target_l0: expected a finite number > 0, got nan"),
        ("suite.sae.target_l0=[1, inf]", "suite.sae[0].target_l0[1]: expected a finite number > 0, got inf"),
        ("suite.sae.target_l0=1e999", "suite.sae[0].target_l0: expected a finite number > 0, got inf"),
        ("suite.sae.l0_coefficient=-1", "suite.sae[0].l0_coefficient: expected a finite number ≥ 0, got -1"),
        ("suite.sae.bandwidth=nan", "suite.sae[0].bandwidth: expected a finite number > 0, got nan"),
        ("checkpoint.minutes=nan", "checkpoint.minutes: expected a finite number > 0, got nan"),
        ("activations.drop_norm=1", "activations.drop_norm: expected a finite number > 1, got 1"),
        ("suite.sae.d_sae=-3", "suite.sae[0].d_sae: expected at least 1, got -3"),
        ("suite.sae.d_sae=0", "suite.sae[0].d_sae: expected at least 1, got 0"),
        ("suite.sae.d_sae=33554432", "suite.sae[0].d_sae: expected at most 16777216, got 33554432"),
        ("suite.sae.seed=9223372036854775808", "suite.sae[0].seed: expected at most 9223372036854775807"),
        ("suite.batch_size=0", "suite.batch_size: expected at least 1, got 0"),
        ("suite.batch_size=2000000", "suite.batch_size: expected at most 1048576, got 2000000"),
        ("text.context=1", "text.context: expected at least 2, got 1"),
        ("text.context=2000000", "text.context: expected at most 1048576, got 2000000"),
        ("checkpoint.keep=1", "checkpoint.keep: expected at least 2, got 1"),
        ("evaluate.rows=0", "evaluate.rows: expected at least 1, got 0"),
        ("evaluate.loss_rows=0", "evaluate.loss_rows: expected at least 1, got 0"),
        ("run.log_every=0", "run.log_every: expected at least 1, got 0"),
        # absurd together
        ("suite.tokens=1000", "suite.tokens: expected at least 1024, got 1000"),
        ("suite.sae.tokens=21M", "suite.sae[0].tokens: expected from one batch, 1024, to those of the suite, 20000000"),
        (
            "suite.sae.tokens=1000",
            "suite.sae[0].tokens: expected from one batch, 1024, to those of the suite, 20000000",
        ),
        ("suite.sae.target_l0=513", "suite.sae[0].target_l0: expected at most d_sae = 512, got 513"),
        (
            "suite.recipe=gemma-scope",
            "suite.sae[0].l0_warmup_steps: expected at most steps = 4882, got 10000: λ would not",
        ),
        (
            "activations.ring_tokens=1024",
            "activations.ring_tokens: expected at least one batch of 1024 tokens in whole",
        ),
        ("activations.forward_rows=20000", "activations.forward_rows: expected at most 16384 rows of 1024 tokens"),
        ("suite.sae.lr_warmup_steps=20000", "suite.sae[0].lr_warmup_steps: expected at most steps = 19531 with"),
        # lists
        ("suite.sae=[]", "suite.sae: expected at least one [[suite.sae]] block, got none"),
        ("suite.sites=[]", "suite.sites: expected some, got an empty list"),
        ("suite.sae.sites=[]", "suite.sae[0].sites: expected some, got an empty list"),
        ("suite.sae.target_l0=[]", "suite.sae[0].target_l0: expected a number or a list of some, got an empty list"),
        ("text.files=[]", "text.files: expected some, got an empty list"),
        ('suite.sites=["resid", "resid"]', "suite.sites[1]: expected each once, got 'resid' twice"),
        ("suite.sae.target_l0=[20, 20.0]", "suite.sae[0].target_l0[1]: expected each once, got 20.0 twice"),
        ("suite.sae.seed=[1, 1]", "suite.sae[0].seed[1]: expected each once, got 1 twice"),
        # choices and texts
        ("model.dtype=float16", "model.dtype: expected 'auto' or 'float32' or 'bfloat16', got 'float16'"),
        ("model.attention=fast", "model.attention: expected 'eager' or 'sdpa'"),
        ("activations.ring=disk", "activations.ring: expected 'auto' or 'device' or 'host', got 'disk'"),
        ("activations.dtype=fp32", "activations.dtype: expected 'bfloat16' or 'float32', got 'fp32'"),
        ("suite.recipe=big", "suite.recipe: expected 'small' or 'gemma-scope', got 'big'"),
        ("run.trackers=mlflow", "run.trackers[0]: expected 'trackio' or 'wandb' or 'tensorboard', got 'mlflow'"),
        ("run.device=gpu", "run.device: expected the name of a device, such as 'cpu' or 'cuda:0', got 'gpu'"),
        ("run.impl=fast", "run.impl: expected 'auto' or"),
        ('model.name=""', "model.name: expected printable text, got ''"),
        ('model.name="a\\u0000"', "model.name: expected printable text, got 'a\\x00'"),
        ('suite.sae.label="a/b"', "suite.sae[0].label: expected letters, digits, '.', '_' or '-', got 'a/b'"),
        ('suite.sae.label=".."', "suite.sae[0].label: expected letters, digits, '.', '_' or '-', got '..'"),
        # what belongs elsewhere, or together
        ("text.dataset=a/b", "text.files: expected files or a dataset, got both"),
        ("suite.sae.steps=5", "suite.sae[0].steps: expected not to be given, since the suite decides it; set tokens"),
        ("suite.sae.batch_size=5", "suite.sae[0].batch_size: expected not to be given, since the suite decides it"),
        ("suite.training.steps=5", "suite.training.steps: expected not to be given, since the suite decides it"),
        ("suite.training.d_sae=5", "suite.training.d_sae: expected "),
        ("suite.sae.sparsity=l0", "suite.sae[0].target_l0: expected None with sparsity='l0', got 20"),
    ],
)
def test_settings_that_are_refused(override, message):
    given = overridden(MINIMAL, [override])
    with pytest.raises((ValueError, TypeError), match=r"^" + re.escape(message)) as found:
        SuiteConfig.from_dict(given)
    assert type(found.value) in (ValueError, TypeError)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model", "model.name: expected to be given, got none"),
        ("text", "text.files: expected files or a dataset, got neither"),
        ("suite", "suite.tokens: expected to be given, got none"),
    ],
)
def test_sections_that_must_be_there(missing, message):
    given = {name: section for name, section in MINIMAL.items() if name != missing}
    with pytest.raises(ValueError, match=re.escape(message)):
        SuiteConfig.from_dict(given)


@pytest.mark.parametrize("missing", ["tokens", "sae", "sites"])
def test_keys_of_the_suite_that_must_be_there(missing):
    suite = {name: value for name, value in MINIMAL["suite"].items() if name != missing}
    with pytest.raises(ValueError, match=r"^suite\."):
        SuiteConfig.from_dict({**MINIMAL, "suite": suite})


def test_a_small_sae_needs_an_aim():
    with pytest.raises(
        ValueError, match=r"^suite\.sae\[0\]\.target_l0: expected one, or an l0_coefficient, with recipe"
    ):
        blocks({"d_sae": 64}, sites=["resid"])
    [spec] = blocks({"d_sae": 64}, sites=["resid"], recipe="gemma-scope", tokens="50M").specs(sites_of(1))
    assert spec.config.loss.l0_coefficient == 6e-4


def test_a_single_block_may_be_a_table():
    assert SuiteConfig.from_dict(tables(suite={"sae": {"d_sae": 64, "target_l0": 4}})).suite.sae[0].d_sae == 64


def test_every_number_of_the_recipe_can_be_given():
    every = {field.name for kind in (TrainConfig, Loss) for field in dataclasses.fields(kind)}
    own = {field.name for field in dataclasses.fields(SAEBlock)}
    assert every - RECIPE_FIELDS - own == {"steps", "batch_size", "loss"}
    assert not RECIPE_FIELDS & own


def test_a_block_goes_before_the_training_of_all():
    made = blocks(
        {"d_sae": 64, "target_l0": 4, "bandwidth": 0.01},
        {"d_sae": 32, "target_l0": 4},
        training={"bandwidth": 0.02},
        sites=["layer_0/mlp"],
    )
    assert [spec.config.loss.bandwidth for spec in made.specs(sites_of(1))] == [0.01, 0.02]


def test_specs_follow_the_sites_and_in_each_the_blocks():
    made = blocks(
        {"d_sae": 64, "target_l0": [4, 2], "seed": [1, 0]},
        {"d_sae": 16, "target_l0": 4, "sites": ["layer_1/att"]},
        sites=["layer_1/att", "layer_0/mlp"],
    )
    specs = made.specs(sites_of(2))
    assert [str(spec.site) for spec in specs] == ["layer_0/mlp"] * 4 + ["layer_1/att"] * 5
    assert [(s.config.d_sae, s.config.loss.target_l0, s.config.seed) for s in specs[4:]] == [
        (64, 4, 1),
        (64, 4, 0),
        (64, 2, 1),
        (64, 2, 0),
        (16, 4, 0),
    ]


def test_blocks_may_have_all_the_sites():
    made = blocks(
        {"d_sae": 64, "target_l0": 4, "sites": ["layer_1/att"]}, {"d_sae": 64, "target_l0": 4, "sites": "layer_0/*"}
    )
    assert [str(site) for site in made.selected_sites(sites_of(2))] == [
        "layer_0/att",
        "layer_0/mlp",
        "layer_0/resid",
        "layer_1/att",
    ]


def test_sites_that_no_block_uses():
    made = blocks({"d_sae": 64, "target_l0": 4, "sites": ["layer_1/att"]}, sites=["att"])
    with pytest.raises(
        ValueError, match=r"^suite\.sites: expected sites of some block, got layer_0/att, of which none"
    ):
        made.selected_sites(sites_of(2))


def test_sites_outside_of_those_of_the_suite():
    made = blocks({"d_sae": 64, "target_l0": 4, "sites": ["layer_1/mlp"]}, sites=["layer_1/att"])
    with pytest.raises(ValueError, match=r"^suite\.sae\[0\]\.sites\[0\]: expected sites among layer_1/att, got"):
        made.specs(sites_of(2))


def test_sites_that_the_model_does_not_have():
    with pytest.raises(
        ValueError, match=r"^suite\.sites\[0\]: expected sites among layer_0 … layer_1 / att, mlp, resid"
    ):
        config(suite={"sites": ["layer_2/resid"]}).specs(sites_of(2))


def test_one_start_for_several_sites():
    block = {"d_sae": 64, "target_l0": 4, "init_from": "saes/x"}
    with pytest.raises(
        ValueError, match=r"^suite\.sae\[0\]\.init_from: expected {layer} and {kind} in it with 6 sites"
    ):
        blocks(block, sites=["*"]).specs(sites_of(2))
    assert blocks(block, sites=["layer_0/mlp"]).specs(sites_of(2))[0].init_from == "saes/x"


def test_too_many_saes():
    seeds = list(range(101))
    with pytest.raises(ValueError, match=r"^suite\.sae\[0\]: expected at most 10000 SAEs, got 10201$"):
        blocks({"d_sae": 512, "target_l0": list(range(1, 102)), "seed": seeds}, sites=["resid"])
    made = blocks({"d_sae": 512, "target_l0": list(range(1, 21)), "seed": seeds}, sites=["*"])
    with pytest.raises(ValueError, match=r"^suite\.sae: expected at most 10000 SAEs, got 12120$"):
        made.specs(sites_of(2))


def test_superblocks_are_whole_rows():
    made = config(text={"context": 100}, activations={"ring_tokens": 12_345})
    assert made.rows_per_block == 123
    assert config(text={"context": 4096}, activations={"ring_tokens": 10}).rows_per_block == 1


def test_a_section_of_another_kind():
    with pytest.raises(TypeError, match=r"^model: expected a ModelSection, got str$"):
        SuiteConfig("m", config().text, config().suite)  # type: ignore
