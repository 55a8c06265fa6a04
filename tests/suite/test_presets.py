"""Presets against Table 1 of Gemma Scope (arXiv 2408.05147), and the recipes behind them."""

import pytest

from gemmascope.sites import KINDS, Site
from gemmascope.suite import SuiteConfig
from gemmascope.suite.presets import PRESETS, TABLE_1, preset_tables, recipe
from gemmascope.training.config import SMALL_L0_COEFFICIENTS
from tests.suite.configs import sites_of

LAYERS = {"google/gemma-2-2b": 26, "google/gemma-2-9b": 42, "google/gemma-2-27b": 46, "google/gemma-2-9b-it": 42}
B = 10**9
# name: model, width, the layers of residual SAEs (None: all layers, all three kinds), tokens
PUBLISHED = {
    "2b-16k": ("google/gemma-2-2b", 16_384, None, 4 * B),
    "2b-32k": ("google/gemma-2-2b", 32_768, [12], 8 * B),
    "2b-65k": ("google/gemma-2-2b", 65_536, None, 8 * B),
    "2b-131k": ("google/gemma-2-2b", 131_072, [12], 8 * B),
    "2b-262k": ("google/gemma-2-2b", 262_144, [12], 8 * B),
    "2b-524k": ("google/gemma-2-2b", 524_288, [12], 8 * B),
    "2b-1m": ("google/gemma-2-2b", 1_048_576, [5, 12, 19], 16 * B),
    "9b-16k": ("google/gemma-2-9b", 16_384, None, 4 * B),
    "9b-32k": ("google/gemma-2-9b", 32_768, [20], 8 * B),
    "9b-65k": ("google/gemma-2-9b", 65_536, [20], 8 * B),
    "9b-131k": ("google/gemma-2-9b", 131_072, None, 8 * B),
    "9b-262k": ("google/gemma-2-9b", 262_144, [20], 8 * B),
    "9b-524k": ("google/gemma-2-9b", 524_288, [20], 8 * B),
    "9b-1m": ("google/gemma-2-9b", 1_048_576, [9, 20, 31], 16 * B),
    "27b-131k": ("google/gemma-2-27b", 131_072, [10, 22, 34], 8 * B),
    "9b-it-16k": ("google/gemma-2-9b-it", 16_384, [9, 20, 31], 4 * B),
    "9b-it-131k": ("google/gemma-2-9b-it", 131_072, [9, 20, 31], 8 * B),
}
TEXT = {"files": ["corpus/*.txt"]}


def test_every_row_of_the_table_has_a_preset():
    assert set(TABLE_1) == {f"gemma-scope-{name}" for name in PUBLISHED}
    assert set(PRESETS) == {"small", *TABLE_1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_against_table_1(name):
    model, d_sae, layers, tokens = PUBLISHED[name]
    config = SuiteConfig.preset(f"gemma-scope-{name}", text=TEXT)
    assert config.model.name == model
    specs = config.specs(sites_of(LAYERS[model]))
    kinds = KINDS if layers is None else ["resid"]
    assert [spec.site for spec in specs] == [
        Site(layer, kind) for layer in (range(LAYERS[model]) if layers is None else layers) for kind in kinds
    ]
    assert {spec.config.d_sae for spec in specs} == {d_sae}
    assert config.suite.tokens == tokens
    # Section 3.2: batches of 4,096; section 3.4: 2,048 sequences of 1,024.
    assert {spec.config.steps for spec in specs} == {tokens // 4096} == {config.steps}
    assert (config.text.context, config.evaluate.rows) == (1024, 2048)


def test_the_recipe_of_the_presets_is_that_of_section_3_2():
    [spec] = SuiteConfig.preset("gemma-scope-2b-32k", text=TEXT).specs(sites_of(26))
    config, loss = spec.config, spec.config.loss
    assert (config.batch_size, config.learning_rate, config.adam_beta2, config.adam_eps) == (4096, 7e-5, 0.999, 1e-8)
    assert (config.lr_warmup_steps, config.lr_warmup_start, config.lr_decay_steps) == (1000, 0.1, 0)
    assert (config.l0_warmup_steps, config.threshold_init, config.threshold_parametrisation) == (10_000, 1e-3, "log")
    assert (config.compute_dtype, config.b_dec_init, loss.bandwidth) == ("fp32", "zeros", 1e-3)
    assert (loss.sparsity, loss.l0_coefficient) == ("l0", 6e-4)


def test_a_preset_is_refined_by_a_file_and_by_overrides(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        "[text]\nfiles = ['a.txt']\n[suite]\nsites = ['layer_3/resid']\n"
        "[[suite.sae]]\nl0_coefficient = [6e-4, 1e-3]\n[[suite.sae]]\nd_sae = 4096\ntarget_l0 = 50\n"
    )
    config = SuiteConfig.read(path, ["suite.tokens=1B"], preset="gemma-scope-2b-16k")
    specs = config.specs(sites_of(26))
    assert [spec.name for spec in specs] == [
        "layer_3/resid/width_16384/l0_coefficient_0.0006",
        "layer_3/resid/width_16384/l0_coefficient_0.001",
        "layer_3/resid/width_4096/target_l0_50",
    ]
    assert config.suite.tokens == 10**9
    assert config.model.name == "google/gemma-2-2b"


def test_a_preset_with_overrides_alone():
    config = SuiteConfig.read(None, ["text.files=a.txt", "suite.sae.target_l0=[20, 80]"], preset="gemma-scope-9b-131k")
    assert len(config.specs(sites_of(42))) == 2 * 42 * 3


def test_a_preset_leaves_text_to_the_user():
    with pytest.raises(ValueError, match=r"^text\.files: expected files or a dataset, got neither$"):
        SuiteConfig.read(None, preset="gemma-scope-2b-16k")


def test_another_preset():
    with pytest.raises(ValueError, match=r"^preset: expected 'small' or 'gemma-scope-2b-16k' or"):
        preset_tables("gemma-scope-3b-16k")


def test_tables_of_a_preset_are_the_callers_own():
    preset_tables("small")["suite"]["recipe"] = "gemma-scope"
    assert preset_tables("small")["suite"]["recipe"] == "small"


def test_small_filters_outliers_and_aims_at_an_l0():
    suite = {"sites": "resid", "tokens": "5M", "sae": [{"d_sae": 64, "target_l0": 5}]}
    config = SuiteConfig.preset("small", model={"name": "m"}, text=TEXT, suite=suite)
    assert config.activations.drop_norm == 3
    [first, *_] = config.specs(sites_of(2))
    assert first.config.loss.target_l0 == 5
    assert first.config.batch_size == config.suite.batch_size == 1024


def test_small_aims_at_the_l0_of_the_batch():
    loss = recipe("small", steps=400, d_sae=64, target_l0=5).loss
    assert (loss.sparsity, loss.l0_of, loss.target_l0) == ("target_l0", "batch", 5)
    assert recipe("small", steps=400, d_sae=64, target_l0=5, l0_coefficient=0.5).loss.l0_coefficient == 0.5
    by_square = recipe("small", steps=400, d_sae=64, target_l0=5, sparsity="quadratic_l0").loss
    assert (by_square.sparsity, by_square.l0_coefficient) == ("quadratic_l0", SMALL_L0_COEFFICIENTS["quadratic_l0"])
    assert recipe("small", steps=400, d_sae=64, l0_coefficient=1e-3).loss.sparsity == "l0"


def test_small_has_schedules_that_end_within_its_steps():
    for steps in (1, 7, 400, 100_000):
        config = recipe("small", steps=steps, d_sae=64, target_l0=5)
        assert config.l0_warmup_steps <= steps
        assert config.lr_warmup_steps + config.lr_decay_steps <= steps


def test_gemma_scope_with_a_target_is_quadratic_in_the_l0_of_each_token():
    loss = recipe("gemma-scope", d_sae=64, target_l0=5).loss
    assert (loss.sparsity, loss.l0_of, loss.target_l0, loss.l0_coefficient) == ("quadratic_l0", "token", 5, 0.02)
    assert recipe("gemma-scope", d_sae=64).loss.sparsity == "l0"


def test_another_recipe():
    with pytest.raises(ValueError, match=r"^recipe: expected 'small' or 'gemma-scope', got 'large'$"):
        recipe("large")
