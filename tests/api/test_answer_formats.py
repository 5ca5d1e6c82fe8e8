"""Answers that are read, though no grammar can make a model call so: GLM's and gpt-oss's."""

from collections.abc import Callable
from typing import Any

import pytest
from api.harness import Bench, byte_tokenizer, sse, writing
from api.tool_helpers import NOW, TOOLS, accepts, read, widen
from support.chat_templates import GLM, HARMONY

from loramux.server.api.answer_formats import detect_style
from loramux.server.api.parsing import AnswerFormat
from loramux.server.api.rendering import Renderer

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
CHANNEL = "<|channel|>"
TURN = "<|start|>assistant"
THOUGHT = f"{CHANNEL}analysis<|message|>Hm,\n two.<|end|>"
FINAL = f"{TURN}{CHANNEL}final<|message|>Two. "
ROME = '{"city": "Rome", "days": 3}'


def format_of(template: str) -> AnswerFormat:
    found = Renderer(byte_tokenizer(MARKS), chat_template=template).format
    assert found is not None
    return found


@pytest.fixture
def bench_of(make: Any) -> Callable[..., Any]:
    async def build(**settings: Any) -> Bench:
        return widen(await make(**{"template": HARMONY, "marks": MARKS, **settings}))

    return build


@pytest.mark.parametrize("template", [GLM, HARMONY])
def test_no_style_is_taken_for_theirs(template: str) -> None:
    assert detect_style(template) is None
    assert format_of(template).style is None


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (THOUGHT + FINAL, "Two. ", "Hm,\n two.", []), (FINAL.removeprefix(TURN), "Two. ", "", []),
        (THOUGHT + FINAL + "<|return|>", "Two.", "Hm,\n two.", []), ("No channels.", "No channels.", "", []),
        (THOUGHT.removesuffix("<|end|>"), "", "Hm,\n two.", []), (THOUGHT.removesuffix("<|end|>") + FINAL, "Two. ",
                                                                 "Hm,\n two.", []),
        (f"{THOUGHT}{TURN}{THOUGHT}{FINAL}", "Two. ", "Hm,\n two.Hm,\n two.", []),
        (f"{THOUGHT}{TURN}{CHANNEL}commentary to=functions.get_weather <|constrain|>json<|message|>{ROME}<|call|>", "",
         "Hm,\n two.", [("get_weather", ROME)]),
        (f"{CHANNEL}commentary to=functions.now json<|message|>{{}}", "", "", [("now", "{}")]),
        (f" to=functions.now{CHANNEL}commentary json<|message|>{{}}<|call|>", "", "", [("now", "{}")]),
        (f"{CHANNEL}commentary<|message|>I look.<|end|>{TURN}{CHANNEL}commentary to=functions.now<|message|>{{}}",
         "I look.", "", [("now", "{}")]),
        ("Write to=functions.now please", "Write to=functions.now please", "", []),
        ("<|chan", "<|chan", "", []),
    ],
)  # fmt: skip
def test_messages_in_channels(text: str, content: str, reasoning: str, calls: list[tuple[str, str]]) -> None:
    for parts in ([text], list(text)):
        assert read(format_of(HARMONY), parts, prompt="<|start|>user<|message|>x<|end|>" + TURN)[:3] == (
            content, reasoning, calls
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Wait.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
         "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>", "Wait.",
         [("get_weather", ROME), ("now", "{}")]),
        ("<tool_call>now</tool_call> Done.", "Done.", [("now", "{}")]), ("<tool_call>now", "<tool_call>now", []),
        ('<tool_call>{"name": "now"}</tool_call>', '<tool_call>{"name": "now"}</tool_call>', []),
    ],
)  # fmt: skip
def test_keys_and_values(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for parts in ([text], list(text)):
        assert read(format_of(GLM), parts)[:3] == (content, "", calls)


@pytest.mark.anyio
@pytest.mark.parametrize("per_step", [1, 3, 100])
async def test_channels_over_http(bench_of: Any, per_step: int) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), THOUGHT + FINAL, per_step=per_step)
    message = (await bench.chat()).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Two. ", "Hm,\n two.")
    events = sse((await bench.chat(stream=True)).text)[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Two. "
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm,\n two."


@pytest.mark.anyio
async def test_calls_in_channels_over_http(bench_of: Any) -> None:
    bench = await bench_of()
    said = f"{THOUGHT}{TURN}{CHANNEL}commentary to=functions.get_weather <|constrain|>json<|message|>{ROME}<|call|>"
    bench.engine.script = writing(byte_tokenizer(MARKS), said)
    choice = (await bench.chat(tools=TOOLS)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "get_weather", "arguments": ROME}
    ]
    refused = await bench.chat(tools=[NOW], tool_choice="required")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tool_choice"


@pytest.mark.anyio
async def test_json_behind_reasoning_in_a_channel(bench_of: Any) -> None:
    bench = await bench_of()
    await bench.chat(response_format={"type": "json_object"})
    constraint = bench.engine.requests[-1].sampling.constraint
    assert accepts(constraint, THOUGHT + "{}", MARKS)
    assert accepts(constraint, "{}", MARKS)
    assert not accepts(constraint, THOUGHT + "x", MARKS)


@pytest.mark.anyio
@pytest.mark.parametrize(("content", "shown"), [("", True), ("Wait.", False)])
async def test_reasoning_goes_back_under_both_names(bench_of: Any, content: str, shown: bool) -> None:
    bench = await bench_of()
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": content, "reasoning": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "3"},
    ]
    assert (await bench.chat(messages=turns, tools=[NOW])).status_code == 200
    prompt = byte_tokenizer(MARKS).decode(list(bench.engine.requests[-1].prompt_token_ids), skip_special_tokens=False)
    assert (f"{CHANNEL}analysis<|message|>Hm.<|end|>" in prompt) is shown
