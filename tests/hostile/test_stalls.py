"""The server's event loop never stands still for 50 ms, whatever is sent: measured in the server's own process.

`make test-stalls`. Tests that need no clock are in `test_event_loop.py`: they look at which thread does the work.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save
from safetensors.torch import load
from support.live import LiveServer, live_server

pytestmark = pytest.mark.slow

BASE = "loramux-demo"
ALLOWED_SECONDS = 0.05
ATTEMPTS = 4
ADAPTER = Path(__file__).parents[2] / "server" / "demo" / "adapters" / "reverse"
WORDS = "the quick brown fox jumps over lazy dogs and "
TYPE = {"content-type": "application/json"}
Work = Callable[[httpx.Client], None]


class Watched:
    """A server, and the stalls of its loop."""

    def __init__(self, server: LiveServer, file: Path) -> None:
        self.server = server
        self.file = file

    def stalls(self, work: Work) -> list[dict[str, float]]:
        """What `work` does to the loop while four others stream."""
        before = self.file.stat().st_size
        done = threading.Event()
        others = [threading.Thread(target=self._stream, args=(done,)) for _ in range(4)]
        for other in others:
            other.start()
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            work(client)
        time.sleep(0.1)
        done.set()
        for other in others:
            other.join()
        return [json.loads(line) for line in self.file.read_text()[before:].splitlines()]

    def _stream(self, done: threading.Event) -> None:
        body = {
            "model": "reverse",
            "prompt": "Reverse this: planet",
            "max_tokens": 64,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            while not done.is_set():
                with client.stream("POST", "/v1/completions", json=body) as response:
                    for _ in response.iter_bytes():
                        pass


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("stalls")
    file = root / "stalls"
    file.touch()
    program = [str(Path(__file__).with_name("watched_server.py"))]
    with live_server(root, "--max-num-seqs", "64", env={"WATCH_FILE": str(file)}, program=program) as server:
        yield Watched(server, file)


def post(client: httpx.Client, path: str, expected: int, **body: Any) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == expected, answer.text[:500]


def raw(client: httpx.Client, path: str, expected: int, data: bytes) -> None:
    answer = client.post(path, content=data, headers=TYPE)
    assert answer.status_code == expected, answer.text[:500]


def large_adapters(client: httpx.Client) -> None:
    """Thirteen megabytes each, and one with long lists of examples."""
    config = json.loads((ADAPTER / "adapter_config.json").read_text()) | {
        "r": 200, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    small = {k: v.float().numpy() for k, v in load((ADAPTER / "adapter_model.safetensors").read_bytes()).items()}
    for number in range(3):
        tensors = {}
        for name, value in small.items():
            shape = (200, value.shape[1]) if "lora_A" in name else (value.shape[0], 200)
            tensors[name] = np.resize(value * (1 + number / 8), shape).astype(np.float32)
        files = [
            ("files", ("adapter_config.json", json.dumps(config))),
            ("files", ("adapter_model.safetensors", save(tensors))),
        ]
        examples = json.dumps([f"{WORDS} {number} {line}" for line in range(200)])
        answer = client.post("/v1/adapters", data={"name": f"large{number}", "examples": examples}, files=files)
        assert answer.status_code in (200, 201), answer.text


def often(client: httpx.Client) -> None:
    """What programs ask for again and again, and the API's description."""
    for path in ("/openapi.json", "/metrics", "/v1/models", "/v1/adapters?limit=1000", "/v1/router", "/"):
        client.get(path).raise_for_status()


SCHEMAS: list[dict[str, Any]] = [
    {"guided_regex": "(a+)+b"}, {"guided_regex": "((a{1,100}){1,100}){1,100}"},
    {"guided_json": {"enum": [f"{WORDS} {i}" for i in range(5000)]}},
    {"guided_json": {"type": "object", "properties": {f"key{i}": {"type": "integer"} for i in range(500)}}},
    {"guided_json": {"type": "integer", "multipleOf": 1_000_003}},
    {"guided_grammar": "start: r0\n" + "".join(f'r{i}: "a"r{i + 1}|"b"\n' for i in range(4000)) + 'r4000: "a"\n'},
]  # fmt: skip


def grammars(client: httpx.Client) -> None:
    """Some that are large, some that cannot be compiled."""
    for fields in SCHEMAS:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": BASE, "messages": messages, "max_tokens": 8, **fields}
        assert client.post("/v1/chat/completions", json=body).status_code in (200, 400)


CASES: dict[str, Work] = {
    "large adapters": large_adapters,
    "a prompt of 100k ids": lambda c: post(c, "/v1/completions", 400, model=BASE, prompt=[5] * 100_000, max_tokens=4),
    "100 prompts of 1000 ids": lambda c: post(
        c, "/v1/completions", 200, model=BASE, prompt=[[5] * 1000] * 100, max_tokens=4
    ),
    "a prompt of 450k characters": lambda c: post(c, "/v1/completions", 400, model=BASE, prompt=WORDS * 10_000),
    "a prompt of 4 MB": lambda c: post(c, "/v1/completions", 400, model=BASE, prompt="abcdefgh" * 500_000),
    "a conversation of 2 MB": lambda c: post(
        c, "/v1/chat/completions", 400, model=BASE, messages=[{"role": "user", "content": WORDS * 20}] * 2000
    ),
    "auto for 1 MB": lambda c: post(
        c, "/v1/chat/completions", 400, model="auto", messages=[{"role": "user", "content": WORDS * 20_000}]
    ),
    "echo with log-probabilities": lambda c: post(
        c, "/v1/completions", 200, model=BASE, prompt=[list(range(5, 200))] * 64, echo=True, logprobs=5, max_tokens=20,
        ignore_eos=True,
    ),
    "the same as a stream": lambda c: post(
        c, "/v1/completions", 200, model=BASE, prompt=[list(range(5, 200))] * 32, echo=True, logprobs=5, max_tokens=20,
        ignore_eos=True, stream=True,
    ),
    "many choices with the likeliest tokens": lambda c: post(
        c, "/v1/chat/completions", 200, model=BASE, messages=[{"role": "user", "content": "hi"}], n=32, logprobs=True,
        top_logprobs=20, max_tokens=200, ignore_eos=True,
    ),
    "tokenize": lambda c: post(c, "/tokenize", 200, prompt=WORDS * 10_000, return_token_strs=True),
    "detokenize": lambda c: post(c, "/detokenize", 200, tokens=[5] * 450_000),
    "many stop strings": lambda c: post(
        c, "/v1/completions", 200, model=BASE, prompt=["hello"] * 64, max_tokens=200, ignore_eos=True,
        stop=[("a" * 480 + chr(97 + i) * 32)[:512] for i in range(16)],
    ),
    "many embeddings": lambda c: post(c, "/v1/embeddings", 400, model=BASE, input=["a" * 1900] * 2000 + [""]),
    "many prompts": lambda c: post(
        c, "/v1/completions", 400, model=BASE, prompt=["a" * 8000] * 127 + ["b"], max_tokens=2
    ),
    "embeddings": lambda c: post(c, "/v1/embeddings", 200, model=BASE, input=[WORDS] * 500),
    "a million ids": lambda c: post(c, "/v1/completions", 400, model=BASE, prompt=[5] * 1_000_000),
    "deep nesting": lambda c: raw(c, "/v1/chat/completions", 400, b"[" * 4_000_000),
    "a million lists": lambda c: raw(c, "/v1/chat/completions", 400, b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}"),
    "wrong parts": lambda c: post(
        c, "/v1/chat/completions", 400, model=BASE,
        messages=[{"role": "user", "content": [{"type": "text"}] * 900}] * 90,
    ),
    "a huge bias": lambda c: post(
        c, "/v1/completions", 400, model=BASE, prompt="a", logit_bias={str(i): "x" for i in range(100_000)}
    ),
    "long numbers": lambda c: raw(
        c, "/v1/completions", 400, b'{"model": "loramux-demo", "prompt": [' + b",".join([b"9" * 4299] * 900) + b"]}"
    ),
    "grammars": grammars,
    "what is asked for often": often,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loop_goes_on(watched: Watched, case: str) -> None:
    worst: list[float] = []
    for _ in range(ATTEMPTS):
        found = watched.stalls(CASES[case])
        worst.append(max((stall["stall"] for stall in found), default=0.0))
        if worst[-1] <= ALLOWED_SECONDS:
            return
    raise AssertionError(f"the loop stood still for {worst} s in each of {ATTEMPTS} attempts: {found}")


def test_the_watch_sees_a_stall(tmp_path: Path) -> None:
    """The same measurement, of a loop that computes for 100 ms."""
    import asyncio

    from hostile.watched_server import Watch

    async def stall() -> None:
        watch = asyncio.create_task(Watch(tmp_path / "stalls").run())
        await asyncio.sleep(0.02)
        until = time.process_time() + 2 * ALLOWED_SECONDS
        while time.process_time() < until:
            pass
        await asyncio.sleep(0.02)
        watch.cancel()

    asyncio.run(stall())
    (found,) = [json.loads(line) for line in (tmp_path / "stalls").read_text().splitlines()]
    assert found["stall"] > ALLOWED_SECONDS
