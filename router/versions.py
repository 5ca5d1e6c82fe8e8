"""Numbered versions of one thing on disk: safetensors for numbers, JSON for the rest; a version never changes.

    <folder>/v000001/<name>.json          format, digest of the tensors, and what the thing says of itself
    <folder>/v000001/<name>.safetensors

A version is written beside its place, made durable and renamed into it, so that a reader sees all of it or nothing.
What is read is checked: format, digest, and that it is whole.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from loramux.adapters_store import strict_json
from loramux.adapters_store.storage import sync_folder

FORMAT = 1
_VERSION = re.compile(r"v(\d{6,})")
_ABANDONED_SECONDS = 3600

Arrays = dict[str, npt.NDArray[Any]]


class ArtifactError(ValueError):
    """Something saved that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of what is called `name` in a folder; `remedy` says how to make another one."""

    folder: Path
    name: str
    remedy: str

    def numbers(self) -> list[int]:
        """Ascending; none when there is no folder."""
        if not self.folder.is_dir():
            return []
        found = (_VERSION.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def place(self, number: int) -> Path:
        """The folder of a version."""
        return self.folder / f"v{number:06d}"

    def write(self, info: Mapping[str, Any], tensors: Arrays, keep: int | None = None) -> int:
        """Writes the next version and returns its number; the latest `keep` stay, all of them when None.

        The same contents make the same bytes. Raises ValueError for keep < 1, OSError when the disk refuses.
        """
        if keep is not None and keep < 1:
            raise ValueError("keep must be at least 1")
        encoded = save_tensors({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
        text = {**info, "format": FORMAT, "sha256": hashlib.sha256(encoded).hexdigest()}
        self.folder.mkdir(parents=True, exist_ok=True)
        staged = self.folder / f".new-{secrets.token_hex(8)}"
        staged.mkdir()
        try:
            _write(staged / f"{self.name}.safetensors", encoded)
            described = json.dumps(text, indent=1, sort_keys=True, allow_nan=False) + "\n"
            _write(staged / f"{self.name}.json", described.encode())
            sync_folder(staged)
            number = max(self.numbers(), default=0) + 1
            while not _move(staged, self.place(number)):  # another process took the number
                number += 1
            sync_folder(self.folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._clean(keep)
        return number

    def read(self, version: int | None = None) -> tuple[int, dict[str, Any], Arrays]:
        """(number, what it says of itself, tensors) of a version, the latest when None. Raises ArtifactError."""
        known = self.numbers()
        if not known or (version is not None and version not in known):
            wanted = "any version" if version is None else f"version {version}"
            have = f"; there are {', '.join(map(str, known))}" if known else ""
            raise ArtifactError(f"{self.folder.name} does not hold {wanted} of a {self.name}{have}; {self.remedy}")
        number = known[-1] if version is None else version
        place = self.place(number)
        try:
            encoded = (place / f"{self.name}.safetensors").read_bytes()
            text = (place / f"{self.name}.json").read_bytes()
        except OSError as error:
            raise self.damaged(number, f"{Path(error.filename).name} cannot be read ({error.strerror})") from error
        try:
            value = strict_json.loads(text)
        except ValueError as error:
            raise self.damaged(number, f"{self.name}.json is {error}") from error
        if not isinstance(value, dict) or "format" not in value:
            raise self.damaged(number, f"{self.name}.json does not describe a {self.name}")
        if value["format"] != FORMAT:
            raise ArtifactError(
                f"{place.name}: format {value['format']} is not known to this version of loramux, which reads "
                f"{FORMAT}; {self.remedy}, or use the loramux that wrote it"
            )
        if value.get("sha256") != hashlib.sha256(encoded).hexdigest():
            raise self.damaged(number, f"{self.name}.safetensors is not the file that {self.name}.json describes")
        try:
            return number, value, load_tensors(encoded)
        except SafetensorError as error:
            raise self.damaged(number, f"{self.name}.safetensors is damaged ({error})") from error

    def damaged(self, number: int, reason: str) -> ArtifactError:
        """The error that a version is of no use."""
        return ArtifactError(f"{self.place(number).name}: {reason}; delete this version, or {self.remedy}")

    def _clean(self, keep: int | None) -> None:
        """Deletes versions beyond the latest `keep`, and what writes that never ended left an hour ago."""
        for number in self.numbers()[: -keep if keep else 0]:
            shutil.rmtree(self.place(number), ignore_errors=True)
        for left in self.folder.glob(".new-*"):
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


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
