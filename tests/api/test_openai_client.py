"""The official client against a live server: what it parses, and which exceptions it raises."""

import asyncio
from collections.abc import Callable

import openai
import pytest
from api.harness import BASE, END, Bench, saying

from loramux.server.engine.protocol import EngineDeadError, EngineError, QueueFullError

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(live: Callable[..., Bench]) -> Bench:
    """A live server."""
    return live()


@pytest.fixture
def client(server: Bench) -> openai.OpenAI:
    """A client that does not retry."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=20)


def test_chat(server: Bench, client: openai.OpenAI) -> None:
    server.put("skill")
    answer = client.chat.completions.create(model="skill", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.model_extra["loramux"]["adapters"][0]["name"] == "skill"
    replay = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
    assert client.chat.completions.create(model=BASE, messages=replay).choices[0].message.role == "assistant"


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=BASE, messages=MESSAGES) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == "hello"
    assert final.choices[0].message.content == "hello"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=["a", "b"], extra_body={"return_token_ids": True})
    assert [choice.text for choice in answer.choices] == ["hello", "hello"]
    assert answer.choices[1].model_extra["token_ids"] == [*b"hello", END]
    chunks = list(client.completions.create(model=BASE, prompt=[1, 2], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"


def test_models(server: Bench, client: openai.OpenAI) -> None:
    server.put("skill")
    assert [model.id for model in client.models.list()] == [BASE, "skill"]
    assert client.models.retrieve(BASE).id == BASE
    assert client.models.retrieve("skill@1").model_extra["parent"] == BASE


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ({"model": "auto", "extra_body": {"router": {"top_k": 0}}}, openai.BadRequestError, "invalid_value"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "unsupported_parameter"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"extra_body": {"colour": 1}}, openai.BadRequestError, "unknown_parameter"),
    ],
)
def test_refusals(client: openai.OpenAI, options: dict, kind: type[openai.APIStatusError], code: str) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": MESSAGES, **options})
    assert caught.value.code == code
    assert caught.value.request_id


@pytest.mark.parametrize(
    "failure", [QueueFullError("full"), EngineDeadError("dead"), EngineError("x", retryable=False)]
)
def test_failures(server: Bench, client: openai.OpenAI, failure: Exception) -> None:
    server.engine.script = lambda request: [failure]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=BASE, messages=MESSAGES)
    server.engine.script = lambda request: [[97], failure]
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True))


def test_what_is_retried(server: Bench) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2, timeout=20)
    failures = [QueueFullError("full", retry_after=1)]
    server.engine.script = lambda request: [failures.pop()] if failures else saying("hello")(request)
    assert client.chat.completions.create(model=BASE, messages=MESSAGES).choices[0].message.content == "hello"
    server.engine.requests.clear()
    server.engine.script = lambda request: [EngineError("x", retryable=False)]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=BASE, messages=MESSAGES)
    assert len(server.engine.requests) == 1


def test_keys(live: Callable[..., Bench]) -> None:
    url = live(api_key=["right"]).url
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    assert openai.OpenAI(base_url=f"{url}/v1", api_key="right").models.list().data


def test_async_client(server: Bench) -> None:
    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=BASE, messages=MESSAGES) for _ in range(20))
            )
            assert {answer.choices[0].message.content for answer in answers} == {"hello"}
            stream = await client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True)
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "hello"
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="nope", messages=MESSAGES)

    asyncio.run(talk())
