"""First timings of the kernels beside PyTorch's own operators: python -m bench.kernels [--d-sae 131072] [--save]

Each row is one operator and one implementation at one shape, after a parity gate: our result must agree with the fp32
reference before anything is timed. Times are milliseconds, 20th, 50th and 80th percentile, inputs made outside the
clock. Bytes and FLOPs are the least the operator needs (`work`), so that the percentages are of the roofline given with
--tflops and --gbps. The last line of standard output is one JSON document; --save appends the rows to
bench/results/kernels.jsonl.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemmascope import kernels
from gemmascope.kernels import SparseCode, reference

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"


def time_ms(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """20th, 50th and 80th percentile of ``repeats`` runs; on a GPU with its L2 cleared before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=20 * repeats, quantiles=[0.2, 0.5, 0.8])
    function()
    times = []
    for _ in range(max(repeats, 5)):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=10)
    return [cuts[1], cuts[4], cuts[7]]


def work(operator: str, n: int, d: int, f: int, nnz: int, size: int) -> tuple[int, int]:
    """(FLOPs, bytes) that an operator cannot do without; ``size`` is the bytes of an operand's element.

    encode: one [N, d]·[d, F] product; reads x and W_enc once, writes 8 bytes an entry. decode: 2·d FLOPs an entry, each
    entry gathering one row of W_dec (served by L2 when it fits: more than 100 % of the memory rate is possible).
    jumprelu: forward reads pre and writes f; backward reads pre and u and writes dpre.
    """
    return {
        "encode": (2 * n * d * f, size * (n * d + d * f) + 8 * nnz),
        "decode": (2 * nnz * d, size * (nnz * d + n * d) + 8 * nnz),
        "jumprelu forward": (2 * n * f, 2 * size * n * f),
        "jumprelu backward": (8 * n * f, 3 * size * n * f),
    }[operator]


def gate(name: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    error = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.3g} exceeds {tolerance:.3g}; nothing is timed on a red gate")


def cases(n: int, d: int, f: int, l0: int, dtype: torch.dtype, device: torch.device):
    """Yield (operator, implementation, function, nnz) for each row, gated. About ``l0`` of the F latents are active."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=generator, device=device).to(dtype)
    W_latent_major = (torch.randn(f, d, generator=generator, device=device) / d**0.5).to(dtype)
    W_enc, W_dec = W_latent_major.T, W_latent_major
    b_enc, b_dec = torch.zeros(f, device=device), torch.zeros(d, device=device)
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - l0 / f)).item()
    threshold = torch.full((f,), quantile, device=device)
    band = 4 * torch.finfo(dtype).eps

    code = kernels.encode(x, W_enc, b_enc, threshold, impl="triton")
    expected = SparseCode(*reference.encode_forward(x, W_enc, b_enc, threshold), f)
    dense, expected_dense = code.to_dense(), expected.to_dense()
    both = (dense != 0) & (expected_dense != 0)  # entries within rounding of the threshold may fall on either side
    gate("encode", dense[both], expected_dense[both], 1e-5)
    gate("encode, entries", torch.tensor(float(code.nnz)), torch.tensor(float(expected.nnz)), 1e-3)
    del dense, expected_dense, both
    gate(
        "decode",
        kernels.decode(code, W_dec, b_dec, impl="triton"),
        kernels.decode(code, W_dec, b_dec, impl="reference"),
        band,
    )
    pre = x @ W_enc
    u = torch.randn(n, f, generator=generator, device=device).to(dtype)
    s = torch.full((1,), 1e-3, device=device).expand(n)
    ours, eager = (kernels.jumprelu(pre, b_enc, threshold, 0.1, impl=impl) for impl in ("triton", "reference"))
    gate("jumprelu forward", ours.f, eager.f, band)
    from gemmascope.kernels.autograd import operator

    backward = {impl: operator("jumprelu", impl).jumprelu_backward for impl in ("triton", "reference")}
    arguments = (u, s, pre, b_enc, threshold, 0.1)
    for a, b in zip(backward["triton"](*arguments), backward["reference"](*arguments), strict=True):
        gate("jumprelu backward", a, b, band)

    nnz, f_dense = code.nnz, eager.f
    yield "encode", "triton", lambda: kernels.encode(x, W_enc, b_enc, threshold, impl="triton"), nnz
    yield "encode", "torch.mm alone", lambda: torch.mm(x, W_enc), nnz
    yield "decode", "triton", lambda: kernels.decode(code, W_dec, b_dec, impl="triton"), nnz
    yield "decode", "torch.mm of dense f", lambda: torch.mm(f_dense, W_dec), nnz
    for impl in ("triton", "reference"):
        yield "jumprelu forward", impl, lambda i=impl: kernels.jumprelu(pre, b_enc, threshold, 0.1, impl=i), nnz
        yield "jumprelu backward", impl, lambda i=impl: backward[i](*arguments), nnz


def provenance(device: torch.device) -> dict[str, object]:
    import triton

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=here)
        return done.stdout.strip()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} (interpreter)"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--tokens", 4096), ("--d-model", 2304), ("--d-sae", 16384), ("--l0", 64), ("--repeats", 20)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cpu only with TRITON_INTERPRET=1, to test this script")
    parser.add_argument("--tflops", type=float, default=790.0, help="matrix rate of the device, 10^12 FLOP/s")
    parser.add_argument("--gbps", type=float, default=4300.0, help="memory rate of the device, 10^9 byte/s")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = (options.tokens, options.d_model, options.d_sae)
    facts = provenance(device)
    rows = []
    for name, impl, function, nnz in cases(*shape, options.l0, dtype, device):
        low, middle, high = time_ms(function, device, options.repeats)
        flops, size = work(name, *shape, nnz, dtype.itemsize)
        row = {"op": name, "impl": impl, "dtype": options.dtype, "shape": shape, "nnz": nnz}
        row |= {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "tflops": flops / middle / 1e9}
        row |= {"gbps": size / middle / 1e6}
        least = max(flops / options.tflops / 1e9, size / options.gbps / 1e6)
        row["pct_roofline"] = 100 * least / middle
        rows.append(row | facts)
        print(
            f"{name:18s} {impl:20s} {middle:9.3f} ms  {row['tflops']:7.1f} TFLOP/s  {row['gbps']:7.0f} GB/s", flush=True
        )
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main()
