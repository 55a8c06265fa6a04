"""The reference itself: numbers worked out by hand, boundary conventions, dtypes, and autograd where it applies."""

import math

import pytest
import torch

from gemmascope import kernels
from gemmascope.kernels import reference
from tests.helpers import lattice, normal

THETA, EPSILON = 1.5, 0.5  # neither 0 nor 1, so that no factor of them can go missing unseen

# One latent, one token a row. |z − θ| < ε/2 means 1.25 < z < 1.75, both ends excluded.
#       z       u     s     f      dpre  dθ: −(θ/ε)·u − s/ε = −3u − 2s inside the window
HAND = [
    (1.0,     3.0,  2.0,  0.0,    0.0,    0.0),
    (1.25,    5.0,  4.0,  0.0,    0.0,    0.0),   # the lower edge of the window is outside
    (1.3125,  7.0,  6.0,  0.0,    0.0,  -33.0),   # inactive, yet inside
    (1.5,    11.0,  8.0,  0.0,    0.0,  -49.0),   # z = θ is inactive
    (1.625,  13.0, 10.0,  1.625, 13.0,  -59.0),
    (1.75,   17.0, 12.0,  1.75,  17.0,    0.0),   # the upper edge is outside
    (2.5,    19.0, 14.0,  2.5,   19.0,    0.0),
    (-1.5,   23.0, 16.0,  0.0,    0.0,    0.0),
]  # fmt: skip
B_ENC = 0.25
EVERY_DTYPE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def hand_inputs(rows=slice(None), dtype=torch.float64):
    """pre, b_enc, threshold, u, s and the expected f, dpre, dθ terms, of the chosen rows."""
    z, u, s, f, dpre, terms = torch.tensor(HAND[rows], dtype=torch.float64).T
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    pre = (z - B_ENC)[:, None].to(dtype)
    b_enc, threshold = torch.tensor([B_ENC], dtype=dtype), torch.tensor([THETA], dtype=parameter_dtype)
    return pre, b_enc, threshold, u[:, None].to(dtype), s.to(parameter_dtype), f[:, None], dpre[:, None], terms


class TestJumpReLU:
    @pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
    def test_by_hand(self, dtype):
        pre, b_enc, threshold, u, s, f, dpre, _ = hand_inputs(dtype=dtype)
        leaves = [t.requires_grad_() for t in (pre, b_enc, threshold)]
        out = kernels.jumprelu(*leaves, EPSILON, impl="reference")
        grads = torch.autograd.grad((out.f, out.l0), leaves, (u, s))
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        assert [t.dtype for t in out] == [dtype, accumulator, torch.int32]
        assert [t.dtype for t in grads] == [dtype, dtype, threshold.dtype]
        assert torch.equal(out.f.double(), f)
        assert out.l0.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
        assert out.firing_count.tolist() == [3]
        assert torch.equal(grads[0].double(), dpre)
        assert grads[1].item() == 49
        assert grads[2].item() == -141

    @pytest.mark.parametrize("row", range(len(HAND)))
    def test_threshold_gradient_entry_by_entry(self, row):
        pre, b_enc, threshold, u, s, *_, terms = hand_inputs(slice(row, row + 1))
        *_, dthreshold = reference.jumprelu_backward(u, s, pre, b_enc, threshold, EPSILON)
        assert dthreshold.tolist() == terms.tolist()

    def test_threshold_gradient_is_the_derivative_of_the_expected_loss(self):
        """With z uniform on [0, 4], E[u·f + s·1[z > θ]] = u·(16 − θ²)/8 + s·(4 − θ)/4, whatever ε."""
        u, s, theta, n = 3.0, 5.0, 1.5, 2**14
        z = ((torch.arange(n, dtype=torch.float64) + 0.5) * 4 / n)[:, None]
        zero, threshold = torch.zeros(1, dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)
        grad_f, grad_l0 = torch.full_like(z, u), torch.full((n,), s, dtype=torch.float64)
        for epsilon in (0.25, 0.5, 2.0):
            *_, dthreshold = reference.jumprelu_backward(grad_f, grad_l0, z, zero, threshold, epsilon)
            assert dthreshold.item() / n == pytest.approx(-(u * theta + s) / 4, rel=1e-9)

    NOT_FINITE = (
        # z, θ, f, active, gate, window
        (math.nan, THETA, math.nan, 0, math.nan, math.nan),
        (math.inf, THETA, math.inf, 1, 1.0, 0.0),
        (-math.inf, THETA, math.nan, 0, 0.0, 0.0),
        (2.5, math.nan, math.nan, 0, math.nan, math.nan),
        (2.5, math.inf, 0.0, 0, 0.0, 0.0),
        (math.inf, math.inf, math.nan, 0, 0.0, math.nan),
    )

    @pytest.mark.parametrize(("z", "theta", "f", "active", "gate", "window"), NOT_FINITE)
    def test_not_finite(self, z, theta, f, active, gate, window):
        pre, threshold = torch.tensor([[z]], dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        out = reference.jumprelu_forward(pre, zero, threshold)
        got = [out[0].item(), out[1].item(), out[2].item(), reference.gate(pre, threshold).item()]
        got.append(reference.window(pre, threshold, EPSILON).item())
        assert got == pytest.approx([f, active, active, gate, window], nan_ok=True)

    @pytest.mark.parametrize("where", ["u", "s"])
    def test_gradient_that_is_not_finite_is_not_hidden_by_a_closed_gate(self, where):
        pre, b_enc, threshold, u, s, *_ = hand_inputs(slice(0, 1))
        {"u": u, "s": s}[where].fill_(math.inf)
        dpre, db_enc, dthreshold = reference.jumprelu_backward(u, s, pre, b_enc, threshold, EPSILON)
        assert dthreshold.isnan().all()
        assert dpre.isnan().all() == db_enc.isnan().all() == (where == "u")

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
    def test_empty(self, shape):
        n, f = shape
        leaves = [torch.zeros(size, requires_grad=True) for size in (shape, (f,), (f,))]
        out = kernels.jumprelu(*leaves, EPSILON)
        assert [tuple(t.shape) for t in out] == [shape, (n,), (f,)]
        grads = torch.autograd.grad((out.f, out.l0), leaves, (torch.ones(shape), torch.ones(n)))
        assert [g.count_nonzero().item() for g in grads] == [0, 0, 0]

    def test_ignores_autocast(self):
        pre, b_enc, threshold = normal(7, 5), normal(5, seed=1), normal(5, seed=2)
        with torch.autocast("cpu", torch.bfloat16):
            cast = kernels.jumprelu(pre, b_enc, threshold, EPSILON)
        assert all(map(torch.equal, cast, kernels.jumprelu(pre, b_enc, threshold, EPSILON)))


class TestEncode:
    X = ((1.0, 2.0), (-1.0, 0.5), (0.0, 0.0))
    W_ENC = ((2.0, -1.0, 0.5), (1.0, 3.0, -0.25))
    # x·W_enc + b_enc with b_enc = (0.5, -0.5, 0.25): [[4.5, 4.5, 0.25], [-1, 2, -0.375], [0.5, -0.5, 0.25]]

    @pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
    def test_by_hand(self, dtype):
        theta = torch.tensor([0.5, 2.0, 0.125], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        b_enc = torch.tensor([0.5, -0.5, 0.25], dtype=dtype)
        code = kernels.encode(torch.tensor(self.X, dtype=dtype), torch.tensor(self.W_ENC, dtype=dtype), b_enc, theta)
        assert code.values.tolist() == [4.5, 4.5, 0.25, 0.25]  # 2.0 and 0.5 equal their thresholds
        assert code.indices.tolist() == [0, 1, 2, 2]
        assert code.offsets.tolist() == [0, 3, 3, 4]
        assert code.values.dtype == theta.dtype
        assert (code.indices.dtype, code.offsets.dtype) == (torch.int32, torch.int64)

    def test_bad_input_stays_visible(self):
        x = torch.tensor([[math.nan], [math.inf], [-math.inf], [3.0]])
        code = kernels.encode(x, torch.ones(1, 1), torch.zeros(1), torch.tensor([THETA]))
        assert code.offsets.tolist() == [0, 1, 2, 3, 4]
        assert code.values.tolist() == pytest.approx([math.nan, math.inf, math.nan, 3.0], nan_ok=True)


class TestDecode:
    def code(self, dtype=torch.float64):
        values = torch.tensor([2.0, 0.5, 4.0, -1.5], dtype=dtype)
        indices = torch.tensor([0, 2, 2, 1], dtype=torch.int32)
        return kernels.SparseCode(values, indices, torch.tensor([0, 2, 2, 4]), 3)

    W_DEC = ((1.0, 2.0), (3.0, -1.0), (0.5, 0.25))

    @pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
    def test_by_hand(self, dtype):
        code = self.code(torch.float64 if dtype == torch.float64 else torch.float32)
        x_hat = kernels.decode(code, torch.tensor(self.W_DEC, dtype=dtype), torch.tensor([0.25, -0.25]))
        assert x_hat.dtype == dtype
        assert x_hat.tolist() == [[2.5, 3.875], [0.25, -0.25], [-2.25, 2.25]]

    def test_gradcheck(self):
        code = self.code()
        leaves = [code.values, torch.tensor(self.W_DEC, dtype=torch.float64), torch.tensor([0.25, -0.25]).double()]

        def decode(values, W_dec, b_dec):
            return kernels.decode(code._replace(values=values), W_dec, b_dec, impl="reference")

        assert torch.autograd.gradcheck(decode, [leaf.requires_grad_() for leaf in leaves])


def random_case(d=5, f=11, n=7):
    """x and parameters in fp64, thresholds positive."""
    shapes = [(n, d), (d, f), (f,), (f, d), (d,), (f,)]
    x, *tensors = (normal(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes))
    return x, reference.Parameters(*tensors[:-1], tensors[-1].abs())


class TestAutoencoder:
    def test_by_hand(self):
        x = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
        p = reference.Parameters(
            W_enc=torch.tensor([[2.0, -1.0]]),
            b_enc=torch.tensor([0.5, 0.25]),
            W_dec=torch.tensor([[1.5], [-0.5]]),
            b_dec=torch.tensor([0.5]),
            threshold=torch.tensor([2.0, 0.75]),
        )
        out = reference.sae_forward(x, p)
        assert out.z.tolist() == [[2.5, -0.75], [-1.5, 1.25]]
        assert out.f.tolist() == [[2.5, 0.0], [0.0, 1.25]]
        assert out.l0.tolist() == [1, 1]
        assert out.x_hat.tolist() == [[4.25], [-0.125]]
        assert reference.sae_loss(x, out, 0.5).item() == (2.75**2 + 0.375**2) / 2 + 0.5
        for parametrisation, dtheta in (("raw", [-6.8, -0.0875]), ("log", [-13.6, -0.065625])):
            grads = reference.sae_backward(x, p, out, 0.5, 1.25, threshold_parametrisation=parametrisation)
            assert grads.W_enc.tolist() == [[4.125, 0.1875]]
            assert grads.b_enc.tolist() == [4.125, -0.1875]
            assert grads.W_dec.tolist() == [[6.875], [0.46875]]
            assert grads.b_dec.tolist() == [-5.3125]
            assert grads.threshold.tolist() == pytest.approx(dtheta, rel=1e-12)

    @pytest.mark.parametrize("pre_encoder_bias", [True, False])
    @pytest.mark.parametrize("parametrisation", ["raw", "log"])
    def test_backward_is_what_autograd_makes_of_the_public_operator(self, parametrisation, pre_encoder_bias):
        x, p = random_case()
        epsilon, coefficient = 0.7, 0.3
        leaves = [t.clone().requires_grad_() for t in p[:-1]]
        leaves.append((p.threshold.log() if parametrisation == "log" else p.threshold.clone()).requires_grad_())
        W_enc, b_enc, W_dec, b_dec, t = leaves
        pre = ((x - b_dec) if pre_encoder_bias else x) @ W_enc
        out = kernels.jumprelu(pre, b_enc, t.exp() if parametrisation == "log" else t, epsilon, impl="reference")
        loss = ((x - out.f @ W_dec - b_dec).square().sum(1) + coefficient * out.l0).mean()
        expected = torch.autograd.grad(loss, leaves)
        forward = reference.sae_forward(x, p, pre_encoder_bias)
        torch.testing.assert_close(loss, reference.sae_loss(x, forward, coefficient))
        actual = reference.sae_backward(x, p, forward, coefficient, epsilon, pre_encoder_bias, parametrisation)
        for name, got, want in zip(reference.Parameters._fields, actual, expected, strict=True):
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")

    @pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
    def test_smooth_parts_match_finite_differences(self, name):
        x, p = random_case()
        direction, h = normal(*getattr(p, name).shape, dtype=torch.float64, seed=9), 1e-6

        def loss(step):
            moved = p._replace(**{name: getattr(p, name) + step * direction})
            return reference.sae_loss(x, reference.sae_forward(x, moved), 0.3).item()

        grads = reference.sae_backward(x, p, reference.sae_forward(x, p), 0.3, 0.7)
        slope = (getattr(grads, name) * direction).sum().item()
        assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(slope, rel=1e-6)

    def test_unknown_parametrisation(self):
        x, p = random_case()
        with pytest.raises(ValueError, match="threshold_parametrisation: expected 'log' or 'raw', got 'exp'"):
            reference.sae_backward(x, p, reference.sae_forward(x, p), 0.3, 0.7, threshold_parametrisation="exp")


class TestSparseCode:
    def test_by_hand(self):
        code = kernels.SparseCode.from_dense(torch.tensor([[0.0, 2.5, 0.0], [0.0, 0.0, 0.0], [1.5, -3.5, math.nan]]))
        assert (code.n_tokens, code.nnz, code.d_sae) == (3, 4, 3)
        assert code.indices.tolist() == [1, 0, 1, 2]
        assert code.offsets.tolist() == [0, 1, 1, 4]
        assert code.values.tolist() == pytest.approx([2.5, 1.5, -3.5, math.nan], nan_ok=True)
        assert code.l0().tolist() == [1, 0, 3]
        assert code.token_indices().tolist() == [0, 2, 2, 2]
        assert code.firing_count().tolist() == [1, 2, 1]

    @pytest.mark.parametrize("shape", [(5, 7), (0, 7), (5, 0)])
    def test_dense_round_trip(self, shape):
        dense = lattice(*shape).relu()
        assert torch.equal(kernels.SparseCode.from_dense(dense).to_dense(), dense)

    def test_refuses_other_ranks(self):
        with pytest.raises(ValueError, match=r"f: expected shape \[N, d_sae\], got \[3\]"):
            kernels.SparseCode.from_dense(torch.zeros(3))
