"""Folders of SAELens, sparsify and dictionary_learning: the same function bit by bit, and refusals common to them."""

import copy
import json

import pytest
import torch

from gemmascope import JumpReLUSAE, TopKSAE, load_pretrained_sae, load_sae
from gemmascope.errors import BadFileError
from tests.formats import others
from tests.formats.others import D_MODEL, D_SAE, ROWS, K

OLD = {"normalize_activations": False, "activation_fn_str": "relu", "hook_point": "blocks.3.hook_resid_post"}
KINDS = {
    **{f"saelens-{name}": (others.write_saelens, others.saelens(name)) for name in (
        "standard", "jumprelu", "gated", "topk", "batchtopk", "matryoshka_batchtopk",
    )},
    "saelens-without-b_dec": (others.write_saelens, others.saelens("jumprelu", apply_b_dec_to_input=False)),
    "saelens-3": (others.write_saelens, others.saelens("standard", architecture=..., metadata=..., **OLD)),
    "sparsify": (others.write_sparsify, others.sparsify()),
    "sparsify-num_latents": (others.write_sparsify, others.sparsify(num_latents=D_SAE, expansion_factor=99)),
    **{f"dictionary_learning-{name}": (others.write_dictionary_learning, others.dictionary(name)) for name in (
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    )},
}  # fmt: skip
TOPK = {"saelens-topk", "sparsify", "sparsify-num_latents", "dictionary_learning-AutoEncoderTopK"}
WEIGHTS = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"}


def project(kind: str) -> str:
    return kind.partition("-")[0]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def case(kind):
    return KINDS[kind][1]


@pytest.fixture
def folder(tmp_path, kind):
    write, case = KINDS[kind]
    return write(tmp_path / "sae", case.tensors, case.config)


def test_the_same_bits(folder, case, kind):
    sae = load_sae(folder)
    f = case.encode(ROWS)
    assert 0.05 < (f > 0).float().mean() < 0.9
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            assert torch.equal(sae.encode(ROWS), f)
            assert torch.equal(sae.decode(f), case.decode(f))
            assert torch.equal(sae(ROWS), case.decode(f))
    assert torch.equal(sae.encode_sparse(ROWS).to_dense(), f)
    assert type(sae) is (TopKSAE if kind in TOPK else JumpReLUSAE)


def test_by_the_name_of_the_weights_and_by_the_class(folder, kind):
    sae = load_sae(folder)
    for again in (load_sae(folder / WEIGHTS[project(kind)]), type(sae).load(str(folder))):
        assert type(again) is type(sae)
        assert again.metadata == sae.metadata
        for a, b in zip(sae.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
    other = JumpReLUSAE if type(sae) is TopKSAE else TopKSAE
    with pytest.raises(BadFileError, match=r"expected a .* SAE, found a .* SAE: gemmascope.load_sae opens both$"):
        other.load(folder)


def test_saved_as_ours_it_is_the_same(folder, tmp_path):
    sae = load_sae(folder)
    sae.save(tmp_path / "ours")
    again = load_sae(tmp_path / "ours")
    assert type(again) is type(sae)
    assert again.metadata == sae.metadata
    assert torch.equal(again.encode(ROWS), sae.encode(ROWS))


def test_from_a_local_repository(folder, tmp_path, kind):
    for path in ("sae", f"sae/{WEIGHTS[project(kind)]}"):
        sae = load_pretrained_sae(tmp_path, path)
        assert torch.equal(sae.encode(ROWS), load_sae(folder).encode(ROWS))


def test_links_out_of_a_local_repository(folder, tmp_path, kind):
    for name in (WEIGHTS[project(kind)], "config.json" if project(kind) == "dictionary_learning" else "cfg.json"):
        inside = tmp_path / "repo" / name / "sae"
        inside.mkdir(parents=True)
        for file in folder.iterdir():
            (inside / file.name).write_bytes(file.read_bytes())
        (inside / name).unlink()
        (inside / name).symlink_to(folder / name)
        with pytest.raises(BadFileError, match=r"/sae/.*: expected a file inside .*, found a link out of it$"):
            load_pretrained_sae(tmp_path / "repo" / name, "sae")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype(folder, dtype):
    sae = load_sae(folder, device="cpu", dtype=dtype)
    assert sae.W_enc.dtype == sae.b_dec.dtype == dtype
    if isinstance(sae, JumpReLUSAE):
        assert sae.threshold.dtype == torch.promote_types(dtype, torch.float32)
    assert load_sae(folder, device="meta").W_enc.is_meta


# ---- refusals


def refusal(path) -> str:
    with pytest.raises(BadFileError) as caught:
        load_sae(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def damaged(kind, tmp_path, change) -> str:
    """The refusal of the weights after ``change`` of their dict."""
    write, case = KINDS[kind]
    folder = write(tmp_path / "damaged", change(dict(case.tensors)), case.config)
    return refusal(folder).removeprefix(f"{folder}/{WEIGHTS[project(kind)]}: ")


def test_nan_and_inf(kind, case, tmp_path):
    for key, tensor in case.tensors.items():
        if not tensor.is_floating_point():
            continue
        for bad in (torch.nan, torch.inf, -torch.inf):
            broken = tensor.clone(memory_format=torch.contiguous_format)
            broken.view(-1)[-1:] = bad
            message = damaged(kind, tmp_path, lambda tensors, key=key, broken=broken: tensors | {key: broken})
            assert message == f"{key}: expected finite values, found {bad}"


def test_wrong_keys(kind, case, tmp_path):
    for key in case.tensors:
        message = damaged(kind, tmp_path, lambda tensors, key=key: {k: v for k, v in tensors.items() if k != key})
        assert message.startswith("expected ")
        assert key in message
    message = damaged(kind, tmp_path, lambda tensors: tensors | {"W_skip": torch.zeros(D_MODEL, D_MODEL)})
    assert message.startswith("expected the keys ")
    assert message.endswith(", found also W_skip")


def test_transposed(kind, case, tmp_path):
    for key, tensor in case.tensors.items():
        if tensor.ndim == 2:
            message = damaged(kind, tmp_path, lambda tensors, key=key: tensors | {key: tensors[key].T.contiguous()})
            assert message.startswith(f"{key}: expected shape {list(tensor.shape)} (")
            assert message.endswith(f"d_sae), found {list(tensor.shape[::-1])}")


def test_wrong_dtypes(kind, case, tmp_path):
    first = next(key for key, tensor in case.tensors.items() if tensor.ndim == 2)
    message = damaged(kind, tmp_path, lambda tensors: tensors | {first: tensors[first].half()})
    assert "expected float" in message


def test_other_sizes_than_in_the_config(kind, case, tmp_path):
    config = copy.deepcopy(case.config)
    sizes = config.get("trainer", config)
    sizes["activation_dim" if "trainer" in config else "d_in"] = D_MODEL + 1
    folder = KINDS[kind][0](tmp_path / "damaged", case.tensors, config)
    assert (
        refusal(folder)
        .removeprefix(f"{folder}/{WEIGHTS[project(kind)]}: ")
        .startswith("expected d_model, d_sae = (5, ")
    )


def test_truncated_empty_and_foreign_weights(folder, kind):
    weights = folder / WEIGHTS[project(kind)]
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"", b"<html>", bytes(len(whole))):
        weights.write_bytes(content)
        assert refusal(folder).startswith(f"{weights}: ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "expected JSON, found "),
        ("[]", "expected an object, found list"),
        ('{"k": NaN}', "expected JSON, found the constant NaN"),
        ('{"k": 1e999}', "expected JSON, found a number beyond float64"),
        ('{"a": 1, "a": 2}', "expected JSON, found the key 'a' twice"),
        ("[" * 100_000, "expected JSON, found nesting deeper than 64"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "expected at most 1048576 bytes of JSON, found more"),
    ],
)
@pytest.mark.parametrize("kind", ["saelens-jumprelu", "sparsify", "dictionary_learning-AutoEncoder"], indirect=True)
def test_config_that_is_none(folder, kind, text, found):
    config = folder / ("config.json" if project(kind) == "dictionary_learning" else "cfg.json")
    config.write_text(text)
    assert refusal(folder).startswith(f"{config}: {found}")


@pytest.mark.parametrize("kind", ["saelens-topk", "sparsify"], indirect=True)
@pytest.mark.parametrize("k", [0, -1, "3", 2.5, True])
def test_wrong_k(folder, k):
    config = json.loads((folder / "cfg.json").read_text()) | {"k": k}
    (folder / "cfg.json").write_text(json.dumps(config))
    assert refusal(folder).startswith(f"{folder}/cfg.json: k: expected ")


def test_k_beyond_the_latents(tmp_path):
    folder = others.write_sparsify(tmp_path, others.sparsify().tensors, others.sparsify(k=D_SAE + 1).config)
    assert refusal(folder) == f"{folder}/sae.safetensors: k: expected 1 to d_sae = {D_SAE}, found {D_SAE + 1}"
    case = others.dictionary("AutoEncoderTopK")
    others.write_dictionary_learning(
        tmp_path / "b", case.tensors | {"k": torch.tensor(0, dtype=torch.int32)}, case.config
    )
    assert refusal(tmp_path / "b") == f"{tmp_path}/b/ae.pt: k: expected 1 to d_sae = {D_SAE}, found 0"


def test_a_device_that_is_not_here(folder, kind):
    if kind == "sparsify" and not torch.cuda.is_available():
        from gemmascope.errors import EnvironmentProblemError

        with pytest.raises(EnvironmentProblemError, match="device: expected one of the 0 GPUs"):
            load_sae(folder, device="cuda:0")
    with pytest.raises(TypeError, match="dtype: expected float"):
        load_sae(folder, dtype=torch.int32)
    with pytest.raises(TypeError, match="dtype: expected a dtype, got str"):
        load_sae(folder, dtype="float32")


def test_a_dtype_that_does_not_hold_the_weights(tmp_path):
    case = others.saelens("jumprelu")
    case.tensors["W_dec"] = case.tensors["W_dec"] * 1e6
    folder = others.write_saelens(tmp_path, case.tensors, case.config)
    with pytest.raises(ValueError, match=r"^dtype: expected one that holds W_dec, got float16, in which it is Inf$"):
        load_sae(folder, dtype=torch.float16)
    assert load_sae(folder, dtype=torch.bfloat16).W_dec.isfinite().all()


def test_k_of_what_is_topk(tmp_path):
    for kind in ("saelens-topk", "sparsify", "dictionary_learning-AutoEncoderTopK"):
        write, case = KINDS[kind]
        assert load_sae(write(tmp_path / kind, case.tensors, case.config)).k == K
