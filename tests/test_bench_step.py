"""The benchmark of the whole step: its gate can fail, its peers make the step they stand for, its rows are complete."""

import json

import pytest
import torch

from bench import peers, step_gate
from bench import step as bench
from gemmascope.kernels.training import Rule
from gemmascope.sae import JumpReLUSAE
from gemmascope.step import TrainState, reference_step

CPU = torch.device("cpu")
D, F = 16, 96
HARMONIC = sum(1 / j for j in range(1, F + 1))
SMALL = ["--device", "cpu", "--shapes", f"{D}x{F}", "--tokens", "32", "--steps", "2", "--l0", "6"]


@pytest.fixture
def base():
    return JumpReLUSAE(D, F, impl="reference", threshold_init=0.1, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def narrow_gate(monkeypatch):
    """The gate compares the first and last 20 of the 96 latents."""
    monkeypatch.setattr(step_gate, "GATE_LATENTS", 20)
    monkeypatch.setattr(step_gate, "GATE_DENSITY", 0.1)


def check(base, route="sparse", dtype="fp32"):
    return step_gate.gate([route], base, bench.activations(64, D, CPU, seed=0), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_every_row_and_the_json_line(dtype, capsys, tmp_path, monkeypatch, narrow_gate):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "step.jsonl")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    only = ["--only", "sparse", "dense", "saelens", "saelens_autocast", "eager"]
    rows = bench.main([*SMALL, "--dtype", dtype, *only, "--save"])
    assert [(row["kind"], row["name"]) for row in rows] == [
        ("gate", "sparse"), ("gate", "dense"), ("step", "sparse"),
        *(("operator", name) for name in (
            "encode_entries", "residual_pass", "by_latent", "latent_pass", "encoder_times", "update_from_entries"
        )),
        ("step", "dense"), ("step", "saelens"), ("step", "saelens_autocast"), ("step", "eager"),
    ]  # fmt: skip
    by_name = {row["name"]: row for row in rows if row["kind"] == "step"}
    assert by_name["saelens"]["skipped"] == by_name["saelens_autocast"]["skipped"] == "sae_lens is not installed"
    timed = [row for row in rows if row["kind"] != "gate" and "skipped" not in row]
    assert all(row["p50_ms"] > 0 for row in timed)
    assert not any("pct_roofline" in row for row in rows)  # a CPU has no data sheet here
    for name in ("sparse", "dense"):
        assert (by_name[name]["impl"], by_name[name]["dtype"]) == ("reference", dtype)
        assert abs(by_name[name]["l0"] - 6) < 3
    assert by_name["sparse"]["counted_gib"] > 0
    printed = capsys.readouterr().out
    assert "gate green" in printed
    assert f"{by_name['eager']['p50_ms'] / by_name['sparse']['p50_ms']:.2f} x sparse" in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads(json.dumps(rows))
    assert [json.loads(row) for row in (tmp_path / "step.jsonl").read_text().splitlines()] == json.loads(
        json.dumps(rows)
    )
    assert {"torch", "commit", "date", "device", "activations", "d_model", "d_sae", "tokens"} <= set(rows[0])


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_the_gate_is_green(route, dtype, base, narrow_gate):
    assert 0 < check(base, route, dtype)[route] <= 1


def without_tensor(name):
    """A step after which one tensor is as before."""

    def broken(route, state, x, loss, rule, capacity):
        owner = state.sae if name == "b_dec" else state.latents
        before = getattr(owner, name).detach().clone()
        figures = original(route, state, x, loss, rule, capacity)
        with torch.no_grad():
            getattr(owner, name).copy_(before)
        return figures

    return broken


def touching_all(route, state, x, loss, rule, capacity):
    figures = original(route, state, x, loss, rule, capacity)
    state.latents.last.fill_(1)
    return figures


original = step_gate.take
MISTAKES = {
    "bandwidth": (lambda r, s, x, loss, *rest: original(r, s, x, bench.Loss(0.02, 1.2e-2), *rest), "threshold"),
    "coefficient": (lambda r, s, x, loss, *rest: original(r, s, x, bench.Loss(0.04, 1e-2), *rest), "threshold"),
    "one token less": (lambda r, s, x, *rest: original(r, s, x[1:], *rest), ""),
    "rounded activations": (lambda r, s, x, *rest: original(r, s, (8 * x).round() / 8, *rest), ""),
    "W_dec stays": (without_tensor("W_dec"), "W_dec"),
    "b_enc stays": (without_tensor("b_enc"), "b_enc"),
    "b_dec stays": (without_tensor("b_dec"), "b_dec"),
    "W_enc_v stays": (without_tensor("W_enc_v"), "W_enc_v"),
    "quiet latents move": (touching_all, "latents without an entry"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("mistake", "place"), MISTAKES.values(), ids=MISTAKES)
def test_the_gate_turns_red(mistake, place, dtype, base, narrow_gate, monkeypatch):
    monkeypatch.setattr(step_gate, "take", mistake)
    with pytest.raises(SystemExit, match=rf"sparse, {dtype}: error of {place}.* times its budget; nothing is timed"):
        check(base, dtype=dtype)


def test_a_red_gate_times_nothing(narrow_gate, monkeypatch, capsys):
    monkeypatch.setattr(step_gate, "take", MISTAKES["b_dec stays"][0])
    with pytest.raises(SystemExit):
        bench.main(SMALL)
    assert " ms" not in capsys.readouterr().out


def test_withheld_updates_are_not_timed(narrow_gate, monkeypatch):
    monkeypatch.setattr(bench, "room_for", lambda state, x: 1)
    with pytest.raises(SystemExit, match="sparse: updates were withheld; the times are not those of a step"):
        bench.main([*SMALL, "--only", "sparse"])


def test_the_plain_step_is_the_reference_step(base):
    """In fp64 the peer of autograd and torch.optim makes the update of the written formulas."""
    sae = base.double()
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    x, rule = bench.activations(64, D, CPU, seed=0).double(), Rule(1e-3, 0.999, 1e-8, True)
    state = bench.our_state(sae, "fp32", CPU)
    loss = bench.Loss(coefficient=6e-4, bandwidth=0.05)
    parameters = peers.plain_parameters(sae)
    step = peers.plain_step(parameters, x, loss, rule, autocast=False)
    for _ in range(3):
        reference_step(state, x, loss, rule)
        step()
    ours = (state.sae.W_enc, state.sae.b_enc, state.sae.W_dec, state.sae.b_dec, state.sae.threshold.log())
    for theirs, expected in zip(parameters, ours, strict=True):
        torch.testing.assert_close(theirs, expected, rtol=1e-10, atol=1e-12)
    assert ((state.sae.threshold - 0.1).abs() > 1e-5).any()


def test_a_peer_that_fails_is_a_row(narrow_gate, monkeypatch):
    def fail(*arguments, **named):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(bench, "plain_step", fail)
    rows = bench.main([*SMALL, "--only", "eager"])
    assert rows[-1]["skipped"] == "OutOfMemoryError: tried to allocate 20 GiB"


def test_our_own_failure_is_not_a_row(narrow_gate, monkeypatch):
    monkeypatch.setattr(bench, "room_for", lambda state, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main([*SMALL, "--only", "sparse"])


def test_changed_bits_counts_the_runs_that_differ(base):
    x, state, calls = bench.activations(32, D, CPU, seed=0), bench.our_state(base, "fp32", CPU), []

    def step():
        calls.append(0)
        reference_step(state, x, bench.LOSS, bench.RULE)
        if len(calls) == 3:
            state.latents.W_dec[5, 2] += 1e-6

    assert bench.changed_bits(state, step, 5) == 1
    assert len(calls) == 5
    assert bench.changed_bits(state, step, 3) == 0


def test_the_threshold_gives_the_wanted_l0(base):
    x = bench.activations(4000, D, CPU, seed=1)
    spread = step_gate.spread_of_z(base, bench.activations(4000, D, CPU, seed=2))
    assert not any(part.requires_grad for part in spread)  # a graph would hold every z
    for skew, first, last in ((0.0, 2 / F, 2 / F), (1.0, 2 / HARMONIC, 2 / HARMONIC / F)):
        theta = step_gate.threshold_at(*spread, l0=2, skew=skew)
        frequency = (x @ base.W_enc.detach() > theta).double().mean(0)
        assert frequency.sum() == pytest.approx(2, rel=0.05)
        assert frequency[0] == pytest.approx(first, rel=0.2)
        assert frequency[-8:].mean() == pytest.approx(last, rel=0.2)


def test_work_by_hand():
    size = bench.Size(n=2, d=3, f=64, active=4, entries=6, capacity=8, touched=5, itemsize=2)
    assert bench.work("encode_entries", size) == (2 * 2 * 3 * 64, 2 * (6 + 192) + 32 + 120)
    assert bench.work("residual_pass", size) == (2 * 3 * 10, 2 * 3 * 12 + 24 + 72)
    assert bench.work("by_latent", size) == (0, 96 + 512)
    assert bench.work("latent_pass", size) == (120, 216 + 28 * 64)
    assert bench.work("encoder_times", size) == (2 * 192, 2 * 192 + 256)
    assert bench.work("update_from_entries", size) == (72 + 450, 72 + 72 + 36 * 15)
    assert bench.work("update_from_entries", size._replace(itemsize=4))[1] == 144 + 72 + 32 * 15


def test_percentages_are_of_the_slower_limit(base):
    options = type("Options", (), {"steps": 2, "dtype": "bf16"})
    x, state = bench.activations(32, D, CPU, seed=0), TrainState.start(base, "bf16")
    peaks = {"bf16": 1.0, "gbps": 1e9}
    rows = list(
        bench.operator_rows(
            state, x, 4096, lambda: step_gate.take("sparse", state, x, bench.LOSS, bench.RULE, 4096), options, peaks
        )
    )
    encode = rows[0]
    assert encode["floor_ms"] == pytest.approx(2 * 32 * D * F / 1e9)
    assert encode["pct_roofline"] == pytest.approx(100 * encode["floor_ms"] / encode["p50_ms"])
    assert rows[0]["touched"] == (state.latents.last == state.updates).sum()
