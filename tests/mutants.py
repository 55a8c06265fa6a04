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
TESTS = {
    "_jumprelu.py": ["tests/test_jumprelu.py", "-k", "not compiled and not opcheck and not float16"],
    "_encode.py": ["tests/test_encode.py", "-k", "not float16 and not shipped_tiles"],
    "_decode.py": ["tests/test_decode.py", "-k", "not float16"],
}

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

ENCODE = [
    ("a tie is kept", "inactive = (z <= threshold)", "inactive = (z < threshold)"),
    ("value at infinite z and threshold", "active = z > threshold", "active = z >= threshold"),
    ("-Inf hidden", "(z <= threshold) & (tl.abs(z) < float(\"inf\"))", "(z <= threshold)"),
    ("-Inf as a value", "value = tl.where(active, z, float(\"nan\"))", "value = z"),
    ("bias dropped", "z = acc + b_enc[None, :]", "z = acc"),
    ("row mask of the entries", "kept = ~inactive & in_rows[:, None] &", "kept = ~inactive &"),
    ("column mask of the entries", "in_rows[:, None] & in_columns[None, :]\n    value", "in_rows[:, None]\n    value"),
    ("mask of the words", "mask=in_rows[:, None] & (word_columns < n_words)[None, :],", "mask=in_rows[:, None],"),
    ("last bit of a word lost", "kept.to(tl.int32) << (tl.arange(0, WIDTH) % 32)",
     "kept.to(tl.int32) << (tl.arange(0, WIDTH) % 31)"),
    ("32-bit scratch rows", "z_ptr + rows.to(tl.int64)[:, None] * F", "z_ptr + rows[:, None] * F"),
    ("halves exchanged",
     "left, right = _halves(acc, BLOCK_M, BLOCK_N)", "right, left = _halves(acc, BLOCK_M, BLOCK_N)"),
    ("quarters exchanged", "_gate_slab(left_1, rows, first + WIDTH,", "_gate_slab(left_1, rows, first + 2 * WIDTH,"),
    ("ragged group of row tiles", "rows = tl.minimum(tiles_m - first_m, GROUP_M)", "rows = GROUP_M"),
    ("column past the depth", "in_depth = start + depth < D", "in_depth = start + depth < D + 1"),
    ("rows of x unmasked", "mask=in_rows & in_depth[None, :]", "mask=in_depth[None, :]"),
    ("columns of W unmasked", "mask=in_depth[:, None] & in_columns", "mask=in_depth[:, None]"),
    ("32-bit rows of x", "rows.to(tl.int64)[:, None] * stride_xn", "rows[:, None] * stride_xn"),
    ("32-bit columns of x", "depth.to(tl.int64)[None, :] * stride_xd", "depth[None, :] * stride_xd"),
    ("32-bit columns of W", "columns.to(tl.int64)[None, :] * stride_wf", "columns[None, :] * stride_wf"),
    ("32-bit step", "step = tl.full((), BLOCK_K, tl.int64)", "step = tl.full((), BLOCK_K, tl.int32)"),
    ("descriptor of the wrong tile", "W_enc_desc.load([pid_n * BLOCK_N, start])",
     "W_enc_desc.load([pid_m * BLOCK_N, start])"),
    ("full word counts 0", "(halves >> 16)) & 0x3F)", "(halves >> 16)) & 0x1F)"),
    ("count past the row", "[:, None] & (word_columns < n_words),\n        other=0", "[:, None],\n        other=0"),
    ("count past the segments", "mask=segments < n_segments)", "mask=segments <= n_segments)"),
    ("compaction past the row", "+ word_columns, mask=word_columns < n_words, other=0).to(tl.uint32)",
     "+ word_columns).to(tl.uint32)"),
    ("inclusive scan", "tl.cumsum(counts, 0) - counts", "tl.cumsum(counts, 0)"),
    ("one bit short", "range(tl.max(counts, 0))", "range(tl.max(counts, 0) - 1)"),
    ("position not advanced", "            position += 1\n", ""),
    ("32-bit row of the compaction", "row = (segment // per_row).to(tl.int64)", "row = segment // per_row"),
    ("chunks not added up", "chunk[2][1:] + nnz", "chunk[2][1:]"),
    ("tiling of the chunk", "config = encode_config(architecture(x.device), x.dtype, N,",
     "config = encode_config(architecture(x.device), x.dtype, min(N, 16),"),
    ("descriptors everywhere", "if describable and arch in DATACENTRE:", "if describable:"),
    ("unaligned descriptor", "matrix.data_ptr() % 16 == 0", "True"),
]  # fmt: skip

DECODE = [
    ("bias dropped", "    if HAS_BIAS:\n", "    if False:\n"),
    ("value dropped", "acc += values[:, None] * table.to(tl.float32)", "acc += table.to(tl.float32)"),
    ("entry past the list",
     "valid = start + lanes < length\n        values", "valid = start + lanes <= length\n        values"),
    ("column past the row", "mask = valid[:, None] & in_columns[None, :]", "mask = valid[:, None]"),
    ("store past the row", "out.to(out_ptr.dtype.element_ty), mask=in_columns)", "out.to(out_ptr.dtype.element_ty))"),
    ("first gather only",
     "tl.range(0, length, LANES, num_stages=NUM_STAGES)", "tl.range(0, LANES, LANES, num_stages=NUM_STAGES)"),
    ("32-bit table rows", "rows = tl.load(rows_ptr + first + start + lanes, mask=valid, other=0).to(tl.int64)",
     "rows = tl.load(rows_ptr + first + start + lanes, mask=valid, other=0)"),
    ("32-bit table columns", "columns.to(tl.int64)[None, :] * stride_column", "columns[None, :] * stride_column"),
    ("32-bit output rows", "i.to(tl.int64) * D", "i * D"),
    ("32-bit list starts", "first = tl.load(offsets_ptr + i)", "first = tl.load(offsets_ptr + i).to(tl.int32)"),
    ("gradient taken for contiguous", "n.to(tl.int64) * stride_grad_n", "n.to(tl.int64) * D"),
    ("32-bit gradient rows", "n.to(tl.int64) * stride_grad_n", "n * stride_grad_n"),
    ("32-bit gradient columns", "columns.to(tl.int64) * stride_grad_d", "columns * stride_grad_d"),
    ("32-bit W rows", "latents = tl.load(indices_ptr + first + start + lanes, mask=valid, other=0).to(tl.int64)",
     "latents = tl.load(indices_ptr + first + start + lanes, mask=valid, other=0)"),
    ("32-bit W columns", "columns.to(tl.int64) * stride_wd", "columns * stride_wd"),
    ("last column block only", "acc += W.to(tl.float32) * grad", "acc = W.to(tl.float32) * grad"),
    ("dot past the row", "in_columns = columns < D\n            grad", "in_columns = columns <= D\n            grad"),
    ("dot of the first entries only", "for start in range(0, length, LANES):", "for start in range(0, LANES, LANES):"),
    ("dvalues past the list", "+ lanes, dvalues, mask=valid)", "+ lanes, dvalues)"),
    ("latents one off",
     "torch.searchsorted(latents, boundaries)", "torch.searchsorted(latents, boundaries, right=True)"),
    ("tokens not sorted along", "values[order], tokens[order]", "values[order], tokens"),
    ("tokens in reverse", "latents, order = torch.sort(indices, stable=True)",
     "latents, order = torch.sort(indices.flip(0), stable=True)\n    order = indices.shape[0] - 1 - order"),
]  # fmt: skip

MUTANTS = [
    Mutant(name, file, old, new)
    for file, mutants in (("_jumprelu.py", JUMPRELU), ("_encode.py", ENCODE), ("_decode.py", DECODE))
    for name, old, new in mutants
]


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
