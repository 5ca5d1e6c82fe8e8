"""Each tenant's share: requests under way, tokens a minute, and the two answers for too much."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from api.harness import Bench
from api.test_tenants import As
from hypothesis import given
from hypothesis import strategies as st

from loramux.adapters_store.tenants import TenantLimits
from loramux.server.api.admission import UNSAID_TOKENS, Admission, TenantGate, TokenBucket
from loramux.server.api.caller import Caller
from loramux.server.api.errors import APIError
from loramux.server.engine.protocol import QueueFullError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def caller(tenant: str = "acme", *, alone: bool = False, **limits: int) -> Caller:
    return Caller(tenant, "user", TenantLimits(**limits), None if alone else "key_1", None if alone else b"salt")


def refused(admission: Admission) -> APIError | None:
    """Enters; the refusal, if there is one."""
    try:
        admission.__enter__()
    except APIError as error:
        return error
    return None


def leave(admission: Admission) -> None:
    admission.__exit__(None, None, None)


def test_requests_at_once() -> None:
    gate = TenantGate(lambda: None)
    me = caller(requests=2)
    held = [gate.admit(me) for _ in range(2)]
    assert [refused(admission) for admission in held] == [None, None]
    error = refused(gate.admit(me))
    assert error is not None
    assert (error.status, error.code, error.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert refused(gate.admit(caller("other", requests=2))) is None
    leave(held[0])
    assert refused(gate.admit(me)) is None
    assert gate.of("acme").sequences == 2


def test_sequences_count_and_what_can_never_be_is_a_400() -> None:
    gate = TenantGate(lambda: None)
    me = caller(requests=4)
    with gate.admit(me) as first:
        first.reserve([1, 1, 1], [1, 1, 1])
        assert gate.of("acme").sequences == 3
        with gate.admit(me) as second:
            with pytest.raises(APIError) as caught:
                second.reserve([1, 1], [1, 1])
            assert caught.value.status == 429
            with pytest.raises(APIError) as caught:
                second.reserve([1] * 5, [1] * 5)
            assert caught.value.status == 400
    assert gate.of("acme").sequences == 0


def test_a_flood_gets_half_of_the_queue_and_leaves_room() -> None:
    gate = TenantGate(lambda: 12)

    def flood(tenant: str) -> int:
        count = 0
        while (error := refused(gate.admit(caller(tenant)))) is None:
            count += 1
        assert error.status == 429
        return count

    assert flood("a") == 6
    assert flood("b") == 3
    assert flood("c") in (1, 2)
    assert refused(gate.admit(caller("d"))) is None  # there is always room for one more
    alone = TenantGate(lambda: 4)
    assert all(refused(alone.admit(caller(alone=True))) is None for _ in range(100))  # the engine's 503 is next


def test_what_was_let_in_stays_in() -> None:
    gate = TenantGate(lambda: 4)
    with gate.admit(caller("a")) as first, gate.admit(caller("a")) as second:
        assert all(refused(gate.admit(caller(name))) is None for name in ("b", "c", "d"))
        for admission in (first, second):
            admission.reserve([1], [1])
        with pytest.raises(APIError):
            first.reserve([1, 1], [1, 1])


def test_tokens_are_held_back_and_settled() -> None:
    clock = Clock()
    gate = TenantGate(lambda: None, clock=clock)
    me = caller(tokens_per_minute=600)
    with gate.admit(me) as first:
        first.reserve([100], [200])
        assert first.headers == {
            "x-ratelimit-limit-tokens": "600", "x-ratelimit-remaining-tokens": "300",
            "x-ratelimit-reset-tokens": "30.000s",
        }  # fmt: skip
        with gate.admit(me) as second, pytest.raises(APIError) as caught:
            second.reserve([100], [201])
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        assert caught.value.headers["retry-after"] == "1"
        assert caught.value.headers["x-ratelimit-remaining-tokens"] == "300"
        first.used(0, 100)
        first.used(0, 150)
    with gate.admit(me) as third:
        assert third.headers["x-ratelimit-remaining-tokens"] == "450"  # 300 held, 150 used
        clock.now += 6  # 60 more
        third.reserve([10], [None])
        assert third.headers["x-ratelimit-remaining-tokens"] == str(510 - 10 - UNSAID_TOKENS)
        third.used(0, 10 + UNSAID_TOKENS + 400)  # it grew: taken as it came
        with gate.admit(me) as fourth, pytest.raises(APIError) as caught:
            fourth.reserve([0], [1])
        debt = 510 - 10 - UNSAID_TOKENS - 400
        assert debt < 0
        assert caught.value.headers["x-ratelimit-remaining-tokens"] == "0"
        assert int(caught.value.headers["retry-after"]) == -(-(1 - debt) // 10)
    clock.now += 1000
    with gate.admit(me) as fifth:
        assert fifth.headers["x-ratelimit-remaining-tokens"] == "600"  # never more than a minute's
        fifth.reserve([1000], [1000])  # more than a minute's: it waits for a full bucket, and pays later
        with gate.admit(me) as sixth, pytest.raises(APIError):
            sixth.reserve([1], [1])


def test_what_the_engine_refused_is_given_back() -> None:
    gate = TenantGate(lambda: None, clock=Clock())
    me = caller(tokens_per_minute=600)
    with gate.admit(me) as admission:
        admission.reserve([100], [100])
        admission.used(0, 100)
        admission.used(0, 0)
    assert gate.tokens_left("acme", 600) == 600


def test_limits_change_under_way() -> None:
    clock = Clock()
    bucket = TokenBucket(600, clock.now)
    bucket.take(500)
    assert bucket.level(1200, clock.now) == 700
    assert bucket.level(60, clock.now) == 60
    assert bucket.level(60, clock.now + 1) == 60
    bucket.take(100)
    assert bucket.level(60, clock.now + 11) == -30
    assert bucket.seconds_to(0) == 30


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80), st.integers(0, 200), st.floats(0, 5)), max_size=40))
def test_no_order_of_requests_gets_past_the_limit(steps: list[tuple[int, int, int, float]]) -> None:
    """Tokens let in never exceed a full bucket, what has flowed in since, and what one request may owe."""
    clock, limit = Clock(), 120
    gate = TenantGate(lambda: None, clock=clock)
    me = caller(tokens_per_minute=limit)
    used = 0
    for prompt, asked, generated, pause in steps:
        clock.now += pause
        with gate.admit(me) as admission:
            try:
                admission.reserve([prompt], [asked])
            except APIError:
                continue
            admission.used(0, prompt + generated)
            used += prompt + generated
        left = gate.tokens_left("acme", limit)
        assert left is not None
        assert used + left <= limit + (clock.now - 100.0) * limit / 60 + 1e-6
    assert gate.of("acme").sequences == 0


# Over HTTP.


async def gated(bench: Bench) -> asyncio.Event:
    """Answers that wait until the event is set."""
    go = asyncio.Event()
    bench.engine.script = lambda request: [go.wait(), list(b"ab"), [257]]
    return go


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_concurrent_requests(bench: Bench, stream: bool) -> None:
    acme, other = As(bench, "acme"), As(bench, "other")
    bench.state.tenants.set_limits("acme", {"requests": 3})
    go = await gated(bench)
    running = [asyncio.create_task(acme.chat(stream=stream)) for _ in range(8)]
    while len(bench.engine.running) < 3 or sum(task.done() for task in running) < 5:
        await asyncio.sleep(0.001)
    refused = [task.result() for task in running if task.done()]
    assert {response.status_code for response in refused} == {429}
    for response in refused:
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert response.headers["retry-after"] == "1"
    theirs = asyncio.create_task(other.chat())
    while len(bench.engine.running) < 4:
        await asyncio.sleep(0.001)
    go.set()
    assert (await theirs).status_code == 200
    assert sorted(r.status_code for r in await asyncio.gather(*running)) == [200] * 3 + [429] * 5
    assert bench.state.gate.of("acme").sequences == 0
    assert (await acme.chat()).status_code == 200


@pytest.mark.anyio
async def test_a_client_that_leaves_gives_its_share_back(bench: Bench) -> None:
    acme = As(bench, "acme")
    bench.state.tenants.set_limits("acme", {"requests": 1, "tokens_per_minute": 10_000})
    await gated(bench)
    running = asyncio.create_task(acme.chat())
    while not bench.engine.running:
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    while bench.engine.running:
        await asyncio.sleep(0.001)
    assert bench.state.gate.of("acme").sequences == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [{"model": "nope"}, {"messages": []}, {"router": {}}, {"messages": [{"role": "user", "content": "x" * 999}]}],
)
async def test_refused_requests_hold_nothing(bench: Bench, body: dict[str, Any]) -> None:
    acme = As(bench, "acme")
    bench.state.tenants.set_limits("acme", {"requests": 1, "tokens_per_minute": 600})
    for _ in range(3):
        assert 400 <= (await acme.chat(**body)).status_code < 429
    bench.engine.script = lambda request: [QueueFullError("full", retry_after=7)]
    busy = await acme.chat()
    assert (busy.status_code, busy.json()["error"]["code"], busy.headers["retry-after"]) == (503, "queue_full", "7")
    assert bench.state.gate.of("acme").sequences == 0
    assert bench.state.gate.tokens_left("acme", 600) == pytest.approx(600, abs=1)


@pytest.mark.anyio
async def test_tokens_per_minute(make: Callable[..., Any]) -> None:
    bench = await make(tenant_tokens_per_minute=100)
    acme, other = As(bench, "acme"), As(bench, "other")
    bench.state.gate._clock = Clock()
    answers = await asyncio.gather(*(acme.chat(max_tokens=20) for _ in range(10)))
    good = [answer for answer in answers if answer.status_code == 200]
    bad = [answer for answer in answers if answer.status_code == 429]
    used = sum(answer.json()["usage"]["total_tokens"] for answer in good)
    assert good
    assert bad
    assert used <= 100
    for answer in (*good, *bad):
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        assert 0 <= int(answer.headers["x-ratelimit-remaining-tokens"]) < 100
    for answer in bad:
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
    assert bench.state.gate.tokens_left("acme", 100) == 100 - used
    streamed = await other.chat(max_tokens=20, stream=True)
    assert streamed.headers["x-ratelimit-limit-tokens"] == "100"


@pytest.mark.anyio
async def test_without_limits_there_is_nothing_to_say(bench: Bench) -> None:
    response = await bench.chat()
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


@pytest.mark.anyio
async def test_many_sequences_in_one_request(bench: Bench) -> None:
    acme = As(bench, "acme")
    bench.state.tenants.set_limits("acme", {"requests": 2})
    body = {"model": "tiny/base", "prompt": ["a", "b", "c"]}
    response = await acme.ask("POST", "/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "limit_exceeded")
    assert not bench.engine.requests
    body["prompt"] = ["a", "b"]
    assert (await acme.ask("POST", "/v1/completions", json=body)).status_code == 200
    assert bench.state.gate.of("acme").sequences == 0
