"""`/v1/chat/completions`: the contract, whole and streamed."""

import pytest
from api.harness import ASSISTANT, BASE, BEGIN, END, SYSTEM, USER, Bench, saying, sse

from loramux.server.api.rendering import SamplingDefaults

pytestmark = pytest.mark.anyio

PROMPT = [BEGIN, USER, *b"hi", END, ASSISTANT]


async def test_whole_answer(bench: Bench) -> None:
    bench.engine.cached_tokens = 4
    response = await bench.chat()
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert isinstance(body["created"], int)
    assert body["model"] == BASE
    assert body["system_fingerprint"] is None
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert body["loramux"] == {"adapters": []}
    assert "x-loramux-adapters" not in response.headers
    assert response.headers["x-request-id"] in body["id"]
    (request,) = bench.engine.requests
    assert list(request.prompt_token_ids) == PROMPT
    assert request.adapters == ()
    assert request.sampling.max_tokens == 256 - len(PROMPT)


async def test_stream(bench: Bench) -> None:
    response = await bench.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = sse(response.text)
    assert events.pop() == "[DONE]"
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert all("usage" not in event for event in events)
    first, last = events[0]["choices"][0], events[-1]["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert events[0]["loramux"] == {"adapters": []}
    assert last["delta"] == {}
    assert last["finish_reason"] == "stop"
    middle = [event["choices"][0] for event in events[1:-1]]
    assert "".join(choice["delta"]["content"] for choice in middle) == "hello"
    assert all(choice["finish_reason"] is None for choice in [first, *middle])


async def test_stream_usage(bench: Bench) -> None:
    response = await bench.chat(stream=True, stream_options={"include_usage": True})
    *events, last, done = sse(response.text)
    assert done == "[DONE]"
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6


async def test_continuous_usage(bench: Bench) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, _ = sse((await bench.chat(stream=True, stream_options=options)).text)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[1] == 1
    assert last["usage"]["total_tokens"] == 12


async def test_return_token_ids(bench: Bench) -> None:
    body = (await bench.chat(return_token_ids=True)).json()
    assert body["prompt_token_ids"] == PROMPT
    assert body["choices"][0]["token_ids"] == [*b"hello", END]
    events = sse((await bench.chat(return_token_ids=True, stream=True)).text)[:-1]
    assert events[0]["prompt_token_ids"] == PROMPT
    ids = [token for event in events for token in event["choices"][0].get("token_ids", [])]
    assert ids == [*b"hello", END]


async def test_messages_become_a_prompt(bench: Bench) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "user", "content": "c"},
    ]
    assert (await bench.chat(messages=messages)).status_code == 200
    expected = [BEGIN, SYSTEM, *b"be kind", END, USER, *b"a\nb", END, ASSISTANT, END, USER, *b"c", END, ASSISTANT]
    assert list(bench.engine.requests[0].prompt_token_ids) == expected


async def test_a_refusal_is_replayed_as_what_was_said(bench: Bench) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "no"}]
    assert (await bench.chat(messages=[*said, {"role": "user", "content": "b"}])).status_code == 200
    assert bytes(i for i in bench.engine.requests[0].prompt_token_ids if i < 256) == b"anob"
    error = (await bench.chat(messages=[{"role": "user", "content": "a", "refusal": "no"}])).json()["error"]
    assert error["param"] == "messages[0]"


async def test_long_conversations_are_rendered_too(make) -> None:
    bench = await make()
    bench.engine.info_value = bench.engine.info.__class__(
        **{name: getattr(bench.engine.info, name) for name in bench.engine.info.__slots__} | {"max_model_len": 100_000}
    )
    text = "word " * 5000
    assert (await bench.chat(messages=[{"role": "user", "content": text}])).status_code == 200
    assert len(bench.engine.requests[0].prompt_token_ids) == len(text) + 4


async def test_explicit_nulls(bench: Bench) -> None:
    fields = (
        "temperature top_p top_k min_p seed max_tokens max_completion_tokens min_tokens stop stop_token_ids n "
        "presence_penalty frequency_penalty logit_bias logprobs top_logprobs stream stream_options tools tool_choice "
        "response_format user metadata store service_tier functions adapters ignore_eos return_token_ids cache_salt "
        "parallel_tool_calls repetition_penalty modalities audio prediction safety_identifier prompt_cache_key "
        "include_stop_str_in_output skip_special_tokens reasoning_effort"
    ).split()
    response = await bench.chat(**dict.fromkeys(fields))
    assert response.status_code == 200, response.text


async def test_bookkeeping_and_neutral_values_are_accepted(bench: Bench) -> None:
    response = await bench.chat(
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s", prompt_cache_key="k",
        parallel_tool_calls=True, n=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, logprobs=False,
        top_logprobs=0, tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"],
        repetition_penalty=1.0,
    )  # fmt: skip
    assert response.status_code == 200, response.text


async def test_sampling_reaches_the_engine(bench: Bench) -> None:
    await bench.chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-5, max_tokens=9, min_tokens=3, ignore_eos=True,
        stop_token_ids=[65, 65, 66], cache_salt="tenant",
    )  # fmt: skip
    (request,) = bench.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (-5, 9, 3, True)
    assert sampling.stop_token_ids == (65, 66)
    assert request.salt == "tenant"


async def test_defaults_are_the_models(make) -> None:
    bench = await make(defaults=SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05))
    await bench.chat()
    await bench.chat(temperature=0, top_p=1, top_k=-1, min_p=0)
    own, asked = (request.sampling for request in bench.engine.requests)
    assert (own.temperature, own.top_p, own.top_k, own.min_p) == (0.6, 0.95, 20, 0.05)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0, 1, 0, 0)


async def test_seeds_differ_unless_given(bench: Bench) -> None:
    await bench.chat()
    await bench.chat()
    first, second = bench.engine.requests
    assert first.sampling.seed != second.sampling.seed


async def test_max_completion_tokens_wins(bench: Bench) -> None:
    bench.engine.script = saying("hello", end=False)
    body = (await bench.chat(max_tokens=4, max_completion_tokens=2)).json()
    assert body["choices"][0]["message"]["content"] == "he"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_context_length(bench: Bench) -> None:
    error = (await bench.chat(messages=[{"role": "user", "content": "x" * 300}])).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "256" in error["message"]
    assert "304" in error["message"]
    error = (await bench.chat(max_tokens=251)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert (await bench.chat(max_tokens=250, min_tokens=250)).status_code == 200
    assert (await bench.chat(max_tokens=3, min_tokens=4)).json()["error"]["param"] == "min_tokens"


async def test_no_chat_template(make) -> None:
    bench = await make(template=None)
    error = (await bench.chat()).json()["error"]
    assert error["code"] == "no_chat_template"
    assert (await bench.complete()).status_code == 200


async def test_template_refuses(make) -> None:
    bench = await make(template="{{ raise_exception('roles must alternate') }}")
    response = await bench.chat()
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]
