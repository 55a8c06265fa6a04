"""Metrics on activations, baselines, and losses with SAEs spliced in: hand-computed cases and properties.

pytest tests/evaluation/test_evaluate.py
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gemmascope import JumpReLUSAE
from gemmascope.activations import moments
from gemmascope.evaluation import (
    SparingOutliers,
    baselines,
    delta_loss,
    evaluate_sae,
    evaluate_splice,
    language_model,
    language_model_loss,
    loss_recovered,
    mean_ablation_loss,
    pair_table_fvu,
    pca_fvu,
    random_dictionary_fvu,
)
from gemmascope.sites import Site, all_sites
from tests import tiny_models as tiny

needs_transformers = pytest.mark.usefixtures("transformers")
RESID = Site(1, "resid")

# f keeps the coordinates above 0.5; the third latent reads nothing and never fires.
X = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.25, 0.0], [-1.0, 1.0]])


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def by_hand(threshold=0.5):
    sae = JumpReLUSAE(2, 3, pre_encoder_bias=False, threshold_init=threshold, impl="reference")
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    return sae


def constant(value):
    """An SAE that reconstructs everything as ``value``."""
    sae = JumpReLUSAE(len(value), 4, threshold_init=1e30, impl="reference")
    with torch.no_grad():
        sae.b_dec.copy_(value)
    return sae


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


class TestEvaluateSAE:
    def test_by_hand(self):
        """x̂ = (2,0), (0,4), (0,0), (0,1): squared error 0.0625 + 1; Σx² = 22.0625, mean (0.3125, 1.25)."""
        metrics = evaluate_sae(by_hand(), X)
        assert metrics.tokens == 4
        assert metrics.l0 == 3 / 4
        assert metrics.fvu == pytest.approx(1.0625 / (22.0625 - 4 * (0.3125**2 + 1.25**2)), rel=1e-15)
        assert metrics.pca_fvu is metrics.pca_median_fvu is None
        # By token 0, 0, 0.0625 and 1, over 4.41, 7.66, 1.57 and 1.79: the lower of the middle two, and the largest.
        assert metrics.median_fvu == 0
        assert metrics.top_error_share == 1 / 1.0625
        assert metrics.top_variance_share == pytest.approx((0.3125**2 + 2.75**2) / 15.421875, rel=1e-12)
        assert metrics.dead_fraction == 1 / 3
        assert metrics.high_freq_fraction == 2 / 3
        assert torch.equal(metrics.firing_frequency, torch.tensor([0.25, 0.5, 0.0]))
        assert metrics.firing_frequency.dtype == torch.float32

    def test_the_bias_by_hand(self):
        """x̂ = (3, 0), (1, 4), (1, 0), (1, 1) with b_dec = (1, 0): Σ‖x̂‖² = 9 + 17 + 1 + 2, Σ⟨x̂, x⟩ = 6 + 16 + ¼ + 0."""
        sae = by_hand()
        with torch.no_grad():
            sae.b_dec[0] = 1
        assert evaluate_sae(sae, X).reconstruction_bias == pytest.approx(29 / 22.25, rel=1e-15)

    @pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
    def test_the_bias_is_the_factor_that_x_hat_is_too_large(self, factor):
        x = normal(50, 6, seed=2)
        sae = JumpReLUSAE(6, 12, threshold_init=0.0, pre_encoder_bias=False, impl="reference")
        with torch.no_grad():
            sae.W_enc.copy_(torch.cat([torch.eye(6), -torch.eye(6)]).T)
            sae.W_dec.copy_(factor * sae.W_enc.T)
        assert evaluate_sae(sae, x).reconstruction_bias == pytest.approx(factor, rel=1e-6)

    def test_it_is_unbiased_when_the_error_is_orthogonal(self):
        """γ = 1 ⇔ E‖x̂‖² = E‖x‖² − E‖x̂ − x‖², as for PCA without a mean."""
        x = normal(80, 6, seed=3)
        V = torch.linalg.svd(x, full_matrices=False).Vh[:2]
        sae = JumpReLUSAE(6, 4, threshold_init=0.0, pre_encoder_bias=False, impl="reference")
        with torch.no_grad():
            sae.W_dec.copy_(torch.cat([V, -V]))
            sae.W_enc.copy_(sae.W_dec.T)
        found = evaluate_sae(sae, x)
        assert found.fvu > 0.1
        assert found.reconstruction_bias == pytest.approx(1, rel=1e-6)

    def test_nothing_reconstructed_has_no_bias(self):
        assert math.isnan(evaluate_sae(constant(torch.zeros(2)), X).reconstruction_bias)

    def test_positions_left_out_count_nowhere(self):
        noisy = torch.cat([X[:2], torch.full((3, 2), 1e6), X[2:]])
        keep = torch.tensor([True, True, False, False, False, True, True])
        expected, metrics = evaluate_sae(by_hand(), X), evaluate_sae(by_hand(), noisy, keep=keep)
        assert (metrics.tokens, metrics.l0, metrics.fvu) == (4, expected.l0, expected.fvu)
        assert torch.equal(metrics.firing_frequency, expected.firing_frequency)

    def test_more_than_ten_percent_is_strict(self):
        x = torch.zeros(30, 2)
        x[:3, 0], x[:4, 1] = 1, 1
        metrics = evaluate_sae(by_hand(), x)
        assert metrics.high_freq_fraction == 1 / 3
        torch.testing.assert_close(metrics.firing_frequency, torch.tensor([3 / 30, 4 / 30, 0.0]))

    def test_pca_has_the_rank_of_the_rounded_l0(self):
        train, heldout = normal(60, 2, seed=1), torch.cat([X[:2]] * 2 + [X[2:]])
        metrics = evaluate_sae(by_hand(), heldout, train)
        assert metrics.l0 == 5 / 6
        assert metrics.pca_fvu == pca_fvu(train, heldout, 1)
        metrics = evaluate_sae(by_hand(threshold=3.0), heldout, train)
        assert metrics.l0 == 2 / 6
        assert metrics.pca_fvu == pca_fvu(train, heldout, 0)

    def test_predicting_the_mean_is_one_and_copying_is_zero(self):
        x = normal(50, 6, seed=2, scale=3.0) + 5
        assert evaluate_sae(constant(x.mean(0)), x).fvu == pytest.approx(1, abs=1e-6)
        sae = JumpReLUSAE(6, 12, threshold_init=0.0, pre_encoder_bias=False, impl="reference")
        with torch.no_grad():
            sae.W_dec.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
            sae.W_enc.copy_(sae.W_dec.T)
        metrics = evaluate_sae(sae, x)
        assert (metrics.fvu, metrics.l0) == (0, 6)

    def test_folding_changes_nothing(self):
        x = normal(200, 8, seed=3, scale=4.0)
        sae = JumpReLUSAE(8, 16, input_scale=12.0, impl="reference", generator=torch.Generator().manual_seed(0))
        nn.init.normal_(sae.b_dec, generator=torch.Generator().manual_seed(1), std=0.1)
        raw, folded = evaluate_sae(sae, x), evaluate_sae(sae.fold(), x)
        assert folded.fvu == pytest.approx(raw.fvu, rel=1e-5)
        assert folded.l0 == pytest.approx(raw.l0, abs=0.05)

    @pytest.mark.parametrize("chunk_elements", [1, 50, 7 * 48, 2**24])
    def test_chunks_bound_the_rows_and_not_the_result(self, monkeypatch, chunk_elements):
        x, train = normal(101, 16, seed=4), normal(130, 16, seed=5)
        sae = JumpReLUSAE(16, 48, impl="reference", generator=torch.Generator().manual_seed(0))
        whole, rows, encode = evaluate_sae(sae, x, train), [], sae.encode_sparse
        monkeypatch.setattr(moments, "CHUNK_ELEMENTS", chunk_elements)
        monkeypatch.setattr(sae, "encode_sparse", lambda x: rows.append(len(x)) or encode(x))
        metrics = evaluate_sae(sae, x, train)
        assert max(rows) <= max(1, chunk_elements // 48)
        assert sum(rows) == 101
        assert metrics.l0 == whole.l0
        assert metrics.fvu == pytest.approx(whole.fvu, rel=1e-6)
        assert metrics.pca_fvu == pytest.approx(whole.pca_fvu, rel=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_stored_precision_is_not_the_saes_error(self, dtype):
        """x̂ is compared in the weights' fp32, not rounded to the dtype of the stored activations."""
        x = normal(300, 16, seed=6, dtype=dtype)
        sae = JumpReLUSAE(16, 48, impl="reference", generator=torch.Generator().manual_seed(0))
        assert evaluate_sae(sae, x).fvu == evaluate_sae(sae, x.float()).fvu

    def test_a_large_mean_costs_no_precision(self):
        x = normal(400, 4, seed=7) + 3e4
        x_hat = constant(x[0])
        exact = ((x - x[0]).double() ** 2).sum() / ((x.double() - x.double().mean(0)) ** 2).sum()
        assert evaluate_sae(x_hat, x).fvu == pytest.approx(exact.item(), rel=1e-9)

    def test_activations_that_do_not_vary_have_no_fvu(self):
        metrics = evaluate_sae(by_hand(), X[:1])
        assert math.isnan(metrics.fvu)
        assert metrics.l0 == 1

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"activations": X.tolist()}, TypeError, r"^activations: expected a torch.Tensor, got list$"),
            ({"activations": X.int()}, TypeError, r"^activations: expected dtype float16 or .*, got int32$"),
            ({"sae": {}}, TypeError, r"^sae: expected a SparseAutoencoder, with W_dec, .*decode, got dict$"),
            ({"sae": JumpReLUSAE}, TypeError, r"^sae: expected a SparseAutoencoder, with .*, got type$"),
            ({"sae": by_hand().to("meta")}, ValueError, r"^sae: expected weights that hold values, got .* meta$"),
            ({"activations": X[:0]}, ValueError, r"^activations: expected at least one row, got none$"),
            ({"activations": X[:, :1]}, ValueError, r"^activations: expected shape \[n, 2\], got \[4, 1\]$"),
            ({"activations": X[None]}, ValueError, r"^activations: expected shape \[n, 2\], got \[1, 4, 2\]$"),
            ({"activations": X / 0}, ValueError, r"^activations: expected finite values, found NaN or Inf$"),
            ({"train_activations": X.T}, ValueError, r"^train_activations: expected shape \[n, 2\], got \[2, 4\]$"),
            ({"train_activations": X / 0}, ValueError, r"^train_activations: expected finite values, found NaN or"),
            ({"keep": [True]}, TypeError, r"^keep: expected a torch.Tensor, got list$"),
            ({"keep": torch.ones(4)}, TypeError, r"^keep: expected dtype bool, got float32$"),
            ({"keep": torch.ones(3).bool()}, ValueError, r"^keep: expected shape \[4\], got \[3\]$"),
            ({"keep": torch.zeros(4).bool()}, ValueError, r"^keep: expected at least one position to count, got none"),
        ],
    )
    def test_refusals(self, change, error, message):
        with pytest.raises(error, match=message):
            evaluate_sae(**({"sae": by_hand(), "activations": X} | change))

    def test_a_reconstruction_of_another_shape_is_not_broadcast(self, monkeypatch):
        sae = by_hand()
        monkeypatch.setattr(sae, "decode", lambda code: torch.ones(4, 1))
        with pytest.raises(ValueError, match=r"^sae: expected a reconstruction of shape \[4, 2\], got \[4, 1\]$"):
            evaluate_sae(sae, X)

    def test_a_reconstruction_that_is_not_finite_shows(self):
        sae = by_hand()
        with torch.no_grad():
            sae.W_dec[1, 0] = math.nan
        metrics = evaluate_sae(sae, X)
        assert math.isnan(metrics.fvu)
        assert math.isnan(metrics.median_fvu)
        assert metrics.l0 == 3 / 4


class TestOutliers:
    """One token in a thousand with 100 times the norm of the rest, as real models have them."""

    def rows(self, outliers, seed=0):
        x = normal(4000, 16, seed=seed)
        if outliers:
            x[::1000] = 100 * x[::1000].roll(1, 1)
        return x

    def sae(self):
        """Takes the first twelve coordinates of sixteen."""
        sae = JumpReLUSAE(16, 24, threshold_init=0.0, pre_encoder_bias=False, impl="reference")
        with torch.no_grad():
            sae.W_dec.copy_(torch.cat([torch.eye(16)[:12], -torch.eye(16)[:12]]))
            sae.W_enc.copy_(sae.W_dec.T)
        return sae

    def test_fvu_is_that_of_the_outliers_and_the_median_that_of_the_rest(self):
        """An SAE that reconstructs the outliers alone is good by FVU, and worthless for all other tokens."""
        x = self.rows(outliers=True)
        big = x.norm(dim=1) > 50
        sae = self.sae()
        with torch.no_grad():
            sae.threshold.fill_(20.0)
        metrics = evaluate_sae(sae, x, self.rows(outliers=True, seed=1))
        assert big.sum() == 4
        assert metrics.fvu < 0.5
        assert metrics.median_fvu == pytest.approx(1, abs=0.15)
        assert metrics.top_variance_share > 0.85

    def test_the_median_hardly_moves_and_says_what_fvu_says_without_them(self):
        plain, mixed = (evaluate_sae(self.sae(), self.rows(outliers)) for outliers in (False, True))
        assert mixed.median_fvu == pytest.approx(plain.median_fvu, rel=0.02)
        assert plain.median_fvu == pytest.approx(plain.fvu, rel=0.15)
        assert plain.top_variance_share < 0.01
        assert plain.top_error_share < 0.01
        assert mixed.top_error_share > 0.85

    def test_the_top_is_a_thousandth_and_at_least_one(self):
        x = normal(3001, 4)
        errors = x.double().square().sum(1).sort(descending=True).values
        found = evaluate_sae(constant(torch.zeros(4)), x)
        assert found.top_error_share == pytest.approx((errors[:4].sum() / errors.sum()).item(), rel=1e-12)
        found = evaluate_sae(constant(torch.zeros(4)), x[:7])
        few = x[:7].double().square().sum(1)
        assert found.top_error_share == pytest.approx((few.max() / few.sum()).item(), rel=1e-12)

    def test_pca_stands_beside_every_figure(self):
        train, heldout = self.rows(True, seed=1), self.rows(True)
        metrics = evaluate_sae(self.sae(), heldout, train)
        mean = train.double().mean(0)
        _, _, V = torch.linalg.svd(train.double() - mean, full_matrices=False)
        V = V[: round(metrics.l0)].T
        x = heldout.double()
        errors = (x - mean - (x - mean) @ V @ V.T).square().sum(1)
        by_token = errors / (x - x.mean(0)).square().sum(1)
        assert metrics.pca_median_fvu == pytest.approx(by_token.median().item(), rel=1e-9)

    def test_a_perfect_reconstruction_has_no_top_error(self):
        metrics = evaluate_sae(constant(X[0]), torch.cat([X[:1], X[:1] + 0]))
        assert math.isnan(metrics.fvu)
        sae = JumpReLUSAE(2, 4, threshold_init=0.0, pre_encoder_bias=False, impl="reference")
        with torch.no_grad():
            sae.W_dec.copy_(torch.cat([torch.eye(2), -torch.eye(2)]))
            sae.W_enc.copy_(sae.W_dec.T)
        metrics = evaluate_sae(sae, X)
        assert (metrics.fvu, metrics.median_fvu) == (0, 0)
        assert math.isnan(metrics.top_error_share)


class TestPCA:
    def test_by_hand(self):
        """Trained along the first axis about (1, 0), it misses the second coordinate: 8 of 8 + 2 + 0."""
        train = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        heldout = torch.tensor([[0.0, 2.0], [0.0, -2.0], [3.0, 0.0], [1.0, 0.0]])
        assert pca_fvu(train, heldout, 1) == pytest.approx(8 / (8 + 6), rel=1e-12)

    def test_full_rank_is_exact_and_larger_ranks_are_full(self):
        train, heldout = normal(40, 5, seed=1), normal(30, 5, seed=2)
        assert pca_fvu(train, heldout, 5) < 1e-25
        assert pca_fvu(train, heldout, 99) == pca_fvu(train, heldout, 5)
        assert pca_fvu(train, heldout, 0) > 1  # the training mean is not theirs
        assert pca_fvu(train, train, 0) == pytest.approx(1, rel=1e-12)

    @settings(deadline=None, max_examples=30)
    @given(n=st.integers(2, 30), d=st.integers(1, 8), seed=st.integers(0, 99))
    def test_is_the_truncated_svd(self, n, d, seed):
        x = normal(n, d, seed=seed) @ torch.diag(torch.arange(1.0, d + 1))
        singular = np.linalg.svd((x - x.double().mean(0)).numpy(), compute_uv=False) ** 2
        curve = [pca_fvu(x, x, rank) for rank in range(d + 1)]
        exact = [singular[rank:].sum() / singular.sum() for rank in range(d + 1)]
        np.testing.assert_allclose(curve, exact, rtol=1e-9, atol=1e-12)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"^train_activations: expected shape \[n, d_model\], got \[2\]$"):
            pca_fvu(X[0], X, 1)
        with pytest.raises(ValueError, match=r"^heldout_activations: expected shape \[n, 2\], got \[4, 1\]$"):
            pca_fvu(X, X[:, :1], 1)
        with pytest.raises(ValueError, match=r"^heldout_activations: expected finite values"):
            pca_fvu(X, X / 0, 1)
        with pytest.raises(ValueError, match=r"^rank: expected at least 0, got -1$"):
            pca_fvu(X, X, -1)
        for rank in (1.0, True, None, torch.tensor(1)):
            with pytest.raises(TypeError, match=r"^rank: expected an int, got "):
                pca_fvu(X, X, rank)


class TestRandomDictionary:
    def test_an_orthonormal_basis_keeps_the_largest_coordinates(self):
        """Of (3, −4, 1) about 0: none, −4, then 3 too, then all."""
        x = torch.tensor([[3.0, -4.0, 1.0]], dtype=torch.float64)
        basis = torch.eye(3, dtype=torch.float32)
        for k, expected in enumerate(([0, 0, 0], [0, -4, 0], [3, -4, 0], [3, -4, 1])):
            projected = baselines.span_of_largest(x, basis, k)
            torch.testing.assert_close(projected, torch.tensor([expected], dtype=torch.float64), rtol=1e-10, atol=1e-10)

    def test_coefficients_are_those_of_least_squares(self):
        """x = (1, 1): of (1, 0) and (.6, .8) alone the latter, 1.4 of it; of both together x itself."""
        x, directions = torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        one, both = (baselines.span_of_largest(x, directions, k) for k in (1, 2))
        torch.testing.assert_close(one, 1.4 * directions[1:].double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(both, x, rtol=1e-6, atol=0)

    def test_no_direction_predicts_the_mean_and_as_many_as_d_model_are_exact(self):
        train = normal(50, 6, seed=1) + 7
        assert random_dictionary_fvu(train, train, 0, 20) == pytest.approx(1, rel=1e-12)
        assert random_dictionary_fvu(train, train, 6, 20) < 1e-12
        assert random_dictionary_fvu(train, train, 99, 20) == random_dictionary_fvu(train, train, 6, 20)
        assert random_dictionary_fvu(train, train, 99, 3) == random_dictionary_fvu(train, train, 3, 3) > 0.01

    @settings(deadline=None, max_examples=30)
    @given(n=st.integers(2, 20), d=st.integers(2, 8), k=st.integers(1, 6), d_sae=st.integers(1, 30))
    def test_against_a_loop_over_tokens(self, n, d, k, d_sae):
        seed = n
        train, heldout = normal(n, d, seed=seed), normal(n, d, seed=seed + 100)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(d_sae, d, generator=generator, dtype=torch.float32)
        directions /= directions.norm(dim=1, keepdim=True)
        mean, errors = train.double().mean(0), 0.0
        for x in heldout.double() - mean:
            largest = (directions @ x.float()).abs().topk(min(k, d_sae, d)).indices
            chosen = directions[largest].double().numpy()
            solution = np.linalg.lstsq(chosen.T, x.numpy(), rcond=None)[0]
            errors += ((x.numpy() - solution @ chosen) ** 2).sum()
        variance = (heldout.double() - heldout.double().mean(0)).square().sum().item()
        found = random_dictionary_fvu(train, heldout, k, d_sae, seed)
        assert found == pytest.approx(errors / variance, rel=1e-6, abs=1e-9)

    def test_more_directions_to_choose_from_are_better_and_training_beats_chance(self):
        train, heldout = (normal(300, 16, seed=seed) @ torch.diag(torch.arange(16.0)) for seed in (1, 2))
        few, many = (random_dictionary_fvu(train, heldout, 4, d_sae) for d_sae in (16, 256))
        assert many < few < 1

    @pytest.mark.parametrize("chunk_elements", [1, 100])
    def test_chunks(self, monkeypatch, chunk_elements):
        train, heldout = normal(30, 4, seed=1), normal(30, 4, seed=2)
        whole = random_dictionary_fvu(train, heldout, 2, 9)
        monkeypatch.setattr(moments, "CHUNK_ELEMENTS", chunk_elements)
        assert random_dictionary_fvu(train, heldout, 2, 9) == pytest.approx(whole, rel=1e-9)

    def test_of_many_tokens_an_even_sample_counts(self, monkeypatch):
        train, heldout = normal(30, 4, seed=1), normal(30, 4, seed=2)
        monkeypatch.setattr(baselines, "RANDOM_TOKENS", 10)
        assert random_dictionary_fvu(train, heldout, 2, 9) == random_dictionary_fvu(train, heldout[::3], 2, 9)

    def test_refusals(self):
        for arguments, error, message in (
            ((X, X[:, :1], 1, 4), ValueError, r"^heldout_activations: expected shape \[n, 2\], got \[4, 1\]$"),
            ((X, X / 0, 1, 4), ValueError, r"^heldout_activations: expected finite values"),
            ((X, X, -1, 4), ValueError, r"^k: expected at least 0, got -1$"),
            ((X, X, 1.0, 4), TypeError, r"^k: expected an int, got float$"),
            ((X, X, 1, 0), ValueError, r"^d_sae: expected at least 1, got 0$"),
            ((X, X, 1, 2**31), ValueError, r"^d_sae: expected at most 2147483647, got 2147483648$"),
            ((X, X, 1, 4, 2**63), ValueError, r"^seed: expected at most "),
        ):
            with pytest.raises(error, match=message):
                random_dictionary_fvu(*arguments)


class TestPairTable:
    PAIRS = torch.tensor([[1, 2], [1, 2], [3, 2], [1, 4]])
    TRAIN = torch.tensor([[1.0], [3.0], [8.0], [0.0]])

    def test_by_hand(self):
        """(1,2) was seen: 2. (9,2) falls back to token 2: 4. (1,7) falls back to all: 3. Errors 1, 4, 9."""
        pairs, heldout = torch.tensor([[1, 2], [9, 2], [1, 7]]), torch.tensor([[3.0], [2.0], [0.0]])
        mean = 5 / 3
        variance = (3 - mean) ** 2 + (2 - mean) ** 2 + mean**2
        assert pair_table_fvu(self.TRAIN, self.PAIRS, heldout, pairs) == pytest.approx(14 / variance, rel=1e-12)

    def test_pairs_are_ordered_and_do_not_collide(self):
        """(0, 3) and (1, 0) would share a key if the base were too small, (2, 1) and (1, 2) if order were lost."""
        pairs = torch.tensor([[0, 3], [1, 0], [2, 1], [1, 2]], dtype=torch.int32)
        x = normal(4, 3)
        assert pair_table_fvu(x, pairs, x.bfloat16().float(), pairs) < 1e-4
        assert pair_table_fvu(x, pairs, x, pairs) == 0

    @settings(deadline=None, max_examples=40)
    @given(
        ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True),
        seed=st.integers(0, 99),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    )
    def test_ids_are_names(self, ids, seed, dtype):
        """Whatever their size: the product of two near 2³³ is beyond int64."""
        generator = torch.Generator().manual_seed(seed)
        small, other = (torch.randint(len(ids), (30, 2), generator=generator) for _ in range(2))
        large = torch.tensor(ids, dtype=torch.int64)
        x, y = normal(30, 3, seed=seed, dtype=dtype), normal(30, 3, seed=seed + 1, dtype=dtype)
        expected = pair_table_fvu(x, small, y, other)
        assert pair_table_fvu(x, large[small], y, large[other]) == pytest.approx(expected, rel=1e-12)

    def test_pairs_near_two_to_the_33_do_not_collide(self):
        base = 2**33
        pairs = torch.tensor([[base, base], [base - 1, base], [0, base], [base, 0]])
        x = normal(4, 3)
        assert pair_table_fvu(x, pairs, x, pairs) == 0

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
    def test_any_integers_are_ids(self, dtype):
        x, y = normal(4, 1), normal(4, 1, seed=1)
        expected = pair_table_fvu(x, self.PAIRS, y, self.PAIRS)
        assert pair_table_fvu(x, self.PAIRS.to(dtype), y, self.PAIRS.to(dtype)) == expected

    def test_a_table_of_one_pair_predicts_the_mean(self):
        x, pairs = normal(20, 3), torch.ones(20, 2, dtype=torch.int64)
        assert pair_table_fvu(x, pairs, x, pairs) == pytest.approx(1, rel=1e-12)

    def test_nothing_seen_in_training_predicts_the_mean_of_all(self):
        pairs, heldout = torch.tensor([[7, 8], [8, 9]]), torch.tensor([[1.0], [5.0]])
        assert pair_table_fvu(self.TRAIN, self.PAIRS, heldout, pairs) == pytest.approx((4 + 4) / 8, rel=1e-12)

    @pytest.mark.parametrize("chunk_elements", [1, 40])
    def test_chunks(self, monkeypatch, chunk_elements):
        x, pairs = normal(57, 6), torch.randint(0, 4, (57, 2), generator=torch.Generator().manual_seed(0))
        whole = pair_table_fvu(x[:40], pairs[:40], x[40:], pairs[40:])
        monkeypatch.setattr(moments, "CHUNK_ELEMENTS", chunk_elements)
        assert pair_table_fvu(x[:40], pairs[:40], x[40:], pairs[40:]) == pytest.approx(whole, rel=1e-12)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"train_pairs": PAIRS.float()},
                TypeError,
                r"^train_pairs: expected an integer torch.Tensor, got float32$",
            ),
            ({"train_pairs": [[1, 2]]}, TypeError, r"^train_pairs: expected an integer torch.Tensor, got list$"),
            ({"heldout_pairs": PAIRS[:2]}, ValueError, r"^heldout_pairs: expected shape \[4, 2\], got \[2, 2\]$"),
            ({"heldout_pairs": -PAIRS}, ValueError, r"^heldout_pairs: expected ids of at least 0, got -4$"),
            ({"heldout_activations": X}, ValueError, r"^heldout_activations: expected shape \[n, 1\], got \[4, 2\]$"),
            ({"train_activations": TRAIN[:0]}, ValueError, r"^train_activations: expected at least one row, got none$"),
        ],
    )
    def test_refusals(self, change, error, message):
        arguments = {"train_activations": self.TRAIN, "heldout_activations": self.TRAIN}
        arguments |= {"train_pairs": self.PAIRS, "heldout_pairs": self.PAIRS} | change
        with pytest.raises(error, match=message):
            pair_table_fvu(**arguments)


@needs_transformers
class TestLanguageModelLoss:
    def test_a_model_that_knows_nothing(self):
        """A final norm of gain 0 makes all logits 0: ln(61) whatever the tokens."""
        model = tiny.gemma2()
        nn.init.constant_(model.model.norm.weight, -1.0)
        assert language_model_loss(model, tiny.tokens()) == pytest.approx(math.log(tiny.VOCAB), rel=1e-7)

    @pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
    def test_against_a_loop_over_positions(self, batch_size):
        """Neither predictions of special tokens nor those made at them count."""
        model, ids = tiny.gemma2(), tiny.tokens(rows=5)
        ids[1, 4], ids[2, 5:], ids[3, 1:] = tiny.EOS, tiny.PAD, tiny.PAD
        with torch.no_grad():
            log_p = model(ids).logits.double().log_softmax(-1)
        losses = [
            -log_p[row, t, ids[row, t + 1]].item()
            for row in range(5)
            for t in range(8)
            if ids[row, t : t + 2].min() > 2
        ]
        assert len(losses) == 7 + 5 + 3 + 7
        assert language_model_loss(model, ids, batch_size=batch_size) == pytest.approx(np.mean(losses), rel=1e-6)
        every = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
        assert language_model_loss(model, ids, (), batch_size) == pytest.approx(every, rel=1e-6)

    def test_probabilities_of_logits_in_bfloat16_are_not_rounded(self):
        model, ids = tiny.gemma2(dtype=torch.bfloat16), tiny.tokens(rows=4)
        with torch.no_grad():
            log_p = model(ids).logits.double().log_softmax(-1)
        losses = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[:, 1:]
        assert language_model_loss(model, ids) == pytest.approx(losses.mean().item(), rel=1e-6)

    def test_the_default_batch_is_bounded(self, monkeypatch):
        model, ids, rows = tiny.gemma2(), tiny.tokens(rows=8), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        expected = language_model_loss(model, ids)
        monkeypatch.setattr(language_model, "_BATCH_TOKENS", 29)
        assert language_model_loss(model, ids.int()) == pytest.approx(expected, rel=1e-6)
        monkeypatch.setattr(language_model, "CHUNK_ELEMENTS", 9 * tiny.VOCAB)
        language_model_loss(model, ids)
        assert rows == [8] + [3, 3, 2] + [1] * 8

    def test_dropout_is_off_and_the_mode_kept(self):
        model = tiny.gemma2(attention_dropout=0.5).train()
        model.lm_head.eval()
        modes = [module.training for module in model.modules()]
        assert language_model_loss(model, tiny.tokens()) == language_model_loss(model, tiny.tokens())
        assert [module.training for module in model.modules()] == modes

    @pytest.mark.parametrize(
        ("tokens", "error", "message"),
        [
            ([[1, 2]], TypeError, r"^tokens: expected a torch.Tensor of int64 or int32, got list$"),
            (torch.ones(2, 3), TypeError, r"^tokens: expected a torch.Tensor of int64 or int32, got float32$"),
            (torch.ones(3).long(), ValueError, r"^tokens: expected shape \[rows, context\], got \[3\]$"),
            (torch.ones(2, 3).byte(), TypeError, r"^tokens: expected a torch.Tensor of int64 or int32, got uint8$"),
            (torch.ones(3, 1).long(), ValueError, r"^tokens: expected shape .*, got \[3, 1\]$"),
            (torch.ones(0, 3).long(), ValueError, r"^tokens: expected shape .*, got \[0, 3\]$"),
            (torch.full((1, 3), 61), ValueError, r"^tokens: expected ids from 0 to 60, got 61$"),
            (torch.full((1, 3), -1), ValueError, r"^tokens: expected ids from 0 to 60, got -1$"),
            (torch.zeros(2, 3).long(), ValueError, r"^tokens: expected at least one next token to score, got special"),
        ],
    )
    def test_refusals(self, tokens, error, message):
        with pytest.raises(error, match=message):
            language_model_loss(tiny.gemma2(), tokens)

    def test_bad_batch_size(self):
        with pytest.raises(ValueError, match=r"^batch_size: expected at least 1, got 0$"):
            language_model_loss(tiny.gemma2(), tiny.tokens(), batch_size=0)


@needs_transformers
class TestSplicing:
    @pytest.mark.parametrize("build", [tiny.gemma2, tiny.gemma3, tiny.gemma3_multimodal])
    def test_an_identity_costs_exactly_nothing(self, build):
        model = build()
        for skip in (None, ()):
            saes = {site: nn.Identity() for site in all_sites(model)}
            assert delta_loss(model, tiny.tokens(), saes, skip) == 0

    def test_an_sae_that_outputs_the_mean_is_mean_ablation(self):
        model, ids = tiny.gemma2(), tiny.tokens(rows=4)
        clean = language_model_loss(model, ids)
        for site in all_sites(model):
            mean = normal(tiny.width(site), seed=site.layer)
            ablated = mean_ablation_loss(model, ids, site, mean)
            assert delta_loss(model, ids, {site: constant(mean)}) == ablated - clean
            assert ablated != clean

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_positions_are_those_of_their_rows(self, batch_size):
        """What is spliced in somewhere else in each row, in batches and at once."""
        model, ids = tiny.gemma2(), tiny.tokens(rows=4)
        positions = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4
        saes = {RESID: constant(normal(16))}
        x = normal(16, seed=2)
        found = delta_loss(model, ids, saes, batch_size=batch_size, positions=positions)
        assert found == pytest.approx(delta_loss(model, ids, saes, positions=positions), rel=1e-5)
        assert found != pytest.approx(delta_loss(model, ids, saes, positions=positions.flip(0)), rel=1e-2)
        ablated = mean_ablation_loss(model, ids, RESID, x, batch_size=batch_size, positions=positions)
        assert ablated == pytest.approx(mean_ablation_loss(model, ids, RESID, x, positions=positions), rel=1e-5)

    def test_an_activation_of_just_the_largest_norm_is_not_spared(self):
        x = torch.tensor([[3.0, 4.0], [3.0, 4.5]])
        found = SparingOutliers(lambda x: x * 0, 5.0)(x)
        assert found.tolist() == [[0, 0], [3.0, 4.5]]

    def test_the_metrics_of_a_splice(self):
        model, ids = tiny.gemma2(), tiny.tokens(rows=4)
        sae = JumpReLUSAE(16, 24, impl="reference", generator=torch.Generator().manual_seed(0))
        mean, clean = normal(16), language_model_loss(model, ids)
        metrics = evaluate_splice(model, ids, RESID, sae, mean)
        assert metrics.clean_loss == clean
        assert (metrics.rows, metrics.predictions) == (4, 4 * 7)  # nothing is predicted at BOS
        assert metrics.delta_loss == delta_loss(model, ids, {RESID: sae}) != 0
        assert metrics.ablation_delta_loss == mean_ablation_loss(model, ids, RESID, mean) - clean
        assert metrics.loss_recovered == loss_recovered(metrics.delta_loss, metrics.ablation_delta_loss)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        padded = evaluate_splice(model, ids, RESID, sae, mean, attention_mask=mask)
        assert padded.predictions == 3 * 7 + 3
        shifted = evaluate_splice(model, ids, RESID, sae, mean, clean_loss=clean - 1)
        assert shifted.delta_loss == pytest.approx(metrics.delta_loss + 1)

    @pytest.mark.parametrize(
        ("delta", "ablation", "recovered"),
        [(0.1, 0.4, 0.75), (0.0, 2.0, 1.0), (0.5, 0.5, 0.0), (-0.1, 0.4, 1.25), (1.0, 0.5, -1.0), (0.1, 0.0, None),
         (0.1, -0.2, None), (math.nan, 1.0, None), (0.1, math.nan, None), (0.1, math.inf, None)],
    )  # fmt: skip
    def test_loss_recovered(self, delta, ablation, recovered):
        assert loss_recovered(delta, ablation) == recovered

    def test_refusals(self):
        model, ids = tiny.gemma2(), tiny.tokens()
        with pytest.raises(ValueError, match=r"^mean: expected shape \[24\], the width of layer_0/att, got \[16\]$"):
            mean_ablation_loss(model, ids, Site(0, "att"), torch.zeros(16))
        with pytest.raises(TypeError, match=r"^mean: expected a torch.Tensor, got float$"):
            mean_ablation_loss(model, ids, RESID, 0.0)
        with pytest.raises(TypeError, match=r"^mean: expected a floating dtype, got int64$"):
            mean_ablation_loss(model, ids, RESID, torch.zeros(16).long())
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=r"^mean: expected finite values, got NaN or Inf$"):
                evaluate_splice(model, ids, RESID, nn.Identity(), torch.full((16,), value))
            with pytest.raises(ValueError, match=r"^clean_loss: expected a finite number, got "):
                evaluate_splice(model, ids, RESID, nn.Identity(), torch.zeros(16), clean_loss=value)
        for arguments in ((None, 1.0), (1.0, "1"), (True, 1.0), (torch.tensor(1.0), 1.0)):
            with pytest.raises(TypeError, match=r"delta: expected a number, got "):
                loss_recovered(*arguments)
        with pytest.raises(ValueError, match=r"^site layer_1/resid: expected an SAE of d_model 16, got 2$"):
            delta_loss(model, ids, {RESID: by_hand()})
