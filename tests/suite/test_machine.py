"""What a machine has left: memory within the limits of control groups, disk at a folder."""

import os

import pytest
import torch

from gemmascope.errors import EnvironmentProblemError
from gemmascope.suite.machine import Machine, free_disk, host_memory
from tests import tiny_models

GIB = 1 << 30


@pytest.fixture
def system(tmp_path):
    """A /proc with 16 GiB available, and folders of control groups: {path: text} files are written there."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"

    def made(own: str = "0::/", **files: str):
        (proc / "self").mkdir(parents=True, exist_ok=True)
        (proc / "meminfo").write_text(f"MemTotal: {32 << 20} kB\nMemFree: 5 kB\nMemAvailable: {16 << 20} kB\n")
        (proc / "self" / "cgroup").write_text(own)
        for name, text in files.items():
            path = cgroups / name.replace("__", "/").replace("-", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return host_memory(proc, cgroups)

    return made


def group(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, str]:
    """Files of version 2."""
    prefix = f"{folder}__" if folder else ""
    return {
        f"{prefix}memory-max": f"{limit}\n",
        f"{prefix}memory-current": f"{used}\n",
        f"{prefix}memory-stat": f"anon 5\ninactive_file {cache}\nfile 9\n",
    }


def test_without_limits(system):
    assert system() == 16 * GIB
    assert system(**group("", "max", 3 * GIB)) == 16 * GIB


def test_the_limit_of_a_container(system):
    assert system(**group("", 8 * GIB, 3 * GIB)) == 5 * GIB
    assert system(**group("", 8 * GIB, 3 * GIB, cache=GIB)) == 6 * GIB
    assert system(**group("", 64 * GIB, 3 * GIB)) == 16 * GIB
    assert system(**group("", 2 * GIB, 3 * GIB)) == 0


def test_the_tightest_of_nested_groups(system):
    own = "0::/slice/job\n"
    files = group("slice", 6 * GIB, 2 * GIB) | group("slice__job", 8 * GIB, GIB)
    assert system(own, **files) == 4 * GIB
    assert system(own, **files, **group("slice__job__inner", 1, 1)) == 4 * GIB


def test_groups_of_version_1(system):
    own = "5:cpu,cpuacct:/elsewhere\n4:memory:/job\n"
    files = {"memory__job__memory-limit_in_bytes": str(8 * GIB), "memory__job__memory-usage_in_bytes": str(3 * GIB)}
    files["memory__job__memory-stat"] = f"cache 7\ntotal_inactive_file {GIB}\n"
    assert system(own, **files) == 6 * GIB
    no_limit = {"memory__job__memory-limit_in_bytes": str(0x7FFFFFFFFFFFF000)}
    assert system(own, **files | no_limit) == 16 * GIB


def test_a_system_that_does_not_say(tmp_path):
    expected = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory(tmp_path, tmp_path) == expected
    (tmp_path / "meminfo").write_text("MemAvailable: much\n")
    assert host_memory(tmp_path, tmp_path) == expected


def test_this_machine(tmp_path):
    machine = Machine.here("cpu", tmp_path / "runs" / "a")
    assert machine.device == torch.device("cpu")
    assert machine.device_bytes is None
    assert machine.threads == torch.get_num_threads()
    assert machine.host_bytes is not None
    assert machine.host_bytes > 0
    assert machine.disk_bytes is not None
    assert machine.disk_bytes > 0
    with pytest.raises(EnvironmentProblemError, match=r"^run\.device: "):
        Machine.here("cuda:99", tmp_path)


def test_a_model_in_memory_counts_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr("gemmascope.suite.machine.host_memory", lambda: GIB)
    model = tiny_models.gemma2()
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert Machine.here("cpu", tmp_path, model).host_bytes == GIB + size
    assert Machine.here("cpu", tmp_path, model.to("meta")).host_bytes == GIB


def test_free_disk(tmp_path, monkeypatch):
    facts = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: facts)
    free = facts.f_bavail * facts.f_frsize
    assert free_disk(tmp_path) == free_disk(tmp_path / "a" / "b") == free
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"x" * 1234)
    assert free_disk(tmp_path) == free + 1234
    assert free_disk(tmp_path / "inner" / "file") == free


def test_disk_of_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_disk("runs/a") is not None
