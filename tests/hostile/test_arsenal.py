"""What attackers send, to one real server: it opens no connection, starts no program and unpickles nothing, tells no
path, trace or name of others, and answers the next request as before.
"""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.live import LiveServer, live_server

BASE = "loramux-demo"
CALL_HOME = "http://127.0.0.1:9/never-fetched"
ADAPTER = Path(__file__).parents[2] / "server" / "demo" / "adapters" / "reverse"
CONFIG = json.loads((ADAPTER / "adapter_config.json").read_text())
WEIGHTS = (ADAPTER / "adapter_model.safetensors").read_bytes()
KEYS = ("arsenal-admin-key", "arsenal-other-key")
LEAKS = re.compile(
    r"Traceback|\.py\", line|site-packages|/tmp/|/root/|/home/|object at 0x|\b0x[0-9a-f]{6,}|sqlite3|SELECT |"
    r"victims-own|the password of the victim"
)
OUR_OWN = "'-m', 'loramux.server.engine."
"""What a process of the server's own, for generation or grammars, is started by."""


class Exploit:
    """Unpickling it would start a program."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("false",)


class Range:
    """A server with two tenants' adapters, and what its API process was seen to do."""

    def __init__(self, server: LiveServer, audit: Path) -> None:
        self.server, self.audit = server, audit
        self.client = httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {KEYS[0]}"})

    def seen(self) -> list[str]:
        """What the process did, besides starting its own."""
        return [line for line in self.audit.read_text().splitlines() if OUR_OWN not in line]

    def send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """One shot. Whatever the answer is, it tells nothing and is no failure of the server's."""
        answer = self.client.request(method, path, **kwargs)
        assert answer.status_code < 500, answer.text
        asked = path + repr(kwargs)  # what was sent may be named
        assert all(leak in asked for leak in LEAKS.findall(answer.text)), answer.text
        return answer

    def upload(self, config: Any, weights: bytes = WEIGHTS, **extra: bytes) -> httpx.Response:
        """An adapter, with more files than belong to one if need be."""
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        files = [("files", ("adapter_config.json", text)), ("files", ("adapter_model.safetensors", weights))]
        files += [("files", (name, data)) for name, data in extra.items()]
        return self.send("POST", "/v1/adapters", data={"name": "shot"}, files=files)


@pytest.fixture(scope="module")
def arsenal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    root = tmp_path_factory.mktemp("arsenal")
    audit = root / "audit"
    program = [str(Path(__file__).with_name("audited_server.py"))]
    with live_server(root, "--api-key", KEYS[0], env={"AUDIT_FILE": str(audit)}, program=program) as server:
        made = Range(server, audit)
        key = made.client.post("/v1/admin/keys", json={"tenant": "victim"}).json()["key"]
        files = [
            ("files", ("adapter_config.json", json.dumps(CONFIG))),
            ("files", ("adapter_model.safetensors", WEIGHTS)),
        ]
        theirs = httpx.post(
            f"{server.url}/v1/adapters", headers={"authorization": f"Bearer {key}"}, timeout=60,
            data={"name": "victims-own", "examples": '["the password of the victim"]'}, files=files,
        )  # fmt: skip
        assert theirs.status_code == 201
        yield made
        made.client.close()


@pytest.fixture(autouse=True)
def _unharmed(arsenal: Range) -> Iterator[None]:
    """After every shot: nothing new in the audit, no adapter more, and the right answer to a plain question."""
    before = arsenal.seen()
    names = [a["id"] for a in arsenal.client.get("/v1/adapters").json()["data"]]
    yield
    assert arsenal.seen()[len(before) :] == []
    assert [a["id"] for a in arsenal.client.get("/v1/adapters").json()["data"]] == names
    messages = [{"role": "user", "content": "Reverse this: planet"}]
    answer = arsenal.client.post(
        "/v1/chat/completions", json={"model": "reverse", "messages": messages, "temperature": 0}
    ).json()
    assert answer["choices"][0]["message"]["content"] == "tenalp"


def test_the_audit_sees_what_it_should(arsenal: Range) -> None:
    assert "loramux.server.engine.process" in arsenal.audit.read_text()


@pytest.mark.parametrize(
    "kind", ["image_url", "input_image", "input_audio", "file", "input_file", "video_url", "audio_url"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize", "/v1/route"])
def test_nothing_is_fetched(arsenal: Range, kind: str, path: str) -> None:
    """CVE-2025-6242 and its kind: a part with an address is refused by its type, and the address is never asked."""
    for value in (CALL_HOME, {"url": CALL_HOME}, {"file_url": CALL_HOME}, "file:///etc/passwd", "data:text/plain,x"):
        messages = [{"role": "user", "content": [{"type": kind, kind: value}]}]
        field = "messages" if path in ("/v1/chat/completions", "/tokenize") else "input"
        answer = arsenal.send("POST", path, json={"model": BASE, field: messages})
        assert answer.status_code == 400
        assert "root:" not in answer.text


@pytest.mark.parametrize(
    "extra",
    [
        {"documents": [{"url": CALL_HOME, "text": "x"}]}, {"tools": [{"type": "mcp", "server_url": CALL_HOME}]},
        {"metadata": {"callback": CALL_HOME}, "user": CALL_HOME},
        {"chat_template": "{{ cycler.__init__.__globals__ }}"},
        {"chat_template_kwargs": {"url": CALL_HOME}},
        {"chat_template_kwargs": {"chat_template": "{{ 7*7 }}", "tokenizer": CALL_HOME}},
        {"mm_processor_kwargs": {"a": CALL_HOME}}, {"media_io_kwargs": {}}, {"web_search_options": {}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": CALL_HOME}}}},
    ],
)  # fmt: skip
def test_no_field_opens_a_connection(arsenal: Range, extra: dict[str, Any]) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": CALL_HOME}], "max_tokens": 2, **extra}
    answer = arsenal.send("POST", "/v1/chat/completions", json=body)
    assert "49" not in answer.json().get("error", {}).get("message", "")


TRAVERSALS = [
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%2e%2e%2f%2e%2e%2fregistry.sqlite",
    "..%5c..%5cx", "/etc/passwd", "//etc/passwd", "%00", "reverse%00", "reverse%2f..%2froman", ".%2freverse",
    "reverse%0a", "reverse%0d", "reverse%7f",
    "sha256:" + "0" * 64, "sha256-" + "0" * 64, "blobs/sha256-" + "0" * 64, "r%D0%B5verse", "reverse%e2%80%8b",
    "victim/victims-own", "victim%2Fvictims-own@1", "victim/victims-own/../victims-own",
    "'%20OR%201=1--", "reverse';%20DROP%20TABLE%20adapters;--", "*", "%25", "_everse", "REVERSE",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS)
def test_names_are_names(arsenal: Range, name: str) -> None:
    """No spelling of a name is a path, a pattern, a digest or a query; what is another tenant's is not there."""
    for method, path in (("GET", "/v1/adapters/"), ("DELETE", "/v1/adapters/"), ("PATCH", "/v1/adapters/"),
                         ("GET", "/v1/models/")):  # fmt: skip
        kwargs = {"json": {"description": "mine"}} if method == "PATCH" else {}
        answer = arsenal.send(method, path + name, **kwargs)
        assert answer.status_code in (400, 404, 405), answer.text
    from urllib.parse import unquote

    model = unquote(name)
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert arsenal.send("POST", "/v1/chat/completions", json=body).status_code in (400, 404)
    fused = {**body, "model": BASE, "adapters": [{"name": model}]}
    assert arsenal.send("POST", "/v1/chat/completions", json=fused).status_code in (400, 404)
    chosen = {**body, "model": "auto", "router": {"candidates": [model]}}
    assert arsenal.send("POST", "/v1/chat/completions", json=chosen).status_code in (200, 400, 404)


def pickles() -> dict[str, bytes]:
    """Pickles under the name of safetensors."""
    import io

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return {
        "a program": pickle.dumps(Exploit()), "an old one": pickle.dumps(Exploit(), protocol=0),
        "torch.save": buffer.getvalue(),
        "after a header": (8).to_bytes(8, "little") + b'{"a":1} ' + pickle.dumps(Exploit()),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["a program", "an old one", "torch.save", "after a header"])
def test_nothing_is_unpickled(arsenal: Range, kind: str) -> None:
    """CVE-2025-32434: not even a safe loader is asked."""
    assert arsenal.upload(CONFIG, pickles()[kind]).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "Exploit", "parent_library": "antigravity"}},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, {"megatron_core": "antigravity"},
        {"base_model_name_or_path": CALL_HOME, "revision": "$(false)", "task_type": "__import__('os')"},
        {"peft_type": "../../../etc/passwd"}, {"loftq_config": {"a": CALL_HOME}, "use_loftq": True},
        {"target_modules": "(a+)+$"}, {"target_modules": "(.*)*(.*)*(.*)*x"}, {"rank_pattern": {"(a|a)*b": 4}},
        {"exclude_modules": "((((a*)*)*)*)*$b"}, {"r": 0}, {"r": 10**9}, {"r": -1}, {"lora_alpha": 10**400},
    ],
)  # fmt: skip
def test_a_configuration_is_data(arsenal: Range, change: dict[str, Any]) -> None:
    """CVE-2026-22807 and its kind: nothing that an uploader writes is imported, matched by `re` or taken for a path."""
    answer = arsenal.upload({**CONFIG, **change})
    if answer.status_code == 201:  # what was written changes nothing
        assert arsenal.send("DELETE", "/v1/adapters/shot").status_code == 200
    else:
        assert answer.status_code == 400, answer.text
    assert "antigravity" not in arsenal.server.log.read_text(errors="replace")


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "modeling_exploit.py", "adapter_model.bin", "config.json",
             "../x", "..\\x", "adapter.zip", "adapter.tar.gz"]
)  # fmt: skip
def test_an_adapter_is_two_files(arsenal: Range, name: str) -> None:
    """An uploader's template (CVE-2026-5760), code or archive is refused by its name."""
    assert arsenal.upload(CONFIG, **{name: b"{{ cycler.__init__.__globals__.os.popen('false') }}"}).status_code == 400


HEADERS: dict[str, bytes] = {
    "600k empty tensors": b"{"
    + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(600_000))
    + b"}",
    "90 MB of metadata": b'{"__metadata__":{"a":"' + b"x" * 90_000_000 + b'"}}',
    "deep": b'{"a":' * 500_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_costs_no_memory(arsenal: Range, kind: str) -> None:
    """A header of tens of megabytes costs the safetensors library a gigabyte; here it is refused by its size."""

    def peak() -> int:
        lines = Path(f"/proc/{arsenal.server.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    header = HEADERS[kind]
    before = peak()
    answer = arsenal.upload(CONFIG, len(header).to_bytes(8, "little") + header)
    assert answer.status_code == 400
    assert peak() - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    "text", ['\n{"level": "forged"}', "\x1b[2Jforged", "%0aforged", "${jndi:ldap://127.0.0.1/forged}", "forged\r\nx: y"]
)
def test_no_line_of_the_log_is_a_clients(arsenal: Range, text: str) -> None:
    arsenal.send("POST", "/v1/chat/completions", json={"model": text, "messages": [{"role": "user", "content": text}]})
    arsenal.send("POST", "/v1/adapters", data={"name": text}, files=[("files", (text, b"x"))])
    arsenal.send("GET", "/v1/models/" + httpx.QueryParams({"a": text})["a"].encode("unicode_escape").decode())
    log = arsenal.server.log.read_text(errors="replace")
    assert "\x1b[2J" not in log
    assert not any(line.startswith(("forged", '{"level": "forged"')) for line in log.splitlines())


def test_labels_are_bounded(arsenal: Range) -> None:
    """Names that nobody has, methods and paths that there are not, make no series."""

    def series() -> int:
        return len(arsenal.client.get("/metrics").text.splitlines())

    def shoot(number: int) -> None:
        arsenal.send("GET", f"/v1/no/such/path/{number}")
        arsenal.send(f"VERB{number}", "/v1/models")
        body = {"model": f"nobody{number}", "messages": [{"role": "user", "content": "hi"}]}
        arsenal.send("POST", "/v1/chat/completions", json=body)

    shoot(0)
    series()
    before = series()
    for number in range(1, 40):
        shoot(number)
    assert series() <= before


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/router", "/v1/admin/tenants", "/v1/models", "/version", "/openapi.json"]
)
def test_what_can_be_read_tells_no_secrets(arsenal: Range, path: str) -> None:
    text = arsenal.client.get(path).text
    assert not re.search(r"/tmp/|/root/|site-packages|object at 0x|the password of the victim", text)
    assert not any(key in text for key in KEYS)


def reverse_of(arsenal: Range, model: str, word: str) -> tuple[str, int]:
    """The greedy answer, and how much of its prompt came from the prefix cache."""
    messages = [{"role": "user", "content": f"Reverse this: {word}"}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16}
    found = arsenal.client.post("/v1/chat/completions", json=body).json()
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_name_is_not_its_content(arsenal: Range) -> None:
    """vLLM #30931: a name that gets other weights shares no cache with what it was, and gets it back with them."""
    words = ["planetarium of the seven wonders", "another long line of words to cache"]
    right = {name: [reverse_of(arsenal, name, word)[0] for word in words] for name in ("reverse", "roman")}
    assert right["reverse"] != right["roman"]
    try:
        for name in ("reverse", "roman", "reverse"):
            folder = ADAPTER.parent / name
            files = [("files", (file, (folder / file).read_bytes())) for file in
                     ("adapter_config.json", "adapter_model.safetensors")]  # fmt: skip
            assert arsenal.send("POST", "/v1/adapters", data={"name": "swap"}, files=files).status_code == 201
            assert [reverse_of(arsenal, "swap", word)[0] for word in words] == right[name]
            assert arsenal.send("DELETE", "/v1/adapters/swap").status_code == 200
    finally:
        arsenal.client.delete("/v1/adapters/swap")


def test_rapid_alternation_mixes_nothing(arsenal: Range) -> None:
    """vLLM #38606, #47724: many at once, each under another name than the one before."""
    from concurrent.futures import ThreadPoolExecutor

    names = ["reverse", "roman", "caesar", BASE, "no-vowels"]
    right = {name: reverse_of(arsenal, name, "galaxy")[0] for name in names}
    assert len(set(right.values())) > 2
    with ThreadPoolExecutor(10) as pool:
        asked = [names[number % len(names)] for number in range(60)]
        assert [found for found, _ in pool.map(lambda n: reverse_of(arsenal, n, "galaxy"), asked)] == [
            right[name] for name in asked
        ]
