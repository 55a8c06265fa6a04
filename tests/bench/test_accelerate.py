"""The suite `accelerate`: modules of others, as they come and accelerated, behind one boundary and one gate."""

import sys
from types import ModuleType

import pytest
import torch

from bench import cases
from bench.contenders import Contender
from bench.timing import run
from bench.timing.measure import Clock
from gemmascope.saes.foreign_saelens import SAELens
from tests.saes.standins import saelens as standins

CPU = torch.device("cpu")
CONTENDERS = ("saelens_called", "saelens_accelerated")


def test_the_cases():
    found = cases.cases("accelerate")
    assert {case.tokens for case in found} == {1, 64, 4096}
    assert {case.shape.d_sae for case in found} == {16384, 65536}
    for case in found:
        called, accelerated = (
            {name.removesuffix(how) for name in case.contenders if name.endswith(how)}
            for how in ("_called", "_accelerated")
        )
        assert called == accelerated == {"saelens", "dictionary_learning", "sparsify"}


@pytest.fixture
def saelens(monkeypatch):
    """A stand-in for the package."""
    module = ModuleType("sae_lens")
    module.JumpReLUSAEConfig = lambda d_in, d_sae, device, **options: ((d_in, d_sae), options)
    module.JumpReLUSAE = lambda config: standins.JumpReLUSAE(*config[0], **config[1])
    monkeypatch.setitem(sys.modules, "sae_lens", module)
    monkeypatch.setattr(Contender, "check_available", lambda self, device: None)
    monkeypatch.setattr(Contender, "versions", lambda self: {})


def rows_of() -> tuple[dict[tuple[str, str], dict], bool, list[dict]]:
    (case,) = cases.cases("accelerate", shapes=["16x96"], tokens=[32], l0=[6], only=CONTENDERS)
    rows, failed = run.run_case(case, run.Options(CPU, 2, memory=False), Clock(CPU), run.Gates())
    return {(row["part"], row["contender"]): row for row in rows if row["kind"] == "time"}, failed, rows


def test_rows_of_both(saelens):
    times, failed, _ = rows_of()
    assert not failed
    assert set(times) == {(part, name) for part in ("infer", "encode", "decode") for name in CONTENDERS}
    for (_, name), row in times.items():
        assert row["ours"] == (name == "saelens_accelerated")
        assert set(row["agreement"]) == {"x_hat", "module"}
        assert list(row["ratio_to"]) == ([] if row["ours"] else ["saelens_accelerated"])


def test_a_wrong_one_is_not_timed(saelens, monkeypatch):
    right = SAELens._decoded
    monkeypatch.setattr(SAELens, "_decoded", lambda self, *given: 1.01 * right(self, *given))
    times, failed, rows = rows_of()
    assert failed
    assert {name for _, name in times} == {"saelens_called"}
    (reason,) = (row["reason"] for row in rows if row["kind"] == "skipped")
    assert reason.startswith("red gate, not timed: x_hat differs by 0.01 of its norm")
