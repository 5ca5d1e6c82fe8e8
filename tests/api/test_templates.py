"""Chat templates: what they are given, what clients may add to it, and how long they may take."""

from pathlib import Path
from typing import Any

import pytest
from api.harness import ASSISTANT, BEGIN, END, TEMPLATE, USER, Bench, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from loramux.server.api.errors import APIError
from loramux.server.api.rendering import Renderer, TokenizerError
from loramux.server.api.schemas.prompts import MAX_JSON_VALUES
from loramux.server.api.templates import ChatTemplate, TemplateOptions

TALK: list[Any] = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "It is "}]
PARTS = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}\
{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
ONLY_PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }};{% endfor %}{% endfor %}"
DOCUMENTS = "{% for d in documents or [] %}<{{ d.title }}: {{ d.text }}>{% endfor %}{{ messages[-1].content }}"
TRIMMING = "{% for m in messages %}({{ m.content | trim }}){% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, PARTS, TRIMMING, DOCUMENTS])
@pytest.mark.parametrize("continues", [False, True])
def test_prompts_are_those_of_transformers(template: str, continues: bool) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=template)
    options = TemplateOptions(add_generation_prompt=not continues, continue_final_message=continues)
    expected = theirs.apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )
    assert ChatTemplate(template).render(TALK, options) == expected


def test_parts_are_joined_by_newlines_unless_the_template_renders_them() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    options = TemplateOptions(add_generation_prompt=False)
    assert ChatTemplate(TEMPLATE).render([message], options) == "<|begin|><|user|>a\nb<|stop|>"
    assert ChatTemplate(PARTS).render([message], options) == "[user]ab"
    assert ChatTemplate(PARTS).render([{"role": "user", "content": "a"}], options) == "[user]a"
    assert ChatTemplate(ONLY_PARTS).render([{"role": "user", "content": "ab"}], options) == "ab;"


def test_templates_by_purpose() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools }}tools", "rag": "{{ documents }}rag"})
    tool, document = {"type": "function"}, {"text": "x"}
    assert template.render(TALK, TemplateOptions()) == "plain"
    assert template.render(TALK, TemplateOptions(tools=[tool])).endswith("tools")
    assert template.render(TALK, TemplateOptions(documents=[document])).endswith("rag")


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% set x = j %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for j in range(100000) %}{{ m(0) if n }}{% endfor %}{% endmacro %}"
        "{% for i in range(100000) %}{{ m(1) }}{% endfor %}",
    ],
)
def test_time_is_limited(loop: str) -> None:
    template = ChatTemplate("{% if messages | length > 1 %}" + loop + "{% endif %}", seconds=0.02)
    with pytest.raises(APIError, match="processor time") as caught:
        template.render(TALK, TemplateOptions())
    assert (caught.value.status, caught.value.code) == (400, "template_timeout")
    assert template.render(TALK[:1], TemplateOptions()) == ""


def test_a_broken_template_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="line 2"):
        Renderer(byte_tokenizer(), chat_template="\n{% if %}")


@pytest.mark.anyio
async def test_variables(make: Any) -> None:
    bench = await make(template="{{ messages[0].content }}{{ '!' if enable_thinking is defined and enable_thinking }}")
    bodies = ({}, {"enable_thinking": True}, {"enable_thinking": False, "other": [{"a": None}]})
    for variables in bodies:
        assert (await bench.chat(chat_template_kwargs=variables)).status_code == 200
    assert [bytes(r.prompt_token_ids) for r in bench.engine.requests] == [b"hi", b"hi!", b"hi"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name",
    ["messages", "chat_template", "tokenize", "tools", "documents", "add_generation_prompt", "raise_exception",
     "continue_final_message", "namespace", "range"],
)  # fmt: skip
async def test_reserved_names(bench: Bench, name: str) -> None:
    response = await bench.chat(chat_template_kwargs={name: "x"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"
    assert not bench.engine.requests


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template_kwargs", {"a": list(range(MAX_JSON_VALUES + 1))}),
        ("chat_template_kwargs", {str(i): i for i in range(65)}),
        ("chat_template_kwargs", [1]),
        ("documents", [{}] * 1025),
        ("documents", ["text"]),
        ("chat_template", "{{ messages }}"),
    ],
)
async def test_bounds(bench: Bench, field: str, value: Any) -> None:
    response = await bench.chat(**{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(field)


@pytest.mark.anyio
@pytest.mark.parametrize("inner", ["NaN", '"\\ud800"', "[" * 40 + "]" * 40, "1e999"])
async def test_values_that_are_none(bench: Bench, inner: str) -> None:
    turns = '[{"role": "user", "content": "a"}]'
    body = f'{{"model": "tiny/base", "messages": {turns}, "documents": [{{"a": {inner}}}]}}'
    headers = {"content-type": "application/json"}
    response = await bench.client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "documents[0]"


@pytest.mark.anyio
async def test_documents(make: Any) -> None:
    bench = await make(template=DOCUMENTS)
    assert (await bench.chat(documents=[{"title": "T", "text": "words"}])).status_code == 200
    assert bytes(bench.engine.requests[0].prompt_token_ids) == b"<T: words>hi"


@pytest.mark.anyio
async def test_documents_that_no_template_would_show(bench: Bench) -> None:
    error = (await bench.chat(documents=[{"text": "x"}])).json()["error"]
    assert (error["param"], error["code"]) == ("documents", "unsupported_parameter")
    assert (await bench.chat(documents=[])).status_code == 200


@pytest.mark.anyio
async def test_where_a_prompt_ends(bench: Bench) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "he"}]
    answers = [
        await bench.chat(messages=messages, continue_final_message=True),
        await bench.chat(messages=messages, continue_final_message=True, add_generation_prompt=False),
        await bench.chat(messages=messages, add_generation_prompt=False),
        await bench.chat(messages=messages, add_generation_prompt=True),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    cut, same, closed, opened = ([*r.prompt_token_ids] for r in bench.engine.requests)
    assert cut == same == [BEGIN, USER, *b"hi", END, ASSISTANT, *b"he"]
    assert closed == [*cut, END]
    assert opened == [*closed, ASSISTANT]
    both = await bench.chat(messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert both.json()["error"]["param"] == "continue_final_message"


def test_nothing_to_continue() -> None:
    options = TemplateOptions(add_generation_prompt=False, continue_final_message=True)
    for content in (None, []):
        with pytest.raises(APIError, match="no text to continue"):
            ChatTemplate(PARTS).render([{"role": "assistant", "content": content}], options)


@pytest.mark.anyio
async def test_a_template_that_drops_the_last_message(make: Any) -> None:
    bench = await make(template="{{ messages[0].content }}")
    error = (await bench.chat(messages=TALK, continue_final_message=True)).json()["error"]
    assert error["param"] == "continue_final_message"
