"""Files that SAELens, sparsify and dictionary_learning write themselves open here as the same function, bit by bit.

Weights and inputs are those of tests/formats/others.py, whose sums are exact in any order.
"""

import json

import pytest
import torch

from gemmascope import load_sae
from tests.formats import others
from tests.formats.others import D_MODEL, D_SAE, ROWS, K

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_same(folder, encode, decode) -> None:
    sae = load_sae(folder)
    with torch.no_grad():
        f = encode(ROWS)
        assert 0 < (f > 0).float().mean() < 1
        assert torch.equal(sae.encode(ROWS), f)
        assert torch.equal(sae.decode(f), decode(f))
        assert torch.equal(sae(ROWS), decode(f))


@pytest.mark.parametrize("b_dec", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_saelens(tmp_path, architecture, b_dec):
    sae_lens = pytest.importorskip("sae_lens")
    case = others.saelens(architecture, apply_b_dec_to_input=b_dec)
    theirs = sae_lens.SAE.from_dict(case.config)
    theirs.load_state_dict(case.tensors)
    theirs.save_model(tmp_path)
    assert_same(tmp_path, theirs.encode, theirs.decode)
    again = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(tmp_path, again.encode, again.decode)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_batchtopk(tmp_path, architecture):
    """The training checkpoint, and the JumpReLU SAE that SAELens makes of it."""
    sae_lens = pytest.importorskip("sae_lens")
    case = others.saelens(architecture)
    classes = {"batchtopk": "BatchTopKTrainingSAE", "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE"}
    cls = getattr(sae_lens, classes[architecture])
    config = getattr(sae_lens, classes[architecture] + "Config")
    more = {"matryoshka_widths": [4, D_SAE]} if "matryoshka" in architecture else {}
    training = cls(config(D_MODEL, D_SAE, k=2.5, rescale_acts_by_decoder_norm=False, **more))
    training.load_state_dict(case.tensors)
    training.save_model(tmp_path / "training")
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    b_dec = theirs.cfg.apply_b_dec_to_input
    assert json.loads((tmp_path / "training" / "cfg.json").read_text())["architecture"] == architecture
    for folder in (tmp_path / "inference", tmp_path / "training"):
        assert load_sae(folder).pre_encoder_bias == b_dec
        assert_same(folder, theirs.encode, theirs.decode)


def test_sparsify(tmp_path):
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(k=K, num_latents=D_SAE)
    theirs = sparsify.SparseCoder(D_MODEL, config)
    theirs.load_state_dict(others.sparsify().tensors)
    theirs.save_to_disk(tmp_path)

    def encode(x):
        top = theirs.encode(x)
        return torch.zeros(len(x), D_SAE).scatter(1, top.top_indices, top.top_acts)

    assert_same(tmp_path, encode, lambda f: f @ theirs.W_dec + theirs.b_dec)


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)  # fmt: skip
def test_dictionary_learning(tmp_path, kind):
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    [cls] = {getattr(module, kind) for module in (dictionary, batch_top_k, matryoshka_batch_top_k, top_k)
             if hasattr(module, kind)}  # fmt: skip
    case = others.dictionary(kind)
    more = {"k": K} if "TopK" in kind else {}
    if kind.startswith("Matryoshka"):
        more["group_sizes"] = [4, 8]
    theirs = cls(D_MODEL, D_SAE, **more)
    theirs.load_state_dict(case.tensors)
    torch.save({key: value.cpu() for key, value in theirs.state_dict().items()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    assert_same(tmp_path, theirs.encode, theirs.decode)
