"""What the machine of a run has left: memory of the device, memory of the host, disk."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..training.memory import available_memory
from .model import as_device

# cgroups say so many bytes where there is no limit.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Machine:
    """Bytes are those that a run may use; None where nobody can tell."""

    device: torch.device
    device_name: str
    device_bytes: int | None
    """Of a GPU. None on a CPU, which has the host's."""
    host_bytes: int | None
    disk_bytes: int | None
    """At the run's folder, what it holds already included."""
    threads: int

    @classmethod
    def here(cls, device: torch.device | str, out: str | os.PathLike, model: nn.Module | None = None) -> "Machine":
        """This machine now. model: one that is loaded already, whose memory counts as free."""
        device = as_device(device)
        sizes = {"cpu": 0, device.type: 0}
        for tensor in [*model.parameters(), *model.buffers()] if model is not None else ():
            sizes[tensor.device.type] = sizes.get(tensor.device.type, 0) + tensor.nbytes
        is_gpu = device.type == "cuda"
        host, disk = host_memory(), free_disk(out)
        return cls(
            device,
            torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} threads",
            available_memory(device) + sizes[device.type] if is_gpu else None,
            None if host is None else host + sizes["cpu"],
            disk,
            torch.get_num_threads(),
        )


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that processes here can still take: what Linux calls available, and no more than the limits of the control
    groups of this process leave. None where the system does not say."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return _pages()
    left = [left for folder in _groups(proc, cgroups) if (left := _left_in(folder)) is not None]
    return max(0, min([available, *left]))


def _pages() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """The folders of this process's control groups and those above, of version 2 and of version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    folders = []
    for line in ["0::/", *lines]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        root = cgroups / controllers if controllers else cgroups
        inner = Path(path.lstrip("/"))
        folders += [root / inner, *(root / above for above in inner.parents), cgroups / "memory"]
    return list(dict.fromkeys(folders))


def _left_in(folder: Path) -> int | None:
    """What the limit of a control group leaves, its file cache counted as free."""
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            return limit - used + _statistic(folder / "memory.stat", cache)
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
        return next((int(line[1]) for line in lines if line[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0


def free_disk(folder: str | os.PathLike) -> int | None:
    """Bytes that can be written at ``folder``, or where it would be made, with those of the files in it."""
    folder = Path(folder)
    there = next((path for path in [folder, *folder.absolute().parents] if path.is_dir()), None)
    if there is None or not hasattr(os, "statvfs"):
        return None
    try:
        facts = os.statvfs(there)
    except OSError:
        return None
    held = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                held += os.lstat(os.path.join(inner, name)).st_size
            except OSError:  # gone since
                continue
    return facts.f_bavail * facts.f_frsize + held
