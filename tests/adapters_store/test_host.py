import threading
from pathlib import Path

import pytest
import torch
from tier_helpers import BYTES_PER_RANK, put_adapter, put_blob

from loramux.adapters_store.canonical import CanonicalError, read_canonical
from loramux.adapters_store.digests import blob_path
from loramux.adapters_store.host import HostTier
from loramux.kernels.lora.interface import ModuleWeights


def tier(folder: Path, ranks: int) -> HostTier:
    return HostTier(folder, budget_bytes=ranks * BYTES_PER_RANK, dtype=torch.float32, pin_memory=False)


def test_loads_once_and_evicts_the_least_recently_used(tmp_path: Path) -> None:
    a, b, c = (put_adapter(tmp_path, value) for value in (1.0, 2.0, 3.0))
    host = tier(tmp_path, 2)
    first = host.get(a)
    host.get(b)
    assert host.get(a) is first
    host.get(c)
    assert host.digests() == [a, c]
    assert not host.contains(b)
    assert host.bytes_used == host.bytes_total == 2 * BYTES_PER_RANK
    assert float(host.get(b)["m"].B[0, 0]) == 2.0


def test_a_borrowed_adapter_is_not_evicted_and_one_that_does_not_fit_is_served_through(tmp_path: Path) -> None:
    a, b = put_adapter(tmp_path, 1.0), put_adapter(tmp_path, 2.0)
    large = put_adapter(tmp_path, 3.0, rank=5)
    host = tier(tmp_path, 1)
    with host.borrow(a):
        assert float(host.get(b)["m"].A[0, 0]) == 2.0
        assert host.digests() == [a]
    assert host.get(large)["m"].rank == 5
    assert host.digests() == [a]
    assert host.bytes_used == BYTES_PER_RANK


def test_drop_frees_now_or_after_the_last_borrower(tmp_path: Path) -> None:
    a = put_adapter(tmp_path, 1.0)
    host = tier(tmp_path, 4)
    with host.borrow(a), host.borrow(a):
        host.drop(a)
        assert not host.contains(a)
        assert host.bytes_used == BYTES_PER_RANK
    assert host.bytes_used == 0
    host.get(a)
    host.drop(a)
    host.drop(a)
    assert host.bytes_used == 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "header", "empty", "not a digest"])
def test_damaged_blobs_are_errors_that_hold_no_bytes(tmp_path: Path, damage: str) -> None:
    digest = put_adapter(tmp_path, 1.0)
    path = blob_path(tmp_path, digest)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-3])
    elif damage == "header":
        path.write_bytes(data[:20] + b"\xff" + data[21:])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        digest = "sha256:../../etc/passwd"
    host = tier(tmp_path, 4)
    with pytest.raises((CanonicalError, ValueError)):
        host.get(digest)
    assert host.bytes_used == 0
    assert host.digests() == []
    assert host.get(put_adapter(tmp_path, 7.0))


def test_many_threads_read_each_blob_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [put_adapter(tmp_path, float(i)) for i in range(4)]
    host = tier(tmp_path, 8)
    reads: list[Path] = []

    def counting(path: Path, **options: object) -> object:
        reads.append(path)
        return read_canonical(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("loramux.adapters_store.host.read_canonical", counting)
    barrier = threading.Barrier(8)
    wrong: list[str] = []

    def work() -> None:
        barrier.wait()
        for _ in range(20):
            for i, digest in enumerate(digests):
                if float(host.get(digest)["m"].A[0, 0]) != i:
                    wrong.append(digest)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(reads) == 4


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_to_the_engine_dtype(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 50).to(stored), torch.randn(70, 3).to(stored)
    digest = put_blob(tmp_path, {"x.y": ModuleWeights(A, B, 1 / 3)})
    modules = HostTier(tmp_path, budget_bytes=1 << 20, dtype=wanted, pin_memory=False).get(digest)
    assert modules["x.y"].scale == 1 / 3
    assert torch.equal(modules["x.y"].A, A.to(wanted))
    assert torch.equal(modules["x.y"].B, B.to(wanted))


def test_weights_that_overflow_the_engine_dtype_are_refused(tmp_path: Path) -> None:
    digest = put_blob(tmp_path, {"m": ModuleWeights(torch.full((1, 4), 1e6), torch.ones(4, 1), 1.0)})
    with pytest.raises(CanonicalError, match="overflow float16"):
        HostTier(tmp_path, budget_bytes=1 << 20, dtype=torch.float16, pin_memory=False).get(digest)
