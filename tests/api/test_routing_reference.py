"""What the weights rung measures against where the base's own examples do not do."""

import asyncio
from pathlib import Path

import pytest
from api.harness import TEMPLATE, in_process, make_bench
from api.test_routing import ABC, route, weighed

pytestmark = pytest.mark.anyio

PICKY = "{% if 'refused' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize(
    ("examples", "calibrated"),
    [
        (["one prompt"], "everyday prompts"), (["one prompt", "refused"], "everyday prompts"),
        (["one prompt", "another", "refused"], "2 examples of the base"),
    ],
)  # fmt: skip
async def test_too_few_examples_of_the_base_are_no_reference(
    tmp_path: Path, examples: list[str], calibrated: str
) -> None:
    made = make_bench(tmp_path, base_examples=examples, template=PICKY)
    made.put("a", 1)
    async with in_process(made) as bench:
        assert calibrated in (await weighed(bench, 1))["calibration"]
        (decision,) = await route(bench, ABC, policy="weights")
        assert [score["name"] for score in decision["scores"]] == ["a"]
        assert not (await bench.client.get("/v1/router")).json()["ended"]


async def test_a_template_that_refuses_everything_is_shown(tmp_path: Path) -> None:
    made = make_bench(tmp_path, template="{{ raise_exception('no') }}")
    made.put("a", 1)
    async with in_process(made) as bench:
        while not (ended := (await bench.client.get("/v1/router")).json()["ended"]):
            await asyncio.sleep(0.001)
        assert "at least 2 prompts" in ended["router-weights"]
