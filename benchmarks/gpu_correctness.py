"""What is checked before anything is measured: kernels against float64, the engine's tokens against merged weights."""

import traceback

import gpu_attention
import gpu_engine
import gpu_lora
from gpu_timing import Bench, Deadline, OutOfTimeError, Result
from report import table

LORA, ATTENTION, ENGINE = "LoRA kernels", "attention kernels", "engine"
CHECKS = (
    (LORA, gpu_lora.check_cases),
    (ATTENTION, gpu_attention.check_cases),
    (ENGINE, gpu_engine.check_tokens),
)


def run(bench: Bench, result: Result, deadline: Deadline) -> None:
    """Runs every check; what fails is under `failed`, what the time did not suffice for under `left_out`."""
    result["failed"], result["left_out"], result["rows"] = {}, [], {}
    for number, (name, check) in enumerate(CHECKS):
        rows: list[Result] = []
        result["rows"][name] = rows
        try:
            check(bench, rows, deadline.part(1 / (len(CHECKS) - number)))
        except OutOfTimeError:
            result["left_out"].append(f"{name} after {len(rows)} cases")
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        wrong = [row["case"] for row in rows if not row["good"]]
        if wrong:
            result["failed"][name] = f"wrong: {', '.join(wrong)}"
        bench.release()


def show(result: Result) -> str:
    """The checks, one line each."""
    lines = [["correctness", "cases", "worst error", "verdict"]]
    for name, rows in result["rows"].items():
        worst = max((row["error"] for row in rows if "error" in row), default=None)
        verdict = result["failed"].get(name, "good" if rows else "not reached")
        lines.append([name, str(len(rows)), "-" if worst is None else f"{worst:.1e}", verdict[:120]])
    return table(lines)
