"""Do the tests notice? One deliberate mistake at a time in a copy of the kernels: python -m tests.mutants [-k NAME]

Every mutant is a textual change of one file of ``kernels/``. The relevant tests run on the changed copy in a subprocess
and must fail. The unchanged copy runs first and must pass, or a "killed" would prove nothing. Exit status 1 when the
control fails, a mutant survives, or a mutant's text no longer occurs exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 600


class Mutant(NamedTuple):
    name: str
    file: str  # in kernels/
    old: str  # occurs exactly once
    new: str


# The tests that must notice a mutant of a file: one dtype, to be quick; "float16" is in "bfloat16".
TESTS = {"_jumprelu.py": ["tests/test_jumprelu.py", "-k", "not compiled and not opcheck and not float16"]}

JUMPRELU = [
    ("value at a tie", "f = tl.where(z > threshold, z,", "f = tl.where(z >= threshold, z,"),
    ("plain 0 hides -Inf", "z - z, float", "0.0, float"),
    ("forward bias dropped", "z = pre.to(tl.float32) + b_enc", "z = pre.to(tl.float32)"),
    ("count of masked rows", "((z > threshold) & mask).to", "(z > threshold).to"),
    ("count at a tie", "((z > threshold) & mask)", "((z >= threshold) & mask)"),
    ("l0 stored, not added", "tl.atomic_add(l0_ptr + rows, tl.sum(active, axis=1), mask=rows < N, sem=\"relaxed\")",
     "tl.store(l0_ptr + rows, tl.sum(active, axis=1), mask=rows < N)"),
    ("forward load mask", "stride_pre_n + pre_columns, mask=mask, other=0.0)", "stride_pre_n + pre_columns)"),
    ("forward store mask", "f.to(f_ptr.dtype.element_ty), mask=mask)",
     "f.to(f_ptr.dtype.element_ty), mask=(rows < N)[:, None])"),
    ("32-bit input columns, forward", "columns.to(tl.int64)[None, :] * stride_pre_f",
     "columns[None, :] * stride_pre_f"),
    ("32-bit input rows, forward", "pre_ptr + wide_rows * stride_pre_n + pre_columns",
     "pre_ptr + rows[:, None] * stride_pre_n + pre_columns"),
    ("32-bit output rows, forward", "f_ptr + wide_rows * F", "f_ptr + rows[:, None] * F"),
    ("gate at a tie", "tl.where(z > threshold, 1.0,", "tl.where(z >= threshold, 1.0,"),
    ("gate hides an infinite gradient", "dpre = u * _gate(z, threshold)", "dpre = tl.where(z > threshold, u, 0.0)"),
    ("window without its lower half", "inside = _window(z, threshold, half_bandwidth)",
     "inside = _window(z, threshold, half_bandwidth) * _gate(z, threshold)"),
    ("window includes its edge", "tl.where(distance < half_bandwidth", "tl.where(distance <= half_bandwidth"),
    ("window twice as wide", "half_bandwidth=bandwidth / 2", "half_bandwidth=bandwidth"),
    ("1/bandwidth missing", "slope = threshold / bandwidth", "slope = threshold"),
    ("1/bandwidth twice", "(s / bandwidth)[:, None]", "(s / bandwidth / bandwidth)[:, None]"),
    ("sign of the l0 gradient", "-slope * u - (s", "-slope * u + (s"),
    ("threshold gradient of active entries only, by u", "(-slope * u -", "(-slope * dpre -"),
    ("grad_f taken for contiguous", "wide_rows * stride_grad_f_n + wide_columns", "wide_rows * F + wide_columns"),
    ("grad_l0 taken for contiguous", "rows.to(tl.int64) * stride_grad_l0", "rows.to(tl.int64)"),
    ("32-bit input rows, backward", "pre_offsets = wide_rows * stride_pre_n",
     "pre_offsets = rows[:, None] * stride_pre_n"),
    ("32-bit gradient columns", "stride_grad_f_n + wide_columns * stride_grad_f_f",
     "stride_grad_f_n + columns[None, :] * stride_grad_f_f"),
    ("32-bit output rows, backward", "dpre_ptr + wide_rows * F", "dpre_ptr + rows[:, None] * F"),
    ("programs share partial sums", "partial_ptr + tl.program_id(1).to(tl.int64) * F + columns",
     "partial_ptr + columns"),
    ("sum over the first rows only", "range(0, N_PARTIAL, BLOCK_N)", "range(0, BLOCK_N, BLOCK_N)"),
    ("sum past the partial rows", "mask = (rows < N_PARTIAL)[:, None] &", "mask = (rows < N_PARTIAL + 1)[:, None] &"),
    ("dθ from the sums of db_enc", "partial_ptr + second + offsets", "partial_ptr + offsets"),
]  # fmt: skip

MUTANTS = [Mutant(name, "_jumprelu.py", old, new) for name, old, new in JUMPRELU]


def copy_project(to: Path) -> None:
    """The package as it is once installed, beside the tests."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "gemmascope", to / "gemmascope", ignore=ignore)
    shutil.copytree(ROOT / "kernels", to / "gemmascope" / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", to / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)


def run(project: Path, command: list[str]) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=project, env=env, capture_output=True, text=True, timeout=TIMEOUT
    )


def run_tests(project: Path, file: str) -> tuple[bool, str]:
    """Whether the tests of a file pass, and the first failure."""
    try:
        done = run(project, ["-m", "pytest", "-x", "-p", "no:cacheprovider", *TESTS[file]])
    except subprocess.TimeoutExpired:
        return False, f"no end after {TIMEOUT} s"
    if done.returncode == 0:
        return True, ""
    if done.returncode != 1:
        raise SystemExit(f"pytest ended with status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failure = re.search(r"^(?:FAILED|ERROR) \S+?::(.*)", done.stdout, re.MULTILINE)
    return False, failure[1][:120] if failure else done.stdout[-120:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="NAME", default="", help="only mutants whose name or file contains this")
    wanted = parser.parse_args(argv).k
    mutants = [mutant for mutant in MUTANTS if wanted in mutant.name or wanted in mutant.file]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        project = Path(folder)
        copy_project(project)
        where = run(project, ["-c", "import gemmascope.kernels; print(gemmascope.kernels.__file__)"]).stdout.strip()
        if not where.startswith(str(project)):
            raise SystemExit(f"the copy is not what the tests would import, but {where}")
        print("| file | mutant | result | first failure |\n|---|---|---|---|")
        for file in dict.fromkeys(mutant.file for mutant in mutants):
            passed, failure = run_tests(project, file)
            bad += not passed
            print(f"| {file} | none (control) | {'passes' if passed else 'FAILS'} | {failure} |", flush=True)
            if not passed:
                continue
            target = project / "gemmascope" / "kernels" / file
            source = target.read_text()
            for mutant in (m for m in mutants if m.file == file):
                if source.count(mutant.old) != 1:
                    result, failure = f"STALE: its text occurs {source.count(mutant.old)} times", ""
                else:
                    target.write_text(source.replace(mutant.old, mutant.new))
                    survived, failure = run_tests(project, file)
                    result = "SURVIVED" if survived else "killed"
                bad += result != "killed"
                print(f"| {file} | {mutant.name} | {result} | {failure} |", flush=True)
            target.write_text(source)
    print(f"{len(mutants)} mutants, {bad} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
