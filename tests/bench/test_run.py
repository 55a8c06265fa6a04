"""The runner: rows are complete, faults are rows, nothing is timed on a red gate, ratios and bars add up."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
import torch

from bench import __main__ as main
from bench import cases
from bench.contenders import Contender, Inputs, UnavailableError
from bench.ours import Ours
from bench.timing import gate, measure, prepare, probe, run, worker
from bench.timing.inputs import construct
from bench.timing.work import measure_size, part_work

CPU = torch.device("cpu")
SMALL = ["run", "--shapes", "16x96", "--tokens", "32", "--l0", "6", "--rounds", "2"]


class Fake(Contender):
    """Computes nothing; ``faults`` says where it raises what."""

    parts = ("step", "forward", "backward", "infer", "encode", "decode")
    differs = "does nothing"

    def __init__(self, faults=None, wrong=False, requires=()):
        self.faults, self.wrong, self.requires, self.called = dict(faults or {}), wrong, requires, []

    def call(self, part):
        self.called.append(part)
        if part in self.faults:
            raise self.faults[part]

    def set_up(self, inputs: Inputs):
        self.inputs = inputs
        self.call("set_up" if len(inputs.x) > gate.GATE_TOKENS else "gate")

    def outputs(self):
        x_hat = gate.exact_outputs(self.inputs)["x_hat"]
        return {"x_hat": 2 * x_hat if self.wrong else x_hat}

    def check_made(self):
        self.call("check_made")

    def before(self, part):
        self.call("before " + part)

    def __getattribute__(self, name):
        if name in Fake.parts:
            return lambda: self.call(name)
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def small_gate(monkeypatch):
    for name, value in (("GATE_LATENTS", 20), ("GATE_DENSITY", 0.1), ("GATE_TOKENS", 8)):
        monkeypatch.setattr(gate, name, value)
    monkeypatch.setattr(measure, "COPIED_BYTES", 1 << 16)


@pytest.fixture
def registry(monkeypatch):
    """Puts contenders in place of the registry's: name: factory."""

    def put(**factories):
        def make(name):
            contender = factories[name]()
            contender.name = name
            return contender

        for module in (run, prepare):
            monkeypatch.setattr(module, "make", make)
        return factories

    return put


def rows_of(*names, parts=("step", "infer"), **options):
    case = cases.Case("cpu", cases.shape_of("16x96"), 32, 6, "fp32", parts, names, operators=options.pop("ops", False))
    given = run.Options(CPU, 2, **{"memory": False} | options)
    return run.run_case(case, given, measure.Clock(CPU), run.Gates())


def reasons(rows):
    return {row["contender"]: row["reason"] for row in rows if row["kind"] == "skipped"}


def times(rows):
    return {(row["contender"], row["part"]): row for row in rows if row["kind"] == "time"}


def test_rows_ratios_and_the_json_line(capsys, tmp_path):
    arguments = [*SMALL, "--only", "ours_pytorch", "products", "--save", "--results", str(tmp_path), "--no-memory"]
    assert main.main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    found = times(document["rows"])
    assert set(found) == {
        *(("ours_pytorch", part) for part in ("step", "forward", "backward", "infer", "module", "encode", "decode")),
        *(("products", part) for part in ("infer", "encode", "decode")),
    }
    ours, products = found["ours_pytorch", "infer"], found["products", "infer"]
    assert 0 < ours["min_ms"] <= ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"]
    assert products["ratio_to"] == {"ours_pytorch": products["p50_ms"] / ours["p50_ms"]}
    assert ours["ratio_to"] == {}
    assert ours["pct_roofline"] == pytest.approx(100 * ours["floor_ms"] / ours["p50_ms"])
    assert ours["floor_ms"] == measure.floor_ms((ours["flops"], ours["bytes"]), ours["ceilings"])
    assert 0 <= ours["gate"]["operators"] <= 1
    assert 0 < found["ours_pytorch", "step"]["gate"]["step"] <= 1
    assert ours["impl"] == "pytorch"
    assert abs(ours["l0"] - 6) < 0.5
    assert {"device", "isa", "threads", "versions", "commit", "dirty", "date"} <= set(document["machine"])
    saved = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [row["p50_ms"] for row in saved] == [row["p50_ms"] for row in document["rows"]]
    assert all(row["machine"] == document["machine"] and row["suite"] == "cpu" for row in saved)
    assert "products: the two dense products alone" in printed


def test_a_step_with_a_first_moment(capsys, tmp_path):
    names = ("ours_pytorch", "dense", "dictionary_learning")
    given = ["--beta1", "0.7", "--only", *names, "--parts", "step", "--save", "--results", str(tmp_path), "--no-memory"]
    assert main.main([*SMALL, *given]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    found = times(rows)
    assert set(found) == {("ours_pytorch", "step"), ("dense", "step")}
    assert {row["beta1"] for row in rows} == {0.7}
    assert 0 < found["ours_pytorch", "step"]["gate"]["step"] <= 1
    assert reasons(rows) == {"dictionary_learning": "its trainer has Adam's β1 at 0 and takes no 0.7"}
    assert ", β1 0.7\n" in printed
    assert "least" not in printed  # the bars are those of steps without
    size = measure_size(construct(16, 96, 32, 6, CPU, beta1=0.7))
    assert (size.moments, found["dense", "step"]["bytes"]) == (2, part_work("step", size)[1])


def test_ours_holds_first_moments_where_they_are_asked_for():
    for beta1 in (0.0, 0.7):
        ours = Ours("pytorch")
        ours.set_up(construct(16, 96, 32, 6, CPU, beta1=beta1))
        ours.before("step")
        ours.step()
        ours.check_made()
        assert (ours.state.W_enc_m is not None and bool(ours.state.W_enc_m.any())) == (beta1 > 0)


def test_a_red_gate_of_first_moments_prints_no_time(monkeypatch, capsys):
    """Steps that forget what earlier ones left."""
    right = gate.take

    def forgetting(route, state, *rest):
        if state.W_enc_m is not None:
            state.W_enc_m.zero_()
        return right(route, state, *rest)

    monkeypatch.setattr(gate, "take", forgetting)
    given = [*SMALL, "--only", "ours_pytorch", "--parts", "step", "--no-memory"]
    assert main.main(given) == 0
    assert main.main([*given, "--beta1", "0.7"]) == 1
    assert "red gate, not timed: sparse step, fp32: error of W_enc" in capsys.readouterr().out


FAULTS = {
    "not installed": (lambda: Fake(requires=("no-such-package",)), "no-such-package is not installed"),
    "unavailable": (lambda: Fake({"gate": UnavailableError("no compiler")}), "no compiler"),
    "raises": (lambda: Fake({"set_up": KeyError("weight")}), "failed: KeyError: 'weight'"),
    "raises in a call": (lambda: Fake({"infer": RuntimeError("one\ntwo")}), "failed: RuntimeError: one two"),
    "raises in before": (lambda: Fake({"before step": OSError("gone")}), "failed: OSError: gone"),
    "memory": (lambda: Fake({"set_up": torch.OutOfMemoryError("20 GiB")}), "out of memory: 20 GiB"),
    "memory on the host": (lambda: Fake({"step": MemoryError("3 GiB")}), "out of memory: 3 GiB"),
    "made nothing": (lambda: Fake({"check_made": ValueError("withheld")}), "failed: ValueError: withheld"),
    "wrong output": (
        lambda: Fake(wrong=True),
        "red gate, not timed: x_hat differs by 1 of its norm; 0.0001 is allowed",
    ),
}


@pytest.mark.parametrize(("factory", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_peer_is_a_row_and_the_rest_goes_on(factory, reason, registry, monkeypatch):
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # a third of a second each
    registry(broken=factory, sound=Fake)
    rows, failed = rows_of("broken", "sound")
    assert not failed
    assert reasons(rows) == {"broken": reason}
    assert {name for name, _ in times(rows)} == {"sound"}


def test_a_red_gate_of_ours_prints_no_time(monkeypatch, capsys):
    def red(*arguments):
        raise gate.RedGateError("error of W_dec is 3 times its budget")

    monkeypatch.setattr(gate, "step_gate", red)
    assert main.main([*SMALL, "--only", "ours_pytorch", "--parts", "step", "--no-memory"]) == 1
    printed = capsys.readouterr().out
    assert "ours_pytorch: red gate, not timed: error of W_dec is 3 times its budget" in printed
    assert not times(json.loads(printed.splitlines()[-1])["rows"])
    assert "p50" not in "\n".join(printed.splitlines()[:-1])


@pytest.mark.parametrize("contender", ["ours_pytorch", "dense"])
def test_a_module_that_is_wrong_is_not_timed(contender, monkeypatch):
    module = cases.CONTENDERS[contender][:2]
    kind = getattr(importlib.import_module(module[0]), module[1])
    right = kind.module
    monkeypatch.setattr(kind, "module", lambda self: 1.01 * right(self))
    monkeypatch.setattr(gate, "operator_gate", lambda impl, inputs: 0.0)
    rows, failed = rows_of(contender, "products", parts=("infer", "module"))
    assert failed == (contender == "ours_pytorch")
    assert reasons(rows)[contender].startswith("red gate, not timed: module differs by 0.01 of its norm")
    assert set(times(rows)) == {("products", "infer")}


def test_a_failure_of_ours_is_an_exit_status(monkeypatch, registry):
    registry(ours=lambda: Ours("pytorch"))
    monkeypatch.setattr(Ours, "infer", lambda self: 1 / 0)
    rows, failed = rows_of("ours")
    assert failed
    assert reasons(rows) == {"ours": "failed: ZeroDivisionError: division by zero"}


def test_an_implementation_that_cannot_run_is_a_row(registry, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry(ours=lambda: Ours("triton"))
    rows, failed = rows_of("ours")
    assert not failed
    assert reasons(rows)["ours"].startswith("impl='triton': ")


@pytest.mark.parametrize("where", ["set_up", "infer"])
def test_what_does_not_fit_beside_others_is_timed_alone(where, registry):
    """A contender that is short of memory while another is set up has its turn when that one is gone."""
    alive = []

    class Large(Fake):
        def call(self, part):
            if part == where and alive:
                raise torch.OutOfMemoryError("no room beside the other")
            super().call(part)

    class Small(Fake):
        def set_up(self, inputs):
            super().set_up(inputs)
            if len(inputs.x) > gate.GATE_TOKENS:
                alive.append(self.name)

        def __del__(self):
            if self.name in alive:
                alive.remove(self.name)

    registry(small=Small, large=Large)
    rows, _ = rows_of("small", "large")
    assert reasons(rows) == {}
    found = times(rows)
    assert {name for name, _ in found} == {"small", "large"}
    assert found["large", "infer"]["in_turn_with"] == 0
    assert len([row for row in rows if row["kind"] == "time"]) == 4


def test_too_little_main_memory_is_a_row(registry, monkeypatch):
    registry(sound=Fake)
    monkeypatch.setattr(measure, "available_bytes", lambda: 1000)
    rows, _ = rows_of("sound")
    assert reasons(rows)["sound"].startswith("out of memory: about 0.0 GiB needed, 0.0 GiB available")


def test_contenders_take_turns():
    order = []
    calls = {name: (lambda n=name: order.append(n + "?"), lambda n=name: order.append(n)) for name in "ab"}
    found = measure.interleaved(measure.Clock(CPU), calls, 2, lambda *_: None, lambda _: None)
    assert order == ["a?", "a", "b?", "b"] * 2
    assert all(len(times["ms"]) == 2 for times in found.values())


def test_what_comes_before_a_call_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    calls = {"a": (lambda: spend(5), lambda: spend(0.002))}
    assert measure.interleaved(measure.Clock(CPU), calls, 3, None, lambda _: None)["a"]["ms"] == pytest.approx(
        [2.0] * 3
    )


def test_operators_and_determinism(registry):
    registry(ours=lambda: Ours("pytorch"))
    rows, failed = rows_of("ours", parts=("step",), ops=True, determinism=True)
    operators = [row for row in rows if row["kind"] == "operator"]
    assert [row["operator"] for row in operators] == [
        "encode_entries", "residual_pass", "by_latent", "latent_pass", "encoder_times", "update_from_entries"
    ]  # fmt: skip
    for row in operators:
        assert row["pct_roofline"] == pytest.approx(100 * row["floor_ms"] / row["p50_ms"])
    (determinism,) = [row for row in rows if row["kind"] == "determinism"]
    assert (determinism["runs"], determinism["different"], failed) == (50, 0, False)


def test_changed_bits_counts_the_runs_that_differ(monkeypatch):
    ours = Ours("pytorch")
    ours.set_up(construct(16, 96, 32, 6, CPU))
    ours.before("step")
    right, calls = ours.step, []

    def step():
        calls.append(0)
        right()
        if len(calls) == 3:
            ours.state.latents.W_dec[5, 2] += 1e-6

    monkeypatch.setattr(ours, "step", step)
    assert probe.changed_bits(ours, 5) == 1
    assert len(calls) == 5
    assert probe.changed_bits(ours, 3) == 0


def test_many_saes_have_weights_of_their_own():
    more = (cases.Shape("b", 8, 64, 2),)
    case = cases.Case("inference", cases.Shape("all", 16, 96, 3, more), 32, 6, "fp32", ("infer",), ("ours_pytorch",))
    rows, failed = run.run_case(case, run.Options(CPU, 1, memory=False), measure.Clock(CPU), run.Gates())
    assert not failed
    (row,) = times(rows).values()
    one, other = (construct(*size, 32, 6, CPU) for size in ((16, 96), (8, 64)))
    flops = [part_work("infer", measure_size(inputs))[0] for inputs in (one, other)]
    assert row["flops"] == 3 * flops[0] + 2 * flops[1]
    repeated = prepare.Repeated("ours_pytorch", case)
    repeated.set_up_all([one, other])
    repeated.infer()
    memory = {c.weights[0].data_ptr() for group in repeated.contenders for c in group}
    assert len(memory) == 5


def test_a_worker_makes_the_same_case():
    (case,) = cases.cases("step", shapes=["16x96"], l0=[6], beta1=0.7, only=["ours"])
    parsed, name, device = worker.parse(worker.arguments_of(case, "ours"))
    assert (parsed, name, device) == (dataclasses.replace(case, operators=False), "ours", CPU)
    (inputs,) = prepare.all_inputs(parsed, CPU)
    (small,) = prepare.small_inputs(parsed, CPU)
    assert inputs.rule.beta1 == small.rule.beta1 == 0.7


def test_the_memory_of_a_part(capsys):
    case = cases.cases("cpu", shapes=["16x96"], tokens=[32], l0=[6])[1]
    assert worker.memory(worker.arguments_of(case, "ours_pytorch")) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"infer", "module", "encode", "decode"}
    assert all(part["peak_mib"] >= part["held_mib"] for part in found.values())


@pytest.mark.skipif(not measure.available_bytes(), reason="needs /proc")
def test_the_peak_is_that_of_the_call():
    assert 60 < measure.host_peak_mib(lambda: torch.ones(16 << 20).sum()) < 90
    assert measure.host_peak_mib(lambda: None) < 10


def test_a_process_that_fails_is_said(monkeypatch):
    case = cases.cases("cpu", shapes=["16x96"], tokens=[32], l0=[6])[1]
    rows = [{"kind": "time", "contender": "ours", "part": part} for part in ("infer", "decode")]
    monkeypatch.setattr(measure.sys, "executable", "false")
    worker.add_host_memory(rows, case)
    assert rows[0]["no_memory"] == "ended with status 1"
    assert rows[1] == {"kind": "time", "contender": "ours", "part": "decode"}
    monkeypatch.setattr(measure, "peaks_in_fresh_process", lambda arguments, threads: {"infer": {"peak_mib": 7.0}})
    worker.add_host_memory(rows, case)
    assert rows[0]["peak_mib"] == 7


@pytest.mark.parametrize(("free", "share"), [(1 << 40, 2), (1, 1)])
def test_two_are_weighed_at_once_where_there_is_room(free, share, monkeypatch):
    case = cases.cases("cpu", shapes=["16x96"], tokens=[32], l0=[6])[1]
    rows = [{"kind": "time", "contender": name, "part": "infer"} for name in ("a", "b", "c")]
    given, said = [], []

    def peaks(arguments, threads):
        given.append(threads)
        return {"infer": {"peak_mib": float(len(arguments[arguments.index("--contender") + 1]))}}

    monkeypatch.setattr(measure, "peaks_in_fresh_process", peaks)
    monkeypatch.setattr(measure, "available_bytes", lambda: free)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    worker.add_host_memory(rows, case, said.append)
    assert given == [6 // share] * 3
    assert said == ["a", "b", "c"]
    assert [row["peak_mib"] for row in rows] == [1.0] * 3


def test_ceilings_are_rates(monkeypatch):
    clock = measure.Clock(CPU)
    monkeypatch.setattr(clock, "time", lambda call: 2.0)
    assert measure.copy_rate(clock) == pytest.approx(2 * (1 << 16) / 2e-3 / 1e9)
    assert measure.product_rate(clock, 10, 20, 30, "fp32") == pytest.approx(2 * 10 * 20 * 30 / 2e-3 / 1e12)
    assert measure.floor_ms((10**12, 10**9), {"product_tflops": 2.0, "copy_gbps": 10.0}) == 500
    assert measure.floor_ms((10**9, 10**9), {"product_tflops": 2.0, "copy_gbps": 10.0}) == 100


def test_timing_needs_neither_matplotlib_nor_rich():
    program = "import sys\nfor name in ('matplotlib', 'rich'): sys.modules[name] = None\n"
    program += f"from bench.__main__ import main\nsys.exit(main({[*SMALL, '--only', 'products', '--quick']!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert times(json.loads(done.stdout.splitlines()[-1])["rows"])


def test_no_gpu_is_a_row(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main.main(["run", "--suite", "inference", "--beta1", "0.7"])
    assert "beta1: expected a suite and parts that train, got 'inference'" in capsys.readouterr().err
    assert main.main(["run", "--suite", "inference"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["reason"] for row in rows} == {"no GPU"}
    assert {row["shape"] for row in rows} >= {"gemma-2-2b 16k", "gemma-2-2b 78x16k"}
