"""What is dictionary_learning's alone."""

import os

import pytest
import torch

from gemmascope import load_sae
from gemmascope.errors import BadFileError
from tests.formats.others import D_SAE, dictionary, write_dictionary_learning


def refusal(folder) -> str:
    with pytest.raises(BadFileError) as caught:
        load_sae(folder)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(f"{folder}/")


def test_metadata(tmp_path):
    case = dictionary("GatedAutoEncoder")
    sae = load_sae(write_dictionary_learning(tmp_path, case.tensors, case.config))
    assert sae.metadata == {
        "model": "google/gemma-2-2b",
        "layer": 3,
        "submodule_name": "resid_post_layer_3",
        "converted_from": {"format": "dictionary_learning", "architecture": "GatedAutoEncoder", "folded": ["gate"]},
    }


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_measured(tmp_path, kind):
    case = dictionary(kind)
    tensors = case.tensors | {"threshold": torch.tensor(-1.0)}
    sae = load_sae(write_dictionary_learning(tmp_path, tensors, case.config))
    assert torch.equal(sae.threshold, torch.zeros(D_SAE))


def test_bf16_keeps_its_threshold(tmp_path):
    case = dictionary("BatchTopKSAE")
    tensors = {key: value.bfloat16() if value.ndim else value for key, value in case.tensors.items()}
    tensors["threshold"] = torch.tensor(0.7123)
    sae = load_sae(write_dictionary_learning(tmp_path, tensors, case.config))
    assert sae.W_enc.dtype == torch.bfloat16
    assert torch.equal(sae.threshold, torch.full((D_SAE,), 0.7123))


CLASSES = (
    "AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK, BatchTopKSAE,"
    " MatryoshkaBatchTopKSAE"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_class": "CrossCoder"}, f"trainer: dict_class: expected {CLASSES}, found 'CrossCoder'"),
        ({"dict_class": ...}, f"trainer: dict_class: expected {CLASSES}, found none"),
        ({"dict_class": ["AutoEncoder"]}, "trainer: dict_class: expected str, found list"),
        ({"dict_size": 0}, "trainer: dict_size: expected at least 1, found 0"),
        ({"layer": "3"}, "trainer: layer: expected int, found str"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    case = dictionary("AutoEncoder", **{key: value for key, value in changes.items() if key != "dict_class"})
    if "dict_class" in changes:
        case.config["trainer"]["dict_class"] = changes["dict_class"]
    config = case.config | {"trainer": {k: v for k, v in case.config["trainer"].items() if v is not ...}}
    assert refusal(write_dictionary_learning(tmp_path, case.tensors, config)) == f"config.json: {message}"


def test_config_without_a_trainer(tmp_path):
    case = dictionary("AutoEncoder")
    assert refusal(write_dictionary_learning(tmp_path, case.tensors, {})) == (
        f"config.json: trainer: dict_class: expected {CLASSES}, found none"
    )
    assert refusal(write_dictionary_learning(tmp_path, case.tensors, {"trainer": 3})) == (
        "config.json: trainer: expected dict, found int"
    )


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = dictionary("AutoEncoder")
    folder = write_dictionary_learning(tmp_path / "a", case.tensors | {"bias": Evil()}, case.config)
    assert refusal(folder) == ("ae.pt: expected a dict of tensors and nothing else, found the object 'posix.system'")
    assert not (tmp_path / "evil").exists()


def test_a_whole_module(tmp_path):
    """As old checkpoints are: only a state dict is read."""
    case = dictionary("AutoEncoder")
    folder = write_dictionary_learning(tmp_path, torch.nn.Linear(2, 3), case.config)
    assert refusal(folder).endswith("found the object 'torch.nn.modules.linear.Linear'")
