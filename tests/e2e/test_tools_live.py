"""Tools over HTTP with the official client: a model of random weights that must call calls as the schema says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.chat_templates import BY_STYLE
from support.live import live_server
from support.models import byte_tokenizer, family_config, mixed_recipes, random_model, save_adapter, save_model

from loramux.server.api.answer_formats import detect_template

MESSAGES: list[Any] = [{"role": "user", "content": "hello there"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"]
ADAPTER = "all-r8"


@pytest.fixture(scope="module", params=["hermes", "mistral", "llama"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    root = tmp_path_factory.mktemp("tools")
    model = random_model(family_config("llama", vocab_size=264, max_position_embeddings=4096))
    save_model(model, root / "base")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = BY_STYLE[request.param]
    tokenizer.save_pretrained(root / "base")
    flags = ["--model", str(root / "base"), "--dtype", "float32", "--max-num-seqs", "8"]
    if request.param == "mistral":
        (root / "reads.json").write_text(json.dumps(detect_template(BY_STYLE[request.param], "<assistant>")))
        flags += ["--response-template", str(root / "reads.json")]
    with live_server(root, *flags) as server:
        adapter = save_adapter(model, mixed_recipes(model)[0], Path(root / "adapters"))
        assert server.upload(ADAPTER, adapter).status_code == 201
        yield openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


def check(name: str, arguments: str) -> None:
    """The arguments are what the function takes."""
    made = json.loads(arguments)
    if name == "now":
        assert made == {}
        return
    assert name == "get_weather"
    assert set(made) == {"city", "days", "unit"}
    assert made["city"].isalpha()
    assert 1 <= made["days"] <= 99
    assert made["unit"] in ("C", "F")


@pytest.mark.parametrize("model", ["base", ADAPTER])
@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_must_be_called_is_called(client: openai.OpenAI, model: str, choice: Any, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": model, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "temperature": temperature,
        "seed": 7, "parallel_tool_calls": False, "max_tokens": 400,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
    assert whole.message.content is None
    (call,) = whole.message.tool_calls or ()
    assert call.type == "function"
    check(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "get_weather"
    with client.chat.completions.stream(**options) as stream:
        parts = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert "".join(parts) == call.function.arguments
    assert len(parts) > 5 or call.function.name == "now"


def test_several_calls_and_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        n=4,
        temperature=1.0,
        seed=1,
        max_tokens=400,
    )
    for choice in answer.choices:
        calls = choice.message.tool_calls or []
        assert calls
        for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
            assert call.type == "function"
            check(call.function.name, call.function.arguments)


def test_a_strict_function_leaves_the_choice_to_the_model(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for seed in range(4):
        choice = client.chat.completions.create(
            model="base", messages=MESSAGES, tools=tools, temperature=1.5, seed=seed, max_tokens=60
        ).choices[0]
        assert choice.finish_reason in ("stop", "length", "tool_calls")
        calls = choice.message.tool_calls or []
        for call in calls if choice.finish_reason != "length" else calls[:-1]:
            assert call.type == "function"
            check(call.function.name, call.function.arguments)


def test_responses(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": None, **tool["function"]} for tool in TOOLS]
    chosen: Any = {"type": "function", "name": "get_weather"}
    options: Any = {"model": "base", "input": "hi", "tools": tools, "tool_choice": chosen, "temperature": 0}
    (item,) = client.responses.create(**options).output
    assert item.type == "function_call"
    check(item.name, item.arguments)
    with client.responses.stream(**options) as stream:
        parts = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (again,) = stream.get_final_response().output
    assert again.type == "function_call"
    assert "".join(parts) == again.arguments == item.arguments
