"""Compile the shipped kernels for GPUs that are not here, and read registers, spills and instructions.

    python -m bench.aot [--targets sm_80,sm_90,sm_100,gfx942] [-k NAME] [--update] [--markdown] [-j JOBS]

No GPU or driver is needed. Exit status 1 when a kernel does not compile, spills more than its specification allows,
needs more shared memory than the target has (not a compile error: it would fail at launch), lacks an instruction it is
expected to have, or is worse than the baseline of this Triton version in ``bench/aot_baselines`` (``--update`` rewrites
that). Compilation happens in worker processes without ``TRITON_INTERPRET``: what was decorated for the interpreter
cannot be compiled.

Spills are read from the log of the ptxas run that made the cubin, registers from the cubin; if both disagree on the
registers, the reading is wrong and the row fails. For AMD both come from the metadata in the assembly.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BASELINES = Path(__file__).parent / "aot_baselines"

# Bytes of shared memory one block may use (CUDA C++ programming guide, technical specifications; LDS of CDNA 3).
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

# Instruction classes by mnemonic. The matrix instructions come first.
SASS_CLASSES = {
    "HGMMA": r"[HIQ]GMMA",
    "HMMA": r"[HIQ]MMA",
    "tcgen05": r"UTC\w*MMA",
    "TMA": r"UTMA(LDG|STG)",
    "cp.async": r"LDGSTS",
    "load128": r"LDG\.\S*128",
    "load": r"LDG\b",
    "store128": r"STG\.\S*128",
    "store": r"STG\b",
    "atomic": r"(ATOMG?|REDG?)\b",
    "shuffle": r"SHFL",
    "barrier": r"BAR",
    "local": r"(LDL|STL)\b",
}
AMDGCN_CLASSES = {
    "mfma": r"v_mfma",
    "load128": r"(global|buffer)_load_(dwordx4|b128)",
    "load": r"(global|buffer)_load",
    "store128": r"(global|buffer)_store_(dwordx4|b128)",
    "store": r"(global|buffer)_store",
    "atomic": r"(global|buffer|flat)_atomic",
    "barrier": r"s_barrier",
    "local": r"scratch_(load|store)",
}


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def gpu_target(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def compile_spec(spec, target: str):
    """The `CompiledKernel` of a specification."""
    import triton
    from triton.compiler import ASTSource

    names = list(spec.kernel.arg_names)
    given = {*spec.arguments, *spec.constants}
    if given != set(names):
        raise ValueError(f"{spec.name}: arguments differ from the kernel's: {sorted(given ^ set(names))}")
    attributes = {}
    for i, parameter in enumerate(spec.kernel.params):
        kind = spec.arguments.get(parameter.name, "")
        aligned = kind.startswith("*") or (kind in ("i32", "i64") and not parameter.do_not_specialize)
        if aligned and parameter.name not in spec.unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {name: spec.arguments.get(name, "constexpr") for name in names}
    options = {"num_warps": spec.num_warps}
    if spec.num_stages is not None:
        options["num_stages"] = spec.num_stages
    source = ASTSource(spec.kernel, signature, dict(spec.constants), attributes)
    return triton.compile(source, target=gpu_target(target), options=options)


def count_classes(mnemonics: Iterable[str], classes: dict[str, str]) -> dict[str, int]:
    mnemonics = list(mnemonics)
    counts = {name: sum(bool(re.match(pattern, m)) for m in mnemonics) for name, pattern in classes.items()}
    return {name: n for name, n in counts.items() if n}


def read_cubin(kernel, log: str) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, cubin.name], capture_output=True, text=True, check=True).stdout

        registers = int(re.search(r"REG:(\d+)", dump("-res-usage"))[1])
        sass = dump("-sass")
    logged = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not logged or not spills:
        raise RuntimeError("no ptxas log was captured, so the spills are unknown")
    if int(logged[-1]) != registers:
        raise RuntimeError(f"the ptxas log says {logged[-1]} registers, the cubin {registers}")
    instruction = r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)"
    mnemonics = [m for m in re.findall(instruction, sass, re.MULTILINE) if m != "NOP"]
    return {
        "registers": registers,
        "spills": sum(map(int, spills[-1])),
        "instructions": len(mnemonics),
        "classes": count_classes(mnemonics, SASS_CLASSES),
    }


def read_amdgcn(kernel) -> dict:
    text = kernel.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    mnemonics = re.findall(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)", text, re.MULTILINE)
    return {
        "registers": metadata("vgpr_count"),
        "spills": 4 * metadata("vgpr_spill_count"),
        "instructions": len(mnemonics),
        "classes": count_classes(mnemonics, AMDGCN_CLASSES),
    }


def work() -> None:
    """Worker process: jobs [[target, name], …] as JSON on stdin, one JSON row for each on stdout."""
    results = os.fdopen(os.dup(1), "w")
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  everything the compilers print, whichever way they print it
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    from .aot_specs import specs

    for target, name in json.load(sys.stdin):
        spec = next(spec for spec in specs(target) if spec.name == name)
        started, log_start = time.monotonic(), os.fstat(log.fileno()).st_size
        row = {"name": name, "target": target}
        try:
            kernel = compile_spec(spec, target)
            sys.stdout.flush()
            log.seek(log_start)
            row |= read_cubin(kernel, log.read()) if target.startswith("sm_") else read_amdgcn(kernel)
            row["shared"] = int(kernel.metadata.shared)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            row["error"] = (
                f"{type(error).__name__}: {next((x for x in lines if 'error' in x.lower()), lines[-1])[:300]}"
            )
        row["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(row), file=results, flush=True)


def run_worker(jobs: list[tuple[str, str]]) -> list[dict]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as cache:
        env |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
        command = [sys.executable, "-m", "bench.aot", "--worker"]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, input=json.dumps(jobs), env=env, cwd=root, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    lost = f"the worker ended with status {done.returncode} before this one {done.stderr[-300:]}"
    return rows + [{"name": n, "target": t, "error": lost, "seconds": 0.0} for t, n in jobs[len(rows) :]]


def compile_all(jobs: list[tuple[str, str]], workers: int) -> list[dict]:
    """Rows in the order of ``jobs``, which are dealt out to the workers in turn."""
    hands = [hand for hand in (jobs[i::workers] for i in range(workers)) if hand]
    with ThreadPoolExecutor(workers) as pool:
        rows = [row for hand in pool.map(run_worker, hands) for row in hand]
    found = {(row["target"], row["name"]): row for row in rows}
    return [found[job] for job in jobs]


def problems(row: dict, spec, baseline: dict | None) -> list[str]:
    """What is wrong with a row, measured by its specification, its target and the baseline's row."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"] > spec.max_spill:
        found.append(f"spills {row['spills']} bytes, {spec.max_spill} allowed")
    limit = SHARED_MEMORY_LIMIT[row["target"]]
    if row["shared"] > limit:
        found.append(f"needs {row['shared']} bytes of shared memory, {row['target']} has {limit}")
    found += [f"expected {name} instructions, found none" for name in spec.expects if name not in row["classes"]]
    if baseline:
        allowed = {
            "registers": baseline["registers"] + 8,
            "spills": baseline["spills"],
            "shared": baseline["shared"],
            "instructions": round(1.15 * baseline["instructions"]),
        }
        found += [
            f"{key} {row[key]}, baseline {baseline[key]}, allowed {most}"
            for key, most in allowed.items()
            if row[key] > most
        ]
    return found


def render(rows: list[dict], markdown: bool) -> str:
    header = ["kernel", "target", "registers", "spills", "shared", "instructions", "seconds", "classes"]
    table = [header]
    for row in rows:
        if "error" in row:
            table.append([row["name"], row["target"], "failed", "", "", "", str(row["seconds"]), ""])
        else:
            classes = " ".join(f"{name}={n}" for name, n in row["classes"].items())
            table.append([row["name"], *(str(row[key]) for key in header[1:-1]), classes])
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table)


def baseline_path() -> Path:
    return BASELINES / f"triton-{triton_version()}.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("-k", metavar="NAME", default="", help="only kernels whose name contains this")
    parser.add_argument("--update", action="store_true", help="write the results into the baseline")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("-j", metavar="JOBS", type=int, default=os.cpu_count(), help="worker processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work()
        return 0
    targets = options.targets.split(",")
    unknown = [target for target in targets if target not in SHARED_MEMORY_LIMIT]
    if unknown:
        parser.error(f"--targets: expected some of {', '.join(SHARED_MEMORY_LIMIT)}, got {', '.join(unknown)}")

    from .aot_specs import specs

    wanted = {(target, spec.name): spec for target in targets for spec in specs(target) if options.k in spec.name}
    rows = compile_all(list(wanted), options.j)
    path = baseline_path()
    baseline = json.loads(path.read_text()) if path.exists() else {}
    print(f"Triton {triton_version()}\n{render(rows, options.markdown)}")
    failed = 0
    for row in rows:
        key = f"{row['name']}@{row['target']}"
        known = None if options.update else baseline.get(key)
        found = problems(row, wanted[row["target"], row["name"]], known)
        failed += bool(found)
        for problem in found:
            print(f"{key}: {problem}")
        if "error" not in row:
            baseline[key] = {k: v for k, v in row.items() if k not in ("name", "target", "seconds")}
    if options.update:
        current = {f"{spec.name}@{target}" for target in TARGETS for spec in specs(target)}
        baseline = {key: row for key, row in baseline.items() if key in current}
        path.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
    print(f"{len(rows)} compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
