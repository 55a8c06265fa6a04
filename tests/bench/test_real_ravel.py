"""RAVEL on the real model: what is run, in order, and its exit status. No download, no training."""

from pathlib import Path

import pytest

from bench.real import ravel
from gemmascope.__main__ import main
from gemmascope.errors import BadFileError, EnvironmentProblemError
from gemmascope.suite import SuiteConfig


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(ravel, "make_model", lambda folder, cache: folder)
    monkeypatch.setattr(ravel, "make_text", lambda file, cache: file)
    monkeypatch.setattr(ravel, "train", lambda command: commands.append(command) or 0)
    return commands


def test_it_trains_and_asks(ran, tmp_path):
    assert ravel.main(["--out", str(tmp_path), "--cache", "/cache", "--", "--seeds", "2"]) == 0
    training, asking = ran
    assert training[2:5] == ["gemmascope", "train", str(ravel.CONFIG)]
    assert training[5:7] == ["--out", str(tmp_path)]
    assert 'model.name="/cache/gemma-3-270m"' in training
    assert 'text.files=["/cache/english.jsonl"]' in training
    assert asking[2:5] == ["gemmascope", "ravel", str(tmp_path)]
    assert asking[5:9] == ["--attribute", "country", "--attribute", "continent"]
    sizes = dict(zip(asking[9:-2:2], asking[10:-2:2], strict=True))
    assert sizes == {name: str(value) for name, value in ravel.SIZES.items()}
    assert asking[-2:] == ["--seeds", "2"]


def test_its_sizes_are_options_of_the_command_and_what_is_given_takes_their_place(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("gemmascope.suite.ravel_saes", lambda config, **options: given.append(config))
    command = ravel.commands(tmp_path, tmp_path, tmp_path / "run", ["--pairs", "7"])[1][3:]
    assert main(command) == 0
    protocol = given[0].protocol
    assert (protocol.pairs, protocol.test_pairs, protocol.batch_size, protocol.lr) == (7, 64, 8, 0.02)
    assert (given[0].templates, protocol.epochs, protocol.rotation_epochs) == (2, 1, 1)


def test_what_fails_ends_it(ran, monkeypatch, capsys):
    monkeypatch.setattr(ravel, "train", lambda command: ran.append(command) or 5)
    assert ravel.main([]) == 5
    assert len(ran) == 1
    monkeypatch.setattr(ravel, "train", lambda command: -9)
    assert ravel.main([]) == 137
    for error, status in ((BadFileError("model: torn"), 3), (EnvironmentProblemError("pip: none"), 4)):

        def fail(folder, cache, error=error):
            raise error

        monkeypatch.setattr(ravel, "make_model", fail)
        assert ravel.main([]) == status
        assert str(error) in capsys.readouterr().err


def test_its_config_is_one():
    config = SuiteConfig.read(Path(ravel.CONFIG), [])
    assert [str(site) for site in config.suite.sites] == ["layer_5/resid", "layer_9/resid", "layer_11/resid"]
    kinds = [block.numbers.get("kind", "jumprelu") for block in config.suite.sae]
    assert kinds == ["jumprelu", "topk", "batchtopk", "matryoshka", "gated", "relu"]
