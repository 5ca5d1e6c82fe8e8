"""Trained scorers on disk: safetensors for numbers, JSON for the rest, in numbered versions that never change.

    <folder>/v000001/scorer.json          format, kind, encoder, candidates, digest of the tensors, notes
    <folder>/v000001/scorer.safetensors

A version is written beside its place, made durable and renamed into it, so that a reader sees all of it or nothing.
What is read is checked: format, digest, shapes, and the encoder whose embeddings the scorer was trained on.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from loramux.adapters_store import strict_json
from loramux.adapters_store.storage import sync_folder
from loramux.router.interface import Encoder, Scorer
from loramux.router.scores.ensemble import Ensemble
from loramux.router.scores.features import Memberships, Partition
from loramux.router.scores.knn import Neighbours
from loramux.router.scores.ridge import GramSums, Group, Ridge, RidgeStatistics, RowSums, Sums
from loramux.router.scores.routerdc import RouterDC

FORMAT = 1
_JSON, _TENSORS = "scorer.json", "scorer.safetensors"
_VERSION = re.compile(r"v(\d{6,})")
_ABANDONED_SECONDS = 3600

Arrays = dict[str, npt.NDArray[Any]]


class ArtifactError(ValueError):
    """A saved scorer that cannot be used; the message names the file and the remedy."""


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

    def check_encoder(self, encoder: Encoder) -> None:
        """Raises ArtifactError when the scorer was trained on another encoder's embeddings."""
        if (encoder.name, encoder.dim) != (self.encoder, self.dim):
            raise ArtifactError(
                f"the scorer was trained on embeddings of {self.encoder} ({self.dim} numbers), the encoder is "
                f"{encoder.name} ({encoder.dim}); use that encoder or train again with `loramux route train`"
            )


def versions(folder: Path) -> list[int]:
    """The versions in the folder, ascending; none when there is no folder."""
    if not folder.is_dir():
        return []
    found = (_VERSION.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def save(folder: Path, artifact: Artifact, keep: int | None = None) -> int:
    """Writes the scorer as the next version of the folder and returns its number.

    The latest `keep` versions stay, all of them when None. Raises ValueError for keep < 1, TypeError for a scorer of a
    kind that is not kept here, OSError when the disk refuses.
    """
    if keep is not None and keep < 1:
        raise ValueError("keep must be at least 1")
    tensors: Arrays = {}
    described = _describe(artifact.scorer, "", tensors)
    encoded = save_tensors({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    text = {
        "format": FORMAT,
        "encoder": artifact.encoder,
        "dim": artifact.dim,
        "scorer": described,
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "notes": dict(artifact.notes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".new-{secrets.token_hex(8)}"
    staged.mkdir()
    try:
        _write(staged / _TENSORS, encoded)
        _write(staged / _JSON, (json.dumps(text, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
        sync_folder(staged)
        number = max(versions(folder), default=0) + 1
        while not _move(staged, folder / f"v{number:06d}"):  # another process took the number
            number += 1
        sync_folder(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _clean(folder, keep)
    return number


def load(folder: Path, version: int | None = None) -> Artifact:
    """A version of the folder, the latest when None. Raises ArtifactError naming what is wrong and what to do."""
    known = versions(folder)
    if not known or (version is not None and version not in known):
        wanted = "any version" if version is None else f"version {version}"
        have = f"; there are {', '.join(map(str, known))}" if known else ""
        raise ArtifactError(f"{folder.name} does not hold {wanted} of a scorer{have}; `loramux route train` makes one")
    number = known[-1] if version is None else version
    place = folder / f"v{number:06d}"
    try:
        encoded, text = (place / _TENSORS).read_bytes(), (place / _JSON).read_bytes()
    except OSError as error:
        raise _damaged(place, f"{Path(error.filename).name} cannot be read ({error.strerror})") from error
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise _damaged(place, f"{_JSON} is {error}") from error
    if not isinstance(value, dict) or "format" not in value:
        raise _damaged(place, f"{_JSON} does not describe a scorer")
    if value["format"] != FORMAT:
        raise ArtifactError(
            f"{place.name}: format {value['format']} is not known to this version of loramux, which reads {FORMAT}; "
            "train again, or use the loramux that wrote it"
        )
    if value.get("sha256") != hashlib.sha256(encoded).hexdigest():
        raise _damaged(place, f"{_TENSORS} is not the file that {_JSON} describes")
    try:
        scorer = _restore(value["scorer"], "", load_tensors(encoded))
        artifact = Artifact(scorer, str(value["encoder"]), int(value["dim"]), dict(value["notes"]), number)
        scores = scorer.score(np.zeros((1, artifact.dim), np.float32))
    except (KeyError, TypeError, ValueError, IndexError, SafetensorError, np.linalg.LinAlgError) as error:
        raise _damaged(place, f"its parts do not fit together ({type(error).__name__}: {error})") from error
    if scores.shape != (1, len(scorer.candidates)) or np.isnan(scores).any():
        raise _damaged(place, "its scores are not one number per candidate")
    return artifact


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _move(staged: Path, place: Path) -> bool:
    """Whether the folder could be renamed; False when the place is taken (a folder with files is never replaced)."""
    try:
        staged.rename(place)
    except OSError:
        if place.exists():
            return False
        raise
    return True


def _clean(folder: Path, keep: int | None) -> None:
    """Deletes versions beyond the latest `keep`, and what saves that never ended left an hour ago."""
    for number in versions(folder)[: -keep if keep else 0]:
        shutil.rmtree(folder / f"v{number:06d}", ignore_errors=True)
    for left in folder.glob(".new-*"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _damaged(place: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{place.name}: {reason}; delete this version, or train again with `loramux route train`")


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
