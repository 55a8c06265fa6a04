"""Sparse decoding by Triton and its backward against the fp64 reference: python -m pytest tests/test_decode.py"""

import pytest
import torch

from gemmascope.kernels import SparseCode, decode, reference
from gemmascope.kernels.dispatch import interpreting
from tests.helpers import (
    DTYPES,
    LAYOUTS,
    assert_bitwise_equal,
    assert_same_not_finite,
    assert_within_budget,
    normal,
    shape_cases,
)
from tests.kernels import sanitizer

pytest.importorskip("triton")
from gemmascope.kernels import gpu
from gemmascope.kernels.gpu import decode as gpu_decode
from gemmascope.kernels.gpu.decode import GatherConfig

NAMES = ("x_hat", "dvalues", "dW_dec", "db_dec")
interpreted = pytest.mark.skipif(not interpreting(), reason="forces tiles or programs, in the interpreter only")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several column blocks and gathers at sizes that the interpreter likes."""
    monkeypatch.setattr(gpu_decode, "GATHER", GatherConfig(lanes=4, block_d=16, num_warps=1, num_stages=3))
    monkeypatch.setattr(gpu_decode, "DOT", GatherConfig(lanes=4, block_d=16, num_warps=1, num_stages=3))


def random_code(N, F, device="cpu", active=0.25, seed=0) -> SparseCode:
    values = normal(N, F, seed=seed).abs() + 0.1
    generator = torch.Generator().manual_seed(seed + 1)
    return SparseCode.from_dense(values * (torch.rand(N, F, generator=generator) < active)).to(device)


def inputs(N, F, d, dtype=torch.float32, device="cpu", active=0.25):
    """values, indices, offsets, W_dec, b_dec, grad"""
    code = random_code(N, F, device, active)
    W_dec, b_dec = (normal(*shape, dtype=dtype, device=device, seed=5) for shape in ((F, d), (d,)))
    return (*code[:3], W_dec, b_dec, normal(N, d, dtype=dtype, device=device, seed=6))


def run(impl, values, indices, offsets, W_dec, b_dec, grad) -> dict[str, torch.Tensor]:
    """Output and gradients through the public function."""
    leaves = [t.detach().requires_grad_() for t in (values, W_dec, b_dec)]
    x_hat = decode(SparseCode(leaves[0], indices, offsets, W_dec.shape[0]), *leaves[1:], impl=impl)
    return dict(zip(NAMES, (x_hat, *torch.autograd.grad(x_hat, leaves, grad)), strict=True))


def check(*arguments):
    actual, eager = run("triton", *arguments), run("reference", *arguments)
    exact = run("reference", *(t.double() if t.is_floating_point() else t for t in arguments))
    for name in NAMES:
        assert_within_budget(name, actual[name], exact[name], eager[name])
    return actual


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F", "d"), shape_cases(4, 20, 16))
def test_matches_reference(small_tiles, N, F, d, dtype):
    check(*inputs(N, F, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, gpu_decode.GATHER.block_d + 1])
def test_shipped_tiles_match_reference(d, dtype, device):
    check(*inputs(5, 50, d, dtype, device))


@pytest.mark.parametrize("entries", [1, 3, 4, 5, 8, 9])
def test_row_lengths_around_the_gather(entries, device):
    code = SparseCode.from_dense(torch.ones(2, entries, device=device))
    W_dec = normal(entries, 7, device=device)
    check(*code[:3], W_dec, W_dec[0], normal(2, 7, device=device, seed=1))


def test_every_and_no_latent_active(device):
    *_, W_dec, b_dec, grad = inputs(5, 33, 11, device=device)
    full = torch.ones(5, 33, device=device)
    full[1] = full[4] = 0  # rows without entries, one of them the last
    check(*SparseCode.from_dense(full)[:3], W_dec, b_dec, grad)
    nothing = check(*SparseCode.from_dense(0 * full)[:3], W_dec, b_dec, grad)
    assert_bitwise_equal("x_hat", nothing["x_hat"], b_dec.expand(5, 11))
    assert not nothing["dW_dec"].any()


def test_an_untouched_latent_gets_an_exact_zero(device):
    values, indices, offsets, W_dec, b_dec, grad = inputs(6, 40, 19, device=device, active=0.1)
    untouched = torch.ones(40, dtype=torch.bool, device=device)
    untouched[indices.long()] = False
    assert untouched.any()
    grad[:, 3] = torch.inf  # Inf·0 is NaN where a sum runs over all tokens
    dW_dec = run("triton", values, indices, offsets, W_dec, b_dec, grad)["dW_dec"]
    assert not dW_dec[untouched].any()
    assert dW_dec[~untouched, 3].isinf().all()


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(6), ids=["values", "indices", "offsets", "W_dec", "b_dec", "grad"])
def test_any_strides(small_tiles, which, layout):
    arguments = list(inputs(5, 13, 19))
    if layout == "expanded" and which in (1, 2):
        pytest.skip("the same latent twice in a row, or tokens without entries: not a code")
    arguments[which] = LAYOUTS[layout](arguments[which])
    check(*arguments)


def test_expanded_gradient_of_a_plain_sum(device):
    values, indices, offsets, W_dec, b_dec, grad = inputs(5, 13, 19, device=device)
    leaves = [t.clone().requires_grad_() for t in (values, W_dec, b_dec)]
    decode(SparseCode(leaves[0], indices, offsets, 13), *leaves[1:], impl="triton").sum().backward()
    expected = run("reference", values, indices, offsets, W_dec, b_dec, torch.ones_like(grad))
    for name, leaf in zip(NAMES[1:], leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(needs, device, monkeypatch):
    values, indices, offsets, W_dec, b_dec, grad = inputs(5, 13, 19, device=device)
    expected = run("reference", values, indices, offsets, W_dec, b_dec, grad)
    asked = []
    backward = gpu.decode_backward
    monkeypatch.setattr(gpu, "decode_backward", lambda *a: (asked.append(a[-2:]), backward(*a))[1])
    leaves = [t.clone().requires_grad_(need) for t, need in zip((values, W_dec, b_dec), needs, strict=True)]
    decode(SparseCode(leaves[0], indices, offsets, 13), *leaves[1:], impl="triton").backward(grad)
    assert asked == [needs[:2]]
    for name, leaf, need in zip(NAMES[1:], leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, expected[name])


def test_second_derivative_raises(device):
    values, indices, offsets, W_dec, b_dec, _ = inputs(3, 5, 4, device=device)
    W_dec.requires_grad_()
    x_hat = decode(SparseCode(values, indices, offsets, 5), W_dec, b_dec, impl="triton")
    (gradient,) = torch.autograd.grad(x_hat.square().sum(), W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(4), ids=["values", "W_dec", "b_dec", "grad"])
def test_bad_input_stays_visible(where, bad, device):
    arguments = list(inputs(6, 12, 9, device=device))
    place = (0, 3, 4, 5)[where]
    arguments[place].view(-1)[arguments[place].numel() // 2] = bad
    arguments[0][0] = 0.0  # and 0·Inf is NaN
    arguments[3][arguments[1][0]] = torch.inf
    actual, eager = run("triton", *arguments), run("reference", *arguments)
    assert not all(t.isfinite().all() for t in eager.values())
    for name in NAMES:
        assert_same_not_finite(name, actual[name], eager[name])


def test_mixed_dtypes(device):
    """values may be fp64 (a code made in fp64), b_dec of a dtype of its own."""
    values, indices, offsets, W_dec, b_dec, grad = inputs(5, 13, 19, torch.float16, device)
    actual = check(values.double(), indices, offsets, W_dec, b_dec.float(), grad)
    assert [actual[name].dtype for name in NAMES] == [torch.float16, torch.float64, torch.float16, torch.float32]


def test_repeats_bit_for_bit(device):
    arguments = inputs(20, 30, 40, device=device)
    first = run("triton", *arguments)
    for seed in (1, 2):
        with sanitizer.sanitize(seed=seed):
            again = run("triton", *arguments)
        for name in NAMES:
            assert_bitwise_equal(name, again[name], first[name])


def test_a_token_does_not_depend_on_its_batch(device):
    values, indices, offsets, W_dec, b_dec, _ = inputs(9, 30, 40, device=device)
    whole = gpu_decode.decode_forward(values, indices, offsets, W_dec, b_dec)
    start, stop = offsets[4], offsets[5]
    alone = gpu_decode.decode_forward(values[start:stop], indices[start:stop], offsets[4:6] - start, W_dec, b_dec)
    assert_bitwise_equal("row", alone[0], whole[4])


def test_latent_major_is_the_transposed_code(device):
    code = random_code(17, 11, device)
    values, tokens, offsets = gpu_decode.latent_major(*code)
    transposed = SparseCode(values, tokens, offsets, 17)
    assert torch.equal(transposed.to_dense(), code.to_dense().T)
    keys = transposed.token_indices() * 17 + tokens
    assert (keys.diff() > 0).all(), "tokens do not ascend inside the latents"


@interpreted
@pytest.mark.parametrize(("far_row", "far_column"), [(2**30 + 7, 1), (1, 2**29 + 1)], ids=["row", "column"])
def test_operand_offsets_beyond_32_bits(small_tiles, far_row, far_column):
    """Strides alone reach past 2³¹ elements, untouched in between; each stride fits 32 bits, the products do not."""
    values, indices, offsets, W_dec, b_dec, grad = inputs(3, 3, 5, torch.float16, active=1.0)
    memory = torch.empty(2, 2 * far_row + 4 * far_column + 1, dtype=torch.float16)
    far_W, far_grad = (m.as_strided((3, 5), (far_row, far_column)) for m in memory)
    with sanitizer.sanitize(race=False):
        far_W.copy_(W_dec), far_grad.copy_(grad)
        x_hat = gpu_decode.decode_forward(values, indices, offsets, far_W, b_dec)
        dvalues = gpu_decode._backward_values(far_grad, values, indices, offsets, far_W)
        dW_dec = gpu_decode._backward_weight(far_grad, values, indices, offsets, W_dec)
    exact = run("reference", values.double(), indices, offsets, W_dec.double(), b_dec.double(), grad.double())
    eager = run("reference", values, indices, offsets, W_dec, b_dec, grad)
    for name, actual in (("x_hat", x_hat), ("dvalues", dvalues), ("dW_dec", dW_dec)):
        assert_within_budget(name, actual, exact[name], eager[name])


@interpreted
def test_output_and_entry_offsets_beyond_32_bits(monkeypatch):
    """The last list of an output of 2³¹ + 2¹⁵ elements, its entries beyond 2³¹ in the list of entries."""
    lists, d, entries = 2**16 + 1, 2**15, 2**31 + 3
    monkeypatch.setattr(gpu_decode, "GATHER", GatherConfig(lanes=4, block_d=16, num_warps=1, num_stages=3))
    values, rows = torch.empty(entries, dtype=torch.float16), torch.empty(entries, dtype=torch.int32)
    values[-3:], rows[-3:] = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 1], dtype=torch.int32)
    offsets = torch.zeros(lists + 1, dtype=torch.int64)
    offsets[-2:] = torch.tensor([entries - 3, entries])
    table, out = normal(3, d), torch.empty(lists, d, dtype=torch.float16)
    with sanitizer.sanitize(race=False, programs=lambda dims: [dims[0] * dims[1] - 1]):
        gpu_decode._gather_sum(values, rows, offsets, table, bias=None, out=out)
    exact = (table.double() * torch.tensor([[2.0], [4.0], [1.0]])).sum(0)[-16:]
    assert_within_budget("out", out[-1, -16:], exact, exact.half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("F", [16384, 131072])
def test_full_shapes(device, F, dtype):
    N, d = 4096, 2304
    indices = torch.stack([torch.randperm(F)[:64].sort().values for _ in range(N)]).int().flatten().to(device)
    offsets = torch.arange(0, 64 * N + 1, 64, device=device)
    values = normal(64 * N, device=device).abs()
    W_dec, b_dec = (normal(*shape, dtype=dtype, device=device, seed=5) for shape in ((F, d), (d,)))
    grad = normal(N, d, dtype=dtype, device=device, seed=6)
    actual = run("triton", values, indices, offsets, W_dec, b_dec, grad)
    again = run("triton", values, indices, offsets, W_dec, b_dec, grad)
    for name in NAMES:
        assert_bitwise_equal(name, again[name], actual[name])
    rows = range(0, N, 512)  # the reference gathers [entries, d], too much at once
    arguments = values, indices, offsets, W_dec, b_dec
    for start in rows:
        entries = slice(64 * start, 64 * start + 64 * 16)
        part = values[entries], indices[entries], offsets[:17], W_dec, b_dec
        exact = reference.decode_forward(*(t.double() if t.is_floating_point() else t for t in part))
        token = slice(start, start + 16)
        assert_within_budget("x_hat", actual["x_hat"][token], exact, reference.decode_forward(*part))
        part = (grad[token], *part[:4], True, False)
        exact = reference.decode_backward(
            *(t.double() if hasattr(t, "dtype") and t.is_floating_point() else t for t in part)
        )
        assert_within_budget("dvalues", actual["dvalues"][entries], exact[0], reference.decode_backward(*part)[0])
    dense_values, tokens, starts = gpu_decode.latent_major(*arguments[:3], F)
    for latent in range(0, F, F // 16):
        entries = slice(int(starts[latent]), int(starts[latent + 1]))
        exact = dense_values[entries].double() @ grad[tokens[entries].long()].double()
        eager = (dense_values[entries] @ grad[tokens[entries].long()].float()).to(dtype)
        assert_within_budget("dW_dec", actual["dW_dec"][latent], exact, eager)
