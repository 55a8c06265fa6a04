"""The specification of the training step itself: numbers worked out by hand, bad input, and `sae_backward`."""

import ast
import math
from pathlib import Path

import pytest
import torch

from gemmascope.kernels import reference
from gemmascope.kernels.entries import ACTIVE, ByLatent, LatentState, LatentSums, Objective, Rule
from gemmascope.kernels.reference import training as spec
from tests.helpers import assert_bitwise_equal, normal

# Four tokens, so that 2/N = 1/2; three latents, d = 2; ε = 2, so that the window is |z − θ| < 1, both ends excluded.
#
#    x − b_dec      z = (x − b_dec)·W_enc + b_enc     entries
#    (1, 2)         ( 1,    3,    1/4)                0: z = θ, in the window; 1: active, upper edge; 2: below θ, inside
#    (5/4, −1)      ( 5/4,  0,   15/4)                0: active and in the window; 2: active
#    (−1, 0)        (−1,    1,   −7/4)                none; latent 1 is at the lower edge
#    (0, 3/2)       ( 0,    5/2, −5/4)                1: active and in the window; latent 0 is at the lower edge
EPSILON = 2.0
THETA = (1.0, 2.0, 0.5)
X_CENTRED = ((1.0, 2.0), (1.25, -1.0), (-1.0, 0.0), (0.0, 1.5))
W_ENC = ((1.0, 0.0, 2.0), (0.0, 1.0, -1.0))  # [d, F]
B_ENC = (0.0, 1.0, 0.25)
Z = ((0, 0, 1.0), (0, 1, 3.0), (0, 2, 0.25), (1, 0, 1.25), (1, 2, 3.75), (3, 1, 2.5))  # token, latent, z
IS_ACTIVE = (0, 1, 0, 1, 1, 1)
OFFSETS = [0, 3, 5, 5, 6]

# f·W_dec + b_dec − x:
#    3·(0, 1) + (1/2, −1/2) − (3/2, 3/2)                         = (−1, 1)
#    5/4·(1, 0) + 15/4·(1/2, 1) + (1/2, −1/2) − (7/4, −3/2)      = (15/8, 19/4)
#    (1/2, −1/2) − (−1/2, −1/2)                                  = (1, 0)
#    5/2·(0, 1) + (1/2, −1/2) − (1/2, 1)                         = (0, 1)
W_DEC = ((1.0, 0.0), (0.0, 1.0), (0.5, 1.0))  # [F, d]
B_DEC = (0.5, -0.5)
RESIDUAL = [[-1.0, 1.0], [1.875, 4.75], [1.0, 0.0], [0.0, 1.0]]
U = [-1.0, 1.0, 0.5, 1.875, 5.6875, 1.0]  # ⟨r_n, W_dec[j]⟩ of the entries
S = (0.125, 0.25, 7.0, 0.5)

# Latent by latent, tokens ascending, with du = u/2 and q = −(θ/2)·du − s/2 in the window:
#    entry   token  latent   f      du       q
#    0       0      0        0     −1/2      1/4 − 1/16
#    3       1      0        5/4    15/16   −15/32 − 1/8
#    1       0      1        3      1/2      outside
#    5       3      1        5/2    1/2     −1/2 − 1/4
#    2       0      2        0      1/4     −1/16 − 1/16
#    4       1      2        15/4   91/32    outside
ORDER, BY_LATENT = [0, 3, 1, 5, 2, 4], [0, 2, 4, 6]
TOKENS = [0, 1, 0, 3, 0, 1]
DEC = [0.0, 0.625, 1.5, 1.25, 0.0, 1.875]  # f/2
DU = [-0.5, 0.9375, 0.5, 0.5, 0.25, 2.84375]
DZ = [0.0, 0.9375, 0.5, 0.5, 0.0, 2.84375]
Q = [0.1875, -0.59375, 0.0, -0.75, -0.125, 0.0]
ALONG = [1.171875, 2.75, 10.6640625]  # Σ f/2·u
FIRING_COUNT = [1, 2, 1]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def tensors(dtype, *values):
    return [torch.tensor(value, dtype=dtype) for value in values]


def entries_by_hand(dtype=torch.float64, capacity=None):
    return spec.encode_entries(*tensors(dtype, X_CENTRED, W_ENC, B_ENC, THETA), EPSILON, capacity)


def residual_by_hand(entries, dtype=torch.float64):
    x_centred, W_dec, b_dec = tensors(dtype, X_CENTRED, W_DEC, B_DEC)
    return spec.residual_pass(entries, x_centred + b_dec, W_dec, b_dec)


def sums_by_hand(dtype=torch.float64, capacity=None, **objective):
    entries = entries_by_hand(dtype, capacity)
    u = residual_by_hand(entries, dtype).u
    return spec.latent_pass(
        entries, u, spec.by_latent(entries, 3), *tensors(dtype, THETA, S), Objective(EPSILON, **objective)
    )


def by_latent_sums(values):
    return [values[0] + values[1], values[2] + values[3], values[4] + values[5]]


class TestEntries:
    @both_dtypes
    @pytest.mark.parametrize("capacity", [None, 6, 8])
    def test_by_hand(self, dtype, capacity):
        entries, room = entries_by_hand(dtype, capacity), (capacity or 6) - 6
        tokens, latents, z = zip(*Z, strict=True)
        assert entries.z.dtype == dtype
        assert [t.dtype for t in entries[1:]] == [torch.int32, torch.int32, torch.int64]
        assert entries.z.tolist() == [*z] + [0.0] * room
        flagged = [j + ACTIVE * active for j, active in zip(latents, IS_ACTIVE, strict=True)]
        assert entries.latents.tolist() == flagged + [3] * room
        assert entries.tokens.tolist() == [*tokens] + [0] * room
        assert entries.offsets.tolist() == OFFSETS

    def test_what_does_not_fit_is_counted_and_left_out(self):
        entries, whole = entries_by_hand(capacity=4), entries_by_hand()
        for cut, full in zip(entries[:3], whole[:3], strict=True):
            assert cut.tolist() == full[:4].tolist()
        assert entries.offsets.tolist() == OFFSETS
        out = residual_by_hand(entries)
        # The second token lacks 15/4·(1/2, 1), the last one 5/2·(0, 1).
        assert out.residual.tolist() == [RESIDUAL[0], [0.0, 1.0], RESIDUAL[2], [0.0, -1.5]]
        assert out.l0.tolist() == [1, 1, 0, 0]
        assert out.u.tolist() == [*U[:3], 0.0]
        transposed = spec.by_latent(entries, 3)
        assert transposed.order.tolist() == [0, 3, 1, 2]
        assert transposed.offsets.tolist() == [0, 2, 3, 4]
        nothing = entries_by_hand(capacity=0)
        assert [len(t) for t in nothing] == [0, 0, 0, 5]
        assert nothing.offsets.tolist() == OFFSETS

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_is_widened(self, dtype):
        operands = tensors(dtype, X_CENTRED, W_ENC, B_ENC)
        with torch.autocast("cpu", torch.bfloat16):
            entries = spec.encode_entries(*operands, torch.tensor(THETA), EPSILON, None)
        assert_bitwise_equal("z", entries.z, entries_by_hand(torch.float32).z)

    def test_bad_input_is_an_entry_and_active(self):
        """NaN, ±Inf and a NaN θ, even Inf beside θ = Inf; a finite z below θ = Inf is none."""
        inf, nan = math.inf, math.nan
        b_enc = torch.tensor([0.0, nan, inf, -inf, 2.0, -2.0, 0.0, inf])
        theta = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, -inf, inf, inf])
        x, W_enc = torch.zeros(1, 2), torch.zeros(2, 8)
        entries = spec.encode_entries(x, W_enc, b_enc, theta, EPSILON, None)
        bad = [1, 2, 3, 4, 5, 7]
        # z = 0 beside θ = 1 is at the edge of the window
        assert entries.latents.tolist() == [ACTIVE + j for j in bad]
        assert_bitwise_equal("z", entries.z, b_enc[bad])
        code = spec.dense_encode(x, W_enc, b_enc, theta, EPSILON)
        assert code.f[0].tolist() == pytest.approx([0, nan, inf, nan, nan, -2.0, 0, nan], nan_ok=True)
        assert code.active.nonzero()[:, 1].tolist() == bad
        assert (code.l0.tolist(), code.n_entries.item()) == ([6.0], 6)
        assert code.firing_count.tolist() == code.touched.tolist() == [0, 1, 1, 1, 1, 1, 0, 1]


class TestPasses:
    @both_dtypes
    def test_residual_by_hand(self, dtype):
        out = residual_by_hand(entries_by_hand(dtype, 7), dtype)
        assert {t.dtype for t in out} == {dtype}
        assert out.residual.tolist() == RESIDUAL
        assert out.squared_error.tolist() == [2.0, 26.078125, 1.0, 1.0]
        assert out.l0.tolist() == [1, 2, 0, 1]
        assert out.u[:6].tolist() == U

    def test_residual_is_rounded_after_its_square_and_before_u(self):
        x, W_dec, b_dec = torch.tensor([[-1.0 - 2.0**-10, 0.0]]), torch.tensor([[1.0, 0.0]]).bfloat16(), torch.zeros(2)
        entries = spec.encode_entries(
            torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1), torch.tensor([1.5]), EPSILON, None
        )
        out = spec.residual_pass(entries, x, W_dec, b_dec)
        assert out.residual.tolist() == [[1.0, 0.0]]
        assert out.residual.dtype == torch.bfloat16
        assert out.squared_error.tolist() == [(1 + 2.0**-10) ** 2]
        assert out.u.tolist() == [1.0]
        assert out.l0.tolist() == [0.0]

    def test_a_z_that_is_not_finite_is_not_hidden_by_its_gate(self):
        entries = entries_by_hand()
        entries.z[0] = -math.inf  # of an entry that is not active
        assert residual_by_hand(entries).squared_error.isnan().tolist() == [True, False, False, False]

    def test_by_latent_by_hand(self):
        order, offsets = spec.by_latent(entries_by_hand(capacity=8), 3)
        assert order.tolist() == [*ORDER, 6, 7]
        assert offsets.tolist() == BY_LATENT
        assert order.dtype == offsets.dtype == torch.int64

    @both_dtypes
    def test_sums_by_hand(self, dtype):
        sums = sums_by_hand(dtype)
        assert [t.dtype for t in sums] == [dtype, dtype, torch.int32, dtype, dtype, dtype, torch.int32]
        assert sums.dec.tolist() == DEC
        assert sums.dz.tolist() == DZ
        assert sums.tokens.tolist() == TOKENS
        assert sums.db_enc.tolist() == by_latent_sums(DZ)
        assert sums.dthreshold.tolist() == by_latent_sums(Q)
        assert sums.along.tolist() == ALONG
        assert sums.firing_count.tolist() == FIRING_COUNT
        assert [len(t) for t in sums_by_hand(dtype, 9)] == [9, 9, 9, 3, 3, 3, 3]

    def test_frequency_slope(self):
        """t = 1/4·(1, 2, 1), and each entry in the window adds −t/2."""
        sums = sums_by_hand(frequency_slope=0.25)
        assert sums.dthreshold.tolist() == [Q[0] + Q[1] - 2 * 0.125, Q[3] - 0.25, Q[4] - 0.125]
        assert sums.dz.tolist() == DZ

    def test_ste_to_z(self):
        sums = sums_by_hand(ste_to_z=True)
        # −3/16; 15/16 + 19/32; 1/2; 1/2 + 3/4; 1/8; 91/32
        assert sums.dz.tolist() == [-0.1875, 1.53125, 0.5, 1.25, 0.125, 2.84375]
        assert sums.db_enc.tolist() == [1.34375, 1.75, 2.96875]
        assert sums.dthreshold.tolist() == by_latent_sums(Q)

    def test_tanh_slope(self):
        """1/2·tanh'(a) = 2/(eᵃ + e⁻ᵃ)² with eᵃ = 2^(f/(5/4)): 1/2 for f = 0, 2/(5/2)² for f = 5/4."""
        sums = sums_by_hand(tanh_slope=0.5, tanh_scale=math.log(2) / 1.25)
        slope = [2 / (2**k + 2**-k) ** 2 for k in (0, 1, 2.4, 2, 0, 3)]
        du = [u + more for u, more in zip(DU, slope, strict=True)]
        assert du[:2] == pytest.approx([0.0, 0.9375 + 0.32])
        assert sums.dz.tolist() == pytest.approx([0, du[1], du[2], du[3], 0, du[5]], rel=1e-14)
        # −(θ/2)·du − s/2 of the entries in the window
        q = [-0.0625, -du[1] / 2 - 0.125, 0.0, -du[3] - 0.25, -du[4] / 4 - 0.0625, 0.0]
        assert sums.dthreshold.tolist() == pytest.approx(by_latent_sums(q), rel=1e-14)
        assert sums.along.tolist() == ALONG, "the tanh penalty has no part in dW_dec"

    @both_dtypes
    def test_weight_gradients_by_hand(self, dtype):
        transposed, sums = spec.by_latent(entries_by_hand(dtype), 3), sums_by_hand(dtype, 8)
        dW_enc, dW_dec = spec.weight_gradients(transposed, sums, *tensors(dtype, RESIDUAL, X_CENTRED))
        # 15/16·(5/4, −1);   1/2·(1, 2) + 1/2·(0, 3/2);   91/32·(5/4, −1)
        assert dW_enc.tolist() == [[1.171875, -0.9375], [0.5, 1.75], [3.5546875, -2.84375]]
        # 5/8·(15/8, 19/4);   3/2·(−1, 1) + 5/4·(0, 1);   15/8·(15/8, 19/4)
        assert dW_dec.tolist() == [[1.171875, 2.96875], [-1.5, 2.75], [3.515625, 8.90625]]
        assert dW_enc.dtype == dW_dec.dtype == dtype
        assert (dW_dec * torch.tensor(W_DEC)).sum(1).tolist() == ALONG

    def test_encoder_times_by_hand(self):
        """15/16·(1, 0) + 1·(0, 1) + 91/32·(2, −1)"""
        W_enc = torch.tensor(W_ENC).T.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            product = spec.encoder_times(W_enc, torch.tensor(by_latent_sums(DZ)))
        assert product.tolist() == [6.625, -1.84375]
        assert product.dtype == torch.float32


class TestDense:
    @both_dtypes
    def test_encode_by_hand(self, dtype):
        code = spec.dense_encode(*tensors(dtype, X_CENTRED, W_ENC, B_ENC, THETA), EPSILON)
        assert code.f.tolist() == [[0, 3, 0], [1.25, 0, 3.75], [0, 0, 0], [0, 2.5, 0]]
        assert code.active.int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
        assert code.window.int().tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
        assert code.l0.tolist() == [1, 2, 0, 1]
        assert code.firing_count.tolist() == FIRING_COUNT
        assert code.touched.tolist() == [2, 2, 2]
        assert code.n_entries.item() == 6
        dtypes = [dtype, torch.bool, torch.bool, dtype, torch.int32, torch.int32, torch.int64]
        assert [t.dtype for t in code] == dtypes

    @pytest.mark.parametrize(
        "objective",
        [{}, {"frequency_slope": 0.25}, {"ste_to_z": True}, {"tanh_slope": 0.5, "tanh_scale": 0.7}],
        ids=["plain", "frequency", "ste_to_z", "tanh"],
    )
    @both_dtypes
    def test_backward_says_what_the_entries_say(self, dtype, objective):
        operands, (theta, s) = tensors(dtype, X_CENTRED, W_ENC, B_ENC, THETA), tensors(dtype, THETA, S)
        code, sums = spec.dense_encode(*operands, EPSILON), sums_by_hand(dtype, **objective)
        u = torch.tensor(RESIDUAL, dtype=dtype) @ torch.tensor(W_DEC, dtype=dtype).T
        dz, db_enc, dthreshold = spec.dense_backward(u, code, theta, s, Objective(EPSILON, **objective))
        expected = torch.zeros(4, 3, dtype=dtype)
        expected[TOKENS, [0, 0, 1, 1, 2, 2]] = sums.dz
        assert dz is u
        for got, want in ((dz, expected), (db_enc, sums.db_enc), (dthreshold, sums.dthreshold)):
            torch.testing.assert_close(got, want)

    def test_a_gradient_that_is_not_finite_is_not_hidden_by_a_closed_gate(self):
        code = spec.dense_encode(*tensors(torch.float64, X_CENTRED, W_ENC, B_ENC, THETA), EPSILON)
        u = torch.zeros(4, 3, dtype=torch.float64)
        u[2, 1] = math.inf
        out = spec.dense_backward(u, code, *tensors(torch.float64, THETA, S), Objective(EPSILON))
        assert [t.isnan().sum().item() for t in out] == [1, 1, 1]

    def test_no_tokens(self):
        operands = tensors(torch.float32, X_CENTRED, W_ENC, B_ENC, THETA)
        code = spec.dense_encode(operands[0][:0], *operands[1:], EPSILON)
        out = spec.dense_backward(torch.zeros(0, 3), code, operands[3], torch.zeros(0), Objective(EPSILON))
        assert out[1].tolist() == out[2].tolist() == [0, 0, 0]
        entries = spec.encode_entries(operands[0][:0], *operands[1:], EPSILON, None)
        transposed = spec.by_latent(entries, 3)
        sums = spec.latent_pass(entries, entries.z, transposed, operands[3], torch.zeros(0), Objective(EPSILON))
        assert sums.db_enc.tolist() == sums.firing_count.tolist() == [0, 0, 0]


# The second update, k = 2, by β2 = 1/2: v counts as v/(1 − 1/4). The second moments are such that every one of a
# touched latent becomes 3, so that √(v/(3/4)) = 2, and with lr = eps = 1/2 a parameter moves by −g/2/(2 + 1/2) = −g/5.
# The first latent owes two updates, v ← v/4 + g²/2; the second one, v ← v/2 + g²/2; the third is idle.
#
#                first latent, g and v        second latent, g and v
#    W_enc       (1, −2)     (10, 4)          (2, 0)       (2, 6)
#    W_dec       (0, 2)      (12, 4)          (2, −3/2)    (2, 15/4)   (without 3·(1, 0) and 1·(3/5, 4/5))
#    b_enc       1           10               −2           2
#    θ           2           4                −1           5
RULE = Rule(learning_rate=0.5, beta2=0.5, eps=0.5, log_threshold=False)
DW_ENC, DW_DEC = ((1.0, -2.0), (2.0, 0.0)), ((3.0, 2.0), (2.6, -0.7))
DB_ENC = (1.0, -2.0, math.nan)
# The same matrices from entries: one of the first latent, on token 0; two of the second, on both tokens.
UPDATE_TOKENS, UPDATE_DZ, UPDATE_DEC = (0, 0, 1), (1.0, 1.0, 1.0), (1.0, 0.5, 1.0)
UPDATE_ROWS = ((3.0, 2.0), (1.1, -1.7)), ((1.0, -2.0), (1.0, 2.0))  # residual, x − b_dec


def state_by_hand(dtype=torch.float64, low=False):
    state = tensors(
        dtype,
        ((1.0, 2.0), (0.0, -1.0), (5.0, 6.0)),
        ((1.0, 0.0), (0.6, 0.8), (0.0, 1.0)),
        (1.0, -1.0, 7.0),
        (0.1, 2.0, 8.0),
        ((10.0, 4.0), (2.0, 6.0), (9.0, 9.0)),
        ((12.0, 4.0), (2.0, 3.75), (9.0, 9.0)),
        (10.0, 2.0, 9.0),
        (4.0, 5.0, 9.0),
    )
    copies = [t.bfloat16() for t in state[:2]] if low else []
    return LatentState(*state, torch.tensor([0, 1, 0]), *copies)


def with_first_moments(state: LatentState) -> LatentState:
    """For β1 = 1/2: m is 4·g and 2·g of the two latents, so that m ← m/4 + g/2 and m ← m/2 + g/2 are 3/2·g both, which
    count as m/(1 − 1/4) = 2·g: a parameter moves by −2·g/5."""
    first = tensors(
        state.b_enc.dtype,
        ((4.0, -8.0), (4.0, 0.0), (9.0, 9.0)),
        ((0.0, 8.0), (4.0, -3.0), (9.0, 9.0)),
        (4.0, -4.0, 9.0),
        (8.0, -2.0, 9.0),
    )
    return state._replace(W_enc_m=first[0], W_dec_m=first[1], b_enc_m=first[2], threshold_m=first[3])


def update_by_hand(state, source, rule, dthreshold, ok=1):
    dtype = state.b_enc.dtype
    db_enc, dthreshold = tensors(dtype, DB_ENC, (*dthreshold, math.nan))
    scalars = rule, torch.tensor(ok, dtype=torch.int32), torch.tensor(1)
    if source == "dense":
        nan = (math.nan, math.nan)
        gradients = tensors(dtype, (*DW_ENC, nan), (*DW_DEC, nan))
        touched = torch.tensor([1, 7, 0], dtype=torch.int32)
        return spec.update_from_dense(state, *gradients, db_enc, dthreshold, touched, *scalars)
    along = torch.tensor([3.0, 1.0, math.nan], dtype=dtype)
    sums = LatentSums(
        *tensors(dtype, (*UPDATE_DEC, math.nan), (*UPDATE_DZ, math.nan)),
        torch.tensor([*UPDATE_TOKENS, 2**31 - 1], dtype=torch.int32),
        *(db_enc, dthreshold, along, torch.zeros(3, dtype=torch.int32)),
    )
    transposed = ByLatent(torch.arange(4), torch.tensor([0, 1, 3, 3]))
    return spec.update_from_entries(state, transposed, sums, *tensors(dtype, *UPDATE_ROWS), *scalars)


@pytest.mark.parametrize("source", ["entries", "dense"])
class TestUpdate:
    @pytest.mark.parametrize(
        ("rule", "dthreshold", "theta"),
        [
            # 1/10 − 2/5 is below 0; 2 + 1/5
            pytest.param(RULE, (2.0, -1.0), (0.0, 2.2), id="raw"),
            # dL/dlog θ = θ·dL/dθ is 2 and −1 again
            pytest.param(
                RULE._replace(log_threshold=True),
                (20.0, -0.5),
                (0.1 * math.exp(-0.4), 2 * math.exp(0.2)),
                id="log",
            ),
        ],
    )
    @both_dtypes
    def test_by_hand(self, source, rule, dthreshold, theta, dtype):
        state, before = state_by_hand(dtype), state_by_hand(dtype)
        update_by_hand(state, source, rule, dthreshold)
        expected = {
            "W_enc": [[0.8, 2.4], [-0.4, -1.0]],
            "W_dec": [[1 / 1.16**0.5, -0.4 / 1.16**0.5], [0.2 / 1.25**0.5, 1.1 / 1.25**0.5]],
            "b_enc": [0.8, -0.6],
            "threshold": theta,
            "W_enc_v": [[3.0, 3.0]] * 2,
            "W_dec_v": [[3.0, 3.0]] * 2,
            "b_enc_v": [3.0, 3.0],
            "threshold_v": [3.0, 3.0],
            "last": [2, 2],
        }
        for name, value in expected.items():
            got = getattr(state, name)
            torch.testing.assert_close(got[:2], torch.tensor(value, dtype=got.dtype), msg=lambda m, n=name: f"{n}: {m}")
            assert_bitwise_equal(name, got[2], getattr(before, name)[2])

    @pytest.mark.parametrize(
        ("log_threshold", "dthreshold", "theta"),
        [
            pytest.param(False, (2.0, -1.0), (0.0, 2.4), id="raw"),
            pytest.param(True, (20.0, -0.5), (0.1 * math.exp(-0.8), 2 * math.exp(0.4)), id="log"),
        ],
    )
    @both_dtypes
    def test_with_first_moments_by_hand(self, source, log_threshold, dthreshold, theta, dtype):
        state, before = (with_first_moments(state_by_hand(dtype)) for _ in range(2))
        update_by_hand(state, source, RULE._replace(beta1=0.5, log_threshold=log_threshold), dthreshold)
        expected = {
            "W_enc": [[0.6, 2.8], [-0.8, -1.0]],
            "W_dec": [[1 / 1.64**0.5, -0.8 / 1.64**0.5], [-0.2 / 2**0.5, 1.4 / 2**0.5]],
            "b_enc": [0.6, -0.2],
            "threshold": theta,
            "W_enc_v": [[3.0, 3.0]] * 2,
            "W_enc_m": [[1.5, -3.0], [3.0, 0.0]],
            "W_dec_m": [[0.0, 3.0], [3.0, -2.25]],
            "b_enc_m": [1.5, -3.0],
            "threshold_m": [3.0, -1.5],
            "last": [2, 2],
        }
        for name, value in expected.items():
            got = getattr(state, name)
            torch.testing.assert_close(got[:2], torch.tensor(value, dtype=got.dtype), msg=lambda m, n=name: f"{n}: {m}")
            assert_bitwise_equal(name, got[2], getattr(before, name)[2])

    def test_copies_and_permission(self, source):
        state, before = state_by_hand(low=True), state_by_hand(low=True)
        update_by_hand(state, source, RULE, (2.0, -1.0), ok=0)
        for name, got, want in zip(state._fields, state, before, strict=True):
            if got is not None:
                assert_bitwise_equal(name, got, want)
        update_by_hand(state, source, RULE, (2.0, -1.0))
        for low, weight in ((state.W_enc_low, state.W_enc), (state.W_dec_low, state.W_dec)):
            assert torch.equal(low, weight.bfloat16())
        assert not torch.equal(state.W_enc_low, before.W_enc_low)

    def test_bad_gradients_stay_visible(self, source):
        state = state_by_hand()
        update_by_hand(state, source, RULE, (math.nan, math.inf))
        assert state.threshold.isnan().tolist() == [True, True, False]


def test_settle_by_hand():
    """v/4, v/2 and v/4 up to the second update; the power is that of fp64."""
    state = state_by_hand()
    spec.settle(state, torch.tensor(2), 0.5)
    assert state.W_enc_v.tolist() == [[2.5, 1.0], [1.0, 3.0], [2.25, 2.25]]
    assert state.W_dec_v.tolist() == [[3.0, 1.0], [1.0, 1.875], [2.25, 2.25]]
    assert state.b_enc_v.tolist() == [2.5, 1.0, 2.25]
    assert state.threshold_v.tolist() == [1.0, 2.5, 2.25]
    assert state.last.tolist() == [2, 2, 2]
    assert all(map(torch.equal, state[:4], state_by_hand()[:4]))
    state = with_first_moments(state_by_hand())
    spec.settle(state, torch.tensor(2), 0.5, 0.25)
    assert state.b_enc_v.tolist() == [2.5, 1.0, 2.25]
    assert state.b_enc_m.tolist() == [0.25, -1.0, 0.5625]
    assert state.W_dec_m.tolist() == [[0.0, 0.5], [1.0, -0.75], [0.5625, 0.5625]]
    long = state_by_hand(torch.float32)
    spec.settle(long, torch.tensor(20_000), 0.999)
    assert long.b_enc_v[0].item() == pytest.approx(10 * 0.999**20_000, rel=2e-7)


@pytest.mark.parametrize("route", ["entries", "dense"])
def test_gradients_are_those_of_sae_backward(route):
    N, d, F, epsilon, coefficient = 9, 5, 14, 0.7, 0.3
    shapes = ((N, d), (d, F), (F,), (F, d), (d,), (F,))
    x, *weights, theta = (normal(*shape, dtype=torch.float64, seed=seed) for seed, shape in enumerate(shapes))
    p = reference.Parameters(*weights, theta.abs())
    expected = reference.sae_backward(x, p, reference.sae_forward(x, p), coefficient, epsilon)
    s, objective = torch.full((N,), coefficient / N, dtype=torch.float64), Objective(epsilon)
    x_centred = x - p.b_dec
    encode = x_centred, p.W_enc, p.b_enc, p.threshold, epsilon
    if route == "entries":
        entries = spec.encode_entries(*encode, None)
        out = spec.residual_pass(entries, x, p.W_dec, p.b_dec)
        transposed = spec.by_latent(entries, F)
        sums = spec.latent_pass(entries, out.u, transposed, p.threshold, s, objective)
        residual, db_enc, dthreshold = out.residual, sums.db_enc, sums.dthreshold
        dW_enc, dW_dec = spec.weight_gradients(transposed, sums, residual, x_centred)
    else:
        code = spec.dense_encode(*encode)
        residual = code.f @ p.W_dec + p.b_dec - x
        dz, db_enc, dthreshold = spec.dense_backward(residual @ p.W_dec.T, code, p.threshold, s, objective)
        dW_enc, dW_dec = dz.T @ x_centred, code.f.T @ residual * (2 / N)
    db_dec = residual.sum(0) * (2 / N) - spec.encoder_times(p.W_enc.T, db_enc)
    actual = reference.Parameters(dW_enc.T, db_enc, dW_dec, db_dec, dthreshold)
    for name, got, want in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("path", sorted(Path(reference.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_the_specification_imports_nothing_that_is_written_for_speed(path):
    """Its own files, and the types that operators exchange."""
    own = {file.stem for file in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert (
                (node.level == 1 and node.module in own)
                or (node.level, node.module) in ((2, "entries"), (2, "autocast"))
                or (node.level == 0 and not node.module.startswith("gemmascope"))
            ), ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= {"functools", "torch"}
