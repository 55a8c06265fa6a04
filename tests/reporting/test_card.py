"""The model card: its front matter, its figures, and text from files that would be markup."""

import json
import re

from gemmascope.reporting.card import Entry, card, code, plain
from tests.reporting.test_report import make_results

ENTRY = Entry("resid/layer_3", "JumpReLUSAE", "model.layers.3.output", "blocks.3.hook_resid_post", 4, 7, (), None)


def front_matter(text: str) -> dict:
    lines = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert lines is not None
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines[1].splitlines())}


def test_front_matter():
    found = front_matter(card("saelens", [ENTRY], "google/gemma-2-2b", None))
    assert found == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability"],
        "base_model": "google/gemma-2-2b",
    }
    found = front_matter(card("gemma-scope", [ENTRY], "a folder", None))
    assert "base_model" not in found
    assert found["library_name"] == "gemmascope"
    hostile = 'x/y"\n---\nlicense: mine'
    assert front_matter(card("gemma-scope", [ENTRY], hostile, None))["base_model"] == hostile


def test_how_it_is_opened():
    for format, line in (
        ("saelens", 'SAE.load_from_disk("resid/layer_3")'),
        ("gemma-scope-2", 'JumpReLUSAE.load("resid/layer_3")'),
        ("circuit-tracer", "load_transcoder_from_hub("),
    ):
        [source] = re.findall(r"```python\n(.*?)```", card(format, [ENTRY], None, None), re.DOTALL)
        assert line in source
        compile(source, "card", "exec")
    assert 'SAE.load_from_disk(".")' in card("saelens", [ENTRY._replace(folder="")], None, None)


def test_figures_are_those_of_the_results():
    results = make_results()
    entries = [ENTRY._replace(folder=f"sae_{n}", row=row) for n, row in enumerate(results["saes"])]
    text = card("saelens", entries, None, results)
    heading = next(line for line in text.splitlines() if line.startswith("| Folder | L0 "))
    columns = heading.split(" | ")
    for n, row in enumerate(results["saes"]):
        [line] = [line for line in text.splitlines() if line.startswith(f"| `sae_{n}` |") and line.count("|") > 8]
        cells = line.split(" | ")
        assert cells[columns.index("FVU")] == f"{row['fvu']:.3f}"
        assert cells[columns.index("L0")] == f"{row['l0']:.1f}"
        assert cells[columns.index("Loss recovered")] == f"{row['loss_recovered']:.3f}"
    assert f"tokens {results['model']['tokens']}" in text


def test_text_of_files_is_no_markup():
    hostile = "<script>|`x`|\n# [a](b)\x1b[2J"
    assert plain(hostile) == "\\<script\\>\\|\\`x\\`\\| \\# \\[a\\](b) \\[2J"
    assert code(hostile) == "`<script>/'x'/ # [a](b) [2J`"
    results = make_results()
    results["model"]["held_out"] = hostile
    row = results["saes"][0]
    text = card("saelens", [ENTRY._replace(site=hostile, changes=[hostile], row=row)], hostile, results)
    body = text.split("---\n", 2)[2]
    assert not re.search(r"(?<![\\`])<script", body)
    assert "\x1b" not in body
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1
