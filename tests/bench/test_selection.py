"""The suite `topk`: encoders that select the largest z, behind one gate."""

import pytest
import torch

from bench import cases, selection
from bench.timing import gate, run
from bench.timing.measure import Clock

CPU = torch.device("cpu")
OF = {"topk": "token", "batchtopk": "batch"}


def test_the_cases():
    found = cases.cases("topk")
    assert {case.shape.d_sae for case in found} == {16384, 131072}
    for kind in OF:
        contenders = {name for case in found for name in case.contenders}
        assert {f"ours_{kind}", f"plain_{kind}"} <= contenders
    assert any("sparsify" in case.contenders for case in found)


def rows_of(kind: str) -> tuple[dict[str, dict], bool, list[dict]]:
    only = (f"ours_{kind}", f"plain_{kind}")
    case = cases.cases("topk", shapes=["16x96"], tokens=[32], l0=[6], dtype="fp32", only=only)[0]
    rows, failed = run.run_case(case, run.Options(CPU, 2, memory=False), Clock(CPU), run.Gates())
    return {row["contender"]: row for row in rows if row["kind"] == "time"}, failed, rows


@pytest.mark.parametrize("kind", OF)
def test_rows_of_both(kind):
    times, failed, _ = rows_of(kind)
    assert not failed
    assert set(times) == {f"ours_{kind}", f"plain_{kind}"}
    for name, row in times.items():
        assert row["part"] == "encode"
        assert row["agreement"]["x_hat"] < 1e-5
        assert list(row["ratio_to"]) == ([] if row["ours"] else [f"ours_{kind}"])
        assert row["ours"] == name.startswith("ours")


@pytest.mark.parametrize("kind", OF)
def test_one_that_selects_otherwise_is_not_timed(kind, monkeypatch):
    """Of the batch in the place of each token, or the other way round."""
    other = next(of for of in OF.values() if of != OF[kind])
    right = selection.kernels.encode_topk
    monkeypatch.setattr(selection.kernels, "encode_topk", lambda *given, of, **rest: right(*given, of=other, **rest))
    times, failed, rows = rows_of(kind)
    assert failed
    assert set(times) == {f"plain_{kind}"}
    (reason,) = (row["reason"] for row in rows if row["kind"] == "skipped")
    assert reason.startswith("red gate, not timed: x_hat differs by")


@pytest.mark.parametrize("kind", OF)
def test_bf16_is_within_its_tolerance(kind):
    """At the sizes of the gate of a case with 16,384 latents but for the width."""
    small = gate.agreement_inputs(96, 16384, 64, CPU, "bf16", cases.SKEW, 40)
    assert gate.agreement(cases.make(f"ours_{kind}"), small, {})["x_hat"] < 1e-6
    assert gate.agreement(cases.make(f"plain_{kind}"), small, {})["x_hat"] > 1e-3
