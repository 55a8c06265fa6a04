"""Activations for the comparisons: of a model on a text, held out by document, and of an encoder."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bench.quality import activations, encoders
from bench.quality.reading import load
from gemmascope.sites import Site
from tests.suite.small_runs import write_model

WORDS = ["ab", "cd", "efg", "hijk", "lmnop", "qrs", "tuv", "wxyz"]


def text_file(folder, documents=60):
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(documents):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (120,), generator=generator)]
        lines.append(json.dumps({"source": f"s{number % 7}", "name": str(number), "text": " ".join(words)}))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_of_a_model_on_a_text(tmp_path, capsys):
    model, out = write_model(tmp_path), tmp_path / "made" / "activations.safetensors"
    given = ["--model", str(model), "--text", str(text_file(tmp_path)), "--out", str(out), "--rows", "40"]
    sites = ["layer_0/resid", "layer_1/mlp"]
    assert activations.main([*given, "--sites", *sites, "--context", "32"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with safe_open(out, framework="pt") as file:
        assert sorted(file.keys()) == sites
        held_out = int(file.metadata()["held_out"])
    found = load(out, sites)
    train, rest = found[Site(0, "resid")]
    assert 4 * 30 < held_out == len(rest) <= 4 * 31  # without BOS
    assert 36 * 30 < len(train) <= 36 * 31  # a document may begin within a row
    assert train.dtype == torch.bfloat16
    assert load_file(out.with_name(activations.PAIRS))["pairs"].shape == (len(train) + len(rest), 2)


def test_outliers_are_dropped_with_their_pairs(tmp_path):
    model, out = write_model(tmp_path), tmp_path / "activations.safetensors"
    options = ("--sites", "layer_0/resid", "--context", "32", "--rows", "40", "--drop-norm", "1.1")
    assert (
        activations.main(["--model", str(model), "--text", str(text_file(tmp_path)), "--out", str(out), *options]) == 0
    )
    rows = load_file(out)["layer_0/resid"]
    assert 0 < len(rows) < 40 * 31
    assert len(load_file(out.with_name(activations.PAIRS))["pairs"]) == len(rows)


def test_of_an_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    folder = tmp_path / "bert"
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).eval()
    model.save_pretrained(folder)
    out = tmp_path / "activations.safetensors"
    given = ["--model", str(folder), "--text", str(text_file(tmp_path)), "--out", str(out)]
    assert encoders.main([*given, "--sites", "layer_1/resid", "--context", "16", "--rows", "40"]) == 0
    train, held_out = load(out, ["layer_1/resid"])[Site(1, "resid")]
    assert train.shape[1] == 16
    pairs = load_file(out.with_name(activations.PAIRS))["pairs"]
    assert len(pairs) == len(train) + len(held_out)
    assert not set(pairs[:, 1].tolist()) & {0, 2, 3}, "padding and special tokens"

    first = json.loads((tmp_path / "text.jsonl").read_text().splitlines()[0])["text"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    seen = {}
    model.encoder.layer[1].register_forward_hook(lambda module, given, out: seen.update(out=out))
    with torch.no_grad():
        model(**tokenizer(first[:64], truncation=True, max_length=16, return_tensors="pt"))
    output = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    expected = output.reshape(-1, 16)[1:-1].bfloat16()  # without CLS and SEP
    everywhere = torch.cat([train, held_out]).float()
    assert all((everywhere - row).abs().max(1).values.min() < 0.02 for row in expected.float())
    with pytest.raises(ValueError, match="expected layer_N/resid of an encoder, found layer_1/mlp"):
        encoders.main([*given, "--sites", "layer_1/mlp"])
    with pytest.raises(ValueError, match=r"rows: expected text for 9000 \+ 1000, found "):
        encoders.main([*given, "--sites", "layer_1/resid", "--rows", "10000"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: expected the folder of a demo, or --model"),
        (["runs/demo", "--model", "m"], "run: expected the folder of a demo, or --model"),
        (["--model", "m"], "--model: expected --text and --out with it"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        activations.main(arguments)
    assert message in capsys.readouterr().err
