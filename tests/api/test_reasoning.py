"""Reasoning: how it is told from content, whole and streamed, and how it gets back into prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api.harness import BASE, Bench, byte_tokenizer, sse, writing
from api.tool_helpers import NOW, TOOLS, accepts, read, widen
from support.chat_templates import THINKING, THINKING_HERMES
from transformers.utils.chat_parsing import parse_response

from loramux.server.api.parsing import AnswerFormat
from loramux.server.api.rendering import Renderer, TokenizerError
from loramux.server.api.schemas.chat import ChatRequest
from loramux.server.api.tools import AnswerGrammar
from loramux.server.engine.protocol import Constraint

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SAID = "<think>\nLet me see:\n 1 < 2\n</think>\n\nTwo. "


def thinker(template: str = THINKING) -> AnswerFormat:
    found = Renderer(byte_tokenizer(), chat_template=template).format
    assert found is not None
    return found


@pytest.fixture
def bench_of(make: Any) -> Callable[..., Any]:
    async def build(template: str = THINKING, **settings: Any) -> Bench:
        return widen(await make(**{"template": template, "marks": MARKS, **settings}))

    return build


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        (SAID, "Two. ", "Let me see:\n 1 < 2"), ("No thought.", "No thought.", ""), ("<think>cut o", "", "cut o"),
        ("<think></think>x", "x", ""), ("a <think>b</think>  c", "a c", "b"), ("</think>x", "</think>x", ""),
        ("<think>a</think>b<think>c</think>d", "bd", "ac"), ("<thin", "<thin", ""),
        ("a<think>b</think>\n<think>c</think> \n d", "a \n d", "bc"), ("<think>a</thin> </think>b", "b", "a</thin>"),
    ],
)  # fmt: skip
def test_what_is_reasoning(text: str, content: str, reasoning: str) -> None:
    for parts in ([text], list(text)):
        assert read(thinker(), parts, tools=None)[:3] == (content, reasoning, [])


@pytest.mark.parametrize(
    ("prompt", "content", "reasoning"),
    [
        ("<user>x\n<assistant><think>\n", "b", "a"), ("<user>x\n<assistant>", "a</think>b", ""),
        ("<user>x\n<assistant><think>\n\n</think>\n\n", "a</think>b", ""),
        ("<user><think>\n<assistant>", "a</think>b", ""),
    ],
)  # fmt: skip
def test_prompts_may_begin_the_reasoning(prompt: str, content: str, reasoning: str) -> None:
    """Where the assistant's turn does: what users write changes nothing."""
    for parts in (["a</think>b"], list("a</think>b")):
        assert read(thinker(), parts, prompt=prompt, tools=None)[:3] == (content, reasoning, [])


def test_whole_answers_are_read_as_transformers_reads_them() -> None:
    format = thinker()
    for prompt, text in (("<assistant>", SAID), ("<assistant><think>\n", "a</think>\nb"), ("<assistant>", "plain")):
        theirs = parse_response(text, format.template, prefix=prompt)
        content, reasoning, _, _ = read(format, [text], prompt=prompt, tools=None)
        assert (theirs.get("content", ""), theirs.get("reasoning_content", "")) == (content.strip(), reasoning)


@pytest.mark.anyio
@pytest.mark.parametrize("marks", [MARKS, ()])
@pytest.mark.parametrize("per_step", [1, 2, 100])
async def test_whole_and_streamed(bench_of: Any, marks: tuple[str, ...], per_step: int) -> None:
    bench = await bench_of(marks=marks)
    bench.engine.script = writing(byte_tokenizer(marks), SAID, per_step=per_step)
    body = (await bench.chat()).json()
    message = body["choices"][0]["message"]
    thought = "Let me see:\n 1 < 2"
    assert message == {
        "role": "assistant", "content": "Two. ", "refusal": None, "reasoning": thought, "reasoning_content": thought,
    }  # fmt: skip
    assert body["choices"][0]["finish_reason"] == "stop"
    if per_step == 1 and marks:
        counted = len(byte_tokenizer(marks).encode(SAID.split("\n\nTwo")[0]).ids)
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": counted}
    events = sse((await bench.chat(stream=True, stream_options={"include_usage": True})).text)[:-1]
    assert events[-1]["usage"] == body["usage"]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Two. "
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == thought


@pytest.mark.anyio
async def test_a_prompt_that_begins_the_reasoning(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), "Hm.\n</think>\n\nYes.")
    for variables, content, reasoning in (
        ({"think": True}, "Yes.", "Hm."),
        ({"think": False}, "Hm.\n</think>\n\nYes.", None),
    ):
        message = (await bench.chat(chat_template_kwargs=variables)).json()["choices"][0]["message"]
        assert (message["content"], message.get("reasoning")) == (content, reasoning)


@pytest.mark.anyio
async def test_reasoning_goes_back_into_the_prompt(bench_of: Any) -> None:
    bench = await bench_of()
    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "b", name: "a"}
        assert (await bench.chat(messages=[{"role": "user", "content": "x"}, turn])).status_code == 200
        prompt = bench.state.renderer.decode(bench.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
        assert prompt == "<user>x\n<assistant>b<think>a</think>\n<assistant>"


@pytest.mark.anyio
async def test_calls_after_reasoning(bench_of: Any) -> None:
    bench = await bench_of(THINKING_HERMES)
    text = '<think>\nI call.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    bench.engine.script = writing(byte_tokenizer(MARKS), text)
    choice = (await bench.chat(tools=TOOLS)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, "I call.")
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "now"


@pytest.mark.anyio
async def test_responses(bench_of: Any) -> None:
    bench = await bench_of()
    bench.engine.script = writing(byte_tokenizer(MARKS), SAID)
    body = (await bench.client.post("/v1/responses", json={"model": BASE, "input": "hi"})).json()
    thought, message = body["output"]
    assert thought == {
        "id": thought["id"], "type": "reasoning", "summary": [], "status": "completed",
        "content": [{"type": "reasoning_text", "text": "Let me see:\n 1 < 2"}],
    }  # fmt: skip
    assert message["content"][0]["text"] == "Two. "
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    text = (await bench.client.post("/v1/responses", json={"model": BASE, "input": "hi", "stream": True})).text
    events = [json.loads(block.split("data: ")[1]) for block in text.strip().split("\n\n")]
    deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Let me see:\n 1 < 2"
    assert [event["type"] for event in events if event.get("output_index") == 0][:2] == [
        "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    again = [{"role": "user", "content": "x"}, *body["output"], {"role": "user", "content": "y"}]
    response = await bench.client.post("/v1/responses", json={"model": BASE, "input": again})
    assert response.status_code == 200, response.text
    prompt = bench.state.renderer.decode(bench.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<user>x\n<assistant>Two. <think>Let me see:\n 1 < 2</think>\n<user>y\n<assistant>"


def held(marks: tuple[str, ...], *, is_reasoning: bool = False, given: Constraint | None = None, **body: Any) -> Any:
    renderer = Renderer(byte_tokenizer(marks), chat_template=THINKING_HERMES)
    assert renderer.format is not None
    request = ChatRequest.model_validate({"model": BASE, "messages": [{"role": "user", "content": "x"}], **body})
    grammar = AnswerGrammar(renderer.format, renderer.marks)
    return grammar.constraint(request, offered=bool(request.tools), is_reasoning=is_reasoning, given=given)


@pytest.mark.parametrize("marks", [MARKS, ()], ids=["special", "text"])
def test_reasoning_is_free_where_the_answer_is_not(marks: tuple[str, ...]) -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    must = held(marks, tools=TOOLS, tool_choice="required")
    for text in (call, f"<think>Is 1 < 2?\n</think>\n\n{call}"):
        assert accepts(must, text, marks)
    assert not accepts(must, "<think>a</think>No.", marks)
    inside = held(marks, tools=TOOLS, tool_choice="required", is_reasoning=True)
    assert accepts(inside, f"a </think>\n\n{call}", marks)
    assert not accepts(inside, call, marks)
    one = Constraint("json_object")
    assert accepts(held(marks, given=one), '<think>x</think>\n{"a": 1}', marks)
    assert accepts(held(marks, given=one), '{"a": 1}', marks)
    assert not accepts(held(marks, given=one, is_reasoning=True), '{"a": 1}', marks)
    assert accepts(held(marks, given=one, is_reasoning=True), 'x</think>{"a": 1}', marks)
    strict = [{**NOW, "function": {**NOW["function"], "strict": True}}]
    free = held(marks, tools=strict)
    for text in (f"<think>x</think>Well. {call}", "<think>x</think>Well.", "Well.", f"Well. {call}"):
        assert accepts(free, text, marks)
    grammar = Constraint("lark", 'start: "x"')
    assert held(marks, given=grammar) is grammar


# Response templates

OWN: dict[str, Any] = {
    "start_anchor": "<assistant>",
    "fields": {
        "thinking": {"open": "[[", "close": "]]"},
        "tool_calls": {
            "open_pattern": r"!call (?P<name>\w+) ", "close": ";", "repeats": True, "content": "kv-lines",
            "content_args": {"line_sep": ",", "kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}  # fmt: skip


@pytest.mark.anyio
async def test_a_response_template_of_ones_own(bench_of: Any) -> None:
    bench = await bench_of("{% if tools %}{{ tools }}{% endif %}{{ messages[-1].content }}", response_template=OWN)
    bench.engine.script = writing(byte_tokenizer(), "[[hm]] Well. !call get_weather city=Rome, days=3;")
    choice = (await bench.chat(tools=TOOLS)).json()["choices"][0]
    assert choice["message"]["reasoning"] == "hm"
    assert choice["message"]["content"] == "Well."
    function = choice["message"]["tool_calls"][0]["function"]
    assert function == {"name": "get_weather", "arguments": '{"city": "Rome", "days": 3}'}
    error = (await bench.chat(tools=TOOLS, tool_choice="required")).json()["error"]
    assert (error["param"], error["code"]) == ("tool_choice", "unsupported_parameter")


def test_a_response_template_in_a_known_style_can_be_held_to() -> None:
    """As transformers writes the one of Qwen 2 and 3."""
    template = {
        "start_anchor": "<assistant>",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"\s*(?:<\|end\|>)"},
        },
    }  # fmt: skip
    found = Renderer(byte_tokenizer(), response_template=template).format
    assert found is not None
    assert found.style is not None
    assert found.style.name == "hermes"
    assert found.template.fields["tool_calls"].open_re.pattern == "<tool_call>"  # which does not slow down on blanks
    text = 'a\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    assert read(found, list(text))[:3] == ("a", "", [("now", "{}")])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "no JSON"), ("[]", "wrong"), ("{}", "fields"), ('{"fields": {"content": {}}}', "start_anchor"),
        ('{"start_anchor": "a", "fields": {"content": {"open_pattern": "("}}}', "open_pattern"),
        ('{"start_anchor": "a", "fields": {"tool_calls": {}}}', "tool_calls"), ('{"colour": 1}', "colour"),
    ],
)  # fmt: skip
def test_a_wrong_response_template_is_named_at_start(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "response.json"
    file.write_text(text)
    from support.models import byte_tokenizer as saved

    saved().save_pretrained(tmp_path / "model")
    with pytest.raises(TokenizerError, match=word):
        Renderer.load(tmp_path / "model", response_template=file)


def test_the_models_own_response_template(tmp_path: Path) -> None:
    from support.models import byte_tokenizer as saved

    tokenizer = saved()
    tokenizer.response_template = OWN
    tokenizer.save_pretrained(tmp_path)
    found = Renderer.load(tmp_path).format
    assert found is not None
    assert found.reasoning == "thinking"
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"start_anchor": "a", "fields": {"content": {}}}))
    other = Renderer.load(tmp_path, response_template=file).format
    assert other is not None
    assert other.reasoning is None


@pytest.mark.anyio
async def test_what_a_message_is_continued_from_is_not_said_again(bench_of: Any) -> None:
    """Neither its text nor its reasoning, however it ends; a call in it is text."""
    bench = await bench_of(THINKING_HERMES, marks=())
    bench.engine.script = writing(byte_tokenizer(), "nk>b</think> c")
    for begun, content, reasoning in (
        ("<think>a ", "c", "nk>b"), ("a <thi", "c", "b"), ("a ", "nk>b</think> c", None),
        ("<tool_call>", "nk>b</think> c", None),
    ):  # fmt: skip
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": begun}]
        message = (await bench.chat(messages=talk, tools=TOOLS, continue_final_message=True)).json()["choices"][0][
            "message"
        ]
        assert (message["content"], message.get("reasoning")) == (content, reasoning), begun
