"""Structured output over HTTP: the official client's own helpers, streams, adapters, and a server that goes on."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from support.live import LiveServer, live_server
from support.models import family_config, mixed_recipes, random_model, save_adapter, save_model

MESSAGES: list[Any] = [{"role": "user", "content": "hello there"}]
ADAPTERS = ("all-r8", "first-r4")


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    weight: Annotated[int, Field(ge=1, le=99)]


class Owner(BaseModel):
    """What answers are parsed into: bounded, so that a random model comes to an end."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern="^[A-Z][a-z]{1,6}$")]
    grown: bool
    pets: Annotated[list[Pet], Field(max_length=2)]
    code: Literal["x", "y"] | None


@dataclass
class World:
    server: LiveServer

    def client(self, **kwargs: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", **kwargs)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("structured")
    model = random_model(family_config("llama", vocab_size=264, max_position_embeddings=2048))
    save_model(model, root / "base", tokenizer=True)
    flags = ["--model", str(root / "base"), "--dtype", "float32", "--max-num-seqs", "8"]
    with live_server(root, *flags) as server:
        for recipe in mixed_recipes(model)[: len(ADAPTERS)]:
            assert server.upload(recipe.name, save_adapter(model, recipe, root / "adapters")).status_code == 201
        yield World(server)


def test_parse_gives_objects(world: World) -> None:
    client = world.client()
    for seed, model in enumerate(("base", *ADAPTERS)):
        answer = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=Owner, temperature=1.5, seed=seed, n=2
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Owner)


def test_parse_of_responses_gives_objects(world: World) -> None:
    answer = world.client().responses.parse(model="base", input="hello", text_format=Owner, temperature=1.0)
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, Owner)


def test_streams_say_the_same(world: World) -> None:
    client = world.client()
    options: dict[str, Any] = {"model": "all-r8", "messages": MESSAGES, "temperature": 1.5, "seed": 7}
    whole = client.chat.completions.parse(response_format=Owner, **options)
    with client.chat.completions.stream(response_format=Owner, **options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed


def test_a_cut_answer_says_so(world: World) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        world.client().chat.completions.parse(
            model="base", messages=MESSAGES, response_format=Owner, max_completion_tokens=5
        )


def test_text_completions_and_choices(world: World) -> None:
    client = world.client()
    answer = client.completions.create(
        model="base", prompt=["a", "b"], n=2, max_tokens=40, temperature=1.5, extra_body={"guided_regex": "[a-f]{3,9}"}
    )
    assert all(re.fullmatch("[a-f]{3,9}", choice.text) for choice in answer.choices)
    chosen = client.chat.completions.create(
        model="base", messages=MESSAGES, extra_body={"structured_outputs": {"choice": ["left", "right"]}}, n=4
    )
    assert {choice.message.content for choice in chosen.choices} <= {"left", "right"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="base", messages=MESSAGES, extra_body={"structured_outputs": {"grammar": "start: nothing"}}
        )
    assert refused.value.param == "structured_outputs.grammar"


def test_many_at_once_beside_free_ones_and_bombs(world: World) -> None:
    """Constrained, free and refused requests in one batch: each gets what it asked for."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=world.server.url + "/v1", api_key="none", max_retries=0) as client:

            async def ask(i: int) -> tuple[int, Any]:
                fields: dict[str, Any] = {"model": ("base", *ADAPTERS)[i % 3], "messages": MESSAGES, "seed": i}
                if i % 4 == 0:
                    fields["response_format"] = {"type": "json_schema", "json_schema": {
                        "name": "owner", "schema": Owner.model_json_schema()}}  # fmt: skip
                elif i % 4 == 1:
                    fields["extra_body"] = {"guided_regex": f"{i}[xyz]{{1,5}}"}
                elif i % 4 == 2:
                    fields["max_completion_tokens"] = 15
                    fields["extra_body"] = {"ignore_eos": True}
                else:
                    fields["extra_body"] = {"guided_json": {"type": "integer", "multipleOf": 10_000_019 + i}}
                try:
                    return i, await client.chat.completions.create(**fields)
                except openai.BadRequestError as error:
                    return i, error

            for i, answer in await asyncio.gather(*map(ask, range(12))):
                if i % 4 == 3:
                    assert isinstance(answer, openai.BadRequestError)
                    assert "to compile" in answer.message
                    continue
                text = answer.choices[0].message.content
                if i % 4 == 0:
                    Owner.model_validate_json(text)
                elif i % 4 == 1:
                    assert re.fullmatch(f"{i}[xyz]{{1,5}}", text)
                else:
                    assert answer.usage.completion_tokens == 15

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_request(world: World) -> None:
    body = {"model": "base", "messages": MESSAGES, "stream": True, "ignore_eos": True,
            "response_format": {"type": "json_object"}}  # fmt: skip
    with httpx.stream("POST", world.server.url + "/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(200):
        samples = world.server.metrics()
        if not any(value for name, value in samples.items() if name.startswith("vllm:num_requests_running")):
            return
        time.sleep(0.05)
    pytest.fail("the request still runs")


def test_json_object_is_an_object(world: World) -> None:
    """A random model seldom ends an open object by itself: what is there when it is cut is the beginning of one."""
    answer = world.client().chat.completions.create(
        model="base",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        max_completion_tokens=300,
        temperature=1.0,
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_constraint_that_is_too_slow_ends_with_an_error(world: World) -> None:
    """It is in order when it is compiled; each token takes longer than the one before."""
    client = world.client(max_retries=0)
    with pytest.raises(openai.BadRequestError, match="too long"):
        client.chat.completions.create(
            model="base", messages=MESSAGES, temperature=1.0,
            extra_body={"guided_grammar": 'start: s\ns: s s | "a" | "b"', "ignore_eos": True},
        )  # fmt: skip
    assert client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=3).usage is not None
