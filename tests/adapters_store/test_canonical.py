import io
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_helpers import config, safetensors, upload
from tier_helpers import matrix, put_blob

from loramux.adapters_store.base_spec import BaseSpec, LinearSpec
from loramux.adapters_store.canonical import CanonicalError, read_canonical, read_header, write_canonical
from loramux.adapters_store.digests import blob_name, blob_path, digest_from_hex
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore
from loramux.kernels.lora.interface import ModuleWeights


def weights(rank: int, dtype: torch.dtype, seed: int) -> ModuleWeights:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 7, generator=generator).to(dtype)
    return ModuleWeights(A, torch.randn(5, rank, generator=generator).to(dtype), 1 / (seed + 3))


MODULES = {
    "m.b": weights(3, torch.float16, 0),
    "m.a": weights(1, torch.bfloat16, 1),
    "z": weights(2, torch.float32, 2),
}


def test_order_does_not_matter_and_everything_comes_back(tmp_path: Path) -> None:
    digest = put_blob(tmp_path, MODULES)
    data = blob_path(tmp_path, digest).read_bytes()
    assert put_blob(tmp_path, dict(reversed(MODULES.items()))) == digest
    assert blob_path(tmp_path, digest).read_bytes() == data
    header = read_header(blob_path(tmp_path, digest))
    assert header.ranks == {"m.a": 1, "m.b": 3, "z": 2}
    assert header.scales == {name: w.scale for name, w in MODULES.items()}
    for entry in header.tensors.values():
        assert entry.start % (4 if entry.dtype == "F32" else 2) == 0
    found = read_canonical(blob_path(tmp_path, digest), dtype=torch.float32)
    assert list(found) == sorted(MODULES)
    for name, expected in MODULES.items():
        assert torch.equal(found[name].A, expected.A.float())
        assert torch.equal(found[name].B, expected.B.float())
    storages = {w.A.untyped_storage().data_ptr() for w in found.values()}
    assert len(storages) == 1


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    digest = put_blob(tmp_path, MODULES)
    loaded = load_file(blob_path(tmp_path, digest))
    assert torch.equal(loaded["m.b.A"], MODULES["m.b"].A)
    assert loaded["m.a.B"].dtype == torch.bfloat16


def test_a_source_of_the_wrong_length_is_an_error() -> None:
    tensor = matrix("m", "A", torch.zeros(2, 3))
    tensor.source.data = b"\0" * 20  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="20 bytes for a tensor of 24"):
        write_canonical(io.BytesIO(), [tensor], {"m": 1.0})


@pytest.mark.parametrize("position", [0, 9, 30, -1])
def test_damage_is_found_or_harmless(tmp_path: Path, position: int) -> None:
    path = blob_path(tmp_path, put_blob(tmp_path, MODULES))
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    if position == -1:
        read_canonical(path, dtype=torch.float32)  # a changed number is not visible without hashing
    else:
        with pytest.raises(CanonicalError):
            read_canonical(path, dtype=torch.float32)


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "sha256:" + "g" * 64,
        "sha256:" + "A" * 64,
        "md5:" + "0" * 64,
        "sha256:" + "0" * 64 + "\n",
        "sha256:../../../../etc/passwd",
        "sha256-" + "0" * 64,
    ],
)
def test_only_digests_become_paths(digest: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        blob_name(digest)
    with pytest.raises(ValueError, match="digest"):
        digest_from_hex("../x")


def test_committing_a_large_upload_takes_little_memory(tmp_path: Path) -> None:
    width, rank = 65_536, 64
    base = BaseSpec("big", "llama", "LlamaForCausalLM", width, 1, 8, {"m.up_proj": LinearSpec(width, width)}, {})
    data = safetensors(
        {
            "base_model.model.m.up_proj.lora_A.weight": ("F32", (rank, width), b"\0\0\0\1" * (rank * width)),
            "base_model.model.m.up_proj.lora_B.weight": ("F32", (width, rank), b"\0\0\0\1" * (rank * width)),
        }
    )
    store = AdapterStore(tmp_path, base, StoreLimits(min_free_bytes=0))
    assert len(data) > 32 << 20
    tracemalloc.start()
    upload(store, configuration=config(r=rank), weights=data, piece=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    store.close()
