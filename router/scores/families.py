"""The kinds of scorers that cross-validation compares, each with its grid of hyperparameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from loramux.router.interface import Progress, Scorer
from loramux.router.scores.clusters import fit_clusters
from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.knn import Neighbours
from loramux.router.scores.ridge import Ridge, collect, fit_groups
from loramux.router.scores.routerdc import RouterDCOptions, fit_head


class Family(Protocol):
    """One kind of scorer. `in_score_units`: what it predicts is comparable with the scores themselves."""

    @property
    def name(self) -> str: ...

    @property
    def in_score_units(self) -> bool: ...

    def settings(self) -> tuple[str, ...]:
        """A label per point of the grid."""
        ...

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        """The scorers of some points of the grid, by index. Raises ValueError when the table does not allow it."""
        ...


@dataclass(frozen=True, slots=True)
class RidgeFamily:
    """Ridge regression on the embeddings alone."""

    alphas: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    name: str = "ridge"
    in_score_units: bool = True

    def settings(self) -> tuple[str, ...]:
        return tuple(f"alpha={alpha:g}" for alpha in self.alphas)

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        statistics = collect(table)
        return [Ridge(statistics, self.alphas[i]) for i in settings]


@dataclass(frozen=True, slots=True)
class GroupedRidgeFamily:
    """Ridge regression on embeddings and the group they look most like; see `fit_groups`."""

    alphas: tuple[float, ...] = (1.0, 10.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)
    scale: float = 3.0
    name: str = "grouped ridge"
    in_score_units: bool = True

    def settings(self) -> tuple[str, ...]:
        return tuple(f"alpha={alpha:g}" for alpha in self.alphas)

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        features = fit_groups(table, self.scale)
        statistics = collect(table, features)
        return [Ridge(statistics, self.alphas[i], features) for i in settings]


@dataclass(frozen=True, slots=True)
class ClusteredRidgeFamily:
    """Ridge regression on embeddings and memberships in clusters of several sizes; see `fit_clusters`.

    Each size stands twice: k-means is random, and two clusterings of a size cut at different places.
    """

    alphas: tuple[float, ...] = (1.0, 10.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)
    sizes: tuple[int, ...] = (4, 4, 8, 8, 16, 16, 32, 32)
    scale: float = 3.0
    name: str = "clustered ridge"
    in_score_units: bool = True

    def settings(self) -> tuple[str, ...]:
        return tuple(f"alpha={alpha:g}" for alpha in self.alphas)

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        features = fit_clusters(table.embeddings, self.sizes, self.scale, seed)
        statistics = collect(table, features)
        return [Ridge(statistics, self.alphas[i], features) for i in settings]


@dataclass(frozen=True, slots=True)
class NeighboursFamily:
    """Nearest neighbours over a grid of k and temperature."""

    ks: tuple[int, ...] = (40, 80, 160)
    temperatures: tuple[float, ...] = (0.05, 0.1)
    name: str = "knn"
    in_score_units: bool = True

    def settings(self) -> tuple[str, ...]:
        return tuple(f"k={k} temperature={t:g}" for k, t in self._grid())

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        grid = list(self._grid())
        return [Neighbours.fit(table, *grid[i]) for i in settings]

    def _grid(self) -> Iterator[tuple[int, float]]:
        return ((k, t) for k in self.ks for t in self.temperatures)


@dataclass(frozen=True, slots=True)
class RouterDCFamily:
    """RouterDC's head on frozen embeddings over a list of options."""

    options: tuple[RouterDCOptions, ...] = (RouterDCOptions(),)
    name: str = "routerdc"
    in_score_units: bool = False

    def settings(self) -> tuple[str, ...]:
        return tuple(f"tau={o.temperature:g} dropout={o.dropout:g} width={o.projection}" for o in self.options)

    def fit(self, table: ScoreTable, settings: tuple[int, ...], seed: int, progress: Progress | None) -> list[Scorer]:
        return [fit_head(table, self.options[i], seed=seed, progress=progress) for i in settings]
