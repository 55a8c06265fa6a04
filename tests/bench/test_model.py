"""The counted step: disassembly read and followed, lists, bytes against the interpreter, and a worse kernel is seen."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from bench.aot import __main__ as aot
from bench.aot import expectation, follow, model, sass, selecting, trips
from bench.aot.cards import CARDS, occupancy
from bench.aot.dense import dense
from bench.aot.launches import SIZES, Operation, recorded
from bench.aot.lists import WINDOW, Case, Lengths
from bench.launches import record_step
from bench.timing.inputs import firing_frequencies
from gemmascope.kernels.entries import ACTIVE, ByLatent, Entries, LatentState, LatentSums, Objective, Rule
from gemmascope.kernels.gpu import latents as gpu_latents
from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu import selection as gpu_selection
from gemmascope.kernels.gpu import update as gpu_update

LENGTHS = np.array([0, 1, 5, 8, 9, 21, 3])
D = 320

# for (i = 0; i + 3 < n; i += 4) …; for (; i < n; i++) …, as the assembler unrolls: four turns, then one by one.
UNROLLED = """
        /*0000*/                   ULDC.64 UR6, c[0x0][0x208] ;
        /*0010*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0020*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0030*/                   CS2R R6, SRZ ;
        /*0040*/                   ISETP.GE.AND P0, PT, R4, 0x4, PT ;
        /*0050*/              @!P0 BRA 0xa0 ;
        /*0060*/                   VIADD R6, R6, 0x4 ;
        /*0070*/                   VIADD R5, R4, 0xfffffffd ;
        /*0080*/                   ISETP.GE.AND P0, PT, R6, R5, PT ;
        /*0090*/              @!P0 BRA 0x60 ;
        /*00a0*/                   ISETP.GE.AND P0, PT, R6, R4, PT ;
        /*00b0*/               @P0 EXIT ;
        /*00c0*/                   FADD R9, R9, R9 ;
        /*00d0*/                   VIADD R6, R6, 0x1 ;
        /*00e0*/                   BRA 0xa0 ;
        /*00f0*/                   BRA 0xf0 ;
        /*0100*/                   NOP ;
"""


def follower(text: str, arguments=(("n_ptr", 8),), offsets=(0x210,)) -> follow.Follower:
    code = sass.parse(text)
    code.parameters = dict(enumerate(offsets))
    return follow.Follower(code, list(arguments))


def instructions(found: follow.Follower, given: follow.Given) -> int:
    return int(found.walk(given).counts @ [len(block.instructions) for block in found.code.blocks])


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 31])
def test_an_unrolled_loop_is_followed(n):
    found = follower(UNROLLED)
    given = follow.Given({}, {"n_ptr": np.array([n], np.int32)}, 64)
    turns = n // 4
    assert found.walk(given).counts.tolist() == [2, 2 * turns, 2 * (n % 4 + 1), 2 * (n % 4)]
    assert instructions(found, given) == 2 * (6 + 4 * turns + 2 * (n % 4 + 1) + 3 * (n % 4))


def test_warps_that_skip_a_block_do_not_run_it():
    found = follower("""
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x28, PT ;
        /*0020*/               @P0 BRA 0x40 ;
        /*0030*/                   FADD R1, R1, R1 ;
        /*0040*/                   EXIT ;
    """)
    assert found.walk(follow.Given({}, {}, 128)).counts.tolist() == [4, 2, 4]


def test_what_is_not_known():
    forwards = """
        /*0000*/                   FSETP.GT.AND P0, PT, R0, R1, PT ;
        /*0010*/               @P0 BRA 0x30 ;
        /*0020*/                   FADD R1, R1, R1 ;
        /*0030*/                   EXIT ;
    """
    walk = follower(forwards).walk(follow.Given({}, {}, 32))
    assert walk.counts.tolist() == [1, 0, 1]
    assert walk.assumed == {0x10}
    with pytest.raises(follow.NotFollowedError, match="0x10: BRA depends on what is not known"):
        follower(forwards.replace("BRA 0x30", "BRA 0x0")).walk(follow.Given({}, {}, 32))
    with pytest.raises(ValueError, match="the kernel has no argument m"):
        follower(forwards).walk(follow.Given({"m": 1}, {}, 32))
    with pytest.raises(ValueError, match="found no instruction"):
        sass.parse("nothing")


# Two words each: a in R0 and R1, b in R2 and R3, the result in R4 and R5.
WIDE = {
    "add": ("IADD3 R4, P0, R0, R2, RZ", "IADD3.X R5, R1, R3, RZ, P0, !PT", lambda a, b: a + b),
    "subtract": ("IADD3 R4, P0, R0, -R2, RZ", "IADD3.X R5, R1, ~R3, RZ, P0, !PT", lambda a, b: a - b),
    "scale": ("LEA R4, P0, R0, R2, 0x3", "LEA.HI.X R5, R0, R3, R1, 0x3, P0", lambda a, b: 8 * a + b),
    "multiply": ("IMAD.WIDE.U32 R4, R0, R2, RZ", None, lambda a, b: (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF)),
    "left": ("SHF.L.U32 R4, R0, 0x5, RZ", "SHF.L.U64.HI R5, R0, 0x5, R1", lambda a, b: a << 5),
    "right": ("SHF.R.U64 R4, R0, 0x7, R1", "SHF.R.U32.HI R5, RZ, 0x7, R1", lambda a, b: a >> 7),
    "logic": ("LOP3.LUT R4, R0, R2, RZ, 0x3c, !PT", "LOP3.LUT R5, R1, R3, RZ, 0xc0, !PT", None),
}


@pytest.mark.parametrize("name", WIDE)
def test_numbers_of_64_bits(name):
    rng = np.random.default_rng(0)
    pairs = [(int(a), int(b)) for a, b in rng.integers(0, 1 << 63, (64, 2))] + [(0, 0), (5, 0), (0, 5), (7, 7)]
    low, high, expected = WIDE[name]
    for a, b in pairs:
        machine = follow._Machine(follow.Given({}, {}, 32), {}, [])
        for register, value in enumerate((a, a >> 32, b, b >> 32)):
            machine.registers[f"R{register}"] = np.full(32, value & follow.MASK)
        for text in filter(None, (low, high)):
            opcode, operands = text.split(" ", 1)
            follow._run(machine, sass.Instruction(0, None, False, opcode, sass.operands_of(operands)))
        found = int(machine.registers["R4"][0]) | int(machine.registers["R5"][0]) << 32
        wanted = expected(a, b) if expected else ((a ^ b) & follow.MASK) | ((a & b) >> 32 << 32)
        assert found == wanted % (1 << 64), (a, b)


@pytest.mark.parametrize("comparison", ["LT", "GE", "GT", "LE"])
def test_comparisons_of_64_bits(comparison):
    rng = np.random.default_rng(1)
    pairs = [(int(a), int(b)) for a, b in rng.integers(-(1 << 40), 1 << 40, (64, 2))] + [(3, 3), (-1, 1), (1 << 33, 1)]
    for a, b in pairs:
        machine = follow._Machine(follow.Given({}, {}, 32), {}, [])
        for register, value in enumerate((a, a >> 32, b, b >> 32)):
            machine.registers[f"R{register}"] = np.full(32, value & follow.MASK)
        for opcode, operands in (
            (f"ISETP.{comparison}.U32.AND", "P0, PT, R0, R2, PT"),
            (f"ISETP.{comparison}.AND.EX", "P0, PT, R1, R3, PT, P0"),
        ):
            follow._run(machine, sass.Instruction(0, None, False, opcode, sass.operands_of(operands)))
        assert bool(machine.registers["P0"][0]) == bool(follow.COMPARE[comparison](a, b)), (a, b)


@pytest.mark.parametrize(("which", "choose"), [("PT", min), ("!PT", max)])
def test_the_less_or_greater_of_a_sum_and_a_number(which, choose):
    for a, b, c in ((5, 7, 20), (5, 7, 3), (-9, 4, -4), (-9, 4, 0)):
        machine = follow._Machine(follow.Given({}, {}, 32), {}, [])
        for register, value in enumerate((a, b, c)):
            machine.registers[f"R{register}"] = np.full(32, value & follow.MASK)
        operands = sass.operands_of(f"R3, R0, R1, R2, {which}")
        follow._run(machine, sass.Instruction(0, None, False, "VIADDMNMX", operands))
        assert int(follow._signed(machine.registers["R3"][0])) == choose(a + b, c)


@pytest.mark.parametrize(("programs", "turns"), [(1, 8), (3, 3), (8, 1)])
def test_the_size_of_the_grid_is_given(programs, turns):
    """for (i = 0; i < 8; i += number of programs)"""
    found = follower("""
        /*0000*/                   LDC R1, c[0x0][0xc] ;
        /*0010*/                   MOV R0, RZ ;
        /*0020*/                   IMAD.IADD R0, R0, 0x1, R1 ;
        /*0030*/                   ISETP.GE.AND P0, PT, R0, 0x8, PT ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   EXIT ;
    """)
    assert found.walk(follow.Given({}, {}, 32, grid=(programs, 2))).counts.tolist() == [1, turns, 1]
    with pytest.raises(follow.NotFollowedError, match="0x40: BRA depends on what is not known"):
        found.walk(follow.Given({}, {}, 32))


# ---- lists


@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_lists_hold_the_entries(skew):
    case = Case(256, 4096, 20, skew, 512)
    assert case.of_latents.lists == pytest.approx(4096, rel=1e-6)
    assert case.of_latents.total == pytest.approx(case.entries)
    assert case.of_tokens.total == pytest.approx(case.entries, rel=1e-3)
    assert case.entries == pytest.approx(512 * 20 * (1 + WINDOW), rel=0.02)
    frequency = firing_frequencies(4096, 20, skew, torch.Generator().manual_seed(0)).numpy() * (1 + WINDOW)
    drawn = np.random.default_rng(0).poisson(512 * frequency)
    assert case.of_latents.touched == pytest.approx((drawn > 0).sum(), rel=0.03)
    assert case.of_latents.longest == pytest.approx(drawn.max(), rel=0.35)
    longest = drawn.reshape(-1, 8).max(1)
    assert case.longest_of(8).total == pytest.approx(longest.sum(), rel=0.05)


def test_fullest_words():
    case = Case(256, 8192, 100, 0.7, 64)
    found = case.fullest_word(4096)
    assert found.lists == pytest.approx(2 * 64)
    rng = np.random.default_rng(0)
    rates = rng.permutation(case.frequencies)
    drawn = (rng.random((64, 8192)) < rates).reshape(128, 128, 32).sum(2).max(1)
    assert found.total == pytest.approx(drawn.sum(), rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 0}, "d: expected at least 1"),
        ({"l0": 0}, "l0: expected more than 0"),
        ({"skew": -1}, "skew: expected at"),
        ({"beta1": 1.0}, "beta1: expected at least 0 and less than 1, got 1.0"),
        ({"beta1": -0.1}, "beta1: expected at least 0"),
    ],
)
def test_a_case_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Case(**({"d": 256, "F": 512} | change))


# ---- bytes of the kernels, against what the interpreter loads and stores


@pytest.fixture
def moved(monkeypatch):
    """Bytes that interpreted kernels load and store, by active lane."""
    found = [0]

    def counting(name: str, mask_at: int):
        original = getattr(interpreter.InterpreterBuilder, name)

        def counted(self, pointers, *rest):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            active = np.broadcast_to(rest[mask_at].data, np.shape(pointers.data))
            found[0] += size * int(np.count_nonzero(active))
            return original(self, pointers, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, counted)

    counting("create_masked_load", 0)
    counting("create_masked_store", 1)
    return found


def entries_of(lengths: np.ndarray, others: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets of lists of these lengths, and for each entry one of ``others``."""
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64)
    drawn = torch.arange(int(offsets[-1]), dtype=torch.int32) * 7 % others
    return offsets, drawn


# None, one, a few, a full first tile and its neighbours, and the later tiles.
TOKEN_LENGTHS = np.array([0, 1, 5, 63, 64, 65, 96, 97, 3])


def test_bytes_of_the_residual(moved):
    offsets, latents = entries_of(TOKEN_LENGTHS, 32)
    active = torch.arange(len(latents)) % 3 > 0
    entries = Entries(torch.rand(len(latents)), torch.where(active, latents | ACTIVE, latents), latents, offsets)
    W_dec = torch.rand(32, D).bfloat16()
    gpu_residual.residual_pass(entries, torch.rand(len(TOKEN_LENGTHS), D), W_dec, torch.rand(D))
    blocks = -(-D // gpu_residual.residual_config("cpu", torch.bfloat16).block_d)
    wanted = len(latents) + len(TOKEN_LENGTHS)
    sums = 8 * -(-wanted // gpu_residual.SUM_BLOCK) + trips.shares_bytes(wanted, blocks)
    assert moved[0] == sum(trips.residual_bytes(D, int(n)) for n in TOKEN_LENGTHS) + sums


def test_bytes_of_the_latents(moved):
    """A long list and its neighbours, in the second of two programs."""
    config = gpu_latents.CONFIG
    lengths = np.concatenate([np.resize(LENGTHS, config.block_f), [config.long, config.long + 1, 0, 700]])
    offsets, tokens = entries_of(lengths, 16)
    nnz, F = len(tokens), len(lengths)
    entries = Entries(torch.rand(nnz), torch.full((nnz,), ACTIVE, dtype=torch.int32), tokens, offsets)
    transposed = ByLatent(torch.arange(nnz), offsets)
    objective = Objective(0.1, 0.0, 0.0, 1.0, False)
    gpu_latents.latent_pass(entries, torch.rand(nnz), transposed, torch.rand(F), torch.rand(16), objective)
    expected = trips.latents_bytes(float(lengths[: config.block_f].sum()), config.block_f)
    expected += trips.latents_bytes(float(lengths[config.block_f :].sum()), 4, long_lists=2)
    assert moved[0] == expected


@pytest.mark.parametrize("beta1", [0.0, 0.7])
def test_bytes_of_the_update(moved, beta1):
    """Those of both launches: lists shorter than a long one and longer, that the first launch does."""
    long = gpu_update.CONFIG.long
    lengths = np.concatenate([LENGTHS, [long - 1, long, 0, long + 9, 3]])
    offsets, tokens = entries_of(lengths, 16)
    nnz, F = len(tokens), len(lengths)
    matrix, vector = (lambda: torch.rand(F, D)), (lambda: torch.rand(F))
    first = (matrix(), matrix(), vector(), vector()) if beta1 else ()
    state = LatentState(
        W_enc=matrix(), W_dec=matrix(), b_enc=vector(), threshold=vector(), W_enc_v=matrix(), W_dec_v=matrix(),
        b_enc_v=vector(), threshold_v=vector(), last=torch.zeros(F, dtype=torch.int64),
        W_enc_low=matrix().bfloat16(), W_dec_low=matrix().bfloat16(),
        **dict(zip(("W_enc_m", "W_dec_m", "b_enc_m", "threshold_m"), first, strict=bool(beta1))),
    )  # fmt: skip
    sums = LatentSums(
        torch.rand(nnz), torch.rand(nnz), tokens, vector(), vector(), vector(), torch.ones(F, dtype=torch.int32)
    )
    rows = torch.rand(16, D).bfloat16()
    rule = Rule(learning_rate=1e-3, beta2=0.999, eps=1e-8, log_threshold=True, beta1=beta1)
    one = torch.ones((), dtype=torch.int32)
    gpu_update.update_from_entries(
        state, ByLatent(torch.arange(nnz), offsets), sums, rows, rows, rule, one, torch.zeros((), dtype=torch.int64)
    )
    found = sum(trips.long_update_bytes(D, int(n), beta1) for n in lengths if n >= long)
    searched = -(-D // gpu_update.CONFIG.block_d) * F * trips.search_bytes(1)
    assert moved[0] == sum(trips.update_bytes(D, int(n), beta1) for n in lengths) + found + searched


def test_what_a_first_moment_adds():
    """Of a latent that has entries, m of two rows and two numbers read and written: whoever does it, once."""
    case = Case(2304, 16384)
    plain, with_moments = ({step.name: step for step in trips.passes(replace(case, beta1=b))} for b in (0.0, 0.7))
    lists, touched = case.of_latents, case.of_latents.touched
    rows = 2 * 8 * case.d
    assert sum(step.hbm for step in with_moments.values()) - sum(step.hbm for step in plain.values()) == pytest.approx(
        touched * (rows + 16)
    )
    more = {
        name: sum(
            number * (with_moments[name].requested(int(length)) - plain[name].requested(int(length)))
            for length, number in zip(plain[name].programs.length, plain[name].programs.count, strict=True)
        )
        for name in plain
    }
    long = lists.at_least(gpu_update.CONFIG.long).lists
    assert more.pop("update") == pytest.approx((touched - long) * rows + touched * 16)
    assert more.pop("update, long") == pytest.approx(long * rows)
    assert not any(more.values())
    changed = {step.name: step.spec for step in with_moments.values() if step.spec != plain[step.name].spec}
    assert changed == {"update": "update_entries_bf16_beta1", "update, long": "update_long_lists_bf16_beta1"}
    finish = [{light.name: light.hbm for light in trips.lights(replace(case, beta1=b))}["finish"] for b in (0.0, 0.7)]
    assert finish[1] - finish[0] == 8 * case.d
    assert set(changed.values()) <= {spec.name for spec in trips.specs()}
    wide = Case(3584, 131072, beta1=0.7)
    assert {"update_entries_bf16_beta1_3584", "update_long_lists_bf16_beta1_3584"} <= {
        spec.name for spec in trips.specs(cases=[wide]) if spec.constants.get("BETA1") == 0.7
    }


@pytest.mark.parametrize(("F", "k"), [(256, 1), (512, 5), (1024, 64), (4096, 80), (64, 64), (96, 90)])
def test_bytes_of_the_selection(moved, F, k):
    """Few groups and many, one tile of them and more, every latent wanted."""
    z = torch.stack([torch.from_numpy(selecting.drawn(F, k, number)[0]) for number in range(3)])
    keys = torch.stack([torch.from_numpy(selecting.largest_of_groups(row.numpy())) for row in z]).int()
    gpu_selection.select_of_tokens(z, keys, k)
    assert moved[0] == sum(selecting.select_bytes(F, k, selecting.drawn(F, k, number)[1]) for number in range(3))


@pytest.mark.parametrize(("F", "k"), [(256, 1), (512, 5), (1024, 64), (4096, 80), (64, 64), (96, 90)])
def test_bytes_of_the_selection_of_a_batch(moved, monkeypatch, F, k):
    """By every kernel; the drawn rows are the batch. And what is found of it is what the kernels find."""
    rows = [selecting.drawn(F, k, number)[0] for number in range(selecting.ROWS)]
    z = torch.from_numpy(np.stack(rows))
    keys = torch.stack([torch.from_numpy(selecting.largest_of_groups(row)) for row in rows]).int()
    found, launched, largest = selecting.batch(F, k), [], keys.clone()
    right = gpu_selection.launch
    monkeypatch.setattr(
        gpu_selection,
        "launch",
        lambda kernel, grid, *given, **rest: launched.append(given) or right(kernel, grid, *given, **rest),
    )
    gpu_selection.select_of_batch(z, keys, k * len(z), k)
    of_groups, of_keys = launched[0][2], launched[-1][4]
    assert max(0, int(of_groups[0])) == found.bound
    assert of_keys.tolist() == [found.v, found.ties]
    assert launched[-1][2].tolist() == [len(listed) for listed in found.listed]
    case = Case(64, F, k, 0.0, len(z))
    steps, total = trips.of_batch(case), 0.0
    for step in steps:
        at = zip(step.programs.length, step.programs.count, strict=True)
        total += step.launches * sum(step.requested(int(length)) * number for length, number in at)
    unused = 4 * gpu_selection.COUNT_BLOCK - 4 * largest.numel()
    assert moved[0] == total - gpu_selection.GROUP_DIGITS * unused - 8  # of no token before the first
    assert sum(step.launches for step in steps) == len(launched)


def test_the_search_among_all_groups_is_counted(moved, monkeypatch):
    """Blocks of 4 groups: the k-th of the largest of each 4th lets too many through."""
    small = gpu_selection.SelectConfig(block=4, tile=4, num_warps=1)
    monkeypatch.setattr(gpu_selection, "FEW", small)
    monkeypatch.setattr(gpu_selection, "MANY", small)
    paths, expected = [], 0.0
    for number, k in ((0, 2), (1, 3), (2, 6), (3, 20)):
        z = np.random.default_rng(number).standard_normal(32 * 40).astype(np.float32)
        paths.append(selecting.path(z, k)[0])
        expected += selecting.select_bytes(len(z), k, paths[-1])
        keys = torch.from_numpy(selecting.largest_of_groups(z)).int()[None]
        gpu_selection.select_of_tokens(torch.from_numpy(z)[None], keys, k)
    assert moved[0] == expected
    assert any(each.among_groups > 1 for each in paths)
    assert any(each.groups > small.tile and each.among_keys > 1 for each in paths)


# ---- counts, times


class Stairs(model.Counter):
    """A kernel whose programs take 100 instructions and 7 for every ``step`` entries, in part too."""

    def __init__(self, step: int):
        self.step, self.known, self.followed = step, {}, 0

    def _program(self, given):
        self.followed += 1
        return np.array([100 + 7 * -(-int(given.memory["n_ptr"][0]) // self.step), 0.0, 0.0])

    threads = 32

    def of(self, lengths: np.ndarray) -> list[int]:
        step = trips.Pass(
            "x", "x", Lengths(lengths, np.ones(len(lengths))),
            lambda length: ({}, {"n_ptr": np.array([length])}), lambda _: 0.0, hbm=0.0,
        )  # fmt: skip
        return self.programs(step, lengths)[:, 0].tolist()


@pytest.mark.parametrize("least", [0, 64])
@pytest.mark.parametrize("step", [1, 2, 4, 8, 32, 64, 512])
def test_a_few_programs_give_all(step, least):
    """Counts that rise every so many entries, or at a few lengths."""
    counter, lengths = Stairs(step), np.append(0, np.arange(max(1, least), 1500))
    assert counter.of(lengths) == [100 + 7 * -(-int(length) // step) for length in lengths]
    assert counter.followed < 250


def test_lengths_without_a_period_are_refused():
    with pytest.raises(follow.NotFollowedError, match="none of the periods"):
        Stairs(7).of(np.arange(1500))


def test_occupancy():
    card = CARDS["h100"]
    assert occupancy(card, 4, 64, 0).warps == 32
    assert occupancy(card, 8, 250, 147456) == occupancy(card, 8, 256, 147456)
    assert occupancy(card, 8, 250, 147456).limit == "registers"
    assert occupancy(card, 1, 32, 200000).limit == "shared memory"


def test_times_are_those_of_what_binds():
    step = trips.Pass("x", "x", Lengths(np.array([1]), np.array([1.0])), lambda _: ({}, {}), lambda _: 0.0, hbm=3.35e9)
    row, card = {"registers": 64, "shared": 0}, CARDS["h100"]
    counts = model.Counts(card.issue / 2000, 0.0, 0.0, 1e6, 0.0)
    found = model.times(step, counts, row, 4, card)
    assert (found.binds, found.floor) == ("HBM", pytest.approx(1e-3))
    assert found.expected == pytest.approx(1e-3 / 0.9)
    counts = model.Counts(card.issue / 1000, 0.0, card.clock / 1000, 1e9, 0.0)
    found = model.times(step, counts, row, 4, card)
    assert found.binds == "tail"
    assert found.expected == pytest.approx(1e-3 / 0.65 + 2.6e-3, rel=1e-3)


def test_dense_steps_are_those_of_the_note():
    found = dense(Case(2304, 16384), CARDS["h200"])
    assert found["dense eager"] == pytest.approx(3.64e-3, rel=0.01)
    assert found["dense compiled"] == pytest.approx(2.86e-3, rel=0.01)


def test_the_table_of_a_step():
    case = Case(256, 4096, 20, 0.0, 512)
    counts = {"warp_instructions": 1e6, "tensor_cycles": 0.0, "longest": 10.0, "programs": 512, "l2": 1e6}
    every = tuple(trips.every(case))
    rows = {
        step.spec: {
            "registers": 64, "shared": 0, "warps": 4,
            "counts": {case.title: {each.name: counts for each in every if each.spec == step.spec}},
        }
        for step in every
    }  # fmt: skip
    small = [Operation("add", (((SIZES["N"], SIZES["d"]), 4),) * 3), Operation("fill", (((SIZES["room"],), 4),))]
    step = expectation.step_of(case, rows, CARDS["h100"], small)
    assert [kernel["kernel"] for kernel in step["kernels"]] == [step.name for step in trips.passes(case)]
    counts_of_z = [f"count z, {shift}" for shift, _ in gpu_selection.DIGITS]
    of_batch = ["count groups, 23", "count groups, 15", "list groups", *counts_of_z, "count ties", "mark", "pick"]
    found = {kind: [kernel["kernel"] for kernel in kernels] for kind, kernels in step["selection"].items()}
    assert found == {"product": ["product, z"], "TopK": ["select"], "BatchTopK": of_batch}
    assert step["expected"] >= step["floor"] >= max(step["overlapped"].values()) > 0
    assert step["overlapped"]["issue"] == pytest.approx(len(step["kernels"]) * 1e6 / CARDS["h100"].issue)
    lights = trips.lights(case)
    others = 12 * 512 * 256 + 4 * int(1.5 * case.entries)
    assert step["small"]["bytes"] == pytest.approx(others + sum(light.hbm for light in lights))
    assert step["small"]["launches"] == sum(step.launches for step in (*trips.passes(case), *lights)) + 2
    text = expectation.render(step, markdown=True)
    assert text.startswith("**256x4096 N 512 L0 20 skew 0, H100: expected ")
    assert all(line.count("|") == len(expectation.COLUMNS) + 1 for line in text.splitlines()[2:])
    assert json.loads(json.dumps(step)) == step
    assert "(by arithmetic)" in expectation.render(step, markdown=False)


def test_wrong_cases_are_refused(capsys):
    for arguments, message in (
        (["--shapes", "big"], "shape: expected"),
        (["--l0", "0"], "l0: expected more than 0"),
        (["--beta1", "0", "1"], "beta1: expected at least 0 and less than 1, got 1.0"),
    ):
        with pytest.raises(SystemExit):
            aot.main(["--model", *arguments])
        assert message in capsys.readouterr().err


def test_a_step_launches_what_is_counted():
    """Recorded by running a small one: as many kernels of ours as the model has, and one of PyTorch's."""
    kernels, operations = recorded()
    case = Case(2304, 16384)
    assert kernels == sum(step.launches for step in (*trips.passes(case), *trips.lights(case)))
    assert [operation.name for operation in operations] == ["zeros"]
    assert kernels + len(operations) == 20


def test_a_first_moment_launches_nothing_more(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain, with_moments = ([call.name for call in record_step(beta1=beta1).kernels] for beta1 in (0.0, 0.7))
    assert plain == with_moments


# ---- the record


def test_every_kernel_of_the_step_is_recorded():
    if not aot.counts_path().exists():
        pytest.skip(f"no counts for Triton {aot.triton_version()}")
    recorded = aot.recorded_counts()
    assert set(recorded) == trips.names()
    assert all(programs and min(programs.values()) > 0 for programs in recorded.values())


def test_more_instructions_are_reported():
    recorded = {"1": 1000, "17": 2000}
    assert aot.worse({"1": 1010, "17": 1500}, recorded) == []
    assert aot.worse({"1": 1000, "17": 2100}, recorded) == [
        "a program of length 17 takes 2100 warp-instructions, recorded 2000: 100 more, +5.0%"
    ]
    assert aot.worse({"1": 1000}, recorded) == ["a program of length 17 was recorded and is not counted"]


WORSE = """
import json
from dataclasses import replace
from bench.aot import compilation, model, sass, trips

spec = next(spec for spec in trips.specs() if spec.name == "latents")
found = []
for lanes in (spec.constants["LANES"], spec.constants["LANES"] // 4):
    changed = replace(spec, constants=spec.constants | {"LANES": lanes})
    kernel = compilation.compile_spec(changed, trips.TARGET)
    found.append(model.of_programs(sass.disassemble(kernel.asm["cubin"]), changed))
print(json.dumps(found))
"""


def test_a_worse_kernel_is_reported():
    """A quarter of the lanes: a list takes more turns."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WORSE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad = json.loads(done.stdout.splitlines()[-1])
    assert aot.worse(good, good) == []
    assert "a program of length 17 takes" in " ".join(aot.worse(bad, good))
