"""A real Prometheus, configured by the shipped files, scrapes the demo; every query of the dashboard has an answer.

Not part of `make test`: it wants the distribution's `prometheus`. `make test-prometheus` fails without it.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.live import LiveServer, free_port, live_server

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy/compose"
DASHBOARD = COMPOSE / "grafana/dashboards/loramux.json"
REQUIRED = os.environ.get("LORAMUX_TEST_PROMETHEUS") == "required"
PATIENCE = 120.0
SCRAPES = 12  # with traffic in between, so that rates are rates

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None and not REQUIRED,
        reason="no `prometheus` on the PATH: apt-get install prometheus, or run make test-prometheus",
    ),
]


class Prometheus:
    """Its HTTP API. Queries are about `moment`, and rates about the `seconds` before it, once these are set."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        self.moment: float | None = None
        self.seconds = 0

    def get(self, path: str, **params: str) -> Any:
        """The `data` of an answer."""
        answer = self.http.get(f"/api/v1/{path}", params=params).raise_for_status().json()
        assert answer["status"] == "success"
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """The numbers that a query gives."""
        moment = {} if self.moment is None else {"time": str(self.moment)}
        return [float(series["value"][1]) for series in self.get("query", query=query, **moment)["result"]]


def wait_for(what: str, condition: Any) -> None:
    """Polls; the bound only ends a test that has failed."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The demo."""
    with live_server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def prometheus(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with compose's own configuration: only the target and the pace are the test's."""
    binary = shutil.which("prometheus")
    assert binary is not None, "no `prometheus` on the PATH: apt-get install prometheus"
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    ((job,),) = [config["scrape_configs"]]
    (group,) = job["static_configs"]
    assert group["targets"] == ["loramux:8000"]
    group["targets"] = [server.url.removeprefix("http://")]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(COMPOSE / "alerts.yml", folder)
    port = free_port()
    command = [
        binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    made = Prometheus(f"http://127.0.0.1:{port}")

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        try:
            return made.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for("Prometheus starts", is_ready)
        yield made
    finally:
        made.http.close()
        process.terminate()
        process.wait(30)


def traffic(server: LiveServer, stop: threading.Event) -> list[int]:
    """Two adapters, the base, the router, a repeated prompt, a mistake and no HTTP, again and again; the statuses."""
    statuses = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while not stop.is_set():
            for model in ("reverse", "double-letters", "loramux-demo", "auto", "no-such-model"):
                messages = [{"role": "user", "content": "Reverse this: planet"}]
                body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
                statuses.append(client.post("/v1/chat/completions", json=body).status_code)
            with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
                connection.sendall(b"NONSENSE\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 400")
            stop.wait(0.1)
    return statuses


@pytest.fixture(scope="module")
def scraped(server: LiveServer, prometheus: Prometheus) -> Prometheus:
    """Prometheus after a few scrapes under traffic."""
    count = 'count_over_time(up{job="loramux"}[1h])'
    wait_for("a scrape before the traffic", lambda: sum(prometheus.values(count)) >= 2)
    stop = threading.Event()
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.extend(traffic(server, stop)))
    start = time.time()
    thread.start()
    try:
        wait_for("scrapes", lambda: sum(prometheus.values(count)) >= SCRAPES)
    finally:
        stop.set()
        thread.join()
    assert set(statuses) == {200, 404}
    prometheus.moment = time.time()
    prometheus.seconds = math.ceil(prometheus.moment - start) + 2
    return prometheus


def queries() -> list[tuple[str, str]]:
    """(title, expression) of every target on the dashboard."""
    board = json.loads(DASHBOARD.read_text())
    return [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]


def filled(expression: str, seconds: int) -> str:
    """The expression as Grafana sends it, with everything selected."""
    text = expression.replace("$__rate_interval", f"{seconds}s")
    text = text.replace('"$model"', '".*"').replace('"$instance"', '".*"')
    assert "$" not in text, text
    return text


@pytest.mark.parametrize(("title", "expression"), queries())
def test_every_query_of_the_dashboard_has_an_answer(scraped: Prometheus, title: str, expression: str) -> None:
    values = scraped.values(filled(expression, scraped.seconds))
    assert values, title
    assert any(math.isfinite(value) for value in values), (title, values)


def test_variables_of_the_dashboard_have_values(scraped: Prometheus) -> None:
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", variable["query"]["query"]).groups()
            assert scraped.get(f"label/{label}/values", **{"match[]": metric})


def test_both_adapters_and_the_mistake_are_there(scraped: Prometheus) -> None:
    for adapter in ("reverse", "double-letters", "loramux-demo"):
        assert sum(scraped.values(f'loramux_requests_total{{adapter="{adapter}",status="stop"}}')) > 0
        assert sum(scraped.values(f'loramux_request_latency_seconds_count{{adapter="{adapter}"}}')) > 0
    assert sum(scraped.values('loramux_http_requests_total{route="/v1/chat/completions",status="404"}')) > 0


def test_the_alerts_are_loaded_and_quiet(scraped: Prometheus) -> None:
    shipped = [rule["alert"] for group in yaml.safe_load((COMPOSE / "alerts.yml").read_text())["groups"] for rule in
               group["rules"]]  # fmt: skip
    wait_for(
        "rules are evaluated",
        lambda: all(rule["health"] == "ok" for group in scraped.get("rules")["groups"] for rule in group["rules"]),
    )
    loaded = [rule["name"] for group in scraped.get("rules")["groups"] for rule in group["rules"]]
    assert loaded == shipped
    assert [alert["labels"]["alertname"] for alert in scraped.get("alerts")["alerts"]] == []


def test_promtool_accepts_what_is_shipped() -> None:
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool comes with Prometheus"
    done = subprocess.run(
        [promtool, "check", "config", str(COMPOSE / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
