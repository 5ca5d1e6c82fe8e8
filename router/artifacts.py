"""Trained scorers on disk, in numbered versions (see `versions`): `scorer.json` and `scorer.safetensors`.

The JSON holds the scorer's kind, its candidates, the encoder whose embeddings it was trained on, and notes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loramux.router.interface import Scorer
from loramux.router.scores.ensemble import Ensemble
from loramux.router.scores.features import Memberships, Partition
from loramux.router.scores.knn import Neighbours
from loramux.router.scores.ridge import GramSums, Group, Ridge, RidgeStatistics, RowSums, Sums
from loramux.router.scores.routerdc import RouterDC
from loramux.router.versions import Arrays, ArtifactError, Versions

__all__ = ["Artifact", "ArtifactError", "load", "save", "versions"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A scorer with what it needs to be used again.

    encoder, dim: name and width of the encoder whose rows it scores. notes: anything JSON can hold, such as how the
    scorer was chosen. version: its number in the folder, 0 before it is saved.
    """

    scorer: Scorer
    encoder: str
    dim: int
    notes: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0

    def check_encoder(self, name: str, dim: int) -> None:
        """Raises ArtifactError when the scorer was trained on embeddings of another encoder than this one."""
        if (name, dim) != (self.encoder, self.dim):
            raise ArtifactError(
                f"scorer {self.version} was trained on embeddings of {self.encoder} ({self.dim} numbers), the encoder "
                f"is {name} ({dim}); train again (POST /v1/router/train, or `loramux route train` with the server's "
                "settings), or use the encoder that it was trained on"
            )


def versions(folder: Path) -> list[int]:
    """The versions in the folder, ascending; none when there is no folder."""
    return _versions(folder).numbers()


def save(folder: Path, artifact: Artifact, keep: int | None = None) -> int:
    """Writes the scorer as the next version of the folder and returns its number.

    The latest `keep` versions stay, all of them when None. Raises ValueError for keep < 1, TypeError for a scorer of a
    kind that is not kept here, OSError when the disk refuses.
    """
    tensors: Arrays = {}
    info = {
        "encoder": artifact.encoder,
        "dim": artifact.dim,
        "scorer": _describe(artifact.scorer, "", tensors),
        "notes": dict(artifact.notes),
    }
    return _versions(folder).write(info, tensors, keep)


def load(folder: Path, version: int | None = None) -> Artifact:
    """A version of the folder, the latest when None. Raises ArtifactError naming what is wrong and what to do."""
    found = _versions(folder)
    number, value, tensors = found.read(version)
    try:
        scorer = _restore(value["scorer"], "", tensors)
        artifact = Artifact(scorer, str(value["encoder"]), int(value["dim"]), dict(value["notes"]), number)
        scores = scorer.score(np.zeros((1, artifact.dim), np.float32))
    except (KeyError, TypeError, ValueError, IndexError, np.linalg.LinAlgError) as error:
        raise found.damaged(number, f"its parts do not fit together ({type(error).__name__}: {error})") from error
    if scores.shape != (1, len(scorer.candidates)) or np.isnan(scores).any():
        raise found.damaged(number, "its scores are not one number per candidate")
    return artifact


def _versions(folder: Path) -> Versions:
    return Versions(folder, "scorer", "train again with `loramux route train`")


def _describe(scorer: Scorer, prefix: str, tensors: Arrays) -> dict[str, Any]:
    """The JSON of a scorer; its arrays go into `tensors` under names that start with `prefix`."""
    if isinstance(scorer, Ridge):
        return _describe_ridge(scorer, prefix, tensors)
    if isinstance(scorer, Neighbours):
        tensors[f"{prefix}rows"], tensors[f"{prefix}scores"] = scorer.rows, scorer.scores
        return {
            "kind": "knn",
            "candidates": list(scorer.candidates),
            "k": scorer.k,
            "temperature": scorer.temperature,
        }
    if isinstance(scorer, RouterDC):
        tensors[f"{prefix}keys"] = scorer.keys
        if scorer.projection is not None:
            tensors[f"{prefix}projection"] = scorer.projection
        return {"kind": "routerdc", "candidates": list(scorer.candidates), "temperature": scorer.temperature}
    if isinstance(scorer, Ensemble):
        members = [_describe(member, f"{prefix}{i}.", tensors) for i, member in enumerate(scorer.members)]
        return {"kind": "ensemble", "members": members, "scales": list(scorer.scales)}
    raise TypeError(f"a {type(scorer).__name__} cannot be saved")


def _describe_ridge(scorer: Ridge, prefix: str, tensors: Arrays) -> dict[str, Any]:
    statistics = scorer.statistics
    for i, group in enumerate(statistics.groups):
        for name, tensor in group.sums.tensors().items():
            tensors[f"{prefix}group{i}.{name}"] = tensor
    partitions = () if scorer.features is None else scorer.features.partitions
    for i, partition in enumerate(partitions):
        tensors[f"{prefix}partition{i}.weights"] = partition.weights
        tensors[f"{prefix}partition{i}.offsets"] = partition.offsets
    return {
        "kind": "ridge",
        "alpha": scorer.alpha,
        "dim": statistics.dim,
        "keep_rows": statistics.keep_rows,
        "groups": [list(group.candidates) for group in statistics.groups],
        "partitions": len(partitions),
        "scale": None if scorer.features is None else scorer.features.scale,
    }


def _restore(value: Mapping[str, Any], prefix: str, tensors: Arrays) -> Scorer:
    kind = value["kind"]
    if kind == "ridge":
        return _restore_ridge(value, prefix, tensors)
    if kind == "ensemble":
        members = tuple(_restore(member, f"{prefix}{i}.", tensors) for i, member in enumerate(value["members"]))
        return Ensemble(members, tuple(float(scale) for scale in value["scales"]))
    candidates = tuple(value["candidates"])
    if kind == "knn":
        rows, scores = tensors[f"{prefix}rows"], tensors[f"{prefix}scores"]
        if len(rows) != len(scores):
            raise ValueError(f"{len(rows)} rows and {len(scores)} rows of scores")
        return Neighbours(rows, scores, candidates, int(value["k"]), float(value["temperature"]))
    if kind == "routerdc":
        projection = tensors.get(f"{prefix}projection")
        return RouterDC(candidates, tensors[f"{prefix}keys"], projection, float(value["temperature"]))
    raise ValueError(f"scorers of kind {str(kind)[:40]!r} are not known")


def _restore_ridge(value: Mapping[str, Any], prefix: str, tensors: Arrays) -> Ridge:
    groups = []
    for i, candidates in enumerate(value["groups"]):
        start = f"{prefix}group{i}."
        parts = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        count = int(parts.pop("count", np.zeros(1))[0])
        sums: Sums = GramSums(count=count, **parts) if "xx" in parts else RowSums(**parts)
        groups.append(Group(tuple(candidates), sums))
    features = None
    if value["scale"] is not None:
        names = [f"{prefix}partition{i}" for i in range(value["partitions"])]
        partitions = [Partition(tensors[f"{name}.weights"], tensors[f"{name}.offsets"]) for name in names]
        features = Memberships(tuple(partitions), float(value["scale"]))
    statistics = RidgeStatistics(int(value["dim"]), tuple(groups), bool(value["keep_rows"]))
    return Ridge(statistics, float(value["alpha"]), features)
