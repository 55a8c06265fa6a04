"""Going on from an SAE that is there already: the same function at first, in the units of the new run."""

import copy
import math
from contextlib import closing

import pytest
import torch

from gemmascope.errors import BadFileError
from gemmascope.evaluation import evaluate_sae
from gemmascope.saes import JumpReLUSAE
from gemmascope.training import SAESpec, Suite
from gemmascope.training.trainer import SAETrainer
from gemmascope.training.unfold import load, unfolded
from tests.training.test_company import STATISTICS, A
from tests.training.test_trainer import config, sample

D, F = 8, 24


def source(pre_encoder_bias=True, unit=True, scale=7.5, dtype=torch.float32):
    """An SAE that fires on a part of `sample`, whose biases and norms are not those of a start."""
    generator = torch.Generator().manual_seed(5)
    sae = JumpReLUSAE(
        D, F, pre_encoder_bias=pre_encoder_bias, input_scale=scale, threshold_init=0.07, generator=generator
    )
    with torch.no_grad():
        sae.b_dec.add_(0.1 * torch.randn(D, generator=generator))
        sae.b_enc.add_(0.05 * torch.randn(F, generator=generator))
        sae.threshold.mul_(0.5 + torch.rand(F, generator=generator))
        sae.W_enc.mul_(0.5 + torch.rand(F, generator=generator))
        if not unit:
            sae.W_dec.mul_(0.2 + 3 * torch.rand(F, 1, generator=generator))
            sae.W_dec[3] = 0
            sae.threshold[5] = -0.2
    return sae.to(dtype)


SOURCES = {
    "ours": source(),
    "folded": source().fold(),
    "no bias": source(False),
    "rows of any norm": source(unit=False),
    "folded, of any norm": source(unit=False).fold(),
    "no bias, of any norm, small": source(False, unit=False, scale=0.3),
    "bf16": source(unit=False, dtype=torch.bfloat16),
    "fp64": source(unit=False, dtype=torch.float64),
}


@pytest.mark.parametrize("scale_by", ["mean_square", "variance"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_function_is_the_same_at_first(name, scale_by):
    given = SOURCES[name]
    before = {key: value.clone() for key, value in given.state_dict().items()}
    rows, settings = sample(), config(scale_by=scale_by)
    sae = SAETrainer(settings, rows, init_from=given).sae
    exact = copy.deepcopy(given).double()  # in bf16 it rounds its inputs too
    expected, found = exact(rows.double()), sae(rows)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    assert torch.equal(sae.encode_sparse(rows).to_dense() > 0, exact.encode_sparse(rows.double()).to_dense() > 0)
    assert 0.5 < evaluate_sae(sae, rows).l0 < F
    norm = sae.W_dec.norm(dim=1)
    assert torch.allclose(norm, torch.where(given.W_dec.norm(dim=1) > 0, 1.0, 0.0))
    assert sae.pre_encoder_bias
    assert sae.input_scale == SAETrainer(settings, rows).sae.input_scale
    assert sae.W_dec.dtype == sae.threshold.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())


def test_l0_of_the_first_step_is_the_source_s():
    for given in SOURCES.values():
        rows, trainer = sample(), SAETrainer(config(), sample(), init_from=given)
        trainer.update(rows)
        assert trainer.report()["l0"] == pytest.approx(evaluate_sae(copy.deepcopy(given).double(), rows).l0, abs=1e-5)


def test_one_of_the_same_units_keeps_its_bits():
    trainer = SAETrainer(config(), sample())
    for seed in range(5):
        trainer.update(sample(64, seed=seed))
    again = SAETrainer(config(), sample(), init_from=trainer.sae)
    for name, tensor in trainer.sae.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], tensor), name
    assert again.step == again.state.updates == 0
    assert not again.state.W_dec_v.any()
    again.update(sample(64))
    assert again.report()["lr"] == again.config.learning_rate_at(0) < again.config.learning_rate
    assert again.report()["l0_coefficient"] == 0


def test_a_trained_sae_is_trained_further():
    rows, settings = sample(2000), config(steps=80, lr_decay_steps=0, l0_warmup_steps=0, lr_warmup_steps=0)
    trainer = SAETrainer(settings, rows)
    for i in range(80):
        trainer.update(rows[64 * (i % 30) :][:64])
    once = evaluate_sae(trainer.sae, rows).fvu
    folded = trainer.sae.fold()
    again = SAETrainer(settings.changed(scale_by="variance"), rows, init_from=folded)
    assert evaluate_sae(again.sae, rows).fvu == pytest.approx(once, rel=1e-5)
    for i in range(80):
        again.update(rows[64 * (i % 30) :][:64])
    assert evaluate_sae(again.sae, rows).fvu < once


def test_large_ones_are_taken_in_pieces(monkeypatch):
    given = SOURCES["no bias, of any norm, small"]
    whole = unfolded(given, 2.0)
    monkeypatch.setattr("gemmascope.training.unfold._LATENTS", 5)
    for name, tensor in unfolded(given, 2.0).items():
        assert torch.allclose(whole[name], tensor, rtol=1e-12), name


@pytest.mark.parametrize("changes", [{}, {"input_scale": 3.0}], ids=["folded", "not"])
def test_a_suite_goes_on_from_files(tmp_path, changes):
    given = source(**({"scale": 3.0} if changes else {}))
    given = given if changes else given.fold()
    given.save(tmp_path / "sae")
    spec = SAESpec("a", A, config(), init_from=str(tmp_path / "sae"))
    with closing(Suite([spec], STATISTICS, model_name="m")) as suite:
        sae = suite.trainers["a"].sae
        assert sae.metadata["init_from"] == str(tmp_path / "sae")
        rows = sample()
        torch.testing.assert_close(sae(rows), given(rows))


def test_a_name_of_the_hub_is_taken_apart(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(JumpReLUSAE, "from_pretrained", lambda *where: asked.append(where))
    load("google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71")
    assert asked == [("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")]
    folder = tmp_path / "a:b"
    SOURCES["ours"].save(folder)
    assert load(str(folder)).d_sae == F
    with pytest.raises(BadFileError):
        load(str(tmp_path / "nothing"))


def test_one_of_another_width(tmp_path):
    SOURCES["folded"].save(tmp_path / "params.npz")
    message = "expected an SAE of d_model 8 and d_sae 40, got one of d_model 8 and d_sae 24$"
    with pytest.raises(ValueError, match="^init_from: " + message):
        SAETrainer(config(d_sae=40), sample(), init_from=SOURCES["folded"])
    spec = SAESpec("x", A, config(d_sae=40), init_from=str(tmp_path / "params.npz"))
    with pytest.raises(ValueError, match=r"^init_from of x, '.*params.npz': " + message):
        Suite([spec], STATISTICS, model_name="m")
    with pytest.raises(ValueError, match="expected an SAE of d_model 9 and d_sae 24, got one of d_model 8"):
        SAETrainer(config(), sample(d=9), init_from=SOURCES["folded"])
    with pytest.raises(TypeError, match=r"^init_from: expected a JumpReLUSAE, got str$"):
        SAETrainer(config(), sample(), init_from="path")


def test_an_sae_that_is_not_finite_stays_so():
    given = source()
    given.W_dec.data[2, 3] = math.nan
    assert SAETrainer(config(), sample(), init_from=given).sae.W_dec.isnan().any()
