"""The console's page and files: what is served, with which headers, to whom, and what never is."""

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from api.harness import Bench

from loramux.server.api.console import FILES, PAGE, TYPES, Console

pytestmark = pytest.mark.anyio

FOLDER = Path(str(files("loramux.server") / "console"))
LINK = re.compile(r'(?:href|src)="([^"#][^"]*)"')


async def page_of(bench: Bench) -> str:
    response = await bench.client.get("/")
    assert response.status_code == 200
    return response.text


def test_every_file_is_listed_and_every_listed_file_is_there() -> None:
    assert sorted([*FILES, PAGE]) == sorted(path.name for path in FOLDER.iterdir())
    assert {name.rpartition(".")[2] for name in (*FILES, PAGE)} == set(TYPES)


async def test_the_page_and_all_that_it_loads(bench: Bench) -> None:
    page = await page_of(bench)
    links = LINK.findall(page)
    assert len(links) >= 6
    assert "@" not in page
    assert '<meta name="root" content="">' in page
    loaded, waiting = set(), {link.rpartition("/")[2] for link in links}
    prefix = next(link for link in links if link.endswith("app.js")).rpartition("/")[0]
    while waiting:
        name = waiting.pop()
        loaded.add(name)
        response = await bench.client.get(f"/{prefix}/{name}")
        assert response.status_code == 200, name
        assert response.headers["content-type"] == TYPES[name.rpartition(".")[2]]
        assert response.content == (FOLDER / name).read_bytes()
        if name.endswith(".js"):
            waiting |= set(re.findall(r'from "\./([\w.]+)"', response.text)) - loaded
    assert loaded == set(FILES)


async def test_headers(bench: Bench) -> None:
    response = await bench.client.get("/")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]
    asset = await bench.client.get("/" + LINK.findall(response.text)[0])
    for answer in (response, asset):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"


async def test_the_page_is_asked_for_anew_and_not_sent_again(bench: Bench) -> None:
    first = await bench.client.get("/")
    again = await bench.client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    other = await bench.client.get("/", headers={"if-none-match": '"other"'})
    assert other.status_code == 200
    head = await bench.client.head("/")
    assert (head.status_code, head.content) == (200, b"")


def test_the_version_follows_the_content() -> None:
    contents = {"app.js": b"1", "icon.svg": b"2"}
    same = Console(b"page", dict(reversed(contents.items())))
    assert Console(b"page", contents).version == same.version
    others = [
        Console(b"other", contents),
        Console(b"page", {**contents, "app.js": b"3"}),
        Console(b"page", {"app.js": b"1"}),
    ]
    assert len({same.version, *(other.version for other in others)}) == 4
    assert same.paths == {"/", f"/console/{same.version}/app.js", f"/console/{same.version}/icon.svg"}


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text()
        for address in re.findall(r"https?://[^\s\"'`)]+", text):
            assert address == "http://www.w3.org/2000/svg", (path.name, address)
        assert not re.search(r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path.name
        )
        assert path.suffix != ".css" or not re.search(r"@import|url\(", text), path.name
    page = (FOLDER / PAGE).read_text()
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*\bsrc=)", page)


@pytest.mark.parametrize(
    "path",
    [
        "app.py", "index.html", "../api/console.py", "..%2fapi%2fconsole.py", "%2e%2e/settings.py", "....//settings.py",
        "/etc/passwd", "%2fetc%2fpasswd", "app.js%00", "app.js/", "APP.JS", ".", "..", "", "app.js~", "__init__.py",
    ],
)  # fmt: skip
async def test_only_listed_files_are_served(bench: Bench, path: str) -> None:
    version = Console.load().version
    response = await bench.client.get(f"/console/{version}/{path}")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (await bench.client.get(f"/console/0123456789abcdef/{path}")).status_code == 404


async def test_another_versions_file_is_not_found(bench: Bench) -> None:
    response = await bench.client.get("/console/0123456789abcdef/app.js")
    assert response.status_code == 404
    assert "reload" in response.json()["error"]["message"]
    assert "immutable" not in response.headers.get("cache-control", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_it_is_read_only(bench: Bench, method: str) -> None:
    assert (await bench.client.request(method, "/")).status_code == 405
    assert (await bench.client.request(method, f"/console/{Console.load().version}/app.js")).status_code == 405


async def test_with_keys_the_page_is_open_and_the_data_is_not(make: Callable[..., Any]) -> None:
    bench = await make(api_key=["secret-key"])
    page = await page_of(bench)
    assert "secret-key" not in page
    assert (await bench.client.get("/" + LINK.findall(page)[0])).status_code == 200
    for path in ("/v1/adapters", "/v1/models"):
        assert (await bench.client.get(path)).status_code == 401


async def test_it_can_be_switched_off(make: Callable[..., Any]) -> None:
    bench = await make(console="off")
    assert (await bench.client.get("/")).status_code == 404
    assert (await bench.client.get(f"/console/{Console.load().version}/app.js")).status_code == 404


async def test_behind_a_path_the_links_start_with_it(make: Callable[..., Any]) -> None:
    bench = await make(root_path="/llm")
    page = (await bench.client.get("/llm/")).text
    assert {link.split("/")[1] for link in LINK.findall(page)} == {"llm"}
    assert '<meta name="root" content="/llm/">' in page


async def test_it_is_no_part_of_the_apis_document(bench: Bench) -> None:
    paths = (await bench.client.get("/openapi.json")).json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/console")]
