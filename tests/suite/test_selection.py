"""Patterns of sites, and the names of SAEs."""

import re

import pytest

from gemmascope.sites import Site
from gemmascope.suite.selection import listing, matching
from tests.suite.configs import blocks, sites_of

SITES = sites_of(14)


def names(patterns: list[str]) -> list[str]:
    return [str(site) for site in matching("suite.sites", patterns, SITES)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer_12/*", ["layer_12/att", "layer_12/mlp", "layer_12/resid"]),
        ("layer_12", ["layer_12/att", "layer_12/mlp", "layer_12/resid"]),
        ("layer_5/att", ["layer_5/att"]),
        ("layer_1/resid", ["layer_1/resid"]),
        ("layer_1?/mlp", ["layer_10/mlp", "layer_11/mlp", "layer_12/mlp", "layer_13/mlp"]),
        ("layer_[02]/mlp", ["layer_0/mlp", "layer_2/mlp"]),
        ("layer_9-11/att", ["layer_9/att", "layer_10/att", "layer_11/att"]),
        ("layer_3-3/[am]*", ["layer_3/att", "layer_3/mlp"]),
        ("resid", [f"layer_{layer}/resid" for layer in range(14)]),
        ("*/att", [f"layer_{layer}/att" for layer in range(14)]),
        ("*", [str(site) for site in SITES]),
        ("*/*", [str(site) for site in SITES]),
        ("model.layers.3.output", ["layer_3/resid"]),
        ("model.layers.3.self_attn.o_proj.input", ["layer_3/att"]),
    ],
)
def test_patterns(pattern, expected):
    assert names([pattern]) == expected


def test_the_order_is_that_of_the_layers_and_duplicates_are_merged():
    assert names(["layer_10/resid", "layer_2/*", "layer_2/mlp", "layer_2"]) == [
        "layer_2/att",
        "layer_2/mlp",
        "layer_2/resid",
        "layer_10/resid",
    ]


@pytest.mark.parametrize(
    "pattern", ["layer_14/resid", "layer_1/*/x", "residual", "layer_*1x/att", "Resid", "layer_01/att", ""]
)
def test_patterns_that_mean_no_site(pattern):
    with pytest.raises(
        ValueError, match=r"^suite\.sites\[1\]: expected sites among layer_0 … layer_13 / att, mlp, resid, got"
    ):
        names(["resid", pattern])  # fmt: skip


@pytest.mark.parametrize("pattern", ["layer_12-14/resid", "layer_5-4/resid", "layer_99-100"])
def test_ranges_beyond_the_model(pattern):
    with pytest.raises(ValueError, match=r"^suite\.sites\[0\]: expected a range of layers from 0 to 13, got"):
        names([pattern])


def test_listing():
    assert listing(SITES) == "layer_0 … layer_13 / att, mlp, resid"
    assert listing([Site(3, "mlp"), Site(1, "att")]) == "layer_1/att, layer_3/mlp"
    assert listing(Site(layer, "att") for layer in range(0, 40, 2)).endswith("layer_20/att, …, layer_38/att")
    assert listing([Site(2, "att"), Site(2, "mlp")]) == "layer_2/att, layer_2/mlp"


# ---- names


def spec_names(*each, layers: int = 2, **suite) -> list[str]:
    return [spec.name for spec in blocks(*each, **suite).specs(sites_of(layers))]


def test_a_name_says_what_is_asked():
    assert spec_names({"d_sae": 64, "target_l0": 4}, sites=["layer_1/resid"]) == ["layer_1/resid/width_64/target_l0_4"]
    assert spec_names({"d_sae": 64, "l0_coefficient": 1e-3}, sites=["layer_1/att"]) == [
        "layer_1/att/width_64/l0_coefficient_0.001"
    ]


def test_names_tell_seeds_and_coefficients_apart():
    assert spec_names(
        {"d_sae": 64, "target_l0": [4, 7.5], "seed": [0, 1], "l0_coefficient": [1e-5, 0.02]}, sites=["layer_0/mlp"]
    ) == [
        f"layer_0/mlp/width_64/target_l0_{target}/l0_coefficient_{coefficient}/seed_{seed}"
        for target in ("4", "7.5")
        for coefficient in ("1e-05", "0.02")
        for seed in (0, 1)
    ]


def test_names_tell_other_settings_apart():
    first, second = {"d_sae": 64, "target_l0": 4}, {"d_sae": 64, "target_l0": 4, "bandwidth": 0.01}
    third = {"d_sae": 64, "target_l0": 4, "tokens": "10M"}
    assert spec_names(first, second, sites=["layer_0/mlp"]) == [
        "layer_0/mlp/width_64/target_l0_4/bandwidth_0.05",
        "layer_0/mlp/width_64/target_l0_4/bandwidth_0.01",
    ]
    assert spec_names(first, third, sites=["layer_0/mlp"]) == [
        "layer_0/mlp/width_64/target_l0_4/steps_19531",
        "layer_0/mlp/width_64/target_l0_4/steps_9765",
    ]
    steps = [{"lr_warmup_steps": 5}, {"lr_warmup_steps": 6}]
    assert spec_names(first | steps[0], first | steps[1], sites=["layer_0/mlp"]) == [
        "layer_0/mlp/width_64/target_l0_4/lr_warmup_steps_5",
        "layer_0/mlp/width_64/target_l0_4/lr_warmup_steps_6",
    ]


def test_only_where_they_meet_are_names_told_apart():
    first = {"d_sae": 64, "target_l0": 4, "sites": ["layer_0/mlp"]}
    assert spec_names(first, first | {"sites": ["layer_1/mlp"], "seed": 3}) == [
        "layer_0/mlp/width_64/target_l0_4",
        "layer_1/mlp/width_64/target_l0_4",
    ]


def test_labels_end_names():
    first = {"d_sae": 64, "target_l0": 4, "label": "a"}
    assert spec_names(first, first | {"label": "b", "init_from": "saes/x"}, sites=["layer_0/mlp"]) == [
        "layer_0/mlp/width_64/target_l0_4/a",
        "layer_0/mlp/width_64/target_l0_4/b",
    ]


def test_names_are_safe_for_files_and_unique():
    config = blocks(
        {"d_sae": 64, "target_l0": [1e-7, 1 / 3, 4], "seed": [0, 2**63 - 1]},
        {"d_sae": 32, "l0_coefficient": [0.0, 1e12], "threshold_parametrisation": "log"},
        {"d_sae": 32, "l0_coefficient": [0.0, 1e12], "frequency_scale": 0.1},
        sites=["*"],
    )
    specs = config.specs(sites_of(2))
    assert len({spec.name for spec in specs}) == len(specs) == 6 * (6 + 2 + 2)
    assert all(re.fullmatch(r"[a-z0-9_.+/-]+", spec.name) for spec in specs)


def test_the_same_sae_twice():
    block = {"d_sae": 64, "target_l0": 4}
    twice = r"^suite\.sae\[1\]: expected another SAE than suite\.sae\[0\] gives already, got .*target_l0_4 twice$"
    with pytest.raises(ValueError, match=twice):
        spec_names(block, block, sites=["layer_0/mlp"])
    with pytest.raises(ValueError, match=twice):
        spec_names(block, block | {"target_l0": [8, 4]}, sites=["layer_0/mlp"])
    with pytest.raises(ValueError, match=r"^suite\.sae\[1\]: expected another SAE .*/a twice$"):
        spec_names(block | {"label": "a"}, block | {"label": "a"}, sites=["layer_0/mlp"])
    with pytest.raises(ValueError, match=r"^suite\.sae\[1\]\.label: expected one, since only init_from tells it"):
        spec_names(block, block | {"init_from": "saes/x"}, sites=["layer_0/mlp"])
