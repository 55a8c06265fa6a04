"""Cross-layer transcoders on disk: circuit-tracer's layout and Gemma Scope 2's, to the bit, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmascope import CrossLayerTranscoder
from gemmascope.errors import BadFileError
from gemmascope.formats import clts, transcoders
from tests.helpers import lattice, normal
from tests.saes.test_clt import by_formula, clt_tensors, inputs

L, D, F = 3, 6, 10
SIZES = {"d_in": (D,) * L, "d_sae": (F,) * L, "d_out": (D,) * L}
METADATA = {
    "model": "google/gemma-2-2b",
    "sites": [f"model.layers.{layer}.pre_feedforward_layernorm.output" for layer in range(L)],
    "sites_out": [f"model.layers.{layer}.post_feedforward_layernorm.output" for layer in range(L)],
}


def layers_of(dtype=torch.float32, skip=False, make=normal):
    found = clt_tensors(skip, make, **SIZES)
    return [{key: t if key == "threshold" else t.to(dtype) for key, t in tensors.items()} for tensors in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_written_is_read_to_the_bit(tmp_path, dtype):
    clt = CrossLayerTranscoder(layers_of(dtype), metadata=METADATA)
    clt.save(tmp_path / "clt")
    found = CrossLayerTranscoder.load(tmp_path / "clt")
    assert found.metadata == METADATA
    for ours, theirs in zip(clt.tensors, found.tensors, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
            assert ours[key].dtype == theirs[key].dtype
    xs = [x.to(dtype) for x in inputs(d_in=(D,) * L)]
    for one, two in zip(clt(xs), found(xs), strict=True):
        assert torch.equal(one, two)


def test_the_layout_is_circuit_tracers(tmp_path):
    layers = layers_of()
    clts.write(layers, METADATA, tmp_path)
    names = {f"{matrix}_{i}.safetensors" for matrix in ("W_enc", "W_dec") for i in range(L)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"config.yaml"}
    for i, tensors in enumerate(layers):
        encoder, decoder = (load_file(tmp_path / f"{matrix}_{i}.safetensors") for matrix in ("W_enc", "W_dec"))
        assert {key: tuple(t.shape) for key, t in encoder.items()} == {
            f"W_enc_{i}": (F, D),
            f"b_enc_{i}": (F,),
            f"b_dec_{i}": (D,),
            f"threshold_{i}": (F,),
        }
        assert torch.equal(encoder[f"W_enc_{i}"], tensors["W_enc"].T)
        [written] = decoder.values()
        assert written.shape == (F, L - i, D)
        for target in range(i, L):  # row 0 is the layer's own output
            assert torch.equal(written[:, target - i], tensors["W_dec"][:, (target - i) * D : (target - i + 1) * D])
    assert (tmp_path / "config.yaml").read_text() == (
        'model_name: "google/gemma-2-2b"\n'
        'model_kind: "cross_layer_transcoder"\n'
        'feature_input_hook: "mlp.hook_in"\n'
        'feature_output_hook: "hook_mlp_out"\n'
    )


def test_relu_is_a_threshold_of_0(tmp_path):
    clts.write(layers_of(), METADATA, tmp_path)
    for i in range(L):
        file = tmp_path / f"W_enc_{i}.safetensors"
        save_file({key: t for key, t in load_file(file).items() if not key.startswith("threshold")}, file)
    (tmp_path / "config.yaml").unlink()
    found = clts.read(tmp_path)
    assert found.metadata == {}
    assert all(torch.equal(tensors["threshold"], torch.zeros(F)) for tensors in found.layers)


def gemma_scope_2(folder, layers, config=None):
    """As DeepMind writes them; w_dec holds all layers, also those before."""
    folder.mkdir(exist_ok=True)
    for i, tensors in enumerate(layers):
        w_dec = torch.full((F, L, D), 7.0)
        w_dec[:, i:] = tensors["W_dec"].view(F, L - i, D)
        theirs = {"w_enc": tensors["W_enc"], "w_dec": w_dec} | {k: tensors[k] for k in ("b_enc", "b_dec", "threshold")}
        if "W_skip" in tensors:
            theirs["affine_skip_connection"] = tensors["W_skip"].T.contiguous()
        save_file({key: t.contiguous() for key, t in theirs.items()}, folder / f"params_layer_{i}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_with_its_last_layer(tmp_path, skip):
    layers = layers_of(skip=skip, make=lattice)
    gemma_scope_2(tmp_path, layers, {"model_name": "google/gemma-3-270m"})
    found = CrossLayerTranscoder.load(tmp_path)
    assert found.n_layers == L
    assert found.metadata == {**METADATA, "model": "google/gemma-3-270m"}
    xs = inputs(lattice, (D,) * L)
    for one, two in zip(found(xs), by_formula(layers, xs, (D,) * L)[1], strict=True):
        assert torch.equal(one, two)


def test_without_a_config(tmp_path):
    gemma_scope_2(tmp_path, layers_of())
    assert clts.read(tmp_path).metadata == {key: METADATA[key] for key in ("sites", "sites_out")}


def changed(file, **changes):
    found = {key: t for key, t in load_file(file).items() if changes.get(key, 0) is not None}
    save_file(found | {key: t for key, t in changes.items() if t is not None}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "W_enc_1.safetensors").unlink(), "expected layers from 0 without a gap, found none of layer 1"),
        (lambda f: (f / "W_dec_1.safetensors").unlink(), "W_dec_1.safetensors: expected a file"),
        (
            lambda f: changed(f / "W_dec_1.safetensors", W_dec_1=torch.zeros(F, L, D)),
            r"\[10, 2, 6\], found \[10, 3, 6\]",
        ),
        (lambda f: changed(f / "W_enc_1.safetensors", W_enc_1=torch.zeros(F, 5)), r"expected shape \[any, 6\], found"),
        (lambda f: changed(f / "W_enc_1.safetensors", b_enc_1=None), "found no b_enc_1"),
        (lambda f: changed(f / "W_enc_1.safetensors", W_skip_1=torch.zeros(D, D)), "found also W_skip_1"),
        (
            lambda f: changed(f / "W_enc_1.safetensors", b_enc_1=torch.zeros(9)),
            r"layers\[1\]\['b_enc'\]: expected shape",
        ),
        (lambda f: changed(f / "W_enc_1.safetensors", b_dec_1=torch.full((D,), torch.nan)), "expected finite values"),
        (lambda f: changed(f / "W_enc_1.safetensors", threshold_1=torch.full((F,), -1.0)), "expected values ≥ 0"),
        (
            lambda f: (f / "W_enc_2.safetensors").write_bytes(b"no"),
            "W_enc_2.safetensors: expected a safetensors header",
        ),
        (lambda f: (f / "config.yaml").write_text("model_kind: transcoder_set"), "model_kind: expected 'cross_layer"),
        (lambda f: (f / "config.yaml").write_bytes(b"\xff"), "expected UTF-8"),
        (lambda f: gemma_scope_2(f, layers_of()), "found both"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, damage, message):
    clts.write(layers_of(), METADATA, tmp_path)
    damage(tmp_path)
    with pytest.raises(BadFileError, match=message):
        clts.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_dec": torch.zeros(F, L + 1, D)}, r"w_dec: expected shape \[any, 3, 6\]"),
        ({"w_enc": torch.zeros(D + 1, F)}, r"w_enc: expected shape \[6, any\], found \[7, 10\]"),
        ({"affine_skip_connection": torch.zeros(D, D + 1)}, "affine_skip_connection: expected shape"),
        ({"b_dec": None}, "found no b_dec"),
    ],
)
def test_a_damaged_gemma_scope_2_is_refused(tmp_path, changes, message):
    gemma_scope_2(tmp_path, layers_of())
    changed(tmp_path / "params_layer_1.safetensors", **changes)
    with pytest.raises(BadFileError, match=message):
        clts.read(tmp_path)


def test_the_first_layer_sets_the_width(tmp_path):
    gemma_scope_2(tmp_path, layers_of())
    changed(tmp_path / "params_layer_0.safetensors", w_dec=torch.zeros(F, L, D + 1))
    with pytest.raises(BadFileError, match="w_dec of layer 0: expected rows 6 wide as w_enc is, found 7"):
        clts.read(tmp_path)


def test_no_folder_of_a_clt(tmp_path):
    for path, message in ((tmp_path, "found neither"), (tmp_path / "none", "expected a folder, found none")):
        with pytest.raises(BadFileError, match=message):
            clts.read(path)
    clts.write(layers_of(), METADATA, tmp_path / "clt")
    with pytest.raises(BadFileError):
        transcoders.read(tmp_path / "clt")


@pytest.mark.parametrize(
    ("layers", "metadata", "message"),
    [
        (lambda: [], METADATA, "layers: expected at least one layer"),
        (lambda: layers_of(skip=True), METADATA, r"layers\[0\]: expected none with a skip connection"),
        (lambda: clt_tensors(), METADATA, r"layers\[0\]: expected d_in, d_sae, d_out = 7, 20, 7"),
        (layers_of, METADATA | {"model": None}, r"metadata\['model'\]: expected the name of the model, got None"),
        (
            layers_of,
            METADATA | {"sites": METADATA["sites"][:2]},
            r"metadata\['sites'\]: expected the sites of layers 0",
        ),
        (layers_of, METADATA | {"sites": METADATA["sites"][::-1]}, r"metadata\['sites'\]: expected"),
        (layers_of, METADATA | {"sites": None}, r"metadata\['sites'\]: expected"),
        (layers_of, METADATA | {"sites_out": ["x", "y", "z"]}, r"metadata\['sites_out'\]: expected"),
        (
            layers_of,
            METADATA | {"sites": [*METADATA["sites"][:2], "model.layers.2.output"]},
            r"metadata\['sites'\]: expected the sites of layers 0 to 2, all of one kind",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, layers, metadata, message):
    with pytest.raises(ValueError, match=message):
        clts.write(layers(), metadata, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["W_enc_7.safetensors", "W_dec_0.safetensors", "params_layer_0.safetensors", "config.yaml"]
)
def test_a_folder_that_holds_another_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"path: expected a folder without {name}"):
        clts.write(layers_of(), METADATA, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_types():
    with pytest.raises(TypeError, match="layers: expected"):
        clts.write({}, METADATA, "x")
    with pytest.raises(TypeError, match="metadata: expected"):
        clts.write(layers_of(), None, "x")
    with pytest.raises(TypeError, match="path: expected"):
        clts.read(3)
