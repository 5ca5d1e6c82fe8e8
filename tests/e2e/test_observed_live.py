"""What a running server tells: every series that dashboards and gateways read, log lines of both processes, and what
happens when the engine hangs."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.live import LiveServer, live_server, wait_ready

from loramux.adapters_store.names import LOCAL_TENANT

ASK = [{"role": "user", "content": "Reverse this: planet"}]
LABELS = '{engine="0",model_name="loramux-demo"}'
HISTOGRAMS = (
    "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_prompt_tokens request_generation_tokens iteration_tokens_total"
).split()
SECRET = "the-secret-of-the-prompt"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The demo, logging JSON; without the router, whose own look at its examples the engine counts, too."""
    flags = ("--router", "off", "--log-format", "json", "--step-timeout-seconds", "5", "--metrics-max-adapters", "3")
    with live_server(tmp_path_factory.mktemp("server"), *flags) as made:
        yield made


def ask(server: LiveServer, model: str, **fields: Any) -> Any:
    """One answer."""
    body = {"model": model, "messages": ASK, "temperature": 0, "max_tokens": 16, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Polls; the bound only ends a test that has failed."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def lines(server: LiveServer) -> list[dict[str, Any]]:
    """The log so far: every line that either process, or a library in it, has written is a record."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_every_series_is_there_and_right(server: LiveServer) -> None:
    before = server.metrics()
    answers = [ask(server, model) for model in ("reverse", "reverse", "roman", "loramux-demo")]
    answers.append(ask(server, "reverse", max_tokens=1, ignore_eos=True))
    wait_for("stats", lambda: server.metrics()[f"vllm:num_requests_running{LABELS}"] == 0)
    wait_for("events", lambda: server.metrics()[f"vllm:iteration_tokens_total_count{LABELS}"] > 0)
    found = server.metrics()

    def grown(name: str) -> float:
        return found[name] - before.get(name, 0.0)

    usages = [answer["usage"] for answer in answers]
    prompt, generated = (sum(usage[key] for usage in usages) for key in ("prompt_tokens", "completion_tokens"))
    assert grown(f"vllm:prompt_tokens_total{LABELS}") == prompt
    assert grown(f"vllm:generation_tokens_total{LABELS}") == generated
    assert grown(f"vllm:request_prompt_tokens_sum{LABELS}") == prompt
    assert grown(f"vllm:request_generation_tokens_sum{LABELS}") == generated
    reasons = [answer["choices"][0]["finish_reason"] for answer in answers]
    for reason in set(reasons):
        name = f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="loramux-demo"}}'
        assert grown(name) == reasons.count(reason)
    assert "length" in reasons
    assert "stop" in reasons
    for name in HISTOGRAMS:
        assert found[f"vllm:{name}_count{LABELS}"] > 0, name
    for name in HISTOGRAMS[:1] + HISTOGRAMS[3:9]:
        assert grown(f"vllm:{name}_count{LABELS}") == len(answers), name
    assert grown(f"vllm:inter_token_latency_seconds_count{LABELS}") == generated - len(answers)
    assert grown(f"vllm:request_time_per_output_token_seconds_count{LABELS}") == len(answers) - 1
    parts = sum(grown(f"vllm:request_{part}_time_seconds_sum{LABELS}") for part in ("queue", "prefill", "decode"))
    assert parts <= grown(f"vllm:e2e_request_latency_seconds_sum{LABELS}")
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert grown(f"vllm:prefix_cache_hits_total{LABELS}") == cached > 0
    assert grown(f"vllm:prefix_cache_queries_total{LABELS}") == prompt
    assert found[f"vllm:num_preemptions_total{LABELS}"] == 0
    assert found[f"vllm:num_requests_waiting{LABELS}"] == 0
    assert 0 <= found[f"vllm:kv_cache_usage_perc{LABELS}"] <= 1
    (cache,) = [name for name in found if name.startswith("vllm:cache_config_info")]
    assert 'block_size="16"' in cache
    (lora,) = [name for name in found if name.startswith("vllm:lora_requests_info")]
    assert "reverse" in lora
    assert "roman" in lora
    for adapter, count in (("reverse", 3), ("roman", 1), ("loramux-demo", 1)):
        for series in ("time_to_first_token", "request_latency"):
            assert found[f'loramux_{series}_seconds_count{{adapter="{adapter}"}}'] == count
    assert found["process_resident_memory_bytes"] > 1 << 20
    assert found["loramux_engine_process_resident_memory_bytes"] > 1 << 20
    assert found["loramux_http_connections"] >= 1
    assert found["process_max_fds"] == found["loramux_engine_process_max_fds"], "both have what the system allows"


def test_labels_are_capped(server: LiveServer) -> None:
    for model in ("reverse", "roman", "caesar", "pig-latin", "no-vowels"):
        ask(server, model, max_tokens=2)
    names = [name for name in server.metrics() if name.startswith("loramux_request_latency_seconds_count")]
    assert len(names) <= 4
    assert 'loramux_request_latency_seconds_count{adapter="other"}' in names


def test_both_processes_log_alike(server: LiveServer) -> None:
    messages = [{"role": "user", "content": SECRET}]
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "reverse", "messages": messages, "max_tokens": 8, "user": SECRET},
        headers={"x-request-id": "told", "authorization": f"Bearer {SECRET}", "user-agent": SECRET},
        timeout=60,
    ).json()
    httpx.get(f"{server.url}/v1/%0A%7B%22level%22:%22forged%22%7D?q={SECRET}")

    def told() -> list[dict[str, Any]]:
        return [line for line in lines(server) if line.get("request_id") == "told"]

    wait_for("the line", lambda: bool(told()))
    (line,) = told()
    assert line["served"] == "reverse"
    assert line["tenant"] == LOCAL_TENANT
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert line["generated_tokens"] == answer["usage"]["completion_tokens"]
    assert line["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert line["queue_seconds"] + line["prefill_seconds"] + line["decode_seconds"] <= line["seconds"]
    found = lines(server)
    assert {item["process"] for item in found} == {"api", "engine"}
    assert [item["address"] for item in found if item["message"] == "serving"] == [server.url]
    assert "forged" not in {item["level"] for item in found}
    assert SECRET not in server.log.read_text()


def engine_of(server: LiveServer) -> int:
    """The engine's process: the server's child that runs it."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (pid,) = [int(c) for c in children if b"engine.process" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return pid


def test_an_engine_that_hangs_is_replaced(server: LiveServer) -> None:
    adapters = httpx.get(f"{server.url}/v1/adapters").json()["data"]
    pid = engine_of(server)
    body = {"model": "reverse", "messages": ASK, "stream": True, "ignore_eos": True, "max_tokens": 100}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
        events = (line[6:] for line in response.iter_lines() if line)
        next(events)
        os.kill(pid, signal.SIGSTOP)
        *_, last = events
    assert json.loads(last)["error"]["code"] == "engine_dead"
    wait_ready(server)
    assert engine_of(server) != pid
    assert server.metrics()['loramux_engine_restarts_total{engine="0",model_name="loramux-demo",reason="stuck"}'] == 1
    assert any("--step-timeout-seconds" in line["message"] for line in lines(server) if line["level"] == "error")
    assert [(a["name"], a["digest"]) for a in httpx.get(f"{server.url}/v1/adapters").json()["data"]] == [
        (a["name"], a["digest"]) for a in adapters
    ]
    assert ask(server, "reverse")["choices"][0]["message"]["content"]
