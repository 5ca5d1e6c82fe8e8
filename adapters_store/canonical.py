"""The canonical form of an adapter: one safetensors file whose sha256 is the adapter's identity.

For every module `m` the adapter touches, sorted by name, the file holds `m.A` [rank, in] and `m.B` [out, rank] in
the dtype they were published in (F32, F16 or BF16), and the metadata holds the scale s of `y += s B A x`:

    {"format": "loramux.lora/1", "scales": "{\\"m\\":2.0,...}"}

Wider dtypes come first in the data so that every tensor is aligned to its element. Nothing else is stored, so two
uploads that compute the same function from the same numbers have the same bytes, whatever their tensor order,
key prefixes or training-only settings were.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Literal, Protocol

import torch

from loramux.kernels.lora.interface import ModuleWeights

FORMAT = "loramux.lora/1"
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 64 << 20
CHUNK_BYTES = 4 << 20

Part = Literal["A", "B"]


class CanonicalError(Exception):
    """A blob that cannot be read as an adapter: missing, damaged, or not representable in the wanted dtype."""


class TensorSource(Protocol):
    """Where a tensor's bytes come from while a canonical file is written."""

    def chunks(self) -> Iterable[bytes | memoryview]:
        """The little-endian row-major bytes in order, in pieces of bounded size."""


@dataclass(frozen=True, slots=True)
class CanonicalTensor:
    """One matrix to be written: A [rank, in] or B [out, rank] of a module, and where its bytes are."""

    module: str
    part: Part
    dtype: str
    shape: tuple[int, int]
    source: TensorSource

    @property
    def name(self) -> str:
        """The key in the file."""
        return f"{self.module}.{self.part}"

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in its own dtype."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One matrix of a canonical file: element type, shape, and byte range counted from the start of the file."""

    dtype: str
    shape: tuple[int, int]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CanonicalHeader:
    """What a canonical file says before its data: the matrices by module and part, and the scales by module."""

    tensors: Mapping[tuple[str, Part], TensorEntry]
    scales: Mapping[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every module."""
        return {module: self.tensors[module, "A"].shape[0] for module in self.scales}

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Bytes of all matrices once cast to `dtype`."""
        return sum(math.prod(t.shape) for t in self.tensors.values()) * dtype.itemsize


def write_canonical(
    file: IO[bytes], tensors: Sequence[CanonicalTensor], scales: Mapping[str, float]
) -> tuple[str, int]:
    """Writes the canonical file to `file` and returns (sha256 in hexadecimal, number of bytes).

    Memory stays bounded by one chunk. The result depends on the tensors' contents and the scales only, not on their
    order. ValueError when a source gives more or fewer bytes than its shape asks for.
    """
    layout = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.module, t.part))
    header: dict[str, object] = {
        "__metadata__": {
            "format": FORMAT,
            "scales": json.dumps({m: float(scales[m]) for m in sorted(scales)}, separators=(",", ":"), allow_nan=False),
        }
    }
    offset = 0
    for tensor in layout:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    total = 0
    for piece in _pieces(encoded, layout):
        digest.update(piece)
        file.write(piece)
        total += len(piece)
    return digest.hexdigest(), total


def _pieces(encoded_header: bytes, layout: Sequence[CanonicalTensor]) -> Iterable[bytes | memoryview]:
    yield len(encoded_header).to_bytes(8, "little")
    yield encoded_header
    for tensor in layout:
        written = 0
        for chunk in tensor.source.chunks():
            written += len(chunk)
            yield chunk
        if written != tensor.nbytes:
            raise ValueError(f"{tensor.name}: {written} bytes for a tensor of {tensor.nbytes}")


def read_header(path: Path) -> CanonicalHeader:
    """The header of a canonical file, checked against the file's size. Raises `CanonicalError`."""
    try:
        with path.open("rb", buffering=0) as file:
            return _read_header(file)
    except OSError as error:
        raise CanonicalError(f"the adapter's blob cannot be read: {error.strerror or error}") from error


def _read_header(file: FileIO) -> CanonicalHeader:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) != 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CanonicalError("the adapter's blob is truncated")
    try:
        raw = json.loads(file.read(length))
        metadata = raw.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise CanonicalError(f"the adapter's blob has format {metadata['format']!r}, not {FORMAT!r}")
        scales = {str(m): float(s) for m, s in json.loads(metadata["scales"]).items()}
        tensors: dict[tuple[str, Part], TensorEntry] = {}
        for name, info in raw.items():
            module, _, part = name.rpartition(".")
            rows, columns = info["shape"]
            start, end = info["data_offsets"]
            entry = TensorEntry(info["dtype"], (rows, columns), 8 + length + start, 8 + length + end)
            if end - start != rows * columns * ITEM_BYTES[entry.dtype] or part not in ("A", "B"):
                raise CanonicalError(f"the adapter's blob is damaged at {name!r}")
            tensors[module, "A" if part == "A" else "B"] = entry
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CanonicalError("the adapter's blob has a damaged header") from error
    if {(m, p) for m in scales for p in ("A", "B")} != set(tensors):
        raise CanonicalError("the adapter's blob has modules without a pair of matrices")
    if max((t.end for t in tensors.values()), default=8 + length) != size:
        raise CanonicalError("the adapter's blob is truncated")
    return CanonicalHeader(tensors, scales)


def read_canonical(path: Path, *, dtype: torch.dtype, pin_memory: bool = False) -> dict[str, ModuleWeights]:
    """All modules of a canonical file, cast to `dtype`, as views of one (optionally pinned) host buffer.

    The buffer is the only allocation that grows with the adapter. Raises `CanonicalError` for a file that is
    missing or damaged, and for weights that are finite as published but not in `dtype` (float16 ends at 65504).
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _read_modules(file, _read_header(file), dtype, pin_memory)
    except OSError as error:
        raise CanonicalError(f"the adapter's blob cannot be read: {error.strerror or error}") from error


def _read_modules(
    file: FileIO, header: CanonicalHeader, dtype: torch.dtype, pin_memory: bool
) -> dict[str, ModuleWeights]:
    flat = torch.empty(header.bytes_as(dtype) // dtype.itemsize, dtype=dtype, pin_memory=pin_memory)
    matrices: dict[tuple[str, Part], torch.Tensor] = {}
    offset = 0
    for key, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
        count = math.prod(entry.shape)
        target = flat[offset : offset + count]
        file.seek(entry.start)
        _read_tensor(file, entry, target)
        if DTYPES[entry.dtype] != dtype and dtype == torch.float16 and not bool(torch.isfinite(target).all()):
            raise CanonicalError(f"{key[0]}: weights published as {entry.dtype} overflow float16")
        matrices[key] = target.view(entry.shape)
        offset += count
    return {m: ModuleWeights(matrices[m, "A"], matrices[m, "B"], header.scales[m]) for m in sorted(header.scales)}


def _read_tensor(file: FileIO, entry: TensorEntry, target: torch.Tensor) -> None:
    """Reads one matrix into `target` (1-D), straight when the dtypes agree, through a chunk when they do not."""
    stored = DTYPES[entry.dtype]
    if stored == target.dtype:
        _read_exactly(file, target.view(torch.uint8).numpy().data)
        return
    step = CHUNK_BYTES // stored.itemsize
    chunk = torch.empty(min(step, target.numel()), dtype=stored)
    for start in range(0, target.numel(), step):
        part = chunk[: min(step, target.numel() - start)]
        _read_exactly(file, part.view(torch.uint8).numpy().data)
        target[start : start + len(part)].copy_(part)


def _read_exactly(file: FileIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CanonicalError("the adapter's blob is truncated")
        done += count
