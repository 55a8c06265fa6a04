"""The folder of dashboards: written, read back to the same bits, and refused where it is damaged or hostile.

pytest tests/dashboards/test_overview.py
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmascope.dashboards.overview import OVERVIEW, Overview, Vocabulary, table_path
from gemmascope.dashboards.strings import vocabulary_of
from gemmascope.dashboards.table import Sizes, layout, window_start
from gemmascope.demo.byte_tokenizer import byte_tokenizer
from gemmascope.errors import BadFileError
from gemmascope.formats.files import seal, sha256

from . import small

NAME = "layer_2/resid/width_3"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overview")
    small.write(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def test_read_back_to_the_same_bits(written):
    overview = Overview.open(written)
    assert dict(overview.vocabulary) == small.STRINGS
    assert torch.equal(overview.text.tokens, small.TOKENS)
    assert torch.equal(overview.text.counted, small.COUNTED)
    assert (overview.model, overview.what, overview.seed, overview.n_tokens) == ("made/tiny-it", "two rows", 0, 9)
    assert [str(of.reads) for of in overview.saes] == ["layer_1/resid", "layer_2/resid"]
    assert overview.saes[1].facts == {"l0": 0.5}
    expected, found = small.table().tensors(), overview.table(NAME).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert {name: (x.dtype, tuple(x.shape)) for name, x in found.items()} == layout(3, small.SIZES)


def test_writing_again_gives_the_same_bytes(written, tmp_path):
    small.write(tmp_path)
    files = [path for path in written.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes()


def test_what_is_derived_by_hand(written):
    table = Overview.open(written).table(NAME)
    assert table.frequency.tolist() == [1 / 9, 3 / 9, 0]
    assert table.mean.tolist() == [0.5, 5 / 3, 0]
    assert torch.equal(replace(table, n_sampled=5).frequency, table.frequency)  # whatever is counted on a sample
    assert table.stratum_bounds()[:2].tolist() == [[[0.5, 1], [0, 0.5]], [[2, 4], [0, 2]]]
    assert table.stratum_share().tolist() == [[1, 0], [1 / 3, 2 / 3], [0, 0]]
    assert table.bars(1) == ([1, 1, 0, 1], [0.5, 1.5, 2.5, 3.5])
    assert table.bars(2) == ([], [])


def test_windows_are_inside_their_rows(written):
    """Of 4 tokens 2 come before; at the ends of a row the window moves in."""
    sizes = small.SIZES
    starts = window_start(torch.arange(6), 6, sizes)
    assert starts.tolist() == [0, 0, 0, 1, 2, 2]
    overview = Overview.open(written)
    table = overview.table(NAME)
    assert overview.window_tokens(table.top)[1].tolist() == [[0, 1, 2, 3], [4, 4, 2, 1]]
    assert table.top.window[1].tolist() == [[0, 0, 3.0, 1.25], [0, 0, 0.75, 0]]
    assert overview.window_tokens(table.top)[2].tolist() == [[-1] * 4] * 2
    assert overview.vocabulary.of(overview.window_tokens(table.top)[2, 0]) == [""] * 4


def changed(folder, change):
    """The manifest after ``change``, sealed again as a forger would."""
    manifest = json.loads((folder / OVERVIEW).read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / OVERVIEW).write_text(json.dumps(manifest | {"sha256": seal(manifest)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(rows=3),
        lambda m: m.update(rows=-1),
        lambda m: m.update(context="6"),
        lambda m: m.update(vocabulary=2),
        lambda m: m.update(extra=1),
        lambda m: m.pop("seed"),
        lambda m: m["sizes"].update(bins=3),
        lambda m: m["sizes"].update(window=7),
        lambda m: m["sizes"].update(windows=7),
        lambda m: m["saes"][0].update(name=NAME),
        lambda m: m["saes"][0].update(reads="nowhere"),
        lambda m: m["saes"][0]["file"].update(file="../../0000.safetensors"),
        lambda m: m["saes"][0].update(d_sae=0),
        lambda m: m["saes"].clear(),
        lambda m: m.update(format_version=2),
        lambda m: m.update(format="another"),
        lambda m: m["text_file"].update(sha256="0" * 64),
        lambda m: m["vocabulary_file"].pop("bytes"),
    ],
)
def test_a_manifest_that_says_what_is_not(folder, change):
    changed(folder, change)
    with pytest.raises(BadFileError, match="expected"):
        Overview.open(folder)


def test_a_manifest_that_was_changed(folder):
    path = folder / OVERVIEW
    path.write_text(path.read_text().replace("two rows", "six rows"))
    with pytest.raises(BadFileError, match="expected the overview as it was written, found it changed"):
        Overview.open(folder)


@pytest.mark.parametrize("file", ["text.safetensors", "vocabulary.safetensors"])
def test_a_file_that_was_changed(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(BadFileError, match="another checksum"):
        Overview.open(folder)


def forged_table(folder, **tensors):
    """The first table with other tensors, its checksum in the manifest."""
    path = table_path(folder, 0)
    save_file(load_file(path) | tensors, path)
    digest, size = sha256(path), path.stat().st_size
    changed(folder, lambda m: m["saes"][0]["file"].update(sha256=digest, bytes=size))
    return Overview.open(folder)


def with_entry(name, value):
    tensor = small.table().tensors()[name].clone()
    tensor.view(-1)[0] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top/row", 2),
        ("top/row", -2),
        ("strata/position", 6),
        ("near", 3),
        ("together", 3),
        ("promoted", 8),
        ("fired", 10),
        ("fired", -1),
        ("sampled", 10),
        ("total", torch.nan),
        ("top/window", torch.inf),
        ("near_cosine", torch.nan),
    ],
)
def test_a_table_that_no_pass_finds(folder, name, value):
    overview = forged_table(folder, **with_entry(name, value))
    with pytest.raises(BadFileError, match=rf"{name}: expected"):
        overview.table(overview.saes[0].name)


def test_a_table_of_other_tensors(folder):
    overview = forged_table(folder, more=torch.zeros(3))
    with pytest.raises(BadFileError, match="expected 28 tensors, found other ones: 'more'"):
        overview.table(overview.saes[0].name)


def test_a_tensor_of_another_shape(folder):
    overview = forged_table(folder, fired=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(BadFileError, match=r"fired: expected int64 \[3\], found int64 \[4\]"):
        overview.table(overview.saes[0].name)


def test_a_vocabulary_that_lacks_tokens(tmp_path):
    text = {k: v for k, v in small.STRINGS.items() if k != 4}
    with pytest.raises(BadFileError, match="expected the token 4 of the text"):
        small.write(tmp_path / "text", text)
    logits = {k: v for k, v in small.STRINGS.items() if k != 7}
    overview = small.write(tmp_path / "logits", logits)
    with pytest.raises(BadFileError, match="expected tokens of the vocabulary, found 7"):
        overview.table(NAME)


def test_an_sae_that_is_not_there(written):
    with pytest.raises(ValueError, match="name: expected that of one of 2 SAEs, got 'b'"):
        Overview.open(written).table("b")


def test_no_overview(tmp_path):
    with pytest.raises(BadFileError, match="expected a file, found none"):
        Overview.open(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"ids": torch.tensor([2, 1]), "ends": torch.tensor([1, 2])},
        {"ids": torch.tensor([-1, 1]), "ends": torch.tensor([1, 2])},
        {"ids": torch.tensor([1, 2]), "ends": torch.tensor([2, 1])},
        {"ids": torch.tensor([1, 2]), "ends": torch.tensor([1, 99])},
        {"ids": torch.tensor([1]), "ends": torch.tensor([1, 2])},
    ],
)
def test_no_vocabulary(tensors):
    with pytest.raises(ValueError, match="expected ascending ids and ends"):
        Vocabulary.from_tensors(tensors | {"utf8": torch.tensor(list(b"abc"), dtype=torch.uint8)})


def test_no_utf8():
    tensors = {"ids": torch.tensor([1]), "ends": torch.tensor([1]), "utf8": torch.tensor([255], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="utf-8"):
        Vocabulary.from_tensors(tensors)


def test_empty_and_many_strings():
    for strings in ({}, {3: ""}, {n: chr(0x4E00 + n) * (n % 3) for n in range(500)}):
        assert dict(Vocabulary.from_tensors(Vocabulary(strings).tensors())) == strings


def test_strings_of_a_tokenizer():
    pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    found = vocabulary_of(tokenizer, torch.tensor([97, 10, 195, 256]))
    assert found[97] == "a"
    assert found[10] == "\n"
    assert found[195] == tokenizer.convert_ids_to_tokens(195)  # the first byte of two
    assert found[256] == tokenizer.bos_token
    assert len(found) == 4


def test_sizes_are_checked():
    for name in ("top", "strata", "of_stratum", "window", "logits", "related"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            replace(Sizes(), **{name: 0})
    with pytest.raises(ValueError, match="strata: expected at most 3 for 4 bins, got 4"):
        Sizes(bins=4, strata=4)
