"""What the gallery learns from its examples: the metric, and how examples score that took no part in the scoring."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loramux.router.gallery.centroids import cluster_means, number_of_centroids, spherical_kmeans, unit_rows
from loramux.router.gallery.metric import Metric, fit_metric
from loramux.router.interface import Floats

FOLDS = 8
BASE_SHARE = 0.7
BASE_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """Width of the embeddings, and how many centroids an adapter has at `most`."""

    dim: int
    most: int


def evidence(best: Floats, base: Floats | None) -> Floats:
    """best - `BASE_SHARE` * base: what speaks for an adapter, less a share of what speaks for the base (nothing where
    it is unknown).

    A share, because a near miss is close to both; the whole would measure nothing but the boundary between the two.
    """
    return best if base is None else best - np.float32(BASE_SHARE) * base


def centroids(rows: Floats, metric: Metric, most: int) -> Floats:
    """Up to `most` centroids, float32 [k, dim], of embeddings [n >= 1, dim]: one for every four rows.

    Clusters are those of spherical k-means under the metric; a centroid is mu' + the mean of (x - mu') / |x - mu'|_M
    over its rows, so that every example counts the same.
    """
    white = metric.whiten(rows)
    clusters = spherical_kmeans(unit_rows(white), number_of_centroids(len(rows), most))
    lengths = np.linalg.norm(white, axis=1, keepdims=True)  # |x - mu'|_M
    means = cluster_means(np.asarray((rows - metric.mean) / np.where(lengths > 0, lengths, 1), np.float32), clusters)
    return np.asarray(metric.mean + means, dtype=np.float32)


def nearest_threshold(base: float) -> float:
    """The evidence of an adapter that is exactly as near as the base: best = base."""
    return base - BASE_SHARE * base


def nearest_mean(likeness: Floats) -> Floats:
    """The mean of the `BASE_NEAREST` largest of each row [n, examples >= 1]: float32 [n].

    The base stands for many kinds of query, of which a few examples each are there: by the nearest of these a near miss
    is known better than by means of many.
    """
    k = min(BASE_NEAREST, likeness.shape[1])
    return np.asarray(np.partition(likeness, -k, axis=1)[:, -k:].mean(axis=1), dtype=np.float32)


def centroid_lengths(metric: Metric, rows: Floats, examples: Floats | float) -> Floats:
    """The lengths by which centroids [k, dim] enter the cosine: float32 [k], |c - mu'|_M without what is chance in it.

    A mean c of N rows of length 1 around a true mean m has E|c|^2 = |m|^2 + (1 - |m|^2) / N: the fewer rows, the longer
    c is, and the smaller its cosine with whatever belongs to it. Hence (N |c|^2 - 1) / (N - 1) in place of |c|^2, but
    at least half of that; for N <= 1 it stays. N, given as `examples` [k], is the mean over a candidate's centroids:
    a small cluster is long because its rows were chosen alike.
    """
    squares = metric.norms(rows) ** 2
    n = np.asarray(examples, dtype=np.float32)
    true = (n * squares - 1) / np.maximum(n - 1, 1)
    return np.sqrt(np.where(n > 1, np.maximum(true, squares / 2), squares)).astype(np.float32)


def cosines(metric: Metric, queries: Floats, rows: Floats, row_lengths: Floats) -> Floats:
    """cos_M of every query with every row of such a length: float32 [queries, rows]."""
    weighed = metric.weigh(queries)
    both = metric.norms(queries)[:, None] * row_lengths
    return np.asarray((weighed @ (rows - metric.mean).T) / np.where(both > 0, both, 1), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class CrossScores:
    """Cross-conformal evidence, float32 each: of adapters' examples for their `own` adapter and for the likeliest other
    (`outsiders`, none of a single adapter), and of the `base`'s for the likeliest adapter."""

    own: Floats
    outsiders: Floats
    base: Floats


def cross_scores(groups: Sequence[Floats], base: Floats, shape: Shape) -> CrossScores:
    """The scores of examples that took no part in what scores them.

    In fold f of F, the examples whose position within their adapter is f modulo F are held out of everything: metric,
    centroids, base. Adapters of one example give no score. Vovk 2015, "Cross-conformal predictors".
    """
    folds = min(FOLDS, max((len(g) for g in [*groups, base]), default=0))
    own: list[Floats] = []
    outsiders: list[Floats] = []
    negative: list[Floats] = []
    for fold in range(folds):
        kept = [_without(g, fold, folds) for g in groups]
        kept_base = _without(base, fold, folds)
        metric = fit_metric(kept, shape.dim)
        rows = [centroids(g, metric, shape.most) for g in kept]
        if not rows:
            continue
        everyone, owners = np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        their_lengths = np.concatenate(
            [centroid_lengths(metric, made, len(g) / len(made)) for g, made in zip(kept, rows, strict=True)]
        )
        held = [_only(g, fold, folds) for g in [*groups, base]]  # the base's last
        places = np.repeat(np.arange(len(held)), [len(h) for h in held])
        queries = np.concatenate(held)
        likeness = cosines(metric, queries, everyone, their_lengths)
        base_likeness = None
        if len(kept_base):
            base_likeness = nearest_mean(cosines(metric, queries, kept_base, metric.norms(kept_base)))
        mine, of_base = owners == places[:, None], places == len(groups)
        others = evidence(np.where(mine, -np.inf, likeness).max(axis=1), base_likeness)
        own.append(evidence(np.where(mine, likeness, -np.inf).max(axis=1), base_likeness)[~of_base])
        if len(rows) > 1:
            outsiders.append(others[~of_base])
        negative.append(others[of_base])
    return CrossScores(_joined(own), _joined(outsiders), _joined(negative))


def _only(rows: Floats, fold: int, folds: int) -> Floats:
    return rows[fold::folds] if len(rows) > 1 else rows[:0]


def _without(rows: Floats, fold: int, folds: int) -> Floats:
    return rows[np.arange(len(rows)) % folds != fold] if len(rows) > 1 else rows


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
