"""The scripts of data that a site of latents loads, read back and held to the table."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from gemmascope.dashboards.overview import Vocabulary
from gemmascope.dashboards.table import window_start
from gemmascope.reporting import latents
from gemmascope.reporting.latents import (
    BARS,
    CHUNK,
    FIRING_HEADS,
    Tokens,
    call,
    facts_script,
    latent_scripts,
    list_scripts,
    packed,
    shapes,
    text_scripts,
)

from .made_up import SIZES, STRINGS, write_dashboards


@pytest.fixture(scope="module")
def overview(tmp_path_factory):
    return write_dashboards(tmp_path_factory.mktemp("dashboards"))


@pytest.fixture(scope="module")
def table(overview):
    return overview.table("layer_1/resid")


def arguments(script, function):
    """What a script calls ``gemmascope.function`` with."""
    inside = re.fullmatch(rf"gemmascope\.{function}\((.*)\);\n", script, re.DOTALL)
    assert inside, script[:80]
    return json.loads(f"[{inside[1]}]")


def unpacked(part):
    code, data = part
    return np.frombuffer(base64.b64decode(data), f"<{code}")


def joined(scripts, function):
    """The arrays of all chunks, one after another."""
    chunks = []
    for number, script in enumerate(scripts):
        at, parts = arguments(script, function)
        assert at == number
        chunks.append({name: unpacked(part) for name, part in parts.items()})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([0, 255], "u1"),
        ([256, 0], "u2"),
        ([65_536], "u4"),
        ([2**32 - 1], "u4"),
        ([2**32], "f8"),
        ([], "u1"),
        (np.array([0.1, np.nan], np.float32), "f4"),
        (np.array([0.1]), "f8"),
    ],
)
def test_arrays_keep_their_values_in_the_smallest_type(values, code):
    array = np.asarray(values, np.int64) if isinstance(values, list) else values
    assert packed(array)[0] == code
    np.testing.assert_array_equal(unpacked(packed(array)), array)


def test_what_is_no_count_is_refused():
    with pytest.raises(ValueError, match="expected counts, got -1"):
        packed(np.array([-1]))
    with pytest.raises(TypeError, match="expected integers, float32 or float64, got bool"):
        packed(np.array([True]))


def test_scripts_are_ascii_and_end_no_element():
    script = call("vocabulary", [None, *STRINGS])
    assert script.isascii()
    assert "<" not in script
    assert arguments(script, "vocabulary") == [[None, *STRINGS]]


def test_tokens_are_numbered_from_one(overview):
    tokens = Tokens(overview)
    ids = torch.tensor([[0, 3], [-1, len(STRINGS) - 1]])
    assert tokens.numbered(ids).tolist() == [[1, 4], [0, len(STRINGS)]]
    assert tokens.strings[1:] == list(STRINGS)
    overview.vocabulary, whole = Vocabulary({0: "a", 5: "b"}), overview.vocabulary
    try:
        assert Tokens(overview).numbered(torch.tensor([5, 0])).tolist() == [2, 1]
        with pytest.raises(ValueError, match="found one missing"):
            Tokens(overview).numbered(torch.tensor([3]))
    finally:
        overview.vocabulary = whole


def test_text_is_all_there_row_by_row(overview, monkeypatch):
    context = overview.text.context
    monkeypatch.setattr(latents, "TEXT_CHUNK", 5 * context + 1)
    scripts = list(text_scripts(overview, Tokens(overview)))
    found = [unpacked(arguments(script, "text")[1]) for script in scripts]
    assert [len(part) for part in found] == [5 * context, 5 * context, 2 * context]
    np.testing.assert_array_equal(np.concatenate(found) - 1, overview.text.tokens.flatten())


def test_list_has_every_latent(overview, table, monkeypatch):
    monkeypatch.setattr(latents, "LIST_CHUNK", 128)
    found = joined(list_scripts(overview, table, Tokens(overview)), "list")
    np.testing.assert_array_equal(found["fired"], table.fired)
    np.testing.assert_array_equal(found["largest"], table.largest)
    assert found["shape"].shape == (table.d_sae * BARS // 2,)
    heads = found["heads"].reshape(table.d_sae, -1)
    for latent in (0, 1, 33, 299):
        row, position, there = table.top.row[latent], table.top.position[latent], table.top.there[latent]
        peaks = overview.text.tokens[row[there].long(), position[there].long()].tolist()
        firing = list(dict.fromkeys(peaks))[:FIRING_HEADS]
        assert heads[latent, :FIRING_HEADS].tolist() == [i + 1 for i in firing] + [0] * (FIRING_HEADS - len(firing))
        assert (heads[latent, FIRING_HEADS:] - 1).tolist() == table.promoted[latent, :5].tolist()


def test_bars_of_a_histogram():
    """4 bins to a bar of 64; heights as log(1 + count), 15 the tallest and none that counts invisible."""
    histogram = torch.zeros(3, 64, dtype=torch.int64)
    histogram[0, [0, 1, 63]] = torch.tensor([1_000_000, 7, 1])
    histogram[1, 8:12] = 1
    found = shapes(histogram)
    bars = np.stack([found >> 4, found & 15], 2).reshape(3, BARS)
    assert bars[0].tolist() == [15, *[0] * 14, 1]
    assert bars[1].tolist() == [0, 0, 15, *[0] * 13]
    assert bars[2].tolist() == [0] * 16
    narrow = shapes(torch.tensor([[3, 0, 0, 3]]))
    assert np.stack([narrow >> 4, narrow & 15], 2).flatten().tolist() == [15] * 4 + [0] * 8 + [15] * 4


def test_latents_in_full_are_those_of_the_table(overview, table):
    tokens = Tokens(overview)
    scripts = list(latent_scripts(table, tokens))
    assert len(scripts) == -(-table.d_sae // CHUNK) == 2
    found = joined(scripts, "latents")
    np.testing.assert_array_equal(found["fired"], table.fired)
    np.testing.assert_array_equal(found["mean"], table.mean)
    np.testing.assert_array_equal(found["end"], table.histogram_end)
    np.testing.assert_array_equal(found["histogram"].reshape(-1, SIZES.bins), table.histogram)
    np.testing.assert_array_equal(found["cells"].reshape(-1, SIZES.strata), table.stratum_cells)
    for name in ("promoted", "suppressed"):
        np.testing.assert_array_equal(found[name].reshape(-1, SIZES.logits).astype(int) - 1, getattr(table, name))
        np.testing.assert_array_equal(found[f"{name}_logit"], getattr(table, f"{name}_logit").flatten())
    for name in ("near", "together"):
        np.testing.assert_array_equal(found[name].reshape(-1, SIZES.related).astype(int) - 1, getattr(table, name))
    np.testing.assert_array_equal(found["near_cosine"], table.near_cosine.flatten())
    latent, other = 33, int(table.together[33, 2])
    both = int(table.together_tokens[latent, 2])
    either = int(table.sampled[latent]) + int(table.sampled[other]) - both
    assert found["together_share"].reshape(-1, SIZES.related)[latent, 2] == np.float32(both / either)
    own = [table.threshold, table.decoder_norm, table.encoder_norm, table.encoder_bias, table.alignment]
    np.testing.assert_array_equal(found["own"].reshape(-1, 5), torch.stack(own, 1))


def test_examples_of_a_latent_keep_every_activation(table, overview):
    """Decoded slot by slot, as the page does."""
    (_, parts) = arguments(next(latent_scripts(table, Tokens(overview))), "latents")
    chunk = {name: unpacked(part) for name, part in parts.items()}
    slots = SIZES.top + SIZES.strata * SIZES.of_stratum
    seen = 0
    for latent in (1, 33, 60, 255):
        for slot in range(slots):
            at = latent * slots + slot
            inside = slice(int(chunk["ends"][at - 1]) if at else 0, int(chunk["ends"][at]))
            window = np.zeros(SIZES.window, np.float32)
            window[chunk["offset"][inside]] = chunk["activation"][inside]
            if slot < SIZES.top:
                examples, index = table.top, (latent, slot)
            else:
                examples, index = table.strata, (latent, *divmod(slot - SIZES.top, SIZES.of_stratum))
            np.testing.assert_array_equal(window, examples.window[index])
            assert chunk["row"][at] == examples.row[index] + 1
            if examples.there[index]:
                assert chunk["position"][at] == examples.position[index]
                start = window_start(examples.position[index].long(), overview.text.context, SIZES)
                assert window[int(examples.position[index] - start)] == examples.value[index] > 0
                seen += 1
    assert seen > 10


def test_figures_that_a_kind_does_not_have_are_left_out(overview):
    names = [of.name for of in overview.saes]
    facts = [arguments(facts_script(overview, of, overview.table(of.name)), "sae")[0]["own"] for of in overview.saes]
    assert names == ["layer_1/resid", "layer_2/mlp 20"]
    assert "cosine of the two" in facts[0]
    assert facts[1] == ["threshold", "norm of decoder", "norm of encoder", "bias of encoder"]
    found = joined(latent_scripts(overview.table(names[1]), Tokens(overview)), "latents")
    assert len(found["own"]) == 4 * overview.saes[1].d_sae
