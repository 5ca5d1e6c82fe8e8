"""Endpoints that are not there say so by name."""

import openai
import pytest
from api.harness import Bench

from loramux.server.api.refused import REFUSED


@pytest.mark.anyio
@pytest.mark.parametrize("path", REFUSED)
async def test_each_names_itself_and_a_remedy(bench: Bench, path: str) -> None:
    response = await bench.client.post(path.replace("{rest:path}", "a/b"), json={"model": "x"})
    error = response.json()["error"]
    assert response.status_code == 404
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "endpoint_not_supported"
    assert path.removesuffix("/{rest:path}") in error["message"]
    assert REFUSED[path] in error["message"]
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.anyio
async def test_the_document_does_not_promise_them(bench: Bench) -> None:
    paths = (await bench.client.get("/openapi.json")).json()["paths"]
    assert not paths.keys() & REFUSED.keys()


def test_the_official_client(live) -> None:
    client = openai.OpenAI(base_url=f"{live().url}/v1", api_key="any", timeout=20)
    calls = [
        lambda: client.moderations.create(input="x"),
        lambda: client.images.generate(prompt="x"),
        lambda: client.audio.speech.create(model="m", voice="alloy", input="x"),
        lambda: client.batches.list(),
        lambda: client.files.list(),
        lambda: client.fine_tuning.jobs.list(),
        lambda: client.responses.retrieve("resp_x"),
        lambda: client.responses.delete("resp_x"),
        lambda: client.responses.cancel("resp_x"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "endpoint_not_supported"
