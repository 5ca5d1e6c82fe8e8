"""Tools: requests, prompts, how calls are read from an answer, and the grammars that make answers call."""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import openai
import pytest
from api.harness import BASE, END, Bench, byte_tokenizer, listening, make_bench, sse, writing
from api.tool_helpers import NOW, TOOLS, WEATHER, accepts, matcher, read, widen
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import BY_STYLE, TOOLS_UNKNOWN
from tokenizers import AddedToken
from transformers.utils.chat_parsing import parse_response

from loramux.server.api.answer_formats import STYLES, detect_style
from loramux.server.api.errors import APIError
from loramux.server.api.parsing import AnswerFormat
from loramux.server.api.rendering import Renderer
from loramux.server.api.schemas.chat import ChatRequest
from loramux.server.api.schemas.responses import CallItem, turns_of_items
from loramux.server.api.tools import AnswerGrammar
from loramux.server.engine.protocol import Constraint, EngineOutput

MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")
TALK = [{"role": "user", "content": "hi"}]
ARGUMENTS = '{"city": "a</tool_call>[TOOL_CALLS]\\"}{", "days": 3}'
CALLED = {
    "hermes": 'Wait.\n<tool_call>\n{"name": "get_weather", "arguments": CITY}\n</tool_call>\n'
              '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
    "mistral": 'Wait. [TOOL_CALLS][{"name": "get_weather", "arguments": CITY, "id": "a"}, {"name": "now"}]',
    "mistral-args": "Wait. [TOOL_CALLS]get_weather[ARGS]CITY[TOOL_CALLS]now[CALL_ID]ab1[ARGS]{}",
    "llama": '{"name": "get_weather", "parameters": CITY}; {"name": "now", "parameters": {}}',
    "markup": "Wait.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
              "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
}  # fmt: skip


def said(style: str, arguments: str = '{"city": "Rome"}') -> str:
    """An answer with two calls, the first with these arguments."""
    return CALLED[style].replace("CITY", arguments)


def answer_format(style: str) -> AnswerFormat:
    found = Renderer(byte_tokenizer(), chat_template=BY_STYLE[style]).format
    assert found is not None
    return found


@cache
def thinking_format(style: str) -> AnswerFormat:
    """The same of a model that reasons."""
    found = AnswerFormat.find(BY_STYLE[style] + "</think>", "<assistant>")
    assert found is not None
    return found


@pytest.fixture
def bench_of(make: Any) -> Callable[..., Any]:
    async def build(style: str = "hermes", **settings: Any) -> Bench:
        return widen(await make(**{"template": BY_STYLE.get(style), "marks": MARKS, **settings}))

    return build


# How calls are read


@pytest.mark.parametrize("style", list(BY_STYLE))
def test_styles_are_known_by_their_templates(style: str) -> None:
    found = detect_style(BY_STYLE[style])
    assert found is not None
    assert found.name == style
    assert answer_format(style).style is found


@pytest.mark.parametrize("style", [style.name for style in STYLES])
def test_calls_are_read(style: str) -> None:
    content, reasoning, calls, _ = read(answer_format(style), [said(style, ARGUMENTS)])
    assert content == ("" if style == "llama" else "Wait.")
    assert reasoning == ""
    assert calls == [("get_weather", '{"city": "Rome", "days": 3}' if style == "markup" else ARGUMENTS), ("now", "{}")]


@pytest.mark.parametrize("style", [style.name for style in STYLES])
def test_whole_answers_are_read_as_transformers_reads_them(style: str) -> None:
    """On answers without marks inside strings, which transformers takes for the end of a call."""
    format = answer_format(style)
    text = said(style).replace("</tool_call>\n<", "</tool_call><").split("; ")[0]  # it lets "\n" replace the content
    text = text.replace('{"name": "now"}', '{"name": "now", "arguments": {}}')
    theirs = parse_response(text, format.template, prefix="", tools=TOOLS)
    content, _, calls, _ = read(format, [text])
    made = theirs["tool_calls"]
    flat = [call for item in made for call in (item if isinstance(item, list) else [item])]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in flat] == [
        (name, json.loads(arguments)) for name, arguments in calls
    ]
    assert theirs.get("content", "") == content


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", "<tool_call>"), ("hermes", "a <tool_call>\n{oops}</tool_call> b"), ("hermes", "1 < 2 <tool"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'), ("hermes", '<tool_call>{"name": "now"'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "x"}</tool_call>'), ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>'), ("hermes", " plain \n"),
        ("hermes", '<tool_call>{"name": "' + "x" * 600), ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        ("mistral", "[TOOL_CALLS]"), ("mistral", "[TOOL_CALLS] none"), ("mistral", "[TOOL_CALLS][5]"),
        ("mistral-args", "[TOOL_CALLS]now{"), ("mistral-args", "[TOOL_CALLS]now[ARGS]5"),
        ("llama", '{"name": "Bob", "age": 3}'), ("llama", '{"name": "unknown", "parameters": {}}'), ("llama", "{}"),
        ("llama", ' {"a": [1, 2]}'), ("llama", 'Use {"name": "now", "parameters": {}}'), ("llama", "{"),
        ("markup", "<tool_call>\n<function=now>\n<param"),
        ("markup", "<tool_call><function=a b></function></tool_call>"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_content(style: str, text: str) -> None:
    for parts in ([text], list(text)):
        assert read(answer_format(style), parts)[:3] == (text, "", [])


def test_calls_that_are_cut_off_or_followed_by_something() -> None:
    format = answer_format("hermes")
    begun = '<tool_call>{"name": "now", "arguments": {"x": [1, "'
    assert read(format, [begun])[:3] == ("", "", [("now", '{"x": [1, "')])
    assert read(format, [begun + '"]}}} </tool_call> Done. ])'])[:3] == ("Done. ])", "", [("now", '{"x": [1, ""]}')])
    doubled = '<tool_call>{"name": "now"}\n{"name": "other", "arguments": null}</tool_call>'
    assert read(format, [doubled])[2] == [("now", "{}"), ("other", "{}")]
    garbage = '<tool_call>{"name": "now", "arguments": {} oops</tool_call>'
    assert read(format, [garbage])[:3] == ("oops", "", [("now", "{}")])
    assert read(format, [f"a\n{garbage} \n b"])[:3] == ("a\noops \n b", "", [("now", "{}")])
    assert read(answer_format("llama"), ['{"name": "now"} and so on'])[:3] == ("and so on", "", [("now", "{}")])


def test_without_tools_calls_are_content() -> None:
    for style in CALLED:
        assert read(answer_format(style), [said(style)], tools=None)[:3] == (said(style), "", [])


def test_arguments_come_as_they_are_written() -> None:
    reader = answer_format("hermes").reader("", TOOLS)
    grown = [reader.feed(char) for char in 'Hm <tool_call>{"name": "now", "arguments": {"a": 1}}']
    assert "".join(piece.text for pieces in grown[:4] for piece in pieces) == "Hm"
    assert not any(grown[4:40])
    assert [piece.kind for pieces in grown for piece in pieces][2:] == ["call", *["arguments"] * 8]


FRAGMENTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", '{"name": "now", "arguments": {}}',
    '{"name": "get_weather", "arguments": {"city": "x"}}', '{"name": "now", "parameters": {"a": "}"}}', "now", "{", "}",
    "[", "]", ",", ";", '"', "\\", " ", "\n", "text", "<", "tool_call>", "é𝄞", '"name": ', "<function=now>",
    "</function>", "<parameter=city>\nRome\n</parameter>", "<|python_tag|>",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(style=st.sampled_from(list(BY_STYLE)), fragments=st.lists(FRAGMENTS, max_size=14), seed=st.integers(0, 1 << 30))
def test_how_an_answer_is_cut_changes_nothing(style: str, fragments: list[str], seed: int) -> None:
    format, text, rng = thinking_format(style), "".join(fragments), random.Random(seed)
    cuts = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))})
    whole = read(format, [text])
    assert read(format, [text[a:b] for a, b in pairwise(cuts)]) == whole
    assert read(format, list(text)) == whole
    content, reasoning, calls, _ = whole
    if not calls and not reasoning and "<think>" not in text:
        assert content == text


@pytest.mark.parametrize("style", ["hermes", "mistral", "mistral-args", "llama", "markup"])
@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_every_place_to_cut(style: str, cut: int) -> None:
    text = said(style)
    whole = read(thinking_format(style), [text])
    for at in range(cut, len(text), 40):
        assert read(thinking_format(style), [text[:at], text[at:]]) == whole


# How tools reach the prompt


@pytest.mark.anyio
async def test_tools_and_calls_reach_the_template(bench_of: Any) -> None:
    bench = await bench_of()
    talk = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
            {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}, "index": 1},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]  # fmt: skip
    response = await bench.chat(messages=talk, tools=[{**NOW, "function": {**NOW["function"], "strict": False}}])
    assert response.status_code == 200, response.text
    prompt = bench.state.renderer.decode(bench.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        '{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, '
        '"additionalProperties": false}}}\n<user>weather?\n'
        '<assistant><tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n\n<tool>sunny\n<assistant>'
    )
    same = await bench.client.post("/tokenize", json={"messages": talk, "tools": [NOW]})
    assert same.json()["tokens"] == list(bench.engine.requests[0].prompt_token_ids)


@pytest.mark.anyio
async def test_a_tools_answer_says_of_which_function_it_is(bench_of: Any) -> None:
    bench = await bench_of(
        template="{% for m in messages %}{{ m.name }}={{ m.content }};{% endfor %}<tool_call>tool_calls"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "not JSON"}}
    talk = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "12"},
            {"role": "tool", "tool_call_id": "x", "content": "?"}]  # fmt: skip
    assert (await bench.chat(messages=talk)).status_code == 200
    prompt = bench.state.renderer.decode(bench.engine.requests[0].prompt_token_ids)
    assert prompt.startswith("=;now=12;=?;")


@pytest.mark.anyio
async def test_arguments_that_are_no_object_stay_text(bench_of: Any) -> None:
    bench = await bench_of()
    call = {"id": "c1", "function": {"name": "now", "arguments": '{"cut": "o'}}
    assert (await bench.chat(messages=[*TALK, {"role": "assistant", "tool_calls": [call]}])).status_code == 200
    prompt = bench.state.renderer.decode(bench.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '"arguments": "{\\"cut\\": \\"o"' in prompt


@pytest.mark.anyio
async def test_none_means_that_the_model_does_not_see_them(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), said("hermes"))
    body = (await bench.chat(tools=TOOLS, tool_choice="none")).json()
    assert body["choices"][0]["message"]["content"].startswith('Wait.\n\n{"name"')  # the marks are special, so unseen
    assert body["choices"][0]["finish_reason"] == "stop"
    await bench.chat()
    first, second = (request.prompt_token_ids for request in bench.engine.requests)
    assert first == second


@pytest.mark.anyio
async def test_none_goes_with_any_template(bench: Bench) -> None:
    assert (await bench.chat(tools=TOOLS, tool_choice="none")).status_code == 200


UNREAD = {"start_anchor": "x", "fields": {"tool_calls": {"open": "<c>"}}}


@pytest.mark.anyio
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "now"}}])
@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({}, ["not known", "--response-template", "--chat-template"]),
        ({"template": TOOLS_UNKNOWN}, ["not known", "--response-template", "--chat-template"]),
        ({"response_template": UNREAD}, ["takes no tools", "--chat-template"]),
    ],
)
async def test_templates_that_know_no_tools(make: Any, choice: Any, made: dict[str, Any], words: list[str]) -> None:
    bench = await make(**made)
    error = (await bench.chat(tools=TOOLS, tool_choice=choice)).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert all(word in error["message"] for word in words)


@pytest.mark.anyio
async def test_templates_that_do_not_show_earlier_calls(bench: Bench) -> None:
    call = {"id": "c1", "function": {"name": "now", "arguments": "{}"}}
    response = await bench.chat(messages=[*TALK, {"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == 400
    assert "tool_calls" in response.json()["error"]["message"]


BIG = {"type": "function", "function": {"name": "f", "description": "x" * 40_000}}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice", "needs `tools`"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "'auto'"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice",
         "allowed_tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice", "custom"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]", "'custom' is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing"),
        ({"tools": [{"function": {"name": "x"}}]}, "tools[0].type", "Missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [BIG]}, "tools[0].function.description", "at most"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters", "object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools[0].function.x", "Unrecognized"),
        ({"tools": [NOW, NOW]}, "tools", "'now'"), ({"tools": [NOW] * 129}, "tools", "at most 128"),
        ({"functions": [{"name": "f"}]}, "functions", "send `tools`"),
        ({"function_call": {"name": "f"}}, "function_call", "`tool_choice`"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0]", "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages[0]", "assistant"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role", "'tool' message"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": {}}]}]},
         "messages[0].tool_calls[0]", "'custom'"),
    ],
)  # fmt: skip
async def test_refusals(bench_of: Any, body: dict[str, Any], param: str, word: str) -> None:
    bench = await bench_of()
    response = await bench.chat(**body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert word in error["message"]
    assert not bench.engine.requests


# How calls are answered


def merged(events: list[Any]) -> dict[str, Any]:
    """The message that a stream of chunks makes, as clients put it together."""
    message: dict[str, Any] = {"content": "", "calls": {}}
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if "id" in call:
                    assert set(call) == {"index", "id", "type", "function"}
                    assert call["index"] == len(message["calls"])
                    message["calls"][call["index"]] = [call["id"], call["function"]["name"], ""]
                else:
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                message["calls"][call["index"]][2] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


@pytest.mark.anyio
@pytest.mark.parametrize("style", list(BY_STYLE))
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("per_step", [1, 3, 1000])
async def test_answers_whole_and_streamed(bench_of: Any, style: str, special: bool, per_step: int) -> None:
    bench = await bench_of(style, marks=MARKS if special else ())
    bench.engine.script = writing(byte_tokenizer(MARKS if special else ()), said(style), per_step=per_step)
    (choice,) = (await bench.chat(tools=TOOLS)).json()["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == (None if style == "llama" else "Wait.")
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(id) == 9 and id.isalnum() if "mistral" in style else id.startswith("call_") for id in ids)
    arguments = '{"city": "Rome", "days": 3}' if style == "markup" else '{"city": "Rome"}'
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "get_weather", "arguments": arguments}},
        {"type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    events = sse((await bench.chat(tools=TOOLS, stream=True)).text)
    assert events.pop() == "[DONE]"
    streamed = merged(events)
    assert streamed["content"] == (message["content"] or "")
    assert [call[1:] for call in streamed["calls"].values()] == [["get_weather", arguments], ["now", "{}"]]
    assert streamed["finish_reason"] == "tool_calls"
    if per_step == 1 and style != "markup":
        parts = [call["function"]["arguments"] for event in events for choice in event["choices"]
                 for call in choice["delta"].get("tool_calls") or ()]  # fmt: skip
        assert len(parts) > 10


@pytest.mark.anyio
async def test_several_choices_do_not_mix(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), said("hermes"))
    choices = (await bench.chat(tools=TOOLS, n=3)).json()["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in choices] == [2, 2, 2]
    assert len({call["id"] for choice in choices for call in choice["message"]["tool_calls"]}) == 6


@pytest.mark.anyio
async def test_a_call_that_is_cut_off(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), said("hermes"), end=False)
    (choice,) = (await bench.chat(tools=TOOLS, max_tokens=60)).json()["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert '{"city": "Rome"}'.startswith(call["function"]["arguments"])


@pytest.mark.anyio
async def test_special_tokens_that_are_no_marks_stay_hidden(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), "a<|user|>b")
    for body in ({}, {"tools": TOOLS}):
        assert (await bench.chat(**body)).json()["choices"][0]["message"]["content"] == "ab"
    shown = (await bench.chat(tools=TOOLS, skip_special_tokens=False)).json()["choices"][0]["message"]["content"]
    assert shown == "a<|user|>b"


@pytest.mark.anyio
async def test_scores_are_of_the_content(bench_of: Any) -> None:
    """Of its tokens and no others, whole and streamed."""
    bench = await bench_of()
    tokens = byte_tokenizer(MARKS).encode(said("hermes") + " End", add_special_tokens=False).ids
    scored = [_scored(token, i) for i, token in enumerate([*tokens, END])]
    bench.engine.script = lambda request: scored
    (choice,) = (await bench.chat(tools=TOOLS, logprobs=True)).json()["choices"]
    assert choice["message"]["content"] == "Wait.\nEnd"
    whole = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in whole) == "Wait.\nEnd"
    events = sse((await bench.chat(tools=TOOLS, logprobs=True, stream=True)).text)[:-1]
    parts = [entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert parts == whole
    plain = [_scored(token, i) for i, token in enumerate([*b" hi\n", END])]
    bench.engine.script = lambda request: plain
    (choice,) = (await bench.chat(tools=TOOLS, logprobs=True)).json()["choices"]
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [-0.0, -1.0, -2.0, -3.0, -4.0]


def _scored(token: int, place: int) -> EngineOutput:
    ends = token == END
    return EngineOutput(
        "", (token,), "stop" if ends else None, stop_token_id=END if ends else None,
        logprobs=np.array([[-float(place)]]).tobytes(),
    )  # fmt: skip


# Grammars


def grammar(
    style: str, marks: Sequence[str] = (), *, given: Constraint | None = None, **body: Any
) -> Constraint | None:
    renderer = Renderer(byte_tokenizer(marks), chat_template=BY_STYLE[style])
    assert renderer.format is not None
    request = ChatRequest.model_validate({"model": BASE, "messages": TALK, **body})
    return AnswerGrammar(renderer.format, renderer.marks).constraint(
        request, offered=True, is_reasoning=False, given=given
    )


def random_answer(constraint: Constraint | None, marks: Sequence[str], seed: int) -> str:
    """What a model without any preference writes; it ends when it may."""
    follower, rng, ids = matcher(constraint, marks), random.Random(seed), []
    tokenizer = byte_tokenizer(marks)
    for _ in range(3000):
        allowed = np.nonzero(np.unpackbits(np.frombuffer(follower.compute_bitmask(), np.uint8), bitorder="little"))[0]
        if END in allowed and rng.random() < 0.3:
            break
        token = int(rng.choice([token for token in allowed if token != END]))
        assert follower.consume_token(token), follower.get_error()
        ids.append(token)
        if follower.is_stopped():
            break
    else:
        raise AssertionError("the answer did not end")
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def follows_schema(name: str, arguments: dict[str, Any]) -> bool:
    if name == "now":
        return arguments == {}
    return (
        name == "get_weather"
        and set(arguments) in ({"city"}, {"city", "days"})
        and isinstance(arguments["city"], str)
        and isinstance(arguments.get("days", 0), int)
    )


SPECIAL = pytest.mark.parametrize("marks", [MARKS, ()], ids=["special", "text"])
JSON_STYLES = pytest.mark.parametrize("style", [name for name in BY_STYLE if name != "markup"])


@SPECIAL
@JSON_STYLES
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_model_that_must_call_calls(style: str, marks: Sequence[str], choice: Any) -> None:
    constraint = grammar(style, marks, tools=TOOLS, tool_choice=choice)
    format = answer_format(style)
    lengths = set()
    for seed in range(4):
        text = random_answer(constraint, marks, seed)
        content, _, calls, _ = read(format, [text])
        assert content == "", text
        assert all(follows_schema(name, json.loads(arguments)) for name, arguments in calls), text
        if choice != "required":
            assert [name for name, _ in calls] == ["get_weather"]
        lengths.add(len(calls))
    assert 0 not in lengths
    one = matcher(grammar(style, marks, tools=TOOLS, tool_choice="required", parallel_tool_calls=False), marks)
    assert not one.is_accepting()
    assert not accepts(constraint, "Hello", marks)


@SPECIAL
@pytest.mark.parametrize("style", [name for name in BY_STYLE if name != "llama"])
def test_how_many_calls(style: str, marks: Sequence[str]) -> None:
    found = detect_style(BY_STYLE[style])
    assert found is not None
    call = found.begin + "now" + found.middle + ("" if style == "markup" else "{}") + found.end
    one, two = (found.opening + (found.separator or "").join([call] * n) + found.closing for n in (1, 2))
    several = grammar(style, marks, tools=TOOLS, tool_choice="required")
    single = grammar(style, marks, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert [accepts(several, text, marks) for text in (one, two)] == [True, True]
    assert [accepts(single, text, marks) for text in (one, two)] == [True, False]


@SPECIAL
@JSON_STYLES
def test_strict_functions_are_held_to_their_schema(style: str, marks: Sequence[str]) -> None:
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}, NOW]
    constraint = grammar(style, marks, tools=tools)
    found = detect_style(BY_STYLE[style])
    assert found is not None
    right, wrong = '{"city": "Rome", "days": 3}', '{"city": 5}'
    before = "" if style == "llama" else "Let me see {\n"
    assert accepts(constraint, "Nothing to do. 1 < 2 <tool [", marks)
    assert accepts(constraint, "", marks)
    assert accepts(constraint, before + found.write("get_weather", right), marks)
    assert not accepts(constraint, before + found.write("get_weather", wrong), marks)
    assert not accepts(constraint, before + found.write("elsewhere", "{}"), marks)
    assert accepts(constraint, before + found.write("now", '{"any": [1]}'), marks)
    single = grammar(style, marks, tools=TOOLS, parallel_tool_calls=False)
    assert accepts(single, before + found.write("now", "{}"), marks)
    assert accepts(single, "Nothing to do.", marks)
    assert not accepts(single, found.write("now", "{}") + found.write("now", "{}"), marks)


@SPECIAL
def test_arguments_in_markup_are_held_to_their_names_and_types(marks: Sequence[str]) -> None:
    constraint = grammar("markup", marks, tools=TOOLS, tool_choice="required")
    begin, end = "<tool_call>\n<function=get_weather>\n", "</function>\n</tool_call>"
    city, days = "<parameter=city>\nRo\nme <\n</parameter>\n", "<parameter=days>\n3\n</parameter>\n"
    assert accepts(constraint, begin + city + days + end, marks)
    assert accepts(constraint, begin + city + end, marks)
    assert not accepts(constraint, begin + days + end, marks)
    assert not accepts(constraint, begin + city + days.replace("3", "three") + end, marks)
    assert read(answer_format("markup"), [begin + city + days + end])[2] == [
        ("get_weather", '{"city": "Ro\\nme <", "days": 3}')
    ]
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    with pytest.raises(APIError, match="leave `strict` out"):
        grammar("markup", marks, tools=tools)


@pytest.mark.parametrize(("style", "mark"), [("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]")])
def test_marks_that_are_added_but_not_special_tokens(style: str, mark: str) -> None:
    """llguidance takes such a token for text, unless it looks like a tag: then a grammar has to name it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False)])
    renderer = Renderer(tokenizer, chat_template=BY_STYLE[style])
    llguidance = pytest.importorskip("llguidance")
    follower = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=END)
    id = tokenizer.token_to_id(mark)
    assert follower.is_special_token(id) is (mark in renderer.marks)
    assert renderer.format is not None
    strict = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    request = ChatRequest.model_validate({"model": BASE, "messages": TALK, "tools": strict})
    held = AnswerGrammar(renderer.format, renderer.marks).constraint(
        request, offered=True, is_reasoning=False, given=None
    )
    found = detect_style(BY_STYLE[style])
    assert held is not None
    assert found is not None
    for arguments, right in (('{"city": "Rome"}', True), ('{"city": 5}', False)):
        ids = tokenizer.encode(f"Well. {found.write('get_weather', arguments)}", add_special_tokens=False).ids
        begun = llguidance.LLMatcher(follower, held.text, log_level=0)
        assert (begun.try_consume_tokens(ids) == len(ids)) is right


def test_content_held_to_a_format_goes_with_calls() -> None:
    schema = Constraint("json_schema", '{"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}')
    for held, answer in (
        (schema, '{"a": 1}'), (schema, '{ "a" :\n1 }'),
        (Constraint("json_object"), '{"b": []}'), (Constraint("choice", '["yes", "n/o"]'), "n/o"),
        (Constraint("regex", r"[a-z]+/\d"), "ab/1"),
    ):  # fmt: skip
        for style in ("hermes", "llama"):
            found = detect_style(BY_STYLE[style])
            assert found is not None
            constraint = grammar(style, MARKS, tools=TOOLS, given=held)
            assert accepts(constraint, answer, MARKS)
            assert accepts(constraint, found.write("now", "{}"), MARKS)
            assert not accepts(constraint, "Hello", MARKS)
            assert not accepts(grammar(style, MARKS, tools=TOOLS, tool_choice="required", given=held), answer, MARKS)
    with pytest.raises(APIError, match="goes without tools"):
        grammar("hermes", MARKS, tools=TOOLS, given=Constraint("lark", 'start: "x"'))
    assert grammar("hermes", MARKS, tools=TOOLS) is None


@pytest.mark.anyio
async def test_the_grammar_reaches_the_engine(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    chosen = {"type": "function", "function": {"name": "now"}}
    for choice, reason in (("required", "tool_calls"), (chosen, "stop")):
        body = (await bench.chat(tools=TOOLS, tool_choice=choice)).json()
        assert body["choices"][0]["finish_reason"] == reason
        assert body["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
        constraint = bench.engine.requests[-1].sampling.constraint
        assert constraint == grammar("hermes", MARKS, tools=TOOLS, tool_choice=choice)
    await bench.chat(tools=TOOLS)
    assert bench.engine.requests[-1].sampling.constraint is None


@pytest.mark.anyio
async def test_schemas_that_cannot_be_followed(bench_of: Any) -> None:
    bench = await bench_of()
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    assert (await bench.chat(tools=tools, tool_choice="required")).status_code == 200  # as far as it can be followed
    tools[0]["function"]["strict"] = True  # type: ignore[index]
    error = (await bench.chat(tools=tools)).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "invalid_constraint")
    assert "not" in error["message"]


# The Responses API

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]


async def respond(bench: Bench, **body: Any) -> Any:
    return await bench.client.post("/v1/responses", json={"model": BASE, "input": "hi", **body})


@pytest.mark.anyio
async def test_responses_with_calls(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), said("hermes"))
    response = await respond(bench, tools=FLAT, parallel_tool_calls=True)
    body = response.json()
    assert response.status_code == 200, response.text
    assert body["tools"] == FLAT
    message, first, second = body["output"]
    assert (message["type"], message["content"][0]["text"]) == ("message", "Wait.")
    assert first == {
        "id": first["id"], "type": "function_call", "call_id": first["call_id"], "name": "get_weather",
        "arguments": '{"city": "Rome"}', "status": "completed",
    }  # fmt: skip
    assert (second["name"], second["arguments"]) == ("now", "{}")
    assert len({item["id"] for item in body["output"]}) == 3
    assert first["call_id"].startswith("call_")
    talk = [{"role": "user", "content": "weather?"}, *body["output"],
            {"type": "function_call_output", "call_id": first["call_id"], "output": "sunny"},
            {"type": "function_call_output", "call_id": second["call_id"],
             "output": [{"type": "input_text", "text": "noon"}]}]  # fmt: skip
    assert (await respond(bench, input=talk, tools=FLAT)).status_code == 200
    prompt = bench.state.renderer.decode(bench.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.split("<user>")[1] == (
        'weather?\n<assistant>Wait.<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n\n<tool>sunny\n<tool>noon\n<assistant>'
    )


@pytest.mark.anyio
async def test_responses_stream_calls(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), said("hermes"))
    text = (await respond(bench, tools=FLAT, stream=True)).text
    events = [json.loads(block.split("data: ")[1]) for block in text.strip().split("\n\n")]
    kinds = [key for key, _ in groupby(event["type"].removeprefix("response.") for event in events)]
    item = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", *item, *item, "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    calls = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(event["delta"] for event in calls if event["output_index"] == 1) == '{"city": "Rome"}'
    assert len(calls) > 10
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"), ({"tools": [*FLAT, FLAT[0]]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "o"}]}, "input[0].call_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ],
)  # fmt: skip
async def test_refused_responses(bench_of: Any, body: dict[str, Any], param: str) -> None:
    bench = await bench_of()
    response = await respond(bench, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.anyio
async def test_responses_that_must_call(bench_of: Any) -> None:
    bench = await bench_of()
    chosen = {"type": "function", "name": "now"}
    body = (await respond(bench, tools=FLAT, tool_choice=chosen)).json()
    assert body["tool_choice"] == chosen
    constraint = bench.engine.requests[-1].sampling.constraint
    assert constraint == grammar(
        "hermes", MARKS, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}}
    )


def test_a_turn_has_as_many_calls_as_a_message_may_have() -> None:
    calls = [CallItem(type="function_call", call_id=f"c{i}", name="now", arguments="{}") for i in range(130)]
    assert [len(turn.tool_calls or ()) for turn in turns_of_items(calls)] == [128, 2]


def test_the_official_client(tmp_path: Any) -> None:
    bench = widen_at_start(make_bench(tmp_path, template=BY_STYLE["hermes"], marks=MARKS))
    bench.engine.script = writing(byte_tokenizer(MARKS), said("hermes"))
    with listening(bench):
        client = openai.OpenAI(base_url=f"{bench.url}/v1", api_key="any", max_retries=0, timeout=20)
        talk: list[Any] = [{"role": "user", "content": "hi"}]
        tools: Any = TOOLS
        message = client.chat.completions.create(model=BASE, messages=talk, tools=tools).choices[0].message
        assert message.tool_calls is not None
        assert [call.type for call in message.tool_calls] == ["function", "function"]
        answers = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls]
        again = client.chat.completions.create(model=BASE, messages=[*talk, message, *answers], tools=tools)
        assert again.choices[0].finish_reason == "tool_calls"
        with client.chat.completions.stream(model=BASE, messages=talk, tools=tools) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0].message
        assert "tool_calls.function.arguments.delta" in kinds
        assert [call.function.arguments for call in final.tool_calls or ()] == ['{"city": "Rome"}', "{}"]
        flat: Any = [{**tool, "strict": False} for tool in FLAT]
        with client.responses.stream(model=BASE, input="hi", tools=flat) as events:
            seen = {event.type for event in events}
            output = events.get_final_response().output
        assert "response.function_call_arguments.delta" in seen
        assert [item.type for item in output] == ["message", "function_call", "function_call"]
        more: Any = [
            {"role": "user", "content": "hi"},
            *output,
            {"type": "function_call_output", "call_id": "x", "output": ""},
        ]
        assert client.responses.create(model=BASE, input=more, tools=flat).status == "completed"


def widen_at_start(bench: Bench) -> Bench:
    """The same before the engine is started."""
    start = bench.engine.start

    async def started() -> None:
        await start()
        widen(bench)

    bench.engine.start = started
    return bench
