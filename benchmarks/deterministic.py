"""What `--deterministic` costs: the engine with it beside the engine without, in the same run.

    python benchmarks/deterministic.py [--shape small|qwen-0.5b|llama-8b] [--dtype D] [--device D] [--threads N]
                                       [--rounds N] [--out FILE]

Random weights and prompts; for a prompt of 512 tokens and for decode steps at a context of about 64, alone and sixteen
at once, base and with adapters of rank 16 (sixteen distinct ones in the batch). Arms take turns; the ratio is that of
the medians. In both arms the logits of one request alone are compared, bit for bit, with those in the batch.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from gpu_models import LLAMA_8B, QWEN_05B, Shape, engine_model, random_prompt, write_adapters
from report import environment, publish, table

from loramux.server.engine.config import EngineConfig
from loramux.server.engine.core import EngineCore
from loramux.server.engine.loading import DTYPES
from loramux.server.engine.protocol import AdapterRef, EngineRequest, SamplingParams

SHAPES = {
    "small": Shape("28M Llama", "llama", 4096, 512, 1408, 8, 8, 8, 64, tied=True),
    "qwen-0.5b": QWEN_05B,
    "llama-8b": LLAMA_8B,
}
PREFILL, CONTEXT, STEPS, BATCH, RANK = 512, 64, 16, 16, 16
CASES = {  # tokens of the prompt, requests, distinct adapters
    "prefill 512": (PREFILL, 1, 0),
    "prefill 512, adapter": (PREFILL, 1, 1),
    "decode alone": (CONTEXT, 1, 0),
    "decode alone, adapter": (CONTEXT, 1, 1),
    "decode 16": (CONTEXT, BATCH, 0),
    "decode 16, 16 adapters": (CONTEXT, BATCH, BATCH),
}


class Arm:
    """One engine; counts its requests, so that no prompt comes twice unless it is asked for."""

    def __init__(self, core: EngineCore, digests: Sequence[str], vocab: int) -> None:
        self.core = core
        self._digests = digests
        self._vocab = vocab
        self._requests = 0

    def _add(self, tokens: int, new: int, adapter: int | None, prompt: int) -> str:
        self._requests += 1
        name = str(self._requests)
        adapters = () if adapter is None else (AdapterRef(self._digests[adapter], 1.0),)
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        ids = random_prompt(0, prompt, tokens, self._vocab)
        self.core.add(EngineRequest(name, ids, sampling, adapters, name))
        return name

    def seconds(self, tokens: int, requests: int, adapters: int, prompt: int) -> float:
        """Of the prompt's step (the first token), or of a decode step when the prompt is short."""
        decode = tokens < PREFILL
        for i in range(requests):
            self._add(tokens, STEPS + 2 if decode else 1, i % adapters if adapters else None, prompt + i)
        if decode:
            while self.core.is_waiting_only() or self.core.scheduler.waiting:
                self.core.step()
        started = time.perf_counter()
        steps = 0
        while self.core.has_work():
            steps += bool(self.core.step().event.scheduled_tokens)
        return (time.perf_counter() - started) / steps

    def load(self) -> None:
        """Brings the adapters to the device."""
        for i in range(len(self._digests)):
            self._add(1, 1, i, i)
        while self.core.has_work():
            self.core.step()

    def same_bits(self) -> bool:
        """Whether a request's logits alone are those that it has among others."""
        alone = self._rows([0])
        company = self._rows(range(BATCH))
        return all(torch.equal(a, b) for a, b in zip(alone, company, strict=True))

    def _rows(self, adapters: Sequence[int]) -> list[torch.Tensor]:
        """Logits of the request of the first adapter; the others' prompts differ in length."""
        names = [self._add(40 + 7 * i, 5, i, i) for i in adapters]
        found: list[torch.Tensor] = []
        compute = self.core.runner.compute

        def record(inputs: Any, *rest: Any) -> Any:
            logits, sampled = compute(inputs, *rest), inputs.sampling
            rows = zip(logits[: len(sampled)], sampled, strict=True)
            found.extend(row.clone() for row, chunk in rows if chunk.seq.request_id == names[0])
            return logits

        self.core.runner.compute = record  # type: ignore[method-assign]
        while self.core.has_work():
            self.core.step()
        self.core.runner.compute = compute  # type: ignore[method-assign]
        return found


def main() -> int:
    """Runs the rounds, prints the table and the JSON; 1 when the deterministic arm's bits differ, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, dtype, device = SHAPES[args.shape], DTYPES[args.dtype], torch.device(args.device)
    seconds: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in CASES}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        digests = write_adapters(
            Path(scratch), shape.modules(), rank=RANK, count=BATCH, files=BATCH, dtype=dtype, device=device
        )
        arms = []
        for deterministic in (False, True):
            config = EngineConfig(
                model_path=shape.name, blob_dir=scratch, dtype=args.dtype, device=args.device, threads=args.threads,
                max_model_len=1024, max_num_seqs=BATCH, max_batched_tokens=BATCH * 256, kv_cache_bytes=1 << 30,
                device_adapter_bytes=4 << 30, deterministic=deterministic,
            )  # fmt: skip
            core = stack.enter_context(closing(EngineCore(config, engine_model(shape, dtype=dtype, device=device))))
            arms.append(Arm(core, digests, shape.vocab))
        for arm in arms:
            arm.load()
        same = [arm.same_bits() for arm in arms]
        for round_number in range(args.rounds + 1):
            for case, (tokens, requests, adapters) in CASES.items():
                for arm, kept in zip(arms, seconds[case], strict=True):
                    taken = arm.seconds(tokens, requests, adapters, 1000 + BATCH * round_number)
                    if round_number:  # the first warms up
                        kept.append(taken)
    medians = {case: [statistics.median(kept) for kept in both] for case, both in seconds.items()}
    rows = [["", "plain ms", "deterministic ms", "ratio"]]
    for case, (plain, invariant) in medians.items():
        rows.append([case, f"{plain * 1e3:.2f}", f"{invariant * 1e3:.2f}", f"{invariant / plain:.2f}"])
    sys.stdout.write(f"{shape.name}, {args.dtype}, {args.device}, {args.threads} threads\n{table(rows)}\n")
    sys.stdout.write(f"same bits alone and in a batch: plain {same[0]}, deterministic {same[1]}\n")
    result = {
        "benchmark": "deterministic", "environment": environment(), "shape": shape.name, "dtype": args.dtype,
        "device": args.device, "threads": args.threads, "rounds": args.rounds,
        "same_bits": dict(zip(("plain", "deterministic"), same, strict=True)),
        "seconds": {case: dict(zip(("plain", "deterministic"), both, strict=True)) for case, both in medians.items()},
        "ratio": {case: both[1] / both[0] for case, both in medians.items()},
    }  # fmt: skip
    publish(result, args.out)
    return 0 if same[1] else 1


if __name__ == "__main__":
    sys.exit(main())
