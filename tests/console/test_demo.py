"""The console in a browser, against the demo: what somebody does on the first day."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from console.steps import column, drop, pick, row, send, view
from support.live import LiveServer

from loramux.server.demo.assets import demo_adapters

pytestmark = pytest.mark.slow

PROMPT = "Reverse this: planet"
PICTURE_BYTES = 300_000


def folder_of(name: str) -> Path:
    return next(adapter.path for adapter in demo_adapters() if adapter.name == name)


def test_two_adapters_answer_side_by_side(demo: LiveServer, open_page: Callable[..., Any], expect: Any) -> None:
    page = open_page(demo.url)
    expect(page.get_by_role("group", name="Server status")).to_contain_text("Ready")
    pick(page, 0, "reverse")
    pick(page, 1, "no-vowels")
    send(page, PROMPT)
    for index, (answer, served) in enumerate((("tenalp", "reverse@1"), ("plnt", "no-vowels@1"))):
        expect(column(page, index).locator(".answer")).to_have_text(answer)
        expect(column(page, index).locator(".facts")).to_contain_text(served)
        expect(column(page, index).locator(".facts")).to_contain_text(re.compile(r"\d+ tokens"))
        expect(column(page, index).locator(".facts")).to_contain_text(re.compile(r"first \d+(\.\d+)? m?s"))
        expect(column(page, index).locator(".facts")).to_contain_text("tok/s")
    send(page, "Reverse this: lamp")
    expect(column(page, 0).locator(".prompt")).to_have_count(2)


def test_auto_says_whom_it_chose_and_a_fusion_what_it_is_made_of(
    demo: LiveServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(demo.url)
    pick(page, 0, "auto")
    pick(page, 1, "fusion")
    for number, name in ((1, "reverse"), (2, "double-letters")):
        box = column(page, 1).get_by_role("combobox", name=f"Adapter {number} of the fusion")
        box.fill(name)
        box.press("Enter")
    column(page, 1).get_by_label("Weight of adapter 2").fill("0.2")
    send(page, PROMPT)
    expect(column(page, 0).locator(".facts")).to_contain_text("reverse@1")
    why = column(page, 0).get_by_text(re.compile("^Routed by examples in"))
    why.click()
    expect(column(page, 0).locator(".scores li.chosen")).to_contain_text("reverse")
    facts = column(page, 1).locator(".facts")
    expect(facts).to_contain_text("reverse@1 × 1")
    expect(facts).to_contain_text("double-letters@1 × 0.2")


def test_sampling_settings_reach_the_server(demo: LiveServer, open_page: Callable[..., Any], expect: Any) -> None:
    page = open_page(demo.url)
    page.get_by_role("button", name="Sampling settings").click()
    for label, value in (("Temperature", "0"), ("Max tokens", "2"), ("Seed", "7"), ("System prompt", "Be short.")):
        page.get_by_label(label).fill(value)
    page.get_by_label("Stop texts").fill("zz\n\nyy")
    pick(page, 0, "reverse")
    with page.expect_request(lambda r: r.url.endswith("/chat/completions") and '"reverse"' in r.post_data) as sent:
        send(page, PROMPT)
    body = sent.value.post_data_json
    assert (body["temperature"], body["max_tokens"], body["seed"], body["stop"]) == (0, 2, 7, ["zz", "yy"])
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    expect(column(page, 0).locator(".facts")).to_contain_text("cut at the token limit")


def test_an_adapter_from_its_drop_to_its_end(
    demo: LiveServer, open_page: Callable[..., Any], expect: Any, tmp_path: Path
) -> None:
    page = open_page(demo.url + "/#adapters")
    expect(row(page, "reverse")).to_contain_text("662 kB")
    drop(page, "#view-adapters", folder_of("reverse"))
    upload = page.get_by_role("dialog", name="Upload an adapter")
    expect(upload).to_contain_text("adapter_model.safetensors")
    upload.get_by_label("Name").fill("mirror")
    upload.get_by_label("Description").fill("Spells <b>words</b> backwards.")
    upload.get_by_label("Examples").fill("Mirror: stone\nMirror: glass")
    upload.get_by_role("button", name="Upload", exact=True).click()
    expect(upload).to_be_hidden()
    expect(page.get_by_role("status").filter(has_text="mirror@1 is ready.")).to_be_visible()
    mirror = row(page, "mirror")
    expect(mirror).to_contain_text("Spells <b>words</b> backwards.")

    mirror.get_by_role("button", name="Pin mirror").click()
    expect(mirror.get_by_role("button", name="Unpin mirror")).to_be_visible()
    expect(mirror).to_contain_text("device")
    mirror.get_by_role("button", name="Chat with mirror").click()
    send(page, PROMPT)
    expect(column(page, 0).locator(".answer")).to_have_text("tenalp")
    expect(column(page, 0).locator(".facts")).to_contain_text("mirror@1")

    view(page, "Adapters")
    expect(mirror.get_by_role("cell").nth(5)).to_have_text(re.compile(r"^\d+$"))  # its requests are counted
    drop(page, "#view-adapters", folder_of("no-vowels"))
    upload.get_by_label("Name").fill("mirror")
    expect(upload).to_contain_text("Replaces mirror@1")
    upload.get_by_role("button", name="Upload a new version").click()
    expect(mirror.get_by_role("cell").nth(0)).to_have_text("2")

    mirror.get_by_role("button", name="mirror", exact=True).click()
    detail = page.get_by_role("dialog", name="mirror@2")
    expect(detail.get_by_role("listitem")).to_have_count(2)
    detail.get_by_label("Description").fill("Something else.")
    detail.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status").filter(has_text="mirror is saved.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(mirror).to_contain_text("Something else.")

    mirror.get_by_role("button", name="Delete mirror").click()
    ask = page.get_by_role("dialog", name="Delete this adapter?")
    ask.get_by_role("button", name="Keep it").click()
    expect(mirror).to_be_visible()
    mirror.get_by_role("button", name="Delete mirror").click()
    ask.get_by_role("button", name="Delete").click()
    expect(mirror).to_be_hidden()
    assert httpx.get(f"{demo.url}/v1/adapters/mirror").status_code == 404


def test_what_cannot_be_uploaded_says_why(
    demo: LiveServer, open_page: Callable[..., Any], expect: Any, tmp_path: Path, watched: Any
) -> None:
    watched.expected.append("400 (Bad Request)")
    page = open_page(demo.url + "/#adapters")
    source = folder_of("reverse")
    drop(page, "#view-adapters", source, ("adapter_config.json",))
    upload = page.get_by_role("dialog", name="Upload an adapter")
    expect(upload.get_by_role("alert")).to_have_text("There is no adapter_model.safetensors.")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    drop(page, ".zone", tmp_path, ("adapter_model.bin",))
    expect(upload.get_by_role("alert")).to_contain_text("safe_serialization=True")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes()[:200])
    drop(page, ".zone", tmp_path)
    upload.get_by_label("Name").fill("broken")
    upload.get_by_role("button", name="Upload", exact=True).click()
    expect(upload.get_by_role("alert")).to_contain_text("status 400")
    expect(upload.get_by_role("button", name="Upload", exact=True)).to_be_enabled()
    upload.get_by_role("button", name="Cancel").click()
    expect(upload).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 390])
def test_pictures(
    demo: LiveServer, open_page: Callable[..., Any], expect: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    """Nothing is cut off sideways, in either theme; SCREENSHOT keeps the README's picture."""
    page = open_page(demo.url, color_scheme=scheme, viewport={"width": width, "height": 760})
    if width > 1000:
        page.get_by_role("button", name="Add a column").click()
        pick(page, 2, "no-vowels")
    pick(page, 0, "reverse")
    sampling = page.get_by_role("button", name="Sampling settings")
    sampling.click()
    page.get_by_label("Temperature").fill("0")
    sampling.click()
    for prompt in (PROMPT, 'Write "garden" without vowels.'):
        send(page, prompt)
        expect(page.get_by_role("button", name="Send to every column")).to_be_visible()
    expect(column(page, 0).locator(".facts").last).to_contain_text("tok/s")
    column(page, 1).get_by_text(re.compile("^Routed by")).last.click()
    scores = column(page, 1).locator(".scores").last
    scores.scroll_into_view_if_needed()
    expect(scores).to_be_visible()
    expect(page.get_by_role("group", name="Server status")).to_contain_text(re.compile("[1-9].*tokens/s"))
    pictures = [page.screenshot(path=tmp_path / "chat.png")]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    view(page, "Adapters")
    expect(row(page, "reverse")).to_contain_text("device")
    pictures.append(page.screenshot(path=tmp_path / "adapters.png"))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(len(picture) < PICTURE_BYTES for picture in pictures)
    if (keep := os.environ.get("SCREENSHOT")) and (scheme, width) == ("light", 1360):
        Path(keep).write_bytes(pictures[0])
