"""The console in a browser, against an engine that follows a script: streams, keys, hostile texts, many rows."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api.harness import BASE, Bench
from console.steps import column, pick, row, send, view
from support.waiting import wait_for

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>{{7*7}}"
SLOW = 0.02
UNLABELLED = """() => [...document.querySelectorAll("button, input, textarea, select, [role=tab]")].filter((node) =>
  node.checkVisibility() && !(node.getAttribute("aria-label") || node.textContent.trim() ||
  (node.labels && [...node.labels].some((label) => label.textContent.trim())))).map((node) => node.outerHTML)"""


def endless(text: str) -> Callable[[Any], Iterator[Any]]:
    """An engine that repeats a text slowly, until it is stopped."""

    def script(request: Any) -> Iterator[Any]:
        while True:
            for byte in text.encode():
                yield [byte]
                yield SLOW

    return script


def test_a_stream_is_shown_as_it_comes_and_can_be_stopped(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any
) -> None:
    bench = scripted()
    bench.engine.script = endless("word ")
    page = open_page(bench.url)
    pick(page, 0, BASE)
    send(page, "go on")
    expect(column(page, 0).locator(".answer")).to_contain_text("word word")
    column(page, 0).get_by_role("button", name="Stop", exact=True).click()
    expect(column(page, 0).locator(".facts")).to_contain_text("stopped")
    expect(column(page, 1).locator(".answer")).to_contain_text("word word")
    page.get_by_role("button", name="Stop every answer").click()
    expect(page.get_by_role("button", name="Send to every column")).to_be_visible()
    expect.set_options(timeout=5000)
    wait_for(lambda: not bench.engine.running)


def test_hostile_texts_are_texts(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any, watched: Any
) -> None:
    bench = scripted()
    bench.engine.script = lambda request: [HOSTILE.encode(), [257]]
    bench.put("skill", description=HOSTILE, examples=[HOSTILE])
    page = open_page(bench.url)
    pick(page, 0, "skill")
    expect(column(page, 0).locator(".intro")).to_contain_text(HOSTILE)
    send(page, HOSTILE)
    expect(column(page, 0).locator(".answer")).to_have_text(HOSTILE)
    expect(column(page, 0).locator(".prompt")).to_have_text(HOSTILE)
    view(page, "Adapters")
    expect(row(page, "skill")).to_contain_text(HOSTILE)
    row(page, "skill").get_by_role("button", name="skill", exact=True).click()
    expect(page.get_by_label("Description")).to_have_value(HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, dialog img, dialog script").count() == 0
    watched.expected.append("TrustedHTML")
    blocked = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return false; } catch { return true; } }"
    )
    assert blocked, "the policy forbids HTML from texts, whatever the code does"


def test_reasoning_is_apart_and_goes_back(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any
) -> None:
    bench = scripted()
    asked: list[Any] = []
    deltas = ({"reasoning_content": "two "}, {"reasoning_content": "and two"}, {"content": "four"})
    chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    stream = "".join(f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]"))

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json["messages"])
        route.fulfill(headers={"content-type": "text/event-stream"}, body=stream)

    page = open_page(bench.url)
    pick(page, 0, BASE)
    page.get_by_role("button", name="Remove this column").nth(1).click()
    page.route("**/v1/chat/completions", answer)
    send(page, "2 + 2?")
    expect(column(page, 0).locator(".answer")).to_have_text("four")
    thought = column(page, 0).locator(".thinking")
    expect(thought.locator("div")).to_be_hidden()  # folded once the answer begins
    thought.get_by_text("Reasoning").click()
    expect(thought.locator("div")).to_have_text("two and two")
    send(page, "and 3?")
    expect(column(page, 0).locator(".answer")).to_have_count(2)
    said = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
    assert asked[1][1] == said


def test_an_adapter_is_opened_to_tenants(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any, watched: Any
) -> None:
    watched.expected.append("400")
    bench = scripted()
    bench.put("skill")
    bench.state.tenants.create_key("acme")
    secret, _ = bench.state.tenants.create_key("default", role="admin")
    page = open_page(bench.url, setup=lambda page: page.add_init_script(f"sessionStorage['loramux.key'] = '{secret}'"))
    view(page, "Adapters")
    row(page, "skill").get_by_role("button", name="skill", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Tenants, separated")).to_be_hidden()
    dialog.get_by_label("Open to").select_option("shared")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_contain_text("shared_with")
    dialog.get_by_label("Tenants, separated").fill("acme")
    dialog.get_by_role("button", name="Save").click()
    expect(page.get_by_text("skill is saved.")).to_be_visible()
    assert bench.store.own("skill", owner="default").shared_with == ("acme",)
    dialog.get_by_label("Open to").select_option("public")
    dialog.get_by_role("button", name="Save").click()
    wait_for(lambda: bench.store.own("skill", owner="default").visibility == "public")


def test_errors_are_shown_as_they_are(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any, watched: Any
) -> None:
    watched.expected += ["503", "404"]
    bench = scripted()
    bench.put("skill")
    error = {"message": f"Queue full {HOSTILE}", "type": "server_error", "param": None, "code": "queue_full"}

    def refuse(route: Any) -> None:
        route.fulfill(status=503, headers={"retry-after": "7"}, body=json.dumps({"error": error}))

    page = open_page(bench.url)
    pick(page, 0, "skill")
    page.get_by_role("button", name="Remove this column").nth(1).click()
    page.route("**/v1/chat/completions", refuse)
    send(page, "hi")
    expect(column(page, 0).get_by_role("alert")).to_have_text(
        f"Queue full {HOSTILE} (status 503, queue_full, try again in 7 s)"
    )
    page.unroute("**/v1/chat/completions")
    cut = 'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
    page.route("**/v1/chat/completions", lambda r: r.fulfill(headers={"content-type": "text/event-stream"}, body=cut))
    send(page, "hi")
    expect(column(page, 0).get_by_role("alert").last).to_contain_text("cut off")
    expect(column(page, 0).locator(".answer").last).to_have_text("half")
    page.unroute("**/v1/chat/completions")
    bench.engine.script = lambda request: [[104], RuntimeError("inside")]
    send(page, "hi")
    expect(column(page, 0).get_by_role("alert")).to_have_count(3)
    assert page.evaluate("window.hacked") is None


def test_the_key_stays_in_the_tab(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any, watched: Any
) -> None:
    watched.expected.append("401")
    bench = scripted(api_key=["open sesame"])
    bench.put("skill")
    page = open_page(bench.url)
    ask = page.get_by_role("dialog", name="API key")
    expect(ask).to_contain_text("This server asks for a key.")
    ask.get_by_label("API key").fill("wrong")
    ask.get_by_role("button", name="Use this key").click()
    expect(ask).to_contain_text("The server refused this key.")
    ask.get_by_label("API key").fill("open sesame")
    ask.get_by_role("button", name="Use this key").click()
    view(page, "Adapters")
    expect(row(page, "skill")).to_be_visible()
    assert page.evaluate("sessionStorage.getItem('loramux.key')") == "open sesame"
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    page.get_by_role("button", name="API key").click()
    expect(ask.get_by_label("API key")).to_have_attribute("type", "password")
    ask.get_by_role("button", name="Forget the key").click()
    assert page.evaluate("sessionStorage.getItem('loramux.key')") is None


def test_ten_thousand_adapters(scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any) -> None:
    bench = scripted()
    bench.put("skill-0")
    names = sorted(f"skill-{i}" for i in range(10_000))
    asked: list[tuple[str, int]] = []

    def setup(page: Any) -> None:
        def listing(route: Any) -> None:
            answer = route.fetch(url=f"{bench.url}/v1/adapters")
            template = answer.json()["data"][0]
            after = re.search(r"after=([^&]+)", route.request.url)
            limit = int(re.search(r"limit=(\d+)", route.request.url)[1])
            start = names.index(after[1].partition("%40")[0]) + 1 if after else 0
            part = names[start : start + limit]
            asked.append((part[0], len(part)))
            data = [{**template, "name": n, "id": f"{n}@1", "bytes": int(n[6:])} for n in part]
            body = {"object": "list", "data": data, "has_more": start + limit < len(names), "last_id": f"{part[-1]}@1"}
            route.fulfill(json=body)

        page.route("**/v1/adapters?*", listing)

    page = open_page(bench.url + "/#adapters", setup=setup)
    expect(page.get_by_text("10,000 adapters")).to_be_visible(timeout=60_000)
    rows = page.locator("tbody tr:visible")
    expect(rows).to_have_count(25)
    page.get_by_role("button", name="Next page").click()
    expect(page.get_by_text("26 to 50 of 10000")).to_be_visible()
    page.get_by_label("Search adapters").fill("skill-999")
    expect(page.get_by_text("11 of 10,000 adapters")).to_be_visible()
    page.get_by_label("Search adapters").fill("")
    page.get_by_role("button", name="Size").click()
    expect(rows.first).to_contain_text("skill-9999")
    del asked[:]
    page.wait_for_timeout(5000)
    assert 1 <= len(asked) <= 50, "what is on the screen is looked at, a bounded number of times"
    assert sum(count for _, count in asked) <= 50
    view(page, "Chat")
    box = page.get_by_role("combobox", name="Model or adapter").first
    box.fill("skill-12")
    options = page.get_by_role("option")
    expect(options).to_have_count(50)
    box.fill("skill-1234")
    expect(options.first).to_contain_text("skill-1234")
    box.press("Enter")
    expect(box).to_have_value("skill-1234")


def test_the_keyboard_is_enough(scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any) -> None:
    bench = scripted()
    bench.put("skill", description="A skill.")
    page = open_page(bench.url)
    expect(page.get_by_role("combobox").first).to_have_value(BASE)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Chat")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Adapters")).to_have_attribute("aria-selected", "true")
    expect(row(page, "skill")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Chat")).to_be_focused()
    box = page.get_by_role("combobox").first
    box.focus()
    page.keyboard.type("ski")
    page.keyboard.press("Enter")
    expect(box).to_have_value("skill")
    page.keyboard.press("ArrowDown")
    expect(box).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(box).to_have_attribute("aria-expanded", "false")
    prompt = page.get_by_role("textbox", name="Prompt", exact=True)
    prompt.focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(column(page, 0).locator(".prompt")).to_have_text("one\ntwo")
    expect(column(page, 0).locator(".answer")).to_have_text("hello")


def test_every_control_has_a_name(scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any) -> None:
    bench = scripted()
    bench.put("skill")
    page = open_page(bench.url)
    page.get_by_role("button", name="Sampling settings").click()
    pick(page, 0, "fusion")
    assert page.evaluate(UNLABELLED) == []
    view(page, "Adapters")
    expect(row(page, "skill")).to_be_visible()
    assert page.evaluate(UNLABELLED) == []
    page.get_by_role("button", name="Upload an adapter").click()
    assert page.evaluate(UNLABELLED) == []
    page.keyboard.press("Escape")
    row(page, "skill").get_by_role("button", name="skill", exact=True).click()
    assert page.evaluate(UNLABELLED) == []
    assert page.evaluate("document.documentElement.lang") == "en"


def test_the_theme_is_remembered(scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any) -> None:
    page = open_page(scripted().url, color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


def test_a_server_that_is_not_ready_says_so(
    scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any, watched: Any
) -> None:
    watched.expected.append("503")
    bench = scripted()
    page = open_page(bench.url)
    status = page.get_by_role("group", name="Server status")
    expect(status).to_contain_text("Ready")
    bench.engine.state = "dead"
    expect(status).to_contain_text("Not ready", timeout=15_000)
    bench.engine.state = "ready"
    expect(status.get_by_text("Ready", exact=True)).to_be_visible(timeout=15_000)


def test_it_works_behind_a_path(scripted: Callable[..., Bench], open_page: Callable[..., Any], expect: Any) -> None:
    bench = scripted(root_path="/llm")
    bench.put("skill")
    page = open_page(bench.url + "/llm/")
    pick(page, 0, "skill")
    send(page, "hi")
    expect(column(page, 0).locator(".answer")).to_have_text("hello")
