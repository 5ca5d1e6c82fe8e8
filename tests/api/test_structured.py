"""What requests may hold their answers to: fields, conflicts, what is compiled, what is refused, and bombs."""

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from api.harness import BASE, END, Bench, byte_tokenizer

from loramux.server.api.grammar_check import GrammarCheck, Model, WorkerLostError
from loramux.server.engine import grammar_worker
from loramux.server.engine.grammars import ConstraintError
from loramux.server.engine.protocol import Constraint, RequestRefusedError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LARK = 'start: "a" | "b"'
GBNF = 'root ::= "1. " [a-z]+ "\\n" second-line\nsecond-line ::= "-" | "+"\n'


def named(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


FIELDS: list[tuple[dict[str, Any], tuple[str, Any]]] = [
    ({"response_format": {"type": "json_object"}}, ("json_object", None)),
    ({"response_format": named(SCHEMA)}, ("json_schema", SCHEMA)),
    ({"response_format": named(SCHEMA, strict=True, description="d")}, ("json_schema", SCHEMA)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, ("json_object", None)),
    ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ("json_schema", SCHEMA)),
    ({"structured_outputs": {"regex": "a+", "disable_fallback": True}}, ("regex", "a+")),
    ({"structured_outputs": {"choice": ["b", "a", "b"], "json_object": False}}, ("choice", ["b", "a"])),
    ({"structured_outputs": {"grammar": LARK}}, ("lark", LARK)),
    ({"structured_outputs": {"json_object": True}}, ("json_object", None)),
    ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, ("json_schema", SCHEMA)),
    ({"guided_regex": "[0-9]{3}"}, ("regex", "[0-9]{3}")),
    ({"guided_choice": ["x", "é\n"]}, ("choice", ["x", "é\n"])),
    ({"guided_grammar": LARK}, ("lark", LARK)),
]


def meaning(constraint: Constraint | None) -> tuple[str, Any]:
    """A constraint with its text as JSON, where it is."""
    assert constraint is not None
    if constraint.kind in ("json_schema", "choice"):
        return constraint.kind, json.loads(constraint.text)
    return constraint.kind, constraint.text or None


@pytest.mark.anyio
@pytest.mark.parametrize(("fields", "expected"), FIELDS)
async def test_the_engine_gets_what_is_asked_for(bench: Bench, fields: dict[str, Any], expected: Any) -> None:
    for ask in (bench.chat, lambda **body: bench.complete(prompt="x", **body)):
        response = await ask(**fields)
        assert response.status_code == 200, response.text
    assert [meaning(request.sampling.constraint) for request in bench.engine.requests] == [expected] * 2
    assert bench.state.grammars.jobs == 1  # the second request's is known


@pytest.mark.anyio
async def test_text_is_free(bench: Bench) -> None:
    free: list[dict[str, Any]] = [
        {}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None},
        {"guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None},
        {"response_format": {"type": "text", "json_schema": None}},
    ]  # fmt: skip
    for fields in free:
        assert (await bench.chat(**fields)).status_code == 200
    assert all(request.sampling.constraint is None for request in bench.engine.requests)
    assert bench.state.grammars.jobs == 0


@pytest.mark.anyio
async def test_a_grammar_of_llama_cpp_is_converted(bench: Bench) -> None:
    assert (await bench.chat(structured_outputs={"grammar": GBNF})).status_code == 200
    constraint = bench.engine.requests[0].sampling.constraint
    assert constraint is not None
    assert constraint.kind == "lark"
    assert "start:" in constraint.text
    assert "::=" not in constraint.text


@pytest.mark.anyio
async def test_a_grammar_may_be_long(bench: Bench) -> None:
    """What grows on its way between the processes still gets there; what grows too much is refused."""
    for text, status in (("🙂" * 40_000, 200), ("/" * 40_000, 200), ("/" * 110_000, 400)):
        answer = await bench.chat(guided_grammar=f'root ::= "a" [{text}]\n')
        assert answer.status_code == status, answer.text


@pytest.mark.anyio
async def test_all_answers_and_prompts_are_held_to_it(bench: Bench) -> None:
    assert (await bench.chat(n=3, guided_regex="a+")).status_code == 200
    assert (await bench.complete(prompt=["x", "y"], guided_regex="a+")).status_code == 200
    assert [meaning(r.sampling.constraint) for r in bench.engine.requests] == [("regex", "a+")] * 5


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "exclude"),
        ({"guided_json": {}, "guided_choice": ["a"]}, "guided_choice", "exclude"),
        ({"structured_outputs": {"json_object": True}, "response_format": named({})}, "structured_outputs.json_object",
         "exclude"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern",
         "not supported"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "Unrecognized"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format", "json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "structural_tag"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
         "response_format.json_schema.name", "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
         "response_format.json_schema.name", "pattern"),
        ({"response_format": named("{}")}, "response_format.json_schema.schema", "dictionary"),
        ({"guided_json": "{"}, "guided_json", "JSON schema"),
        ({"guided_json": "[]"}, "guided_json", "dictionary"),
        ({"guided_json": "[" * 5000}, "guided_json", "JSON schema"),
        ({"guided_regex": ""}, "guided_regex", "at least 1"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
        ({"guided_choice": [1]}, "guided_choice[0]", "string"),
        ({"guided_choice": ["a" * 70_000, "b" * 70_000]}, "guided_choice", "characters"),
        ({"guided_regex": "a" * 20_000}, "guided_regex", "at most"),
        ({"guided_json": json.dumps({"const": "a" * 200_000})}, "guided_json", "characters"),
        ({"guided_json": {"const": "a" * 200_000}}, "guided_json", "characters"),
        ({"guided_json": {"enum": list(range(30_000))}}, "guided_json", "values"),
        ({"guided_json": json.loads('{"items":' * 40 + "{}" + "}" * 40)}, "guided_json", "levels deep"),
        ({"guided_json": {"type": "nope"}}, "guided_json", "nope"),
        ({"guided_json": {"not": {"type": "null"}}}, "guided_json", "not"),
        ({"guided_json": {"type": "string", "format": "nonsense"}}, "guided_json", "nonsense"),
        ({"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}, "guided_json", "not"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/x.json"}}, "guided_json", "not fetch"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no text"),
        ({"response_format": named({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"structured_outputs": {"json": {"if": {}, "then": {}}}}, "structured_outputs.json", "if"),
        ({"guided_regex": "(a"}, "guided_regex", "regex"),
        ({"guided_regex": r"(a)\1"}, "guided_regex", "backreferences"),
        ({"guided_grammar": "begin: start"}, "guided_grammar", "cannot be followed"),
        ({"guided_grammar": 'root ::= "a" other'}, "guided_grammar", "other"),
        ({"guided_grammar": "start: <|nobody|>"}, "guided_grammar", "nobody"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(bench: Bench, fields: dict[str, Any], param: str, words: str) -> None:
    response = await bench.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert not bench.engine.requests
    assert not any(bench.leases().values())


@pytest.mark.anyio
async def test_null_bytes_and_quotes_are_only_text(bench: Bench) -> None:
    options = ['"', "\\", "\x00", "a\nb", "</script>", "%json {}", "🙂"]
    assert (await bench.chat(guided_choice=options)).status_code == 200
    assert meaning(bench.engine.requests[0].sampling.constraint) == ("choice", options)


class Clock:
    """Calls `beat` over and over on the event loop while something else is awaited."""

    def __init__(self) -> None:
        self.beats = 0

    async def during(self, work: Any) -> Any:
        task = asyncio.ensure_future(work)
        while not task.done():
            self.beats += 1
            await asyncio.sleep(0.001)
        return task.result()


MULTIPLE = {"type": "integer", "multipleOf": 1_000_003}
CHAIN = "start: r0\n" + "\n".join(f'r{i}: "a"r{i + 1}|"b"' for i in range(4000)) + '\nr4000: "a"\n'
BOMBS: list[tuple[dict[str, Any], str | None]] = [
    ({"guided_regex": "(a+)+b"}, None),
    ({"guided_regex": "a{1,100000}"}, None),
    ({"guided_regex": "((a{1,100}){1,100}){1,100}"}, None),
    ({"guided_regex": "(a|b)*a(a|b){60}"}, None),
    ({"guided_regex": "(" * 5000 + "a" + ")" * 5000}, "regex"),
    ({"guided_json": {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}}, None),
    ({"guided_json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}}, "no text"),
    ({"guided_json": {"enum": [f"word number {i}" for i in range(5000)]}}, None),
    ({"guided_json": {"allOf": [{"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {"const": j}}}
                                           for j in range(8)]} for i in range(12)]}}, "too large"),
    ({"guided_json": {"type": "string", "minLength": 10**9}}, None),
    ({"guided_json": MULTIPLE}, "0.5 s to compile"),
    ({"guided_grammar": CHAIN}, "nested too deeply"),
]  # fmt: skip


@pytest.mark.anyio
async def test_bombs_are_compiled_elsewhere(bench: Bench) -> None:
    """Each works or is a 400, the server goes on meanwhile, and what was refused costs nothing a second time."""
    bench.state.grammars = GrammarCheck(seconds=0.5)
    clock = Clock()
    for fields, words in BOMBS:
        answers = [await clock.during(bench.chat(**fields)) for _ in range(2)]
        assert [a.status_code for a in answers] == [200 if words is None else 400] * 2, (fields, answers[0].text)
        if words is not None:
            assert words in answers[0].json()["error"]["message"]
            assert answers[0].json()["error"]["message"] == answers[1].json()["error"]["message"]
    assert bench.state.grammars.jobs == len(BOMBS)
    assert clock.beats > len(BOMBS)
    assert (await bench.chat(guided_regex="fine")).status_code == 200
    await bench.state.grammars.stop()


@pytest.mark.anyio
async def test_a_constraint_that_breaks_in_the_middle_is_the_requests_fault(bench: Bench) -> None:
    bench.engine.script = lambda request: [b"a", RequestRefusedError("it takes too long")]
    whole = await bench.chat(guided_regex="a+")
    assert whole.status_code == 400
    assert whole.json()["error"]["code"] == "request_refused"
    assert "too long" in whole.json()["error"]["message"]
    streamed = await bench.chat(guided_regex="a+", stream=True)
    assert streamed.status_code == 200
    assert "too long" in streamed.text
    assert "[DONE]" not in streamed.text


@pytest.mark.anyio
async def test_responses_take_a_format(bench: Bench) -> None:
    async def ask(format: Any) -> httpx.Response:
        body = {"model": BASE, "input": "hi", "text": {"format": format}}
        return await bench.client.post("/v1/responses", json=body)

    given = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    answer = await ask(given)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"] == {"format": given}
    assert (await ask({"type": "json_object"})).json()["text"] == {"format": {"type": "json_object"}}
    assert (await ask({"type": "text"})).json()["text"] == {"format": {"type": "text"}}
    found = [request.sampling.constraint for request in bench.engine.requests]
    assert [meaning(c) for c in found[:2]] == [("json_schema", SCHEMA), ("json_object", None)]
    assert found[2] is None
    for format, param in (
        ({"type": "json_schema", "name": "answer"}, "text.format"),
        ({"type": "text", "schema": {}}, "text.format"),
        ({"type": "grammar"}, "text.format.type"),
        ({**given, "schema": {"not": {}}}, "text.format"),
    ):
        refused = await ask(format)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


MODEL = Model(byte_tokenizer().to_str().encode(), 264, (END,))


@pytest.mark.anyio
async def test_a_process_that_cannot_be_used_is_not_started_again_and_again() -> None:
    check = GrammarCheck()
    for _ in range(2):
        with pytest.raises(ConstraintError, match="end-of-sequence"):
            await check.check(Constraint("regex", "a"), Model(MODEL.definition, 264, ()))
    await check.stop()
    other = GrammarCheck()
    for text in "ab":
        with pytest.raises(ConstraintError, match="tokenizer cannot be constrained"):
            await other.check(Constraint("regex", text), Model(b'{"model": null}', 264, (END,)))
    await other.stop()


@pytest.mark.anyio
async def test_a_process_that_dies_is_replaced_and_its_death_is_no_refusal() -> None:
    check = GrammarCheck(seconds=30.0)
    await check.check(Constraint("regex", "a"), MODEL)
    slow = asyncio.create_task(check.check(Constraint("json_schema", json.dumps(MULTIPLE)), MODEL))
    while check.jobs < 2:
        await asyncio.sleep(0.001)
    assert check.process is not None
    check.process.send_signal(signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        await slow
    await check.check(Constraint("regex", "b"), MODEL)
    await check.stop()


@pytest.mark.anyio
async def test_a_job_that_nobody_waits_for_ends_with_its_caller() -> None:
    check = GrammarCheck(seconds=30.0)
    await check.check(Constraint("regex", "a"), MODEL)
    process = check.process
    slow = asyncio.create_task(check.check(Constraint("json_schema", json.dumps(MULTIPLE)), MODEL))
    while check.jobs < 2:
        await asyncio.sleep(0.001)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert process is not None
    assert process.returncode is not None
    await check.check(Constraint("regex", "b"), MODEL)
    await check.stop()


@pytest.mark.anyio
async def test_a_job_has_only_so_much_memory() -> None:
    check = GrammarCheck(seconds=30.0, memory=32 << 20)
    with pytest.raises(ConstraintError, match="memory"):
        await check.check(Constraint("json_schema", json.dumps({"type": "integer", "multipleOf": 300_007})), MODEL)
    await check.check(Constraint("regex", "b"), MODEL)
    await check.stop()


@pytest.mark.anyio
async def test_one_tenant_does_not_hold_up_another() -> None:
    """The line is by tenant: whoever asks for many waits behind whoever asks for one."""
    check, order = GrammarCheck(), []

    async def ask(tenant: str, text: str) -> None:
        await check.check(Constraint("regex", text), MODEL, tenant)
        order.append(tenant)

    many = [asyncio.create_task(ask("many", f"a{i}")) for i in range(6)]
    await asyncio.sleep(0)
    one = asyncio.create_task(ask("one", "b"))
    await asyncio.gather(*many, one)
    assert order.index("one") <= 1
    await check.stop()


@pytest.mark.anyio
async def test_a_turn_that_does_not_come_is_no_refusal(bench: Bench) -> None:
    bench.state.grammars = check = GrammarCheck(seconds=30.0, wait=0.05)
    process = await asyncio.create_subprocess_exec("sleep", "60", stdin=-1, stdout=-1)
    check.process = process  # never answers
    answers = await asyncio.gather(*(bench.chat(guided_regex=f"a{i}") for i in range(2)))
    assert [answer.status_code for answer in answers] == [503, 503]
    assert {answer.json()["error"]["code"] for answer in answers} == {"grammar_check_failed"}
    assert all(answer.headers["retry-after"] for answer in answers)
    assert process.returncode is not None


@pytest.mark.anyio
async def test_what_is_remembered_is_bounded() -> None:
    check = GrammarCheck(kept=3)
    for text in ("a", "b", "c", "a", "d", "a", "b"):  # the least lately used one goes: b goes for d
        await check.check(Constraint("regex", text), MODEL)
    assert check.jobs == 5
    await check.stop()


def test_the_process_needs_no_more_than_it_must() -> None:
    """It starts in a moment because it has neither torch nor transformers."""
    import subprocess
    import sys

    code = (
        f"import sys, {grammar_worker.__name__}; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'fastapi') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.anyio
async def test_the_process_ends_with_the_server(make: Callable[..., Any]) -> None:
    bench = await make()
    assert (await bench.chat(guided_regex="a")).status_code == 200
    process = bench.state.grammars.process
    await bench.state.stop(drain_seconds=0.0)
    assert process.returncode is not None
