"""The whole way from an upload to a product: store, host tier, device tier, torch backend."""

import time
from pathlib import Path

import torch
from store_helpers import BASE, lora, safetensors, upload

from loramux.adapters_store.device import AdapterLoadFailure, DeviceTier
from loramux.adapters_store.host import HostTier
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore
from loramux.kernels.lora.interface import Segment, Site, SiteSlice
from loramux.kernels.lora.modules import SetLimits
from loramux.kernels.lora.torch_backend import TorchLoraBackend


def sites() -> tuple[Site, ...]:
    modules = sorted(name for name in BASE.linears if name != "lm_head")
    return tuple(
        Site(i, BASE.linears[m].in_features, (SiteSlice(m, BASE.linears[m].out_features),))
        for i, m in enumerate(modules)
    )


def wait(tier: DeviceTier, digests: list[str]) -> tuple[int, ...]:
    for _ in range(5000):
        tier.poll()
        slots = tier.acquire(digests)
        if slots is not None:
            return slots
        time.sleep(0.001)
    raise AssertionError("not loaded")


def test_an_upload_is_served_and_unloading_frees(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, BASE, StoreLimits(min_free_bytes=0))
    digests = [upload(store, f"a{i}", weights=safetensors(lora(seed=i * 100))).adapter.digest for i in range(3)]
    head = upload(store, "head", weights=safetensors(lora(4, ["lm_head"]))).adapter.digest
    backend = TorchLoraBackend(
        sites(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        budget_bytes=2 * 1900,
        max_slots=8,
        limits=SetLimits(max_tokens=64, max_set_size=4, max_set_rank=64),
    )
    host = HostTier(store.blob_dir, budget_bytes=1 << 20, dtype=torch.float32, pin_memory=False)
    tier = DeviceTier(backend, host)
    for digest in [*digests, *digests]:  # three adapters through room for two
        (slot,) = wait(tier, [digest])
        plan = backend.plan([Segment(1, 4, ((slot, 0.5),))], 5)
        assert plan is not None
        for site in backend.sites:
            module = site.slices[0].module
            x = torch.randn(5, site.in_features)
            out = torch.zeros(5, site.out_features)
            backend.add(site, x, out, plan)
            weights = host.get(digest).get(module)
            expected = torch.zeros_like(out)
            if weights is not None:
                expected[1:4] = 0.5 * weights.scale * (x[1:4] @ weights.A.T @ weights.B.T)
            torch.testing.assert_close(out, expected)
        tier.release([digest])
    assert tier.evictions
    assert 0 < tier.bytes_used <= backend.bytes_total
    message = ""
    try:
        wait(tier, [head])  # this engine has no site for the output layer
    except AdapterLoadFailure as failure:
        message = failure.message
    assert "lm_head" in message
    for digest in [*digests, head]:
        tier.forget(digest)
    tier.poll()
    assert tier.idle()
    assert tier.bytes_used == host.bytes_used == 0
    tier.close()
    store.close()
