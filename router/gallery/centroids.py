"""Several centroids of one candidate's embeddings: spherical k-means, the same for the same rows."""

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats

EXAMPLES_PER_CENTROID = 4
_ROUNDS = 50


def unit_rows(rows: Floats) -> Floats:
    """Each row divided by its Euclidean norm; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), dtype=np.float32)


def number_of_centroids(examples: int, most: int) -> int:
    """One centroid for every four examples, at least 1 and at most `most`: fewer examples would fit their noise."""
    return max(1, min(most, examples // EXAMPLES_PER_CENTROID))


def spherical_kmeans(rows: Floats, k: int) -> npt.NDArray[np.int64]:
    """The cluster of each of the unit rows [n, dim]: int64 [n], values 0 .. k' - 1 with k' <= min(k, n).

    Rows go to the mean of largest cosine. Seeds: the row least like the mean of all, then each time the row least like
    any seed (farthest-first), so that nothing is random. Clusters that lose all rows are dropped.
    Dhillon and Modha 2001, "Concept decompositions for large sparse text data using clustering".
    """
    n = len(rows)
    if k <= 1 or n <= 1:
        return np.zeros(n, np.int64)
    seeds = [int((rows @ rows.mean(axis=0)).argmin())]
    nearest = rows @ rows[seeds[0]]
    while len(seeds) < min(k, n) and nearest.min() < 1 - 1e-6:
        seeds.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[seeds[-1]])
    clusters = (rows @ rows[seeds].T).argmax(axis=1)
    for _ in range(_ROUNDS):
        clusters = np.unique(clusters, return_inverse=True)[1]
        moved = (rows @ unit_rows(cluster_means(rows, clusters)).T).argmax(axis=1)
        if (moved == clusters).all():
            break
        clusters = moved
    return np.asarray(np.unique(clusters, return_inverse=True)[1], dtype=np.int64)


def cluster_means(rows: Floats, clusters: npt.NDArray[np.int64]) -> Floats:
    """The mean of each cluster's rows: float32 [clusters, dim]."""
    return np.stack([rows[clusters == c].mean(axis=0) for c in range(int(clusters.max()) + 1)])
