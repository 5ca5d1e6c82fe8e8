"""The shadow's reason, for who asks for it."""

from pathlib import Path

import pytest
from api.harness import in_process, make_bench
from api.test_routing import QUERY, TALK
from api.test_routing_shadow import prepared, waits

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("explain", [True, False])
async def test_the_shadow_explains_when_asked(tmp_path: Path, explain: bool) -> None:
    async with in_process(make_bench(tmp_path, base_examples=TALK, router_shadow=True)) as bench:
        await prepared(bench)
        bench.engine.script = lambda request: [list(b"a"), waits(request), [257]]
        messages = [{"role": "user", "content": QUERY}]
        body = (await bench.chat(model="sum", messages=messages, router={"explain": explain})).json()
        shadow = body["loramux"]["router"]["shadow"]
        assert shadow["status"] == "decided"
        assert ("examples known of all 2 candidates" in shadow.get("reason", "")) is explain
        assert ("reason" in shadow) is explain
