"""k-means over embeddings: RouterDC's query clusters, and cluster memberships as features of the ridge."""

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats
from loramux.router.scores.features import Memberships, Partition

_ROUNDS = 20


def kmeans(rows: Floats, k: int, seed: int, restarts: int = 3) -> Floats:
    """Centroids float32 [min(k, n), dim] of rows [n, dim], the best of `restarts` runs from k-means++ seeds.

    Minimises sum_i min_j |x_i - c_j|^2 by Lloyd's rounds; a centroid that loses all its rows stays where it was.
    Deterministic by `seed`. Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding". Raises
    ValueError for k < 1 or no rows.
    """
    if k < 1 or not len(rows):
        raise ValueError("k-means needs at least one cluster and one row")
    generator = np.random.default_rng(seed)
    norms = (rows.astype(np.float64) ** 2).sum(1)
    best: Floats | None = None
    best_cost = np.inf
    for _ in range(restarts):
        centroids = _plus_plus(rows, norms, min(k, len(rows)), generator)
        members = Partition.nearest(centroids)(rows)
        for _ in range(_ROUNDS):
            centroids = _means(rows, members, centroids)
            moved = Partition.nearest(centroids)(rows)
            if (moved == members).all():
                break
            members = moved
        cost = float(((rows - centroids[members]).astype(np.float64) ** 2).sum())
        if best is None or cost < best_cost:
            best, best_cost = centroids, cost
    assert best is not None
    return best


def _plus_plus(rows: Floats, norms: npt.NDArray[np.float64], k: int, generator: np.random.Generator) -> Floats:
    """k distinct rows, each drawn with probability proportional to its squared distance from those drawn before."""
    chosen = [int(generator.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < k:
        newest = chosen[-1]
        to_newest = norms + norms[newest] - 2 * (rows @ rows[newest]).astype(np.float64)
        distance = np.minimum(distance, np.maximum(to_newest, 0))
        distance[chosen] = 0
        total = float(distance.sum())
        if total <= 0:  # what is left repeats rows already drawn
            break
        chosen.append(int(generator.choice(len(rows), p=distance / total)))
    return rows[chosen].astype(np.float32)


def _means(rows: Floats, members: npt.NDArray[np.int64], before: Floats) -> Floats:
    means = before.copy()
    for cluster in np.unique(members):
        means[cluster] = rows[members == cluster].mean(0)
    return means


def fit_clusters(rows: Floats, sizes: tuple[int, ...], scale: float, seed: int) -> Memberships:
    """One k-means partition per entry of `sizes`, each from a seed of its own."""
    seeds = np.random.SeedSequence(seed).generate_state(len(sizes))
    found = [kmeans(rows, k, int(s), restarts=1) for k, s in zip(sizes, seeds, strict=True)]
    return Memberships(tuple(Partition.nearest(centroids) for centroids in found), scale)
