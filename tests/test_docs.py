"""The documents against the code: their Python runs, their figures are those of the rows, what they name exists."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest

from bench.quality import recorded
from bench.real.judging import STUDIES
from tests.interop.table import formats_block

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "notes").glob("*.md"))]
RUN, CHECK = "python", "python no-run"

SPEED = {
    "ours_cpu": "gemmascope, native backend",
    "ours_pytorch": "gemmascope, PyTorch alone",
    "dense_compiled": "the same in dense PyTorch, compiled",
    "dense": "the same in dense PyTorch",
    "dictionary_learning": "dictionary_learning",
    "saelens": "SAELens",
    "sparsify": "sparsify (TopK)",
}
LARGE, SMALL = "gemma-2-2b 16k", {"gemma-3-270m 2.5k": "640 × 2,560", "minilm 4k": "384 × 4,096"}
PACKAGES = {"saelens": "SAELens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify (TopK)"}
GENERATION = {
    "model": "the model alone",
    "ours": "SAEs of this package",
    "ours_steered": "the same, steered, their error kept",
    "dense": "the same in dense PyTorch",
    "saelens": "the same in SAELens",
}
QUALITY = {
    "saelens": "SAELens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify's TopK",
    "sparsify_adam": "the same with Adam",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Language, line and text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(match[1].strip(), text.count("\n", 0, match.start(2)), match[2]) for match in found]


def marked(page: Path, name: str) -> tuple[str, str]:
    """What stands between ``<!-- name OF -->`` and ``<!-- /name -->``, and OF."""
    begin, end = rf"<!-- {name} ?(.*?) ?-->\n", f"\n<!-- /{name} -->"
    found = re.findall(f"{begin}(.*?){end}", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1, f"{name_of(page)}: expected one block between the marks {name}, found {len(found)}"
    [(of, block)] = found
    return block, of


def assert_block(page: Path, name: str, expected: str) -> None:
    found, _ = marked(page, name)
    assert found == expected, f"{name_of(page)}: the block <!-- {name} --> should be\n\n{expected}\n"


# ---- Python


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """In order and in one namespace, in an empty folder. Blocks marked no-run only compile."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for language, line, source in blocks(page):
        assert language in (RUN, CHECK) or not language.startswith("py"), f"{name_of(page)}:{line}: {language!r}"
        if language in (RUN, CHECK):
            if "transformers" in source:
                pytest.importorskip("transformers")
            code = compile("\n" * line + source, str(page), "exec")  # so that a traceback shows the page's line
            if language == RUN:
                exec(code, namespace)


# ---- figures


def rows_of(name: str) -> list[dict]:
    with (ROOT / "bench" / "results" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    "setting",
    [
        "layer_9/resid shared 2048",
        "layer_9/resid published 2048",
        "layer_9/mlp shared 2048",
        "layer_9/mlp published 2048",
        "layer_9/att shared 2048",
        "layer_9/att published 2048",
        "layer_9/resid shared 16384",
        "layer_2/resid shared 1024",
        "layer_2/resid published 1024",
        "layer_3/resid shared 2048",
    ],
)
def test_tables_of_kinds_are_those_of_the_rows(setting):
    site, recipe, d_sae = setting.split()
    found = recorded.newest(rows_of("architectures.jsonl"))
    assert_block(ROOT / "docs" / "kinds.md", f"kinds {setting}", recorded.tables(found[site, recipe, int(d_sae)]))


RAVEL = {
    "mdas": "DAS with a mask",
    "neurons": "neurons",
    "das": "DAS, 16 directions",
    "pca": "PCA",
    "random": "random directions",
}


def test_what_the_studies_say_is_that_of_the_rows():
    newest = {row["study"]: row for row in rows_of("studies.jsonl")}
    lines = [line for name in STUDIES for line in textwrap.wrap(f"{name}: {newest[name]['conclusion']}", 120)]
    assert_block(README, "studies", "\n".join(["```", *lines, "```"]))


def probing_table() -> str:
    """Means over all labels by k: the SAE's latents, a random dictionary's, coordinates; at the end all coordinates."""
    rows = {(row["layer"], row["site"]): row for row in rows_of("probing.jsonl")}
    ks = [str(k) for k in next(iter(rows.values()))["ks"]]
    lines = [f"| site | probe | {' | '.join(f'k {k}' for k in ks)} | all |", "|---" * (len(ks) + 3) + "|"]
    for (layer, site), row in rows.items():
        for probe, name in (
            ("latents", f"{row['architecture']}, L0 {row['l0']:.1f}"),
            ("random", "random"),
            ("neurons", "coordinates"),
        ):
            means = row[f"{probe}_balanced_accuracy"]
            whole = f"{row['dense_balanced_accuracy']['all']:.3f}" if probe == "neurons" else ""
            figures = " | ".join(f"{means[k]:.3f}" for k in ks)
            lines.append(f"| layer_{layer}/{site} | {name} | {figures} | {whole} |")
    return "\n".join(lines)


def test_what_probes_say_of_the_real_model_is_that_of_the_rows():
    assert_block(ROOT / "docs" / "probing.md", "probes", probing_table())


def ravel_block() -> str:
    """Disentangle, in brackets cause and isolation, of each method at each layer; what SAEs leave of the entities."""
    results = json.loads((ROOT / "bench" / "results" / "ravel.json").read_text(encoding="utf-8"))
    found: dict[str, dict[int, dict]] = {}
    for row in results["summary"]:
        if row["test"] == "entities" and row["method"] not in ("always base", "always source"):
            found.setdefault(row.get("kind") or RAVEL[row["method"]], {})[row["layer"]] = row
    layers = sorted({layer for of in found.values() for layer in of})

    def figure(value: float, digits: int = 3) -> str:
        return f"{value:.{digits}f}".removeprefix("0")

    head = ["", *(f"after layer {layer}" for layer in layers), "FVU of the cities"]
    lines = ["|" + "|".join(f" {name} " if name else " " for name in head) + "|", "|" + "---|" * len(head)]
    for name, of in sorted(found.items(), key=lambda each: -sum(row["disentangle"] for row in each[1].values())):
        cells = [
            f"{figure(row['disentangle'])} ({figure(row['cause'], 2)}, {figure(row['isolation'], 2)})"
            for row in (of[layer] for layer in layers)
        ]
        fvu = [of[layer]["entity_fvu"] for layer in layers]
        left = "–" if None in fvu else ", ".join(figure(each, 2) for each in fvu)
        lines.append(f"| {name} | {' | '.join(cells)} | {left} |")
    return "\n".join(lines)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "ravel.md"], ids=name_of)
def test_the_table_of_ravel_is_that_of_the_results(page):
    assert_block(page, "ravel", ravel_block())


def cpu_rows(date: str) -> list[dict]:
    """Without a first moment: what rows with one take is another question."""
    rows = (row for row in rows_of("cpu.jsonl") if row["kind"] == "time" and not row.get("beta1"))
    return [row for row in rows if row["machine"]["date"] <= date]


def speed_block(date: str) -> str:
    """The table of the run of ``date``; in brackets the ratios of it and all runs before it."""
    rows = [row for row in cpu_rows(date) if row["shape"] == LARGE]
    times = {(row["machine"]["date"], row["part"], row["contender"]): row["p50_ms"] for row in rows}
    runs = sorted({row["machine"]["date"] for row in rows})
    assert date in runs, f"cpu.jsonl: expected the run of {date}, found {', '.join(runs)}"
    lines = ["| | step, ms | times ours | inference, ms | times ours |", "|---|---|---|---|---|"]
    for contender, label in SPEED.items():
        cells = [label]
        for part in ("step", "infer"):
            ratios = [times[run, part, contender] / times[run, part, "ours_cpu"] for run in runs]
            ratio = times[date, part, contender] / times[date, part, "ours_cpu"]
            spread = "" if contender == "ours_cpu" else f" ({min(ratios):.1f}–{max(ratios):.1f})"
            cells += [f"{times[date, part, contender]:,.0f}", f"{ratio:.1f}{spread}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def small_block(date: str) -> str:
    """The latest times of a step and of `sae(x)` up to ``date``, at the sizes of small models."""
    times = {(row["shape"], row["part"], row["contender"]): row["p50_ms"] for row in cpu_rows(date)}
    heads = [f"{size}: {part}, ms" for size in SMALL.values() for part in ("step", "`sae(x)`")]
    lines = [f"| | {' | '.join(heads)} |", f"|{'---|' * (1 + len(heads))}"]
    for contender, label in SPEED.items():
        cells = [label]
        for shape in SMALL:
            for part in ("step", "module"):
                ratio = times[shape, part, contender] / times[shape, part, "ours_cpu"]
                of_ours = "" if contender == "ours_cpu" else f" ({ratio:.1f} ×)"
                cells.append(f"{times[shape, part, contender]:.0f}{of_ours}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quality_block(date: str) -> str:
    from bench.quality.verdicts import compare

    rows = [row for row in rows_of("quality.jsonl") if row["machine"]["date"] == date]
    (site,) = {row["site"] for row in rows}
    lines = ["| against | our FVU over theirs at equal L0 |", "|---|---|"]
    for contender, label in QUALITY.items():
        found = compare(rows, contender, site)
        lines.append(f"| {label} | {found['least']:.2f}–{found['most']:.2f} |".replace("0.", "."))
    return "\n".join(lines)


def accelerate_block(date: str) -> str:
    """Of a call of each module, the latest rows up to ``date``: milliseconds as it comes and accelerated."""
    rows = [row for row in rows_of("accelerate.jsonl") if row["kind"] == "time" and row["machine"]["date"] <= date]
    times = {(row["d_sae"], row["tokens"], row["contender"]): row["p50_ms"] for row in rows if row["part"] == "infer"}
    lines = [f"| latents | tokens | {' | '.join(PACKAGES.values())} |", f"|{'---|' * (2 + len(PACKAGES))}"]
    for d_sae, tokens in sorted({key[:2] for key in times}):
        cells = [f"{d_sae:,}", f"{tokens:,}"]
        for package in PACKAGES:
            called, accelerated = (times[d_sae, tokens, f"{package}_{how}"] for how in ("called", "accelerated"))
            cells.append(f"{called:,.0f} → {accelerated:,.0f} ({called / accelerated:.1f} ×)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def generation_block(date: str) -> str:
    """Of one run: milliseconds a token, and what the SAEs add to the model's own."""
    rows = {row["contender"]: row for row in rows_of("generation.jsonl") if row["machine"]["date"] == date}
    model = rows["model"]["p50_ms"]
    lines = ["| | ms a token | of which SAEs |", "|---|---|---|"]
    for contender, label in GENERATION.items():
        ms = rows[contender]["p50_ms"]
        lines.append(f"| {label} | {ms:.0f} | {f'{ms - model:.0f}' if contender != 'model' else ''} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("page", "name", "block"),
    [
        ("README.md", "speed", speed_block),
        ("README.md", "small", small_block),
        ("README.md", "quality", quality_block),
        ("docs/accelerate.md", "accelerate", accelerate_block),
        ("docs/in-a-model.md", "generation", generation_block),
    ],
)
def test_figures_are_those_of_the_rows(page, name, block):
    assert_block(ROOT / page, name, block(marked(ROOT / page, name)[1]))


# ---- what is named


def packages() -> dict[str, str]:
    """Folder and first docstring line of every package, outermost first."""
    found = {}
    for root in ("gemmascope", "kernels", "bench"):
        for path in sorted((ROOT / root).rglob("__init__.py")):
            folder = f"{path.parent.relative_to(ROOT)}/"
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[folder] = docstring.partition("\n")[0]
    without = [folder for folder, line in found.items() if not line]
    assert not without, f"expected a docstring in the __init__.py of {', '.join(without)}, found none"
    return found


def packages_block() -> str:
    found = packages()
    width = max(map(len, found))
    return "\n".join(["```", *(f"{folder:<{width}}  {line}" for folder, line in found.items()), "```"])


def test_readme_lists_the_packages():
    assert_block(README, "packages", packages_block())


def test_the_table_of_formats_is_that_of_the_proofs():
    """`make test-interop` runs them."""
    assert_block(ROOT / "docs" / "files.md", "formats", formats_block())


def test_every_page_is_listed():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in PAGES[1:]} - {"README.md"}
    examples = {f"../examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert sorted(name for name in pages | examples if f"]({name})" not in index) == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_targets_of_make_exist(page):
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(set(named) - set(targets)) == []
