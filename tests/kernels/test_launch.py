"""How kernels are launched: on the device of their tensors, with the options that every launch has."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import normal

pytest.importorskip("triton")
import triton

from bench.aot.compilation import compile_spec
from bench.aot.spec import Spec
from gemmascope.kernels.gpu import common


class OnSecondDevice(torch.Tensor):
    """A tensor that says it is on a second GPU."""

    is_cuda = True
    device = torch.device("cuda:1")


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    current, calls = [torch.device("cuda:0")], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *exception):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **named: calls.append((current[-1], grid, arguments, named))

    monkeypatch.setattr(torch.cuda, "device", Device)
    there, here = normal(3).as_subclass(OnSecondDevice), normal(3)
    common.launch(Kernel(), (2,), 7, on=there, num_warps=4)
    common.launch(Kernel(), (3,), on=here)
    fused = {"enable_fp_fusion": True}
    assert calls == [
        (torch.device("cuda:1"), (2,), (7,), {"num_warps": 4} | fused),
        (torch.device("cuda:0"), (3,), (), fused),
    ]


def test_operators_launch_no_other_way():
    for path in Path(common.__file__).parent.glob("*.py"):
        assert not re.search(r"_kernel\[", path.read_text(encoding="utf-8")), path


def test_what_is_compiled_ahead_is_what_is_launched(monkeypatch):
    given = []
    monkeypatch.setattr(triton, "compile", lambda source, target, options: given.append(options))
    monkeypatch.setattr(triton.compiler, "ASTSource", lambda *arguments: None)
    compile_spec(Spec("none", SimpleNamespace(arg_names=[], params=[]), {}, {}, num_warps=2), "sm_90")
    assert given == [{"num_warps": 2} | common.LAUNCH_OPTIONS]
