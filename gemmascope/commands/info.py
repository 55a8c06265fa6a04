"""`info`: versions, devices, and who computes."""

import importlib.metadata
import os
import platform
from pathlib import Path

import rich.table
import torch

from ..checks import dtype_name
from ..kernels import choose, density
from ..version import __version__
from .app import DTYPES, Console, Debug, app

OPERATORS = "jumprelu, encode, decode"


PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")


@app.command()
def info(debug: Debug = False) -> None:
    """Show versions, devices, and which implementation each kernel would use and why."""
    console = Console()
    facts = [("gemmascope", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    facts += [(package, installed_version(package)) for package in PACKAGES]
    facts += [(device, description) for device, description in devices()]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)

    table = rich.table.Table(title=f"impl='auto' of {OPERATORS}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("device", "dtype", "implementation", "why"):
        table.add_column(column, overflow="fold")
    for device, _ in devices():
        for dtype in DTYPES:
            choice = choose("auto", device, dtype)
            table.add_row(device, dtype_name(dtype), choice.impl, choice.reason)
    console.print()
    console.print(table)
    console.print()
    for kind in dict.fromkeys("cpu" if name == "cpu" else "cuda" for name, _ in devices()):
        switch, decode = density.training_switch(torch.device(kind)), density.decode_dense_above(torch.device(kind))
        console.print(
            f"{kind}: of all pairs of token and latent, a training step turns dense above {switch.dense_above:g}, "
            f"sparse below {switch.sparse_below:g}; sae(x) decodes by whole matrices above {decode:g}",
            markup=False,
            soft_wrap=True,
        )


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """Name and description of the CPU and of each GPU that torch sees."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("cpu", f"{processor_name()}, {cores} cores, {pages * page_size / 2**30:.1f} GiB")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"))
    return found


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
