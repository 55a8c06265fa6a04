"""Planted features: the right latent is found and tells all, chance tells nothing, documents stay apart."""

import pytest
import torch

from gemmascope.evaluation import Bootstrap
from gemmascope.probing import (
    DenseFeatures,
    LatentFeatures,
    Task,
    area_under_curve,
    balanced_accuracy,
    best,
    fit_logistic,
    probe_task,
    random_dictionary,
    split_by_document,
)

N, DOCUMENTS, WIDTH, PLANTED = 600, 20, 40, 17
OWNERS = torch.arange(N) % DOCUMENTS


def labels(seed=0):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.3


def task(flags, known=None, of="tokens"):
    return Task("planted", of, flags, torch.ones_like(flags) if known is None else known)


def planted(flags, seed=1):
    """Latents that fire at random, and one that fires just where the label is."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.rand(N, WIDTH, generator=generator) * (torch.rand(N, WIDTH, generator=generator) < 0.2)
    f[:, PLANTED] = torch.where(flags, 0.5 + torch.rand(N, generator=generator), 0)
    return f


def sparse(f):
    rows, latents = f.nonzero().T
    return LatentFeatures(rows, latents, f[rows, latents], *f.shape)


def probed(features, task, ks=(1, 2), splits=3):
    chosen = [split_by_document(task, OWNERS, seed) for seed in range(splits)]
    assert not any(isinstance(split, str) for split in chosen)
    kept = [split for split in chosen if not isinstance(split, str)]
    return probe_task(features, task, OWNERS, kept, ks, Bootstrap(DOCUMENTS, draws=40))


def test_the_right_latent_is_found_and_tells_all():
    found = probed(sparse(planted(labels())), task(labels()))
    for k in (1, 2):
        assert found[k].columns[0] == PLANTED
        assert found[k].balanced_accuracy == found[k].auc == 1
        assert found[k].balanced_accuracy_interval == found[k].auc_interval == (1, 1)
        assert found[k].of_splits == (1, 1, 1)
        assert found[k].converged


def test_permuted_labels_and_other_latents_are_at_chance():
    f = planted(labels())
    permuted = labels()[torch.randperm(N, generator=torch.Generator().manual_seed(9))]
    for found in (probed(sparse(f), task(permuted)), probed(sparse(planted(labels(5))), task(labels()))):
        for score in found.values():
            assert abs(score.balanced_accuracy - 0.5) < 0.07
            assert abs(score.auc - 0.5) < 0.08
            low, high = score.auc_interval or (1, 0)
            assert low < 0.5 + 0.05
            assert high > 0.5 - 0.05


def test_dense_rows_are_the_same_features():
    """Of the same numbers, both ways to hold them give the same columns and means; the differences but for units."""
    f, split = planted(labels()), split_by_document(task(labels()), OWNERS, 0)
    assert not isinstance(split, str)
    dense, entries = DenseFeatures(f), sparse(f)
    which = torch.tensor([3, PLANTED, 0])
    assert torch.equal(dense.columns(which), entries.columns(which))
    on, off = split.train & labels(), split.train & ~labels()
    expected = (f[on].double().mean(0) - f[off].double().mean(0)).abs()
    torch.testing.assert_close(entries.differences(on, off), expected)
    torch.testing.assert_close(dense.differences(on, off), expected / f[split.train].double().std(0, correction=0))
    means = torch.stack([f[document == OWNERS].double().mean(0) for document in range(DOCUMENTS)])
    everything = torch.arange(WIDTH)
    for features in (dense, entries):
        torch.testing.assert_close(features.by_document(OWNERS, DOCUMENTS).columns(everything), means)
    kept = torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.5
    torch.testing.assert_close(entries.of(kept).columns(everything), f[kept].double())


def test_a_large_coordinate_is_not_chosen_for_its_size():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator)
    x[:, 2] *= 1000
    x[:, 4] += 0.5 * labels()
    split = split_by_document(task(labels()), OWNERS, 0)
    assert not isinstance(split, str)
    assert best(DenseFeatures(x), split, labels(), 1).tolist() == [4]


def test_latents_are_chosen_on_training_rows_alone():
    """A latent that tells the classes apart on the judged rows alone is not seen."""
    flags, split = labels(), split_by_document(task(labels()), OWNERS, 0)
    assert not isinstance(split, str)
    f = planted(flags)
    f[split.train, PLANTED] = 0
    assert best(sparse(f), split, flags, WIDTH).tolist()[-1] == PLANTED
    equal = torch.zeros(N, WIDTH)
    assert best(sparse(equal), split, flags, 3).tolist() == [0, 1, 2]  # of equals the first


def test_no_document_is_in_both_parts():
    for seed in range(5):
        split = split_by_document(task(labels()), OWNERS, seed)
        assert not isinstance(split, str)
        assert not set(OWNERS[split.train].tolist()) & set(OWNERS[split.judged].tolist())
        assert torch.equal(split.train | split.judged, torch.ones_like(split.train))
    splits = [split_by_document(task(labels()), OWNERS, seed) for seed in (0, 0, 1)]
    assert not any(isinstance(split, str) for split in splits)
    assert torch.equal(splits[0][0], splits[1][0])  # pyright: ignore[reportArgumentType]
    assert not torch.equal(splits[0][0], splits[2][0])  # pyright: ignore[reportArgumentType]


def test_documents_of_a_class_are_halved_by_themselves():
    flags = torch.arange(DOCUMENTS) < 5
    split = split_by_document(task(flags, of="documents"), torch.arange(DOCUMENTS), 3)
    assert not isinstance(split, str)
    assert {int((part & flags).sum()) for part in split} == {2, 3}
    assert int(split.train.sum()) == DOCUMENTS // 2
    known = torch.arange(DOCUMENTS) != 7
    split = split_by_document(task(flags, known, "documents"), torch.arange(DOCUMENTS), 3)
    assert not isinstance(split, str)
    assert not (split.train | split.judged)[7]
    for seed in range(9):  # what is not known has no part in the halves
        split = split_by_document(task(flags, torch.arange(DOCUMENTS) != 2, "documents"), torch.arange(DOCUMENTS), seed)
        assert not isinstance(split, str)
        assert [int((part & flags).sum()) for part in split] == [2, 2]


def test_too_few_of_a_class_is_said():
    alone = torch.arange(N) < 15
    assert "one of its classes has" in str(split_by_document(task(alone), OWNERS, 0))
    of_one = OWNERS == 3  # thirty rows of one document
    assert "is of 1 documents" in str(split_by_document(task(of_one), OWNERS, 0))


def halves_of(of: str, per_document: int, documents: int):
    """So many rows of either class in each of the documents."""
    owners = torch.arange(documents).repeat_interleave(2 * per_document)
    flags = torch.arange(len(owners)) % 2 == 0
    return split_by_document(task(flags, of=of), owners, 0)


def test_just_enough_of_a_class():
    """Ten rows of two documents in each part, and of documents two."""
    assert not isinstance(halves_of("tokens", 5, 4), str)
    assert halves_of("tokens", 4, 5) == "one of its classes has 8 tokens in one of the parts of a split"
    assert halves_of("tokens", 10, 2) == "one of its classes is of 1 documents in one of the parts of a split"
    flags = torch.arange(8) < 4
    assert not isinstance(split_by_document(task(flags, of="documents"), torch.arange(8), 0), str)
    flags = torch.arange(8) < 3
    found = split_by_document(task(flags, of="documents"), torch.arange(8), 0)
    assert found == "one of its classes has 1 documents in one of the parts of a split"


def test_a_document_without_rows_is_0():
    f, owners = planted(labels())[:6], torch.tensor([0, 0, 2, 2, 2, 0])
    expected = torch.stack([f[[0, 1, 5]].double().mean(0), torch.zeros(WIDTH).double(), f[2:5].double().mean(0)])
    for features in (DenseFeatures(f), sparse(f)):
        found = features.by_document(owners, 3).columns(torch.arange(WIDTH))
        torch.testing.assert_close(found, expected)


def test_scores_and_intervals_by_plain_loops():
    """Each split trained and judged by itself, on the columns that its own training rows choose, and every draw of
    documents by repeating their rows."""
    generator = torch.Generator().manual_seed(3)
    flags = labels()
    x = torch.randn(N, 6, generator=generator) + 0.4 * flags[:, None] * torch.tensor([1.0, 0, 0.9, 0, 0.8, 0])
    x += torch.randn(DOCUMENTS, 6, generator=generator)[OWNERS]  # rows of a document are alike
    chosen = [split_by_document(task(flags), OWNERS, seed) for seed in range(4)]
    splits = [each for each in chosen if not isinstance(each, str)]
    bootstrap = Bootstrap(DOCUMENTS, draws=30, seed=2)
    features = DenseFeatures(x)
    (score,) = probe_task(features, task(flags), OWNERS, splits, [2], bootstrap).values()
    values, drawn = [], [[], []]
    columns = []
    for split in splits:
        a, b = x[split.train & flags].double(), x[split.train & ~flags].double()
        both = x[split.train].double()
        which = ((a.mean(0) - b.mean(0)).abs() / both.std(0, correction=0)).argsort(descending=True)[:2]
        columns.append(which.tolist())
        probe = fit_logistic(x[split.train][:, which], flags[split.train])
        scores, truth = probe.scores(x[split.judged][:, which]), flags[split.judged]
        values.append((balanced_accuracy(scores > 0, truth).item(), area_under_curve(scores, truth).item()))
        for times in bootstrap.times:
            rows = torch.repeat_interleave(torch.arange(len(truth)), times[OWNERS[split.judged]])
            drawn[0].append(balanced_accuracy(scores[rows] > 0, truth[rows]).item())
            drawn[1].append(area_under_curve(scores[rows], truth[rows]).item())
    assert len({tuple(each) for each in columns}) > 1, "splits choose columns of their own"
    assert score.columns == tuple(columns[0])
    assert score.of_splits == pytest.approx([each for each, _ in values], rel=1e-12)
    assert score.balanced_accuracy == pytest.approx(sum(each for each, _ in values) / 4, rel=1e-12)
    assert score.auc == pytest.approx(sum(each for _, each in values) / 4, rel=1e-12)
    for every, interval in zip(drawn, (score.balanced_accuracy_interval, score.auc_interval), strict=True):
        mean = torch.tensor(every, dtype=torch.float64).view(4, 30).mean(0)
        low, high = (mean.quantile(end).item() for end in (0.025, 0.975))
        assert interval == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("l0", [1, 5, 30.5])
def test_a_random_dictionary_fires_as_often_as_it_is_to(l0):
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 5
    sae = random_dictionary(x, 64, l0, seed=1)
    assert sae.encode_sparse(x).l0().double().mean().item() == pytest.approx(l0, abs=0.02)
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.ones(64))
    torch.testing.assert_close(sae.b_enc.detach(), -(x.mean(0) @ sae.W_enc.detach()), msg="of x less its mean")
    assert not torch.equal(sae.W_enc, random_dictionary(x, 64, l0, seed=2).W_enc)
    with pytest.raises(ValueError, match=r"^l0: expected above 0 and at most d_sae = 64, got 65"):
        random_dictionary(x, 64, 65)


def test_bad_features_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^x: expected finite activations, found NaN or Inf"):
        DenseFeatures(torch.full((3, 2), torch.nan))
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^values: expected finite activations, found NaN or Inf"):
        LatentFeatures(rows, rows, torch.full((1,), torch.inf), 3, 2)
    with pytest.raises(ValueError, match=r"^latents: expected numbers from 0 to 1, got 2 to 2"):
        LatentFeatures(rows, rows + 2, torch.ones(1), 3, 2)
    with pytest.raises(ValueError, match=r"^features: expected those of 600 rows, got 3"):
        probed(DenseFeatures(torch.ones(3, 2)), task(labels()))
    with pytest.raises(ValueError, match=r"^ks: expected"):
        probed(sparse(planted(labels())), task(labels()), ks=(0,))
