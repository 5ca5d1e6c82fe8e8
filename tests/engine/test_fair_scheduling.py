"""Fair turns in the running engine: a flood of one tenant, or on one adapter set, leaves others' first tokens near."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from support.engines import drain, make_core, request
from support.models import AdapterRecipe, family_config, random_model, save_adapter, save_model, write_blob

from loramux.server.engine.core import EngineCore

SLOTS = 4


@pytest.fixture(scope="module")
def digest_of(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    root = tmp_path_factory.mktemp("fair")
    model = random_model(family_config("llama"))
    found = {"model": str(save_model(model, root / "base")), "blobs": str(root / "blobs")}
    for seed, name in enumerate(("popular", "rare")):
        recipe = AdapterRecipe(name, seed, {"r": 4, "target_modules": ["q_proj"]})
        found[name] = write_blob(model, save_adapter(model, recipe, root / "adapters"), root / "blobs")
    return found


@pytest.fixture
def core(digest_of: Mapping[str, str]) -> Iterator[EngineCore]:
    engine = make_core(Path(digest_of["model"]), Path(digest_of["blobs"]), max_num_seqs=SLOTS)
    yield engine
    engine.close()


def steps(core: EngineCore, count: int) -> list[str]:
    """Some steps; the requests that they gave tokens to, in order."""
    return [output.request_id for _ in range(count) for output in core.step().outputs]


def order(core: EngineCore, begun: list[str]) -> list[str]:
    """All requests in the order of their first tokens, those of `begun` first."""
    return list(dict.fromkeys([*begun, *drain(core)]))


def test_a_flood_leaves_others_near(core: EngineCore) -> None:
    for i in range(60):
        core.add(replace(request(f"flood-{i}", [5, 6, 7, i % 20 + 3], 6, ignore_eos=True), tenant="flood"))
    begun = steps(core, 3)
    for tenant in ("b", "c"):
        core.add(replace(request(tenant, [8, 9, 10], 6, ignore_eos=True), tenant=tenant))
    found = order(core, begun)
    after = [id for id in found if id not in begun]
    assert {"b", "c"} <= set(after[:3])
    assert [id for id in found if id.startswith("flood")] == [f"flood-{i}" for i in range(60)]


def test_a_popular_adapter_leaves_the_tenants_other_near(core: EngineCore, digest_of: Mapping[str, str]) -> None:
    for i in range(40):
        core.add(request(f"p{i}", [5, 6, i % 20 + 3], 6, [(digest_of["popular"], 1.0)], ignore_eos=True))
    begun = steps(core, 3)
    core.add(request("rare", [5, 6, 7], 6, [(digest_of["rare"], 1.0)], ignore_eos=True))
    found = order(core, begun)
    assert found.index("rare") < 3 * SLOTS
    assert [id for id in found if id != "rare"] == [f"p{i}" for i in range(40)]
