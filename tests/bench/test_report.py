"""Rows on disk, what is made of them, and ours against ours at another revision."""

import json
import re
import subprocess
import sys

import pytest
import torch

from bench import __main__ as main
from bench import cases
from bench.contenders import UnavailableError
from bench.reporting import compare, records, report, tables

MACHINE = {
    "device": "CPU", "cpu": "CPU", "isa": "AVX2", "threads": 2, "versions": {"torch": "2.13"}, "commit": "abc",
    "dirty": False, "date": "2026-01-01",
}  # fmt: skip


def row(contender="ours_cpu", part="step", ms=10.0, ratio_to=None, **changes):
    case = cases.cases("cpu")[0 if part in ("step", "forward", "backward") else 1]
    found = case.facts() | {"schema": 1, "suite": "cpu", "kind": "time", "contender": contender, "part": part}
    found |= {"ours": contender.startswith("ours"), "p20_ms": ms - 1, "p50_ms": ms, "p80_ms": ms + 1, "differs": ""}
    found |= {"ratio_to": ratio_to or {}, "pct_roofline": 50.0, "floor_ms": ms / 2, "l0": 64.0, "entries": 66.0}
    found |= {"touched": 0.6, "ceilings": {"copy_gbps": 10.0, "product_tflops": 0.1}, "versions": {}}
    return found | {"machine": MACHINE} | changes


def skipped(contender, reason="no compiler", **changes):
    facts = cases.cases("cpu")[0].facts() | {"schema": 1, "suite": "cpu", "kind": "skipped", "contender": contender}
    return facts | {"ours": False, "reason": reason, "machine": MACHINE} | changes


def on(date):
    return MACHINE | {"date": date}


def saved(tmp_path, *rows, name="cpu"):
    return records.append(name, rows, tmp_path)


def test_rows_are_appended_and_read_back(tmp_path):
    path = saved(tmp_path / "new", row())
    saved(tmp_path / "new", row("dense"))
    assert [found["contender"] for found in records.read(path)] == ["ours_cpu", "dense"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 1, "kind"', r"not JSON \("),
        ("[1]", "expected a row, found none with 'schema'"),
        ('{"schema": 1, "kind": "time", "suite": "cpu"}', "expected a row, found none with 'machine'"),
        ('{"schema": 9, "kind": "time", "suite": "cpu", "machine": {}}', "expected schema 1, found 9"),
    ],
)
def test_a_damaged_line_is_named(line, message, tmp_path):
    path = saved(tmp_path, row())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(records.DamagedRowError, match=rf"cpu\.jsonl, line 2: {message}"):
        records.read(path)


def test_provenance_names_the_machine():
    facts = records.provenance(torch.device("cpu"), ["pytest", "no-such-package"])
    assert facts["versions"]["pytest"] == pytest.__version__
    assert facts["versions"]["no-such-package"] == ""
    assert facts["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", facts["date"])
    assert facts["device"]


def test_the_registry_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"contender: expected one of ours, .*, found 'nobody'"):
        cases.make("nobody")
    for text in ("16k", "12x", "0x5", "1x2x3"):
        with pytest.raises(ValueError, match=f"shape: expected .* or d_model x d_sae, found '{text}'"):
            cases.shape_of(text)


def test_a_module_that_is_missing_makes_its_contenders_unavailable(monkeypatch):
    monkeypatch.setitem(cases.CONTENDERS, "gone", ("bench.no_such_module", "Gone", {}))
    with pytest.raises(UnavailableError, match=r"No module named 'bench\.no_such_module'"):
        cases.make("gone")


def test_shapes_are_named_after_real_saes():
    assert cases.shape_of("2304x16384") == cases.SHAPES["gemma-2-2b 16k"]
    assert cases.shape_of("16x96") == cases.Shape("16x96", 16, 96)
    assert sum(shape.count for shape in cases.SHAPES["gemma-2-2b 78x16k"].all) == 78


def test_cases_of_a_suite():
    names = set(cases.CONTENDERS)
    for suite in cases.SUITES:
        found = cases.cases(suite)
        assert all(set(case.contenders) <= names for case in found)
        assert len({(case.title, case.parts, case.contenders) for case in found}) == len(found)
    inference = cases.cases("inference")
    assert {case.tokens for case in inference if case.shape.name == "gemma-2-2b 16k"} == {1, 8, 64, 512, 4096}
    assert {(case.tokens, case.parts) for case in inference if case.shape.more} == {(1, ("infer",)), (4096, ("infer",))}
    assert not any(case.shape.more for case in cases.cases("inference", parts=["module"]))
    (case,) = cases.cases("cpu", shapes=["8x9"], tokens=[3], l0=[2], dtype="bf16", only=["dense"], parts=["step"])
    assert (case.tokens, case.l0, case.dtype, case.contenders, case.parts) == (3, 2, "bf16", ("dense",), ("step",))


def test_cases_with_a_first_moment_are_those_that_train():
    found = cases.cases("cpu", beta1=0.7)
    assert {case.parts for case in found} == {("step", "forward", "backward")}
    assert {case.beta1 for case in found} == {case.facts()["beta1"] for case in found} == {0.7}
    assert {case.beta1 for case in cases.cases("cpu")} == {0.0}
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"beta1: expected at least 0 and less than 1, got {wrong}"):
            cases.cases("cpu", beta1=wrong)
    for suite, parts in (("inference", ()), ("topk", ()), ("step", ("infer",))):
        with pytest.raises(ValueError, match=f"beta1: expected a suite and parts that train, got '{suite}'"):
            cases.cases(suite, parts=parts, beta1=0.7)


def test_bars_are_judged_by_the_ratios():
    rows = [
        row("dense", ratio_to={"ours_cpu": 5.1, "ours_pytorch": 2.9}),
        row("saelens", ratio_to={"ours_cpu": 5.9}),
        row("saelens", "infer", ratio_to={"ours_cpu": 3.0, "ours_pytorch": 2.5}),
        row("sparsify", ratio_to={"ours_cpu": 9.0}, tokens=64),  # another case than the bar's
    ]
    judged = cases.judge("cpu", rows)
    verdicts = {(bar["ours"], bar["contender"], bar["part"]): bar["met"] for bar in judged if not bar["everywhere"]}
    assert verdicts == {
        ("ours_cpu", "dense", "step"): True,
        ("ours_cpu", "saelens", "step"): False,
        ("ours_cpu", "sparsify", "step"): None,
        ("ours_cpu", "saelens", "infer"): True,
        ("ours_pytorch", "dense", "step"): False,
        ("ours_pytorch", "saelens", "infer"): True,
    }
    lines = tables.bar_lines([bar for bar in judged if not bar["everywhere"]])
    assert [line.split()[-1] for line in lines[1:]] == ["met", "MISSED", "measured", "met", "MISSED", "met"]
    assert cases.judge("kernels", rows) == []


def test_no_package_may_be_faster_in_any_case():
    small = {"shape": "minilm 4k", "tokens": 1024}
    rows = [
        *(row("sparsify", ratio_to={"ours_cpu": 4.8}), row("sparsify", ratio_to={"ours_cpu": 0.7}, **small)),
        *(row("saelens", ratio_to={"ours_cpu": 11.0}), row("saelens", ratio_to={"ours_cpu": 1.2}, **small)),
    ]
    judged = [bar for bar in cases.judge("cpu", rows) if bar["everywhere"]]
    found = {bar["contender"]: (bar["ratio"], bar["met"]) for bar in judged if bar["ratio"] is not None}
    assert found == {"sparsify": (0.7, False), "saelens": (1.2, True)}
    assert any(line.startswith("step: sparsify / ours_cpu, every case") for line in tables.bar_lines(judged))


def test_small_models_train_on_their_own_batches():
    found = {case.shape.name: case.tokens for case in cases.cases("cpu")}
    assert found == {"gemma-2-2b 16k": 512, "gemma-3-270m 2.5k": 1024, "minilm 4k": 1024}
    assert {case.tokens for case in cases.cases("cpu", shapes=["minilm 4k"], tokens=[7])} == {7}


def test_the_table_has_what_was_left_out_and_why():
    rows = [row(), row("dense", ms=50.0, ratio_to={"ours_cpu": 5.0}, differs="dense autograd"), skipped("saelens")]
    lines = tables.case_lines(rows)
    assert "dense: dense autograd" in lines
    assert "saelens: no compiler" in lines
    (dense,) = [line for line in lines if line.startswith("dense ")]
    assert dense.split()[1:5] == ["50.0", "49.0", "51.0", "5.00"]


def test_only_the_last_run_of_a_contender_counts():
    old, new = on("2026-01-01"), on("2026-01-02")
    rows = [
        row("ours_cpu", machine=old), row("ours_cpu", "forward", machine=old), row("dense", machine=old),
        row("ours_cpu", ms=7.0, machine=new), skipped("dense", machine=new), row("saelens", machine=old),
        row("ours_cpu", ms=9.0, machine=old | {"threads": 1}), row("ours_cpu", "infer", machine=old),
    ]  # fmt: skip
    kept = report.newest(rows)
    assert rows[0] not in kept
    assert rows[1] not in kept
    assert rows[2] not in kept
    assert [found for found in rows if found in kept] == rows[3:]


def test_rows_of_another_first_moment_are_another_case(tmp_path, capsys):
    """Rows from before there was one to choose are those of β1 = 0."""
    plain, with_moments = row(ms=10.0), row(ms=14.0, beta1=0.7, machine=on("2026-01-02"))
    older = {key: value for key, value in plain.items() if key != "beta1"}
    before = saved(tmp_path, older, name="before")
    after = saved(tmp_path, with_moments, row(ms=8.0, machine=on("2026-01-03")), name="after")
    assert [found["beta1"] for path in (before, after) for found in records.read(path)] == [0, 0.7, 0]
    assert main.main(["compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("0.800")
    with pytest.raises(SystemExit):
        main.main(["compare", str(before), str(saved(tmp_path, with_moments, name="other"))])

    kept = report.newest([*records.read(before), with_moments])
    assert [found["p50_ms"] for found in kept] == [10.0, 14.0]
    titles = list(tables.by_case(kept))
    assert titles[1] == titles[0] + ", β1 0.7"
    dense = row("dense", ratio_to={"ours_cpu": 1.5}, beta1=0.7)
    assert {bar["ratio"] for bar in cases.judge("cpu", [dense])} == {None}
    pictures = pytest.importorskip("bench.reporting.pictures", exc_type=ImportError)
    assert [title.splitlines()[1].endswith("β1 0.7, 512 tokens") for title, *_ in pictures.panels("cpu", kept)] == [
        False,
        True,
    ]


def test_a_later_run_of_other_parts_leaves_what_it_did_not_time():
    old, new = on("2026-01-01"), on("2026-01-02")
    infer, decode = (row("dense", part, parts=["infer", "decode"], machine=old) for part in ("infer", "decode"))
    later = [row("dense", part, parts=["infer", "module"], machine=new) for part in ("infer", "module")]
    assert report.newest([infer, decode, *later]) == [decode, *later]
    gone = skipped("dense", parts=["module", "decode"], machine=on("2026-01-03"))
    assert report.newest([infer, decode, *later, gone]) == [later[0], gone]


def test_report_writes_pictures_and_one_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    saved(
        tmp_path, row(), row("dense", ms=50.0, ratio_to={"ours_cpu": 5.0}), row("ours_cpu", "infer"),
        row("<b>", "infer", ms=900.0, ratio_to={"ours_cpu": 90.0}), skipped("saelens"),
    )  # fmt: skip
    curve = [row("ours", "infer", n / 10, suite="inference", tokens=n, shape="a") for n in (1, 8, 64)]
    saved(tmp_path, *curve, name="inference")
    out = tmp_path / "out"
    assert main.main(["report", "--results", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert set(json.loads(printed.splitlines()[-1])["files"]) == {
        str(out / name) for name in ("cpu.png", "inference.png", "bench.html")
    }
    assert (out / "cpu.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "bench.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "saelens: no compiler" in page
    assert main.main(["report", "--results", str(tmp_path), "--out", str(out), "--suite", "inference"]) == 0
    assert "saelens" not in capsys.readouterr().out


def test_report_leaves_results_of_other_commands_alone(tmp_path):
    saved(tmp_path, {"kind": "architecture", "machine": {"date": "2026-01-01"}}, name="architectures")
    saved(tmp_path, row("ours_cpu"), name="cpu")
    out = tmp_path / "page"
    assert main.main(["report", "--results", str(tmp_path), "--out", str(out)]) == 0
    assert (out / "bench.html").is_file()


def test_report_without_rows_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["report", "--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "results: expected rows in" in capsys.readouterr().err


def test_panels_are_curves_where_tokens_vary():
    pictures = pytest.importorskip("bench.reporting.pictures", exc_type=ImportError)
    rows = [row("ours", "infer", tokens=n) for n in (1, 8, 64)] + [row("ours", "infer", tokens=1, shape="other")]
    assert [(len(of_panel), curve) for _, of_panel, curve in pictures.panels("inference", rows)] == [
        (3, True),
        (1, False),
    ]


def test_two_files_are_compared_row_by_row(tmp_path, capsys):
    before = saved(tmp_path, row(ms=10.0), row("dense", ms=50.0), name="before")
    after = saved(tmp_path, row(ms=99.0), row(ms=8.0), row("sparsify"), name="after")
    assert main.main(["compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[-5:] == ["ours_cpu", "step", "10.0", "8.000", "0.800"]
    with pytest.raises(SystemExit):
        main.main(["compare", str(before), str(saved(tmp_path, row("sparsify"), name="other"))])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two revisions of packages that say which they are, and a `bench` that answers as a worker does."""
    root = tmp_path / "root"
    for name in ("bench", "gemmascope", "kernels"):
        (root / name).mkdir(parents=True)
    (root / "bench" / "__main__.py").write_text(
        "import sys\nfrom gemmascope import VERSION\nfrom gemmascope.kernels import FAULT\n"
        "if FAULT: sys.exit(FAULT)\nprint('[\"step\"]', flush=True)\n"
        "for line in sys.stdin: print(VERSION, flush=True)\n"
    )

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)

    def version(number, fault=""):
        (root / "gemmascope" / "__init__.py").write_text(
            f"VERSION = {number}\n__path__.append(__path__[0] + '/..')\n"  # as installing in place does
        )
        (root / "kernels" / "__init__.py").write_text(f"FAULT = {fault!r}\n")
        git("add", ".")
        git("commit", "-m", "x")

    git("init", "-q")
    version(1)
    git("tag", "one")
    version(1, fault="cannot start")
    git("tag", "broken")
    version(3)
    monkeypatch.setattr(compare, "ROOT", root)
    return root


def test_another_revision_is_timed_in_turn(repository, capsys):
    plan = [cases.cases("cpu", only=["ours_cpu", "dense"], parts=["step"])[0]]
    assert compare.revisions("one", plan, torch.device("cpu"), 2) == 0
    lines = capsys.readouterr().out.splitlines()
    (found,) = json.loads(lines[-1])["rows"]
    assert (found["contender"], found["part"], found["p50_ms"], found["before_ms"]) == ("ours_cpu", "step", 3.0, 1.0)
    assert lines[1].endswith("3.000")
    assert compare.revisions("broken", plan, torch.device("cpu"), 2) == 0
    assert "ours_cpu: broken: cannot start" in capsys.readouterr().out
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1


def test_a_revision_that_is_not_there(repository):
    with pytest.raises(ValueError, match=r"revision: .*nowhere"), compare.checkout("nowhere"):
        pass


def test_a_server_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        compare.Server(tmp_path, [])
