"""The card's benchmarks without a card: every section at toy sizes in a process of its own, refusals, arithmetic."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("gpu", "cold_adapter", "host_time")
MODULES = (
    "gpu_correctness", "gpu_timing", "gpu_models", "gpu_ceilings", "gpu_lora", "gpu_linear", "gpu_attention",
    "gpu_sampling", "gpu_engine", "gpu_workload",
)  # fmt: skip
ALLOWED = {"torch", "triton", "transformers", "numpy", "peft", "loramux"}
OPTIONAL = {"host_time": {"msgpack"}}


def start(script: str, *options: str) -> "subprocess.Popen[str]":
    """`python benchmarks/<script>.py` as on a bare image: the import path is all that it is given."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, f"benchmarks/{script}.py", *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results and output of small runs, started together: all sections of gpu.py, and host_time.py."""
    folder = tmp_path_factory.mktemp("gpu")
    started = {
        "gpu": start("gpu", "--device", "cpu", "--small", "--out", str(folder / "gpu.json")),
        "host_time": start(
            "host_time", "--batch", "4", "--adapters", "2", "--context", "20", "--steps", "8", "--warmup", "1",
            "--rank", "2", "--layers", "2", "--profile", "--top", "3", "--out", str(folder / "host_time.json"),
        ),
    }  # fmt: skip
    found = {}
    try:
        for name, process in started.items():
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, f"{name}\n{out}\n{err}"
            found[name] = json.loads((folder / f"{name}.json").read_text()), out
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    return found


@pytest.fixture
def scripts_of_the_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts as modules by name; a card that this machine may have is hidden, and Triton is interpreted."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for path in (ROOT / "benchmarks").glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_section_runs(small: Any) -> None:
    result, out = small["gpu"]
    assert result["complete"]
    assert {name: section["status"] for name, section in result["sections"].items()} == dict.fromkeys(
        (
            "correctness",
            "ceilings",
            "lora",
            "linear",
            "attention",
            "sampling",
            "decode",
            "workload",
            "cold",
            "switches",
        ),
        "done",
    )
    assert json.loads(out.splitlines()[-1]) == result
    for key in ("environment", "budget_seconds", "seconds", "dtype", "card"):
        assert key in result


def test_a_cpu_claims_nothing(small: Any) -> None:
    result, out = small["gpu"]
    assert (result["claims"], result["device"], result["card"]) == (False, "cpu", {})
    sections = result["sections"]
    ceilings = sections["ceilings"]
    assert ceilings["bandwidth_bytes_per_second"] is ceilings["flops_per_second"] is None
    rows = [
        row
        for name in ("lora", "linear", "attention", "sampling", "decode", "switches")
        for row in sections[name]["rows"]
    ]
    assert len(rows) > 8
    for row in (row for row in rows if "seconds" in row or "ours_seconds" in row):
        assert row["floor_seconds"] is None
        assert row.get("bandwidth_share") is None
    assert "not claimed on a CPU" in out


def test_correctness_comes_first(small: Any) -> None:
    checks = small["gpu"][0]["sections"]["correctness"]
    assert checks["failed"] == {}
    assert set(checks["rows"]) == {"LoRA kernels", "attention kernels", "engine"}
    assert all(row["good"] for rows in checks["rows"].values() for row in rows)
    assert sum(row["case"].endswith(", folded") for row in checks["rows"]["LoRA kernels"]) == 4
    for row in checks["rows"]["engine"]:
        assert row["equal"] == row["of"] == row["changed_by_adapters"] + 1


def test_kernel_rows(small: Any) -> None:
    sections = small["gpu"][0]["sections"]
    assert {(row["adapters"], row["rank"], row["tokens"]) for row in sections["lora"]["rows"]} == {
        (1, 4, 1), (1, 4, 6), (3, 4, 6),
    }  # fmt: skip
    for row in sections["lora"]["rows"]:
        assert max(row["error"], row["loop_error"], row["gather_error"]) < 1e-5
        assert min(row[f"{way}_seconds"] for way in ("ours", "ours_eager", "loop", "loop_eager", "gather")) > 0
        assert row["bytes"] > 0
    assert [row["way"] for row in sections["linear"]["rows"]] == ["base", "apart", "fold"]
    for row in sections["linear"]["rows"]:
        assert row["good"]
        assert row["seconds"] > 0 < row["bytes"]
    for row in sections["attention"]["rows"]:
        assert row["error"] < 1e-5
        assert row["ours_seconds"] > 0 < row["torch_seconds"]


def test_engine_rows(small: Any) -> None:
    sections = small["gpu"][0]["sections"]
    decode = sections["decode"]["rows"]
    assert {(row["shape"], row["adapters"]) for row in decode} == {
        (shape, n) for shape in ("tiny Llama", "tiny Qwen2") for n in (0, 1, 3)
    }
    assert all(row["base_ratio"] > 0 and row["worst_seconds"] >= row["median_seconds"] for row in decode)
    switches = sections["switches"]
    assert len({row["switch"] for row in switches["rows"]}) == 7
    assert not [row for row in switches["rows"] if row["switch"] != "torch attention" and "error" in row]
    workload = {row["arm"]: row for row in sections["workload"]["rows"]}
    assert len(workload) == 3
    for row in workload.values():
        assert row["requests"]["completed"] == row["requests"]["planned"] > 0
        assert row["output_tokens"] > 0
        assert row["ttft_seconds"]["count"] == row["requests"]["completed"]
    loads = [row["adapter_loads"] for row in workload.values() if row["server"] == "loramux"]
    assert loads[0] == 0 < loads[1]


def test_cold_adapters(small: Any, scripts_of_the_card: Any, tmp_path: Path) -> None:
    out = tmp_path / "cold.json"
    assert scripts_of_the_card["cold_adapter"].main(["--device", "cpu", "--small", "--out", str(out)]) == 0
    for result in (json.loads(out.read_text())["result"], small["gpu"][0]["sections"]["cold"]):
        assert result["adapters"] == result["load_wall_seconds"]["count"] == 2
        assert result["disk_to_device_seconds"] >= result["host_to_device_seconds"] > 0
        assert result["loading_gap_seconds"]["count"] >= 2


def test_host_time(small: Any) -> None:
    result, out = small["host_time"]
    assert [arm["arm"] for arm in result["results"]] == [
        "base", "2 adapters", "2 adapters, arrivals", "2 adapters, drawn",
    ]  # fmt: skip
    parts = {"schedule", "inputs", "attention plan", "lora plan", "sampling", "outputs", "wire encode"}
    for arm in result["results"]:
        assert parts <= set(arm["parts_us"])
        assert arm["outside_model_p10_us"] <= arm["outside_model_us"] <= arm["outside_model_p99_us"]
        assert len(arm["profile"]) == 3
    assert "bar" in out


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("gpu", [], "no CUDA card"),
        ("cold_adapter", [], "no CUDA card"),
        ("gpu", ["--device", "cpu"], "--small"),
        ("cold_adapter", ["--device", "cpu"], "--small"),
        ("gpu", ["--sections", "lora,speed"], "there is no speed"),
        ("gpu", ["--seconds", "0"], "--seconds"),
        ("cold_adapter", ["--adapters", "0"], "--adapters"),
        ("host_time", ["--batch", "2", "--adapters", "3"], "--adapters 3"),
        ("host_time", ["--steps", "0"], "--steps"),
    ],
)
def test_refusals(
    scripts_of_the_card: Any, capsys: Any, tmp_path: Path, script: str, options: list[str], message: str
) -> None:
    out = tmp_path / "out.json"
    try:
        code = scripts_of_the_card[script].main([*options, "--out", str(out)])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_sections_out_of_time_are_cut_and_what_there_is_is_kept(scripts_of_the_card: Any, tmp_path: Path) -> None:
    out = tmp_path / "cut.json"
    options = ["--device", "cpu", "--small", "--sections", "lora,workload", "--seconds", "0.001", "--out", str(out)]
    assert scripts_of_the_card["gpu"].main(options) == 0
    result = json.loads(out.read_text())
    assert result["complete"]
    statuses = {name: section["status"] for name, section in result["sections"].items()}
    assert set(statuses.values()) <= {"cut", "done"}
    assert statuses["lora"] == statuses["workload"] == "cut"


def test_what_is_wrong_is_not_measured(
    scripts_of_the_card: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    correctness = importlib.import_module("gpu_correctness")

    def wrong(bench: Any, rows: list[Any], deadline: Any) -> None:
        rows.append({"case": "two and two", "error": 1.0, "good": False})

    def broken(bench: Any, rows: list[Any], deadline: Any) -> None:
        raise ValueError("no tokens")

    monkeypatch.setattr(correctness, "CHECKS", ((correctness.LORA, wrong), (correctness.ENGINE, broken)))
    out = tmp_path / "wrong.json"
    options = ["--device", "cpu", "--small", "--sections", "lora,decode", "--out", str(out)]
    assert scripts_of_the_card["gpu"].main(options) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["lora"] == {"status": "skipped", "why": "LoRA kernels: wrong: two and two"}
    assert sections["decode"] == {"status": "skipped", "why": "engine: ValueError: no tokens"}


def test_a_failed_section_does_not_end_the_run(
    scripts_of_the_card: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(importlib.import_module("gpu_correctness"), "CHECKS", ())
    monkeypatch.setattr(importlib.import_module("gpu_ceilings"), "run", broken)
    out = tmp_path / "failed.json"
    options = ["--device", "cpu", "--small", "--sections", "lora", "--out", str(out)]
    assert scripts_of_the_card["gpu"].main(options) == 1
    result = json.loads(out.read_text())
    assert result["complete"]
    assert result["sections"]["ceilings"]["why"] == "RuntimeError: the card is gone"
    assert result["sections"]["lora"]["status"] == "done"


def test_shares_of_floors(scripts_of_the_card: Any, tmp_path: Path) -> None:
    from loramux.kernels.cost import Cost, Peaks

    bench = importlib.import_module("gpu_timing").make_bench("cpu", True, tmp_path)
    costs = Cost(weight_bytes=1000, flops=10), Cost(activation_bytes=1000, flops=4000)
    assert bench.floor(*costs) is bench.bandwidth_share(1.0, *costs) is None
    bench.peaks = Peaks(bandwidth=100.0, flops=100.0)
    assert bench.floor(*costs) == pytest.approx(10 + 40)
    assert bench.bandwidth_share(40.0, *costs) == pytest.approx(0.5)


def test_linked_adapters_are_apart_and_equal(scripts_of_the_card: Any, tmp_path: Path) -> None:
    import torch

    from loramux.adapters_store.canonical import read_canonical
    from loramux.adapters_store.digests import blob_path

    models = importlib.import_module("gpu_models")
    modules = {"a": (6, 4), "b": (4, 10)}
    cpu = torch.device("cpu")
    digests = models.write_adapters(tmp_path, modules, rank=3, count=5, files=2, dtype=torch.bfloat16, device=cpu)
    assert len(set(digests)) == 5
    read = [read_canonical(blob_path(tmp_path, digest), dtype=torch.bfloat16) for digest in digests]
    for number, adapter in enumerate(read):
        assert {m: (tuple(p.A.shape), tuple(p.B.shape)) for m, p in adapter.items()} == {
            "a": ((3, 6), (4, 3)), "b": ((3, 4), (10, 3)),
        }  # fmt: skip
        assert torch.equal(adapter["a"].A, read[number % 2]["a"].A)
    assert not torch.equal(read[0]["a"].A, read[1]["a"].A)


@pytest.mark.parametrize("name", [*SCRIPTS, *MODULES])
def test_a_bare_image_has_all_that_is_imported(name: str) -> None:
    siblings = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = sys.stdlib_module_names | siblings | ALLOWED | OPTIONAL.get(name, set())
    assert {name.partition(".")[0] for name in names} <= allowed
