"""Do the tests notice? One deliberate mistake at a time in a copy of the package: python -m tests.mutants [-k REGEX]

Every mutant is a textual change of one file. The relevant tests run on the changed copy in a subprocess and must fail.
The unchanged copy runs first and must pass, or a "killed" would prove nothing. Exit status 1 when the control fails, a
mutant survives, or a mutant's text no longer occurs exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import judging, kernels

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 600
MUTANTS = [*kernels.MUTANTS, *judging.MUTANTS]
TESTS = kernels.TESTS | judging.TESTS


def copy_project(to: Path) -> None:
    """The package as it is once installed, beside the tests."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "gemmascope", to / "gemmascope", ignore=ignore)
    shutil.copytree(ROOT / "kernels", to / "gemmascope" / "kernels", ignore=ignore)
    for name in ("tests", "bench"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
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
    parser.add_argument(
        "-k",
        metavar="REGEX",
        default="",
        help="only mutants in whose 'FILE: NAME' this is found, as in 'decode.py: 32-bit'",
    )
    wanted = re.compile(parser.parse_args(argv).k)
    mutants = [mutant for mutant in MUTANTS if wanted.search(f"{mutant.file}: {mutant.name}")]
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
            target = project / "gemmascope" / file
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
