"""A headless Chromium, and pages of it that fail a test when their console reports anything."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from api.harness import Bench, listening, make_bench
from support.live import LiveServer, live_server

WIDE = {"width": 1360, "height": 820}


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    """Playwright's driver."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="session")
def expect() -> Any:
    """Playwright's assertions, which wait."""
    return pytest.importorskip("playwright.sync_api").expect


@pytest.fixture(scope="session")
def browser(playwright: Any) -> Iterator[Any]:
    """The distribution's Chromium (CHROMIUM names another); as root it runs without its own sandbox."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "no Chromium: apt-get install chromium, or set CHROMIUM"
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = playwright.chromium.launch(executable_path=path, args=options)
    yield browser
    browser.close()


class Watched:
    """What the pages of a test said to the browser's console; errors fail the test, unless it expects their like."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.expected: list[str] = []

    def unexpected(self) -> list[str]:
        return [text for text in self.said if not any(words in text for words in self.expected)]


@pytest.fixture
def watched() -> Iterator[Watched]:
    """The test's record of errors: nothing may be left at its end."""
    record = Watched()
    yield record
    assert record.unexpected() == []


@pytest.fixture
def open_page(browser: Any, watched: Watched) -> Iterator[Callable[..., Any]]:
    """Opens the console of a server in a fresh profile; `setup(page)` runs before."""
    with ExitStack() as stack:

        def build(url: str, *, setup: Callable[[Any], None] | None = None, **options: Any) -> Any:
            context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
            stack.callback(context.close)
            page = context.new_page()
            page.on(
                "console", lambda message: message.type in ("error", "warning") and watched.said.append(message.text)
            )
            page.on("pageerror", lambda error: watched.said.append(str(error)))
            if setup is not None:
                setup(page)
            page.goto(url)
            return page

        yield build


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The embedded demo, once its router knows what the adapters are for."""
    with live_server(tmp_path_factory.mktemp("demo")) as server:
        body = {"input": "Reverse this: planet"}
        while not httpx.post(f"{server.url}/v1/route", json=body, timeout=60).json()["data"][0]["chosen"]:
            time.sleep(0.1)
        yield server


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes a server whose engine follows a script."""
    with ExitStack() as stack:

        def build(**settings: Any) -> Bench:
            return stack.enter_context(listening(make_bench(tmp_path, **settings)))

        yield build
