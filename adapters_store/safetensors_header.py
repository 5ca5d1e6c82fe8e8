"""Reads the header of a safetensors file without trusting it: sizes are bounded before anything is parsed.

The format: 8 bytes little-endian header length, that many bytes of JSON (`name -> {dtype, shape, data_offsets}` and an
optional `__metadata__` of strings), then the tensors' bytes. Every byte after the header belongs to exactly one tensor.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loramux.adapters_store import strict_json
from loramux.adapters_store.canonical import CHUNK_BYTES, ITEM_BYTES
from loramux.adapters_store.errors import InvalidAdapter, shorten
from loramux.adapters_store.limits import StoreLimits

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
_MAX_NAME_CHARS = 512
_MAX_DIMENSIONS = 8
_WRONG_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as `torch.save` writes"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"algg", "a GGML adapter (llama.cpp)"),
    (b"BZh", "bzip2-compressed"),
    (b"\xfd7zXZ", "xz-compressed"),
    (b"<", "an HTML or XML page"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as declared: `start` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def invalid(message: str, code: str = "invalid_safetensors") -> InvalidAdapter:
    """A refusal of the weights file."""
    return InvalidAdapter(f"adapter_model.safetensors: {message}", code=code, field="adapter_model.safetensors")


def is_lfs_pointer(data: bytes) -> bool:
    """Whether the bytes start as the text file that Git LFS leaves in place of a large file."""
    return data.startswith(LFS_MAGIC)


def read_tensor_infos(path: Path, limits: StoreLimits) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, checked: known float dtypes, offsets that tile the file exactly.

    Raises `InvalidAdapter` naming what the file is instead, or the first fault. Memory is bounded by
    `limits.max_header_bytes`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(128)
        _name_other_formats(start, size)
        length = int.from_bytes(start[:8], "little")
        if length > limits.max_header_bytes:
            raise invalid(f"its header claims {length} bytes, the limit is {limits.max_header_bytes}", "limit_exceeded")
        if length < 2 or 8 + length > size:
            raise invalid(
                f"its header claims {length} bytes of a file of {size}; the file is truncated or not safetensors"
            )
        file.seek(8)
        encoded = file.read(length)
    try:
        header = strict_json.loads(encoded)
    except ValueError as error:
        raise invalid(f"its header is {error}" if str(error).startswith("not") else f"header: {error}") from error
    if not isinstance(header, dict):
        raise invalid("its header is not a JSON object")
    _check_metadata(header.pop("__metadata__", None), limits)
    if len(header) > limits.max_tensors:
        raise invalid(f"{len(header)} tensors, the limit is {limits.max_tensors}", "limit_exceeded")
    infos = {name: _tensor(name, raw, 8 + length) for name, raw in header.items()}
    _check_tiling(infos, 8 + length, size)
    return infos


def _name_other_formats(start: bytes, size: int) -> None:
    if is_lfs_pointer(start):
        raise invalid(
            "this is a Git LFS pointer, not the weights; run `git lfs pull` and upload again", "git_lfs_pointer"
        )
    for magic, what in _WRONG_FORMATS:
        if start.startswith(magic):
            code = "pickle_refused" if "pickle" in what or "torch" in what else "invalid_safetensors"
            raise invalid(f"this is {what}, not safetensors; save with `safe_serialization=True`", code)
    if size < 10:
        raise invalid(f"the file has {size} bytes, too few for safetensors")


def _check_metadata(metadata: Any, limits: StoreLimits) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid("`__metadata__` must map strings to strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > limits.max_metadata_bytes:
        raise invalid(f"`__metadata__` is longer than {limits.max_metadata_bytes} bytes", "limit_exceeded")


def _tensor(name: str, raw: Any, data_start: int) -> TensorInfo:
    shown = shorten(name)
    if len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise invalid(f"tensor name {shown!r} is too long or not printable")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise invalid(f"{shown!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise invalid(
            f"{shown!r} has dtype {shorten(str(dtype))}; adapters are served from F32, F16 or BF16", "unsupported_dtype"
        )
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise invalid(f"{shown!r} has a shape that is not a short list of sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise invalid(f"{shown!r} has data_offsets that are not two numbers")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise invalid(f"{shown!r} spans {offsets[1] - offsets[0]} bytes, {dtype} {list(shape)} needs {expected}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_tiling(infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise invalid(f"{shorten(info.name)!r} {fault}")
        position = info.end
    if position > size:
        raise invalid(f"the file has {size} bytes, its header describes {position}: it is truncated", "truncated")
    if position < size:
        raise invalid(f"{size - position} bytes follow the last tensor")


def read_chunks(file: IO[bytes], info: TensorInfo) -> Iterator[bytes]:
    """The bytes of one tensor in pieces of at most `CHUNK_BYTES` (a multiple of every element size)."""
    file.seek(info.start, os.SEEK_SET)
    left = info.end - info.start
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise invalid("the file ended early", "truncated")
        left -= len(chunk)
        yield chunk
