"""What weights alone say: logits, nearest latents, the largest of rows that come in blocks.

pytest tests/dashboards/test_weights.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope import JumpReLUSAE, Transcoder
from gemmascope.dashboards import largest, logits, neighbours
from gemmascope.dashboards.collect import Collector
from gemmascope.dashboards.largest import LargestOf
from gemmascope.dashboards.logits import LogitLens
from gemmascope.dashboards.neighbours import nearest
from gemmascope.dashboards.table import LatentTable, Sizes
from gemmascope.dashboards.weights import complete
from gemmascope.errors import EnvironmentProblemError
from gemmascope.evaluation.protocol import Subject
from gemmascope.saes import TopKSAE
from gemmascope.sites import Site
from tests import tiny_models as tiny

RESID = Site(1, "resid")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class TestLargestOf:
    @given(
        st.integers(1, 5),
        st.lists(st.integers(1, 7), min_size=1, max_size=4),
        st.integers(1, 9),
        st.integers(0, 99),
    )
    @settings(max_examples=60, deadline=None)
    def test_blocks_of_many_ties_against_sorting(self, rows, blocks, k, seed):
        n = sum(blocks)
        x = torch.randint(-2, 3, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
        found = LargestOf(rows, k, x.device)
        start = 0
        for size in blocks:
            found.add(x[:, start : start + size], start)
            start += size
        values, columns = found.found()
        for row in range(rows):
            order = sorted(range(n), key=lambda c: (-float(x[row, c]), c))[:k]
            expected = [float(x[row, c]) for c in order]
            rest = k - len(order)
            assert columns[row].tolist() == order + [-1] * rest
            assert values[row].tolist() == expected + [0.0] * rest

    def test_minus_infinity_is_no_column(self):
        found = LargestOf(1, 3, torch.device("cpu"))
        found.add(torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]]), 0)
        values, columns = found.found()
        assert columns.tolist() == [[1, 3, -1]]
        assert values.tolist() == [[1.0, 0.0, 0.0]]

    def test_first_largest_finds_the_same_as_sorting_where_topk_need_not(self):
        x = torch.zeros(3, 500)
        x[1, 400] = 1
        _, columns = largest.first_largest(x, 3)
        assert columns.tolist() == [[0, 1, 2], [400, 0, 1], [0, 1, 2]]


class TestNearest:
    @pytest.mark.parametrize("blocks", [(1024, 16384), (7, 5)])
    def test_against_fp64(self, blocks, monkeypatch):
        monkeypatch.setattr(neighbours, "ROWS", blocks[0])
        monkeypatch.setattr(neighbours, "COLUMNS", blocks[1])
        rows = normal(40, 12)
        found, cosines = nearest(rows, 5)
        unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
        exact = (unit @ unit.T).fill_diagonal_(-torch.inf)
        expected = exact.sort(dim=1, descending=True, stable=True)
        assert torch.equal(found.long(), expected.indices[:, :5])
        # A product of 12 rounded terms: 12 + 2 roundings of at most half an ulp of numbers below 1.
        assert (cosines.double() - expected.values[:, :5]).abs().max() <= 14 * 2.0**-24

    def test_by_hand(self):
        rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
        found, cosines = nearest(rows, 3)
        assert found.tolist() == [[2, 1, 4], [0, 2, 3], [0, 1, 4], [1, 4, 0], [0, 1, 2]]
        assert cosines.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, -1], [0, 0, 0]]

    def test_fewer_latents_than_asked_for(self):
        found, cosines = nearest(torch.eye(2), 3)
        assert found.tolist() == [[1, -1, -1], [0, -1, -1]]
        assert cosines.tolist() == [[0, 0, 0], [0, 0, 0]]


class TestLogitLens:
    @pytest.fixture(params=["gemma2", "gemma3", "gemma3_multimodal"])
    def model(self, request):
        pytest.importorskip("transformers")
        return getattr(tiny, request.param)()

    @pytest.mark.parametrize("site", [Site(1, "resid"), Site(1, "mlp"), Site(2, "att")])
    @pytest.mark.parametrize("blocks", [(1024, 16384), (3, 10)])
    def test_against_the_model_itself(self, model, site, blocks, monkeypatch):
        """The logits of a direction are what the head makes of it, scaled by the norms' gains alone."""
        monkeypatch.setattr(logits, "LATENTS", blocks[0])
        monkeypatch.setattr(logits, "TOKENS", blocks[1])
        directions = normal(8, tiny.width(site), seed=3)
        text = model.model.language_model if hasattr(model.model, "language_model") else model.model
        stream = directions.double()
        if site.kind == "att":
            layer = text.layers[site.layer]
            stream = layer.self_attn.o_proj.weight.double() @ stream.T
            stream = stream.T * (1 + layer.post_attention_layernorm.weight.double())
        exact = (stream * (1 + text.norm.weight.double())) @ model.lm_head.weight.double().T
        found = LogitLens(model).extremes(site, directions, 4)
        bound = 100 * 2.0**-24 * exact.abs().max()  # at most 24 + 16 + 3 roundings, of sums that may cancel
        for columns, values, sign in (
            (found.promoted, found.promoted_logit, 1),
            (found.suppressed, found.suppressed_logit, -1),
        ):
            order = (sign * exact).sort(dim=1, descending=True, stable=True)
            assert torch.equal(columns.long(), order.indices[:, :4])
            assert (values.double() - sign * order.values[:, :4]).abs().max() <= bound

    def test_the_direction_moves_the_logits_of_the_model_that_way(self, model):
        """A step along the last residual raises the logit of the token it promotes most."""
        if model.config.get_text_config().final_logit_softcapping:
            pytest.skip("the cap bends differences")
        site = Site(tiny.LAYERS - 1, "resid")
        direction = normal(1, tiny.WIDTH, seed=4)
        found = LogitLens(model).extremes(site, direction, 1)
        text = model.model.language_model if hasattr(model.model, "language_model") else model.model
        x = normal(tiny.WIDTH, seed=5)
        with torch.no_grad():
            scale = (x.pow(2).mean() + model.config.get_text_config().rms_norm_eps).rsqrt()
            moved = model.lm_head((x + direction[0]) * scale * (1 + text.norm.weight)) - model.lm_head(text.norm(x))
        assert int(moved.argmax()) == int(found.promoted[0, 0])
        assert int(moved.argmin()) == int(found.suppressed[0, 0])

    def test_where_only_the_mlp_leads_on_there_is_nothing(self, model):
        found = LogitLens(model).extremes(Site(1, "mlp_in"), normal(3, tiny.WIDTH), 2)
        assert (found.promoted == -1).all()
        assert (found.suppressed == -1).all()
        assert (found.promoted_logit == 0).all()

    def test_only_the_first_tokens_count(self, model):
        found = LogitLens(model, 5).extremes(Site(1, "resid"), normal(3, tiny.WIDTH), 10)
        assert found.promoted.max() == 4
        assert (found.promoted[:, 5:] == -1).all()
        assert found.promoted[:, :5].sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 3

    def test_what_is_refused(self, model):
        with pytest.raises(EnvironmentProblemError, match="site layer_1/resid: expected finite logits"):
            LogitLens(model).extremes(Site(1, "resid"), torch.full((1, tiny.WIDTH), torch.inf), 2)
        with pytest.raises(ValueError, match=r"tokens: expected at most \d+, got 1000"):
            LogitLens(model, 1000)


class TestComplete:
    SIZES = Sizes(top=2, strata=2, of_stratum=1, window=3, bins=4, logits=2, related=2)

    def table(self, sae, reads=RESID, writes=RESID) -> LatentTable:
        pytest.importorskip("transformers")
        found = Collector(sae.d_sae, 6, self.SIZES).found()
        return complete(found, Subject("a", reads, writes, sae), LogitLens(tiny.gemma2()), self.SIZES)

    def test_the_scale_of_the_input_is_in_the_weights(self):
        sae = JumpReLUSAE(tiny.WIDTH, 5, input_scale=4.0, threshold_init=0.25)
        with torch.no_grad():
            sae.W_dec.mul_(3)
            sae.b_enc.copy_(torch.arange(5.0))
            sae.threshold[1] = -1
        table = self.table(sae)
        torch.testing.assert_close(table.decoder_norm, torch.full((5,), 12.0))
        torch.testing.assert_close(table.encoder_norm, torch.full((5,), 0.25))
        torch.testing.assert_close(table.alignment, torch.ones(5))
        assert table.encoder_bias.tolist() == [0, 1, 2, 3, 4]
        assert table.threshold.tolist() == [0.25, 0, 0.25, 0.25, 0.25]
        assert not table.fired.any()

    def test_topk_has_no_threshold(self):
        assert self.table(TopKSAE(tiny.WIDTH, 5, 2)).threshold.isnan().all()

    def test_a_transcoder_has_no_alignment(self):
        n = tiny.WIDTH
        tensors = {"W_enc": normal(n, 5), "W_dec": normal(5, n), "b_enc": torch.zeros(5), "b_dec": torch.zeros(n)}
        table = self.table(Transcoder(tensors | {"threshold": torch.zeros(5)}), Site(1, "mlp_in"), Site(1, "mlp"))
        assert table.alignment.isnan().all()
        assert (table.promoted >= 0).all()
