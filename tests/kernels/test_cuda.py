"""The CUDA road without a GPU: its pipeline, tiles and gate compiled for the CPU, its kernel compiled for Hopper.

`hopper.cpp` runs the roles of `kernels/cuda/csrc/pipeline.h` as they are, every thread of a cluster, on emulated loads,
barriers and products, and draws at random what happens first. What it takes from the PTX ISA, and what `encode.cu` has
beyond it, only a GPU can prove: the test marked so does.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gemmascope.kernels import cuda, reference
from gemmascope.kernels.cuda import build, product
from gemmascope.kernels.entries import LATENT
from tests.helpers import assert_bitwise_equal, lattice

CXX = shutil.which(os.environ.get("CXX", "g++"))
try:
    NVCC = build.compiler()
except RuntimeError:
    NVCC = None
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
BANDWIDTH = 0.5  # half of it is one step of the lattice


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """The emulator, with the signature of `product_of_entries` and two numbers more."""
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("hopper") / "hopper.so"
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers")
    source = Path(__file__).with_name("hopper.cpp")
    command = [CXX, "-std=c++20", "-O2", *warnings, "-fPIC", "-shared", "-I", build.SOURCES, source, "-o", path]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


def encode(hopper, x, W_enc, b_enc, threshold, bandwidth, z, words, clusters=2, seed=0):
    """Into z and words by way of larger memory, of which nothing else may be written."""
    (N, d), F = x.shape, W_enc.shape[1]
    beyond = 256 * (F + 256)
    wide = [torch.cat([t.flatten(), torch.full((beyond,), 7, dtype=t.dtype)]) for t in (z, words)]
    tensors = x, W_enc.T, b_enc, threshold, *wide
    assert all(t.is_contiguous() for t in tensors)
    x, W, b_enc, threshold, *out = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    failure = ctypes.create_string_buffer(256)
    half = ctypes.c_float(bandwidth / 2)
    if hopper.encode(x, W, b_enc, threshold, half, *out, N, F, d, clusters, seed, failure):
        raise AssertionError(failure.value.decode())
    for to, t in zip((z, words), wide, strict=True):
        assert (t[-beyond:] == 7).all(), "written beyond the output"
        to.copy_(t[:-beyond].view_as(to))


def operands(N, F, d):
    """As lattices, where every precision computes the same z, and about one entry in fifty is kept."""
    x, W = lattice(N, d, dtype=torch.bfloat16), lattice(F, d, dtype=torch.bfloat16, seed=1)
    return x, W.T, lattice(F, seed=2), 2.0 * lattice(F, seed=3).abs() + round(2.5 * d**0.5)


def outputs(N, F):
    return torch.full((N, F), -1e9), torch.full((N, -(-F // 32)), -1, dtype=torch.int32)


def bits(words):
    return (words[:, :, None] >> torch.arange(32) & 1).flatten(1).bool()


def assert_equals_reference(arguments, bandwidth, z, words):
    """Bit for bit: the entries, their z, and nothing anywhere else."""
    x, W_enc, b_enc, threshold = arguments
    N, F = x.shape[0], W_enc.shape[1]
    expected = reference.encode_entries(x.double(), W_enc.double(), b_enc.double(), threshold, bandwidth, None)
    kept = torch.zeros(N, words.shape[1] * 32, dtype=torch.bool)
    tokens, latents = expected.tokens.long(), (expected.latents & LATENT).long()
    kept[tokens, latents] = True
    assert torch.equal(bits(words), kept)
    assert_bitwise_equal("z", z[tokens, latents], expected.z.float())
    assert (z[~kept[:, :F]] == -1e9).all()
    return len(tokens) / (N * F)


@pytest.mark.parametrize(
    ("N", "F", "d", "clusters"),
    [
        pytest.param(1, 1, 1, 1, id="ones"),
        pytest.param(256, 256, 64, 1, id="one whole pair"),
        pytest.param(130, 40, 96, 1, id="edges, less than a stage at the end"),
        pytest.param(300, 545, 200, 2, id="three pairs a cluster"),
        pytest.param(40, 1100, 40, 2, id="one step a tile, nothing below"),
        pytest.param(300, 300, 328, 1, id="more steps than stages"),
        pytest.param(70, 600, 72, 5, id="more clusters than pairs"),
    ],
)
def test_matches_reference(hopper, N, F, d, clusters):
    arguments = operands(N, F, d)
    z, words = outputs(N, F)
    encode(hopper, *arguments, BANDWIDTH, z, words, clusters)
    share = assert_equals_reference(arguments, BANDWIDTH, z, words)
    assert 0 < share < 0.2 or N * F * d == 1


@pytest.mark.parametrize("seed", range(1, 13))
def test_any_schedule(hopper, seed):
    """Whoever goes first, whenever a load arrives or a product reads: the same bits, and nobody waits for ever."""
    arguments = operands(200, 500, 136)
    z, words = outputs(200, 500)
    encode(hopper, *arguments, BANDWIDTH, z, words, 1, seed)
    assert_equals_reference(arguments, BANDWIDTH, z, words)


def test_the_window_is_open_and_the_threshold_strict(hopper):
    """z = θ and |z − θ| = ε/2 are no reason to keep an entry; what is a step nearer is."""
    N, F, d = 3, 64, 64
    x, W_enc, b_enc, _ = operands(N, F, d)
    W_enc = torch.zeros_like(W_enc.T).T
    steps = torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(F // 4)
    threshold = b_enc - 0.25 * steps
    for bandwidth, kept in ((0.5, [0, 0, 1, 1]), (0.0, [0, 0, 0, 1]), (0.75, [0, 1, 1, 1])):
        z, words = outputs(N, F)
        encode(hopper, x, W_enc, b_enc, threshold, bandwidth, z, words)
        assert torch.equal(bits(words), torch.tensor(kept, dtype=torch.bool).repeat(N, F // 4))
        assert_equals_reference((x, W_enc, b_enc, threshold), bandwidth, z, words)


def test_bad_input_stays_visible(hopper):
    N, F, d = 5, 70, 64
    x, W_enc, b_enc, threshold = operands(N, F, d)
    nan, inf = float("nan"), float("inf")
    b_enc[[0, 33, 66]] = torch.tensor([nan, -inf, inf])
    threshold[[1, 34, 69]] = torch.tensor([nan, inf, -inf])
    x[3, 5] = nan
    for bandwidth in (BANDWIDTH, inf):
        z, words = outputs(N, F)
        encode(hopper, x, W_enc, b_enc, threshold, bandwidth, z, words)
        kept, finite = bits(words)[:, :F], z.where(bits(words)[:, :F], 0.0)
        assert kept[:, [0, 33, 66, 1, 69]].all()
        assert kept[3].all()
        assert kept.all() == (bandwidth == inf) or not kept[[0, 1, 2, 4], 34].any()
        assert finite[0, 0].isnan()
        assert finite[0, 33] == -inf
        assert finite[0, 66] == inf


@pytest.mark.parametrize(("N", "F"), [(1, 1), (4096, 16384), (2300, 1000), (256 * 9, 256 * 5), (10, 5000)])
def test_each_tile_is_someones(hopper, N, F):
    pairs = hopper.tiles(N, F, 0, None)
    found = []
    for rank in range(2):
        tiles = torch.zeros(pairs, 2, dtype=torch.int32)
        hopper.tiles(N, F, rank, ctypes.c_void_p(tiles.data_ptr()))
        found.append(tiles)
    assert torch.equal(found[1], found[0] + torch.tensor([128, 0]))
    every = torch.cartesian_prod(torch.arange(0, N, 256), torch.arange(0, F, 256)).int()
    assert torch.equal(torch.unique(found[0], dim=0), every)
    assert pairs == len(every)


def test_what_runs_side_by_side_shares_its_latents(hopper):
    """Four pairs of row tiles advance together, so that 66 clusters want 17 tiles of W_enc at a time, not 66."""
    tiles = torch.zeros(hopper.tiles(4096, 16384, 0, None), 2, dtype=torch.int32)
    hopper.tiles(4096, 16384, 0, ctypes.c_void_p(tiles.data_ptr()))
    for start in range(0, len(tiles) - 66, 66):
        assert len(tiles[start : start + 66, 1].unique()) <= 18


def test_the_first_product_is_checked(hopper):
    right = []

    def launch(*arguments):
        encode(hopper, *arguments)
        right.extend(t.clone() for t in arguments[-2:])

    product.check(launch, torch.device("cpu"), 300)
    for wrong in ("a bit", "a value", "a value too many", "a bit beyond"):

        def mistaken(*arguments, wrong=wrong):
            z, words = (to.copy_(t) for to, t in zip(arguments[-2:], right, strict=True))
            token, latent = (z != -1e9).nonzero()[5]
            if wrong == "a bit":
                words[token, latent // 32] ^= 1
            elif wrong == "a value":
                z[token, latent] += 1
            elif wrong == "a value too many":
                token, latent = (z == -1e9).nonzero()[0]
                z[token, latent] = 0
            else:
                words[0, -1] |= 1 << 20

        with pytest.raises(RuntimeError, match="computes wrongly on cpu"):
            product.check(mistaken, torch.device("cpu"), 300)


@needs_nvcc
def test_compiles_for_hopper(tmp_path):
    """Registers as the launch needs them, no spills, products that follow one another, loads to both blocks."""
    pytest.importorskip("triton")
    import triton

    cubin = tmp_path / "encode.cubin"
    command = [NVCC, *build.TARGET, "-Xptxas", "-v", "-cubin", "-o", cubin, build.SOURCES / "encode.cu"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "Used 168 registers" in log
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert "serialized" not in log  # what ptxas says of products it must wait for one by one
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", sass, re.MULTILINE)
    assert sum(name.startswith("HGMMA.64x256x16") for name in found) == 4
    assert found.count("UTMALDG.2D") == found.count("UTMALDG.2D.MULTICAST") == 1
    assert not any(name.startswith(("LDL", "STL")) for name in found)
    first, last = (choose(i for i, name in enumerate(found) if "HGMMA" in name) for choose in (min, max))
    assert not any("DEPBAR" in name for name in found[first:last])
    # The two gates, with and without columns beyond F: 128 accumulators a thread, and four words. The producer comes
    # last, whose wait has another store. Divergent threads would need two instructions more for each store.
    gates = found[max(i for i, name in enumerate(found) if "DEPBAR" in name) :]
    assert gates.count("STG.E") == 2 * (128 + 4) + 1
    assert len(gates) < 2700


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """With nothing built, and as in a new process."""
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.delenv("GEMMASCOPE_CUDA", raising=False)
    build.loaded.cache_clear()
    yield tmp_path
    build.loaded.cache_clear()


@needs_nvcc
def test_builds_once_and_loads_without_a_gpu(elsewhere, monkeypatch):
    (elsewhere / "_encode_0123456789ab.so").write_bytes(b"of other sources")
    path = build.build()
    assert [p.name for p in elsewhere.iterdir()] == [path.name]
    monkeypatch.setattr(build, "compiler", lambda: pytest.fail("compiled again"))
    assert build.build() == path
    function = build.loaded().gemmascope_encode_entries
    if not torch.cuda.is_available():
        failure = function(None, 64, None, 64, None, None, 0.0, None, None, 1, 1, 64, None)
        assert failure == b"no CUDA driver that knows tensor maps"


def test_nothing_is_taken_unasked(elsewhere, monkeypatch):
    assert not cuda.asked()
    for word, wish in (("1", True), ("on", True), ("0", False), ("", False)):
        monkeypatch.setenv("GEMMASCOPE_CUDA", word)
        assert cuda.asked() == wish


def test_says_how_to_build(elsewhere):
    with pytest.raises(RuntimeError, match="not built"):
        build.loaded()


def test_needs_a_compiler_that_works(elsewhere, monkeypatch):
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(elsewhere))
    with pytest.raises(RuntimeError, match="needs nvcc"):
        build.build()
    failing = elsewhere / "nvcc"
    failing.write_text("#!/bin/sh\necho no such option >&2\nexit 2\n")
    failing.chmod(0o755)
    with pytest.raises(RuntimeError, match="cannot build the CUDA road: no such option"):
        build.build()
    assert not build.library().exists()


def test_entries_come_by_that_road_when_asked(hopper, monkeypatch):
    gpu = pytest.importorskip("gemmascope.kernels.gpu", reason="needs Triton")
    arguments, asked = operands(130, 300, 72), []

    def by_emulator(x, W_enc, b_enc, threshold, bandwidth, z, words):
        asked.append(len(x))
        encode(hopper, x, W_enc, b_enc, threshold, bandwidth, z, words)

    monkeypatch.setattr(cuda, "asked", lambda: True)
    monkeypatch.setattr(cuda, "takes", lambda *operands: True)
    monkeypatch.setattr(cuda, "product_of_entries", by_emulator)
    found = gpu.encode_entries(*arguments, BANDWIDTH, 4000)
    assert asked == [130]
    x, W_enc, b_enc, threshold = arguments
    expected = reference.encode_entries(x.double(), W_enc.double(), b_enc.double(), threshold, BANDWIDTH, 4000)
    n = int(expected.offsets[-1])
    assert 0 < n < 4000
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.tokens[:n], expected.tokens[:n])
    assert_bitwise_equal("z", found.z[:n], expected.z[:n].float())


def test_other_operands_are_refused():
    x, W_enc, b_enc, threshold = operands(200, 300, 64)
    assert not cuda.takes(x, W_enc, b_enc, threshold)
    with pytest.raises(ValueError, match=r"x, W_enc: .* got torch.bfloat16 \(200, 64\) on cpu"):
        cuda.product_of_entries(x, W_enc, b_enc, threshold, BANDWIDTH, *outputs(200, 300))


@pytest.mark.gpu
def test_on_the_device(elsewhere):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper card")
    if NVCC is None:
        pytest.skip("needs nvcc")
    build.build()
    for N, F, d in ((129, 1, 8), (4096, 16384, 328), (1000, 5000, 2304)):
        arguments = tuple(t.cuda() for t in operands(N, F, d))
        z, words = (t.cuda() for t in outputs(N, F))
        assert cuda.takes(*arguments)
        cuda.product_of_entries(*arguments, BANDWIDTH, z, words)
        assert_equals_reference(tuple(t.cpu() for t in arguments), BANDWIDTH, z.cpu(), words.cpu())
