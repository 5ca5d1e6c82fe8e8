import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from store_helpers import raw_file, safetensors, values

from loramux.adapters_store.errors import InvalidAdapter
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.safetensors_header import read_tensor_infos


def tensor(start: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end], **changes}


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, buffer)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("adapter_model.safetensors", b"x")
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 83115256\n"
GOOD = safetensors({"a": ("F32", (2,), values((2,))), "b": ("F16", (3,), b"\0" * 6)}, {"format": "pt"})

REFUSED: dict[str, tuple[bytes, str, str]] = {
    "pointer": (POINTER, "git_lfs_pointer", "Git LFS pointer"),
    "torch.save": (torch_zip(), "pickle_refused", "torch.save"),
    "zip": (archive(), "pickle_refused", "zip archive"),
    "pickle": (pickle.dumps({"a": 1}), "pickle_refused", "a pickle"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2), "pickle_refused", "a pickle"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 40, "invalid_safetensors", "gzip"),
    "gguf": (b"GGUF" + b"\0" * 40, "invalid_safetensors", "GGUF"),
    "html": (b"<!DOCTYPE html><html></html>", "invalid_safetensors", "HTML"),
    "empty": (b"", "invalid_safetensors", "0 bytes"),
    "text": (b"hello, world, this is text", "limit_exceeded", "header claims"),
    "long header": ((1 << 40).to_bytes(8, "little") + b"{}" * 20, "limit_exceeded", "header claims"),
    "short file": ((500).to_bytes(8, "little") + b"{}" * 20, "invalid_safetensors", "truncated"),
    "not json": (raw_file(b"{not json}  "), "invalid_safetensors", "not JSON"),
    "not utf-8": (raw_file(b"\xff\xfe{}    "), "invalid_safetensors", "not UTF-8"),
    "list": (raw_file([]), "invalid_safetensors", "JSON object"),
    "deep": (raw_file(b"[" * 200_000), "invalid_safetensors", "header"),
    "twice": (
        raw_file(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        "invalid_safetensors",
        "twice",
    ),
    "twice inside": (
        raw_file(b'{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}'),
        "invalid_safetensors",
        "twice",
    ),
    "metadata": (raw_file({"__metadata__": {"a": 1}}), "invalid_safetensors", "strings"),
    "much metadata": (raw_file({"__metadata__": {"a": "x" * 100_000}}), "limit_exceeded", "__metadata__"),
    "extra field": (raw_file({"a": tensor(0, 8, x=1)}, b"\0" * 8), "invalid_safetensors", "exactly"),
    "dtype": (raw_file({"a": tensor(0, 8, dtype="I64", shape=[1])}, b"\0" * 8), "unsupported_dtype", "I64"),
    "float64": (raw_file({"a": tensor(0, 8, dtype="F64", shape=[1])}, b"\0" * 8), "unsupported_dtype", "F64"),
    "dtype list": (raw_file({"a": tensor(0, 8, dtype=[])}, b"\0" * 8), "unsupported_dtype", "dtype"),
    "negative": (raw_file({"a": tensor(0, 8, shape=[-2, -1])}, b"\0" * 8), "invalid_safetensors", "shape"),
    "float size": (raw_file({"a": tensor(0, 8, shape=[2.0])}, b"\0" * 8), "invalid_safetensors", "shape"),
    "bool size": (raw_file({"a": tensor(0, 4, shape=[True])}, b"\0" * 4), "invalid_safetensors", "shape"),
    "huge size": (raw_file({"a": tensor(0, 8, shape=[1 << 60, 1 << 60])}, b"\0" * 8), "invalid_safetensors", "shape"),
    "large size": (raw_file({"a": tensor(0, 8, shape=[1 << 40])}, b"\0" * 8), "invalid_safetensors", "needs"),
    "wrong size": (raw_file({"a": tensor(0, 8, shape=[3])}, b"\0" * 8), "invalid_safetensors", "needs 12"),
    "offsets": (raw_file({"a": tensor(0, 8, data_offsets=[8, 0])}, b"\0" * 8), "invalid_safetensors", "spans"),
    "three offsets": (
        raw_file({"a": tensor(0, 8, data_offsets=[0, 4, 8])}, b"\0" * 8),
        "invalid_safetensors",
        "offsets",
    ),
    "overlap": (raw_file({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12), "invalid_safetensors", "overlaps"),
    "same bytes": (raw_file({"a": tensor(0, 8), "b": tensor(0, 8)}, b"\0" * 8), "invalid_safetensors", "overlaps"),
    "hole": (raw_file({"a": tensor(0, 8), "b": tensor(12, 20)}, b"\0" * 20), "invalid_safetensors", "hole"),
    "hole first": (raw_file({"a": tensor(4, 8)}, b"\0" * 8), "invalid_safetensors", "hole"),
    "trailing": (GOOD + b"\0", "invalid_safetensors", "follow the last"),
    "truncated": (GOOD[:-4], "truncated", "truncated"),
    "name": (raw_file({"a\nb": tensor(0, 8)}, b"\0" * 8), "invalid_safetensors", "a?b"),
    "long name": (raw_file({"a" * 5000: tensor(0, 8)}, b"\0" * 8), "invalid_safetensors", "too long"),
}


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(GOOD)
    infos = read_tensor_infos(path, StoreLimits())
    assert {(i.name, i.dtype, i.shape) for i in infos.values()} == {("a", "F32", (2,)), ("b", "F16", (3,))}
    start, end = infos["a"].start, infos["a"].end
    assert path.read_bytes()[start:end] == values((2,))


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path: Path, case: str) -> None:
    data, code, phrase = REFUSED[case]
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(InvalidAdapter) as refusal:
        read_tensor_infos(path, StoreLimits())
    assert refusal.value.code == code
    assert phrase in refusal.value.message
    assert len(refusal.value.message) < 600
    assert "\n" not in refusal.value.message
    assert str(tmp_path) not in refusal.value.message


def test_many_tensors_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(raw_file({f"t{i}": entry for i in range(25_000)}))
    with pytest.raises(InvalidAdapter, match="25000 tensors") as refusal:
        read_tensor_infos(path, StoreLimits())
    assert refusal.value.code == "limit_exceeded"
    path.write_bytes(raw_file({f"t{i}": entry for i in range(150_000)}))
    assert path.stat().st_size > StoreLimits().max_header_bytes
    tracemalloc.start()
    with pytest.raises(InvalidAdapter, match="header claims"):
        read_tensor_infos(path, StoreLimits())
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_lying_header_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    header = {"a": {"dtype": "F32", "shape": [1 << 45], "data_offsets": [0, 4 << 45]}}
    path.write_bytes(raw_file(header, b"\0" * 64))
    with pytest.raises(InvalidAdapter) as refusal:
        read_tensor_infos(path, StoreLimits())
    assert refusal.value.code == "truncated"
    assert json.dumps(header)
