"""The shipped kernels compile for GPUs that are not here, within bounds; and the check can fail."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from bench.aot import __main__ as aot
from bench.aot import compilation, trips
from bench.aot.spec import Spec
from bench.aot.specs import specs

GOOD = {
    "name": "kernel",
    "target": "sm_90",
    "registers": 100,
    "spills": 0,
    "shared": 1024,
    "instructions": 1000,
    "classes": {"load128": 2},
}


def jobs(target: str) -> list[tuple[str, str]]:
    return [(target, spec.name) for spec in specs(target)]


def check(targets: tuple[str, ...]) -> None:
    """The kernels of the training step are counted too, in the same compilation."""
    baseline = json.loads(aot.baseline_path().read_text()) if aot.baseline_path().exists() else {}
    known = {(target, spec.name): spec for target in targets for spec in specs(target)}
    counts = aot.recorded_counts() if trips.TARGET in targets else {}
    if trips.TARGET in targets:
        known |= {(trips.TARGET, spec.name): spec for spec in trips.specs()}
    rows = compilation.compile_all(list(known), workers=2)
    found = {}
    for row in rows:
        key, programs = f"{row['name']}@{row['target']}", counts.get(row["name"])
        programs = programs if row["target"] == trips.TARGET else None
        if problems := aot.problems(row, known[row["target"], row["name"]], baseline.get(key), programs):
            found[key] = problems
    assert not found, f"\n{aot.render(rows, markdown=False)}\n{json.dumps(found, indent=1)}"


def test_hopper_is_within_bounds():
    check(("sm_90",))


@pytest.mark.slow
def test_other_targets_are_within_bounds():
    check(("sm_80", "sm_100", "gfx942"))


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_has_a_baseline(target):
    if not aot.baseline_path().exists():
        pytest.skip(f"no baseline for Triton {aot.triton_version()}")
    baseline = json.loads(aot.baseline_path().read_text())
    assert [name for _, name in jobs(target) if f"{name}@{target}" not in baseline] == []


@pytest.mark.parametrize("target", aot.TARGETS)
def test_names_are_unique(target):
    assert len(set(jobs(target))) == len(jobs(target))


def problems(changes: dict, baseline: dict | None = None, **spec) -> list[str]:
    return aot.problems(GOOD | changes, Spec("kernel", None, {}, {}, **spec), baseline)


def test_good_row_has_no_problems():
    assert problems({}, GOOD, expects=("load128",)) == []
    assert problems({"registers": 108, "instructions": 1150}, GOOD) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        ({"spills": 4}, "spills 4 bytes, 0 allowed"),
        ({"shared": 232449}, "needs 232449 bytes of shared memory, sm_90 has 232448"),
        ({"classes": {}}, "expected load128 instructions, found none"),
    ],
)
def test_problem_of_a_row(changes, message):
    assert problems(changes, expects=("load128",)) == [message]


def test_spills_may_be_allowed():
    assert problems({"spills": 4}, max_spill=4) == []


@pytest.mark.parametrize(("key", "value"), [("registers", 109), ("shared", 1025), ("instructions", 1151)])
def test_worse_than_the_baseline(key, value):
    (problem,) = problems({key: value}, GOOD)
    assert problem.startswith(f"{key} {value}, baseline {GOOD[key]}")


def test_instruction_classes():
    sass = ["LDG.E.128", "LDG.E", "LDGSTS.E.BYPASS.128", "HGMMA.64x256x16.F32.BF16", "HMMA.16816.F32", "UTCHMMA"]
    counts = compilation.count_classes([*sass, "REDG.E.ADD", "STG.E.128"], compilation.SASS_CLASSES)
    expected = {"HGMMA": 1, "HMMA": 1, "tcgen05": 1, "cp.async": 1, "load128": 1, "load": 2, "atomic": 1}
    assert counts == expected | {"store128": 1, "store": 1}


def test_arguments_must_be_the_kernels():
    (spec, *_) = specs("sm_90")
    wrong = Spec(spec.name, spec.kernel, spec.arguments | {"typo": "i32"}, spec.constants)
    with pytest.raises(ValueError, match=r"arguments differ from the kernel's: \['typo'\]"):
        compilation.compile_spec(wrong, "sm_90")


TABLE = """\
| kernel | sm_80 | sm_90 | sm_100 | gfx942 |
|---|---|---|---|---|
| gather_bf16 | 82 / 0 / 4.5 / 442 |  |  | 105 / 8 / 0.0312 / 503 |
| product |  | 214 / 0 / 144 / 2992 |  |  |"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    def row(registers, spills, shared, instructions):
        return {"registers": registers, "spills": spills, "shared": shared, "instructions": instructions, "classes": {}}

    rows = {"product@sm_90": row(214, 0, 147456, 2992), "gather_bf16@gfx942": row(105, 8, 32, 503)}
    rows |= {"gather_bf16@sm_80": row(82, 0, 4608, 442), "product_fp16@sm_90": row(214, 0, 147456, 2992)}
    rows |= {"gather_ones@sm_90": row(1, 0, 0, 1)}
    for version in ("3.9", "3.10"):
        (tmp_path / f"triton-{version}.json").write_text(json.dumps(rows))
    monkeypatch.setattr(aot, "BASELINES", tmp_path)
    monkeypatch.setattr(aot, "compile_all", None)


def test_what_is_recorded_is_a_table(recorded, capsys):
    assert aot.main(["--table", "3.9"]) == 0
    head = "**Triton {}**: registers / spills in bytes / shared memory in KiB / instructions\n\n"
    one = head.format("3.9") + TABLE + "\n"
    assert capsys.readouterr().out == one
    assert aot.main(["--table"]) == 0
    assert capsys.readouterr().out == head.format("3.10") + TABLE + "\n\n" + one
    with pytest.raises(SystemExit):
        aot.main(["--table", "3.5"])
    assert "--table: expected some of 3.10, 3.9, got 3.5" in capsys.readouterr().err


def test_the_table_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None\nfrom bench.aot.__main__ import main\nmain(['--table'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    versions = [line for line in lines if line.startswith("**Triton ")]
    assert len(versions) == len(list(aot.BASELINES.glob("triton-*.json"))) > 0
    assert all(line.count(" | ") == 4 for line in lines if line.startswith("| "))


def test_a_worker_reports_what_it_cannot_compile(tmp_path):
    rows = compilation.run_worker([("sm_90", "no such kernel")])
    assert "error" in rows[0]


def test_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--targets", "sm_12"])
    assert "--targets: expected some of sm_80, sm_90, sm_100, sm_120, gfx942, got sm_12" in capsys.readouterr().err
