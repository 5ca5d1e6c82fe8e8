"""`/tokenize` and `/detokenize`."""

from typing import Any

import pytest
from api.harness import ASSISTANT, BASE, BEGIN, END, USER, VOCAB, Bench

from loramux.server.api.tokenize import MAX_LISTED

pytestmark = pytest.mark.anyio

TALK = [{"role": "user", "content": "hi"}]


async def post(bench: Bench, path: str, **body: Any) -> Any:
    return await bench.client.post(path, json=body)


async def test_a_prompt(bench: Bench) -> None:
    body = (await post(bench, "/tokenize", model=BASE, prompt="hé <|stop|>")).json()
    ids = [*"hé ".encode(), END]
    assert body == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    body = (await post(bench, "/tokenize", prompt="h <|stop|>", return_token_strs=True)).json()
    assert body["token_strs"] == ["h", "Ġ", "<|stop|>"]
    assert (await post(bench, "/tokenize", prompt="")).json()["tokens"] == []


async def test_messages_are_what_chat_would_send(bench: Bench) -> None:
    body = (await post(bench, "/tokenize", messages=TALK)).json()
    assert body["tokens"] == [BEGIN, USER, *b"hi", END, ASSISTANT]
    await bench.chat(messages=TALK)
    assert list(bench.engine.requests[0].prompt_token_ids) == body["tokens"]
    body = (await post(bench, "/tokenize", messages=TALK, add_generation_prompt=False)).json()
    assert body["tokens"] == [BEGIN, USER, *b"hi", END]
    body = (await post(bench, "/tokenize", messages=TALK, continue_final_message=True)).json()
    assert body["tokens"] == [BEGIN, USER, *b"hi"]


async def test_tools_reach_a_template_that_takes_them(make: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    bench = await make(template="{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}")
    assert bytes((await post(bench, "/tokenize", messages=TALK, tools=tools)).json()["tokens"]) == b"fhi"


async def test_there_and_back(bench: Bench) -> None:
    text = "a 𝄞 b<|user|>"
    ids = (await post(bench, "/tokenize", prompt=text)).json()["tokens"]
    assert (await post(bench, "/detokenize", model=BASE, tokens=ids)).json() == {"prompt": text}
    assert (await post(bench, "/detokenize", tokens=[])).json() == {"prompt": ""}


async def test_models(bench: Bench) -> None:
    bench.put("skill")
    for model in ("skill", "skill@1", "auto", BASE):
        assert (await post(bench, "/tokenize", model=model, prompt="a")).status_code == 200
        assert (await post(bench, "/detokenize", model=model, tokens=[97])).status_code == 200
    for path, rest in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        response = await post(bench, path, model="nobody", **rest)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": TALK}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "colour"),
        ("/tokenize", {"messages": TALK, "tools": [{}]}, "tools[0].type"),
        ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": [VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"), ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)  # fmt: skip
async def test_mistakes(bench: Bench, path: str, body: dict[str, Any], param: str) -> None:
    response = await post(bench, path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_lists_of_tokens_have_a_bound(bench: Bench) -> None:
    text = "a" * (MAX_LISTED + 1)
    for field, body in (("prompt", {"prompt": text}), ("messages", {"messages": [{"role": "user", "content": text}]})):
        response = await bench.client.post("/tokenize", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, field, "too_many_tokens")
        assert f"at most {MAX_LISTED}" in error["message"]
    assert (await post(bench, "/tokenize", prompt=text[1:])).json()["count"] == MAX_LISTED
