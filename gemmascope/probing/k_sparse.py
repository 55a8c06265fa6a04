"""k-sparse probes (arXiv 2305.01610): logistic regression on the k columns whose classes differ most on the training
rows, judged on the rows of other documents.

Half of the documents are trained on, by a seed, and the others judged on, as many times as there are splits; a score is
the mean over the splits. Its interval is of a bootstrap over documents, which are drawn once for all splits: in a draw
a split is judged on those of its documents that were drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int
from ..evaluation.bootstrap import Bootstrap
from ..saes import JumpReLUSAE
from .features import Features
from .labels import Task
from .probes import L2, area_under_curve, balanced_accuracy, fit_logistic

KS = (1, 2, 5, 16)
# Rows and documents of each class that either half of a split needs.
FEWEST_ROWS, FEWEST_DOCUMENTS = 10, 2
# Products of tokens and directions that a threshold is fitted on.
MOST_PRODUCTS = 1 << 25
_DRAWS_AT_ONCE = 64


class Split(NamedTuple):
    """Which rows are trained on and which are judged on: bool [rows]; others are neither."""

    train: Tensor
    judged: Tensor


@dataclass(frozen=True)
class Score:
    """Of one probe, the mean over the splits. ``…_interval``: a pair, or None where there is none."""

    balanced_accuracy: float
    balanced_accuracy_interval: tuple[float, float] | None
    auc: float
    auc_interval: tuple[float, float] | None
    of_splits: tuple[float, ...]
    """The balanced accuracies."""
    columns: tuple[int, ...]
    """Those that were chosen in the first split; none where all are read."""
    converged: bool


def split_by_document(task: Task, owners: Tensor, seed: int) -> Split | str:
    """Half of the documents for either part, of those with rows of both classes, of one and of the other by
    themselves. owners: int64 [rows], the document of each.

    Returns why there is none, in words, where a class has too few rows or documents in one of the parts.
    """
    check_int("seed", seed, 0)
    generator = torch.Generator("cpu").manual_seed(seed)
    n = int(owners.max()) + 1 if len(owners) else 0
    positive, negative = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
    positive[owners[task.known & task.labels]] = True
    negative[owners[task.known & ~task.labels]] = True
    in_train = torch.zeros(n, dtype=torch.bool)
    odd = False  # of an odd number one more is trained on, next time one fewer
    for group in (positive & negative, positive & ~negative, negative & ~positive):
        documents = group.nonzero()[:, 0]
        shuffled = documents[torch.randperm(len(documents), generator=generator)]
        in_train[shuffled[: (len(shuffled) + (not odd)) // 2]] = True
        odd ^= bool(len(shuffled) % 2)
    train = task.known & in_train[owners]
    split = Split(train, task.known & ~in_train[owners])
    for part in split:
        for mask in (part & task.labels, part & ~task.labels):
            if int(mask.sum()) < (FEWEST_ROWS if task.of == "tokens" else FEWEST_DOCUMENTS):
                return f"one of its classes has {int(mask.sum())} {task.of} in one of the parts of a split"
            if (found := len(owners[mask].unique())) < FEWEST_DOCUMENTS:
                return f"one of its classes is of {found} documents in one of the parts of a split"
    return split


def best(features: Features, split: Split, labels: Tensor, k: int) -> Tensor:
    """The k columns, or all where there are fewer, whose means differ most between the classes of the training rows,
    the largest first, of equals the one of the smaller number: int64 [k]."""
    difference = features.differences(split.train & labels, split.train & ~labels)
    return difference.sort(descending=True, stable=True).indices[:k]


def probe_task(
    features: Features,
    task: Task,
    owners: Tensor,
    splits: Sequence[Split],
    ks: Sequence[int | None],
    bootstrap: Bootstrap,
    l2: float = L2,
) -> dict[int | None, Score]:
    """The score for each k; None reads all columns. owners: int64 [rows], of which document of ``bootstrap`` each is.

    Raises ValueError for features of another number of rows and for a k below 1, and as `fit_logistic`.
    """
    if len(features) != len(task.labels):
        raise ValueError(f"features: expected those of {len(task.labels)} rows, got {len(features)}")
    for k in ks:
        if k is not None:
            check_int("ks", k, 1)
    labels, found = task.labels, {}
    most = max((k for k in ks if k is not None), default=0)
    ranked = [best(features, split, labels, most) for split in splits] if most else []
    for k in ks:
        scored, converged = [], True
        for number, split in enumerate(splits):
            which = ranked[number][:k] if k is not None else torch.arange(features.width, dtype=torch.int64)
            x = features.columns(which)
            probe = fit_logistic(x[split.train], labels[split.train], l2)
            converged &= probe.converged
            scored.append((probe.scores(x[split.judged]), labels[split.judged], owners[split.judged]))
        columns = () if k is None else tuple(ranked[0][:k].tolist())
        found[k] = _score(scored, bootstrap, columns, converged)
    return found


def _score(
    scored: Sequence[tuple[Tensor, Tensor, Tensor]], bootstrap: Bootstrap, columns: tuple[int, ...], converged: bool
) -> Score:
    def figures(times: Tensor | None) -> tuple[Tensor, Tensor]:
        """Balanced accuracy and area of every split, [splits] or [splits, draws]."""
        accuracies, areas = [], []
        for scores, labels, owners in scored:
            of_rows = None if times is None else times[:, owners]
            accuracies.append(balanced_accuracy(scores > 0, labels, of_rows))
            areas.append(area_under_curve(scores, labels, of_rows))
        return torch.stack(accuracies), torch.stack(areas)

    accuracies, areas = figures(None)
    drawn = [figures(times) for times in bootstrap.times.split(_DRAWS_AT_ONCE)]
    intervals = [bootstrap.interval(torch.cat([part[i].mean(0) for part in drawn])) for i in range(2)]
    return Score(
        accuracies.mean().item(),
        intervals[0],
        areas.mean().item(),
        intervals[1],
        tuple(accuracies.tolist()),
        columns,
        converged,
    )


def random_dictionary(x: Tensor, d_sae: int, l0: float, seed: int = 0) -> JumpReLUSAE:
    """An SAE that has learnt nothing: ``d_sae`` random unit directions of x less its mean, and one threshold above
    which ``l0`` of them are on a row of x [n, width] on average, both of the rows given, or of some spread over them.

    Raises ValueError as `DenseFeatures` for such rows, and for an l0 that is not above 0 and at most d_sae.
    """
    check_int("d_sae", d_sae, 1)
    if not 0 < l0 <= d_sae:
        raise ValueError(f"l0: expected above 0 and at most d_sae = {d_sae}, got {l0}")
    generator = torch.Generator("cpu").manual_seed(seed)
    sae = JumpReLUSAE(x.shape[1], d_sae, pre_encoder_bias=False, threshold_init=0.0, generator=generator)
    rows = x[:: max(1, -(-len(x) * d_sae // MOST_PRODUCTS))].float()
    mean = x.double().mean(0).float()
    with torch.no_grad():
        sae.b_enc.copy_(-(mean @ sae.W_enc))
        z = (rows @ sae.W_enc + sae.b_enc).flatten()
        fire = min(len(z), max(1, round(l0 * len(rows))))
        # Halfway to the next one below, so that as many are above it.
        top = z.topk(min(len(z), fire + 1)).values
        level = top[fire - 1] if fire == len(z) else (top[fire - 1] + top[fire]) / 2
        sae.threshold.fill_(max(0.0, level.item()))
    return sae
