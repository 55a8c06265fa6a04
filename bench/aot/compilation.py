"""One kernel compiled for a GPU that is not here, and what its code says: registers, spills, instructions.

Compilation happens in worker processes without ``TRITON_INTERPRET``: what was decorated for the interpreter cannot be
compiled. Spills are read from the log of the ptxas run that made the cubin, registers from the cubin; if both disagree
on the registers, the reading is wrong and the row fails. For AMD both come from the metadata in the assembly.
"""

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

ROOT = Path(__file__).resolve().parent.parent.parent

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


def gpu_target(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def compile_spec(spec, target: str):
    """The `CompiledKernel` of a specification."""
    import triton
    from triton.compiler import ASTSource

    from gemmascope.kernels.gpu.common import LAUNCH_OPTIONS

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
    options = {"num_warps": spec.num_warps, **LAUNCH_OPTIONS}
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
    """Worker process: {"jobs": [[target, name], …], "cases": […]} as JSON on stdin, one JSON row a job on stdout.

    Kernels of the training step that are compiled for `trips.TARGET` are also counted, in the given cases of it.
    """
    results = os.fdopen(os.dup(1), "w")
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  everything the compilers print, whichever way they print it
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    from bench.aot import model, trips
    from bench.aot.lists import Case
    from bench.aot.sass import disassemble
    from bench.aot.specs import specs

    given = json.load(sys.stdin)
    cases = [Case(**case) for case in given["cases"]]
    for target, name in given["jobs"]:
        spec = next(spec for spec in (*specs(target), *trips.specs(target, cases)) if spec.name == name)
        started, log_start = time.monotonic(), os.fstat(log.fileno()).st_size
        row = {"name": name, "target": target}
        try:
            kernel = compile_spec(spec, target)
            sys.stdout.flush()
            log.seek(log_start)
            row |= read_cubin(kernel, log.read()) if target.startswith("sm_") else read_amdgcn(kernel)
            row["shared"] = int(kernel.metadata.shared)
            if target == trips.TARGET and name in trips.names((*trips.RECORDED, *cases)):
                code = disassemble(kernel.asm["cubin"])
                row["warps"] = spec.num_warps
                if name in trips.names():
                    row["programs"] = model.of_programs(code, spec)
                row["counts"] = model.count(code, spec, cases)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            row["error"] = (
                f"{type(error).__name__}: {next((x for x in lines if 'error' in x.lower()), lines[-1])[:300]}"
            )
        row["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(row), file=results, flush=True)


def run_worker(jobs: list[tuple[str, str]], cases: Iterable[dict] = ()) -> list[dict]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as cache:
        env |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
        command = [sys.executable, "-m", "bench.aot", "--worker"]
        given = json.dumps({"jobs": jobs, "cases": list(cases)})
        done = subprocess.run(command, input=given, env=env, cwd=ROOT, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    lost = f"the worker ended with status {done.returncode} before this one {done.stderr[-300:]}"
    return rows + [{"name": n, "target": t, "error": lost, "seconds": 0.0} for t, n in jobs[len(rows) :]]


def compile_all(jobs: list[tuple[str, str]], workers: int, cases: Iterable[dict] = ()) -> list[dict]:
    """Rows in the order of ``jobs``, which are dealt out to the workers in turn; cases: see `work`."""
    hands = [hand for hand in (jobs[i::workers] for i in range(workers)) if hand]
    with ThreadPoolExecutor(workers) as pool:
        rows = [row for hand in pool.map(lambda hand: run_worker(hand, cases), hands) for row in hand]
    found = {(row["target"], row["name"]): row for row in rows}
    return [found[job] for job in jobs]
