"""A backend that only keeps books, and canonical blobs to feed it."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loramux.adapters_store.canonical import CanonicalTensor, write_canonical
from loramux.adapters_store.digests import blob_path, digest_from_hex
from loramux.kernels.lora.interface import ArenaFullError, Lane, LoraPlan, ModuleWeights, Segment, Site, SiteSlice

IN, OUT = 8, 16
SITE = Site(0, IN, (SiteSlice("m", OUT),))
BYTES_PER_RANK = (IN + OUT) * 4


class Bytes:
    """A tensor source over bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def chunks(self) -> list[bytes]:
        return [self.data[i : i + 7] for i in range(0, len(self.data), 7)]


def matrix(module: str, part: str, tensor: Tensor) -> CanonicalTensor:
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return CanonicalTensor(module, "A" if part == "A" else "B", dtype, (tensor.shape[0], tensor.shape[1]), Bytes(data))


def put_blob(folder: Path, modules: Mapping[str, ModuleWeights]) -> str:
    """Writes a canonical blob and returns its digest."""
    tensors = [matrix(m, part, getattr(w, part)) for m, w in modules.items() for part in ("A", "B")]
    temporary = folder / "temporary"
    with temporary.open("wb") as file:
        hexdigest, _ = write_canonical(file, tensors, {m: w.scale for m, w in modules.items()})
    digest = digest_from_hex(hexdigest)
    temporary.rename(blob_path(folder, digest))
    return digest


def put_adapter(folder: Path, value: float, rank: int = 1, module: str = "m") -> str:
    """An adapter of one module, all of whose numbers are `value`."""
    weights = ModuleWeights(torch.full((rank, IN), value), torch.full((OUT, rank), value), value)
    return put_blob(folder, {module: weights})


class BookKeeper:
    """A `LoraBackend` without arithmetic that checks the protocol: order of calls, threads, budget, contents."""

    def __init__(self, budget_ranks: int, max_slots: int = 1000) -> None:
        self.sites = (SITE,)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.bytes_total = budget_ranks * BYTES_PER_RANK
        self.bytes_used = 0
        self.most_bytes = 0
        self.engine_thread = threading.get_ident()
        self.max_slots = max_slots
        self.sizes: dict[int, int] = {}
        self.contents: dict[int, float] = {}
        self.published: set[int] = set()
        self.blocked = threading.Event()
        self.blocked.set()
        self.fill_error: Exception | None = None
        self.not_yet: set[int] = set()
        self._next = 0

    def bytes_needed(self, ranks: Mapping[str, int]) -> int:
        return sum(ranks.values()) * BYTES_PER_RANK

    def reserve(self, ranks: Mapping[str, int]) -> int:
        assert threading.get_ident() == self.engine_thread
        for module in ranks:
            if module != "m":
                raise KeyError(module)
        needed = self.bytes_needed(ranks)
        if self.bytes_used + needed > self.bytes_total or len(self.sizes) >= self.max_slots:
            raise ArenaFullError(needed, self.bytes_total - self.bytes_used)
        self._next += 1
        self.sizes[self._next] = needed
        self.bytes_used += needed
        self.most_bytes = max(self.most_bytes, self.bytes_used)
        return self._next

    def fill(self, slot: int, modules: Mapping[str, ModuleWeights]) -> None:
        assert threading.get_ident() != self.engine_thread
        assert self.blocked.wait(30)
        if self.fill_error is not None:
            raise self.fill_error
        assert slot not in self.published
        self.contents[slot] = float(modules["m"].A[0, 0])

    def filled(self, slot: int) -> bool:
        return slot in self.contents and slot not in self.not_yet

    def publish(self, slot: int) -> None:
        assert threading.get_ident() == self.engine_thread
        assert slot in self.contents
        self.published.add(slot)

    def release(self, slot: int) -> None:
        assert threading.get_ident() == self.engine_thread
        self.bytes_used -= self.sizes.pop(slot)
        self.published.discard(slot)
        self.contents.pop(slot, None)

    def check_set(self, slots: Sequence[int]) -> None:
        raise AssertionError("the tier never computes")

    def plan(self, segments: Sequence[Segment], num_tokens: int, lane: Lane = "tokens") -> LoraPlan | None:
        raise AssertionError("the tier never computes")

    def add(self, site: Site, x: Tensor, out: Tensor, plan: LoraPlan) -> None:
        raise AssertionError("the tier never computes")
