"""The CPU's benchmark of distinct adapters at toy size, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOY = (
    "--shape", "tiny", "--batches", "2", "6", "--adapters", "1", "4", "--rank", "3", "--prefill", "24", "--steps", "2",
    "--rounds", "1", "--threads", "1",
)  # fmt: skip


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "benchmarks/cpu_distinct.py", *options], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip


def test_every_arm_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    done = run(*TOY, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert result["clock"] == "thread_time"
    pairs = [(2, 1), (6, 1), (6, 4)]
    assert [(e["dtype"], e["batch"], e["adapters"]) for e in result["forms"]] == [
        (dtype, *pair) for dtype in ("float32", "bfloat16") for pair in pairs
    ]
    everywhere = {"rule", "banks", "own", "gathered", "masked"}
    for entry in result["forms"]:
        extra = {"float32 banks"} if entry["dtype"] == "bfloat16" else set()
        assert set(entry["added_seconds"]) == everywhere | extra
        assert entry["base_seconds"] > 0
    for entry, batch in zip(result["steps"], (2, 6, 2, 6), strict=True):
        whats = ["floor", "base", "1 adapters", *(["4 adapters"] if batch == 6 else [])]
        arms = {
            f"{what}, {kind}"
            for what in whats
            for kind in ("plain", *(["blocked"] if entry["dtype"] == "float32" else []))
        }
        assert entry["batch"] == batch
        for seconds in (entry["prefill_seconds"], entry["decode_seconds"]):
            assert set(seconds) == arms
            assert min(seconds.values()) > 0


def test_forms_can_be_left_out() -> None:
    done = run(*TOY, "--skip-forms", "--dtypes", "float32", "--batches", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["forms"] == []
    assert [entry["batch"] for entry in result["steps"]] == [2]


def test_prompts_that_are_too_short_are_refused() -> None:
    refused = run(*TOY, "--prefill", "11")
    assert refused.returncode == 2
    assert "--prefill must hold two tokens" in refused.stderr
