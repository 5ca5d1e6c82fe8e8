"""A mixed batch on the CPU: our server over HTTP beside PEFT, on the same random model in the same run.

    python benchmarks/cpu_mixed_batch.py [--rounds N] [--adapters N] [--out FILE]

Sixteen requests of 64 prompt and 64 new tokens, float32, fresh prompts in every round, for
  * our base, and sixteen distinct rank-16 all-linear adapters in one batch, over HTTP;
  * transformers' `generate` on the base, and PEFT's `adapter_names` mixed batch;
  * the floor: the matrix products that the batch cannot do without, from blocked weights, and nothing else.
The arms of a round follow one another, so that what else the machine does touches all of them; ratios are of medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from report import environment, publish, table
from server_process import Server, serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from loramux.server.engine.prepacked import PrepackedProduct

REQUESTS, PROMPT, NEW = 16, 64, 64
SAME = 0.95  # of the answers must be PEFT's, token for token
BARS = {"mixed_vs_peft_mixed": 2.5, "mixed_vs_own_base": 0.8, "base_vs_generate": 1.0}


def build(directory: Path, adapters: int, rank: int) -> tuple[Any, LlamaConfig]:
    """A random Llama of about 28 M parameters and its adapters, saved; returns the PEFT model with all of them."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory / "base")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory / "base")
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    for i in range(adapters):
        torch.manual_seed(100 + i)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, lora)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.03)
        wrapped.save_pretrained(directory / f"a{i}")
        model = wrapped.unload()
    wrapped = PeftModel.from_pretrained(model, directory / "a0", adapter_name="a0")
    for i in range(1, adapters):
        wrapped.load_adapter(directory / f"a{i}", adapter_name=f"a{i}")
    return wrapped.eval(), config


def prompts(round_number: int, vocab: int) -> list[list[int]]:
    """Sixteen random prompts that no other round uses."""
    generator = torch.Generator().manual_seed(1000 + round_number)
    return torch.randint(3, vocab, (REQUESTS, PROMPT), generator=generator).tolist()


def peft_run(model: Any, batch: list[list[int]], names: list[str] | None) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of one `generate` over the batch; `names` None runs the base with adapters off."""
    ids = torch.tensor(batch)
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    with torch.inference_mode():
        started = time.perf_counter()
        if names is None:
            with model.disable_adapter():
                out = model.generate(ids, **options)
        else:
            out = model.generate(ids, adapter_names=names, **options)
        seconds = time.perf_counter() - started
    return seconds, out[:, PROMPT:].tolist()


def our_run(server: Server, batch: list[list[int]], names: list[str]) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of sixteen concurrent requests over HTTP."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        started = time.perf_counter()
        tokens = list(pool.map(lambda job: server.complete(job[1], job[0], NEW), zip(batch, names, strict=True)))
        return time.perf_counter() - started, tokens


def floor_run(weights: list[tuple[torch.Tensor, PrepackedProduct]]) -> float:
    """Seconds of the base's matrix products alone: one prefill of all prompts, then NEW - 1 decode steps."""
    inputs = {
        rows: {w.shape[1]: torch.randn(rows, w.shape[1]) for w, _ in weights} for rows in (REQUESTS * PROMPT, REQUESTS)
    }
    with torch.inference_mode():
        started = time.perf_counter()
        for rows in [REQUESTS * PROMPT] + [REQUESTS] * (NEW - 1):
            for weight, product in weights[:-1]:
                product(inputs[rows][weight.shape[1]], weight, None)
            head, product = weights[-1]
            product(inputs[REQUESTS][head.shape[1]], head, None)
        return time.perf_counter() - started


def floor_weights(config: LlamaConfig) -> list[tuple[torch.Tensor, PrepackedProduct]]:
    """Random matrices of the model's shapes, the projections that share an input as one, the head last."""
    h, i = config.hidden_size, config.intermediate_size
    shapes = [(3 * h, h), (h, h), (2 * i, h), (h, i)] * config.num_hidden_layers
    weights = [torch.randn(*shape) for shape in [*shapes, (config.vocab_size, h)]]
    return [(weight, PrepackedProduct(weight)) for weight in weights]


def main() -> int:
    """Runs the rounds, prints the table and the JSON; 1 when too many answers differ from PEFT's, 0 otherwise.

    A random model has near-ties, which float32 sums of another order decide otherwise now and then.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=16, help="distinct adapters in the batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepacked-weights", choices=("auto", "on", "off"), default="auto", help="ours")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds: dict[str, list[float]] = {}
    equal = total = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model, config = build(root, args.adapters, args.rank)
        names = [f"a{i % args.adapters}" for i in range(REQUESTS)]
        weights = floor_weights(config)
        flags = ["--dtype", "float32", "--device", "cpu", "--threads", str(args.threads), "--served-model-name", "base",
                 "--prepacked-weights", args.prepacked_weights]  # fmt: skip
        with serve(root / "base", *flags) as server:
            for i in range(args.adapters):
                server.upload(f"a{i}", root / f"a{i}")
            for number in range(-1, args.rounds):  # round -1 warms up and counts for nothing
                batch = prompts(number, config.vocab_size)
                ours_base, _ = our_run(server, batch, ["base"] * REQUESTS)
                theirs_base, _ = peft_run(model, batch, None)
                ours, our_tokens = our_run(server, batch, names)
                theirs, their_tokens = peft_run(model, batch, names)
                floor = floor_run(weights)
                if number < 0:
                    continue
                for key, value in {
                    "our base": ours_base, "generate, base": theirs_base, f"our {args.adapters} adapters": ours,
                    f"PEFT {args.adapters} adapters": theirs, "matrix-product floor": floor,
                }.items():  # fmt: skip
                    seconds.setdefault(key, []).append(value)
                equal += sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True))
                total += REQUESTS
    median = {key: statistics.median(values) for key, values in seconds.items()}
    our_base, base, ours, theirs, floor = median.values()
    ratios = {
        "mixed_vs_peft_mixed": theirs / ours,
        "mixed_vs_own_base": our_base / ours,
        "base_vs_generate": base / our_base,
        "peft_mixed_vs_generate": base / theirs,
        "floor_share_base": floor / our_base,
        "floor_share_mixed": floor / ours,
    }
    rows = [["arm", "median s", "min s", "tokens/s", "floor / arm"]]
    for key, values in seconds.items():
        value = median[key]
        rows.append(
            [key, f"{value:.3f}", f"{min(values):.3f}", f"{REQUESTS * NEW / value:.0f}", f"{floor / value:.0%}"]
        )
    sys.stdout.write(table(rows) + "\n\n")
    lines = [["ratio", "measured", "bar"]]
    lines += [[key, f"{value:.2f}", f"{BARS[key]:.2f}" if key in BARS else ""] for key, value in ratios.items()]
    sys.stdout.write(table(lines) + f"\n\nequal to PEFT's tokens: {equal} of {total} requests\n")
    publish(
        {
            "benchmark": "cpu_mixed_batch", "environment": environment(), "seconds": seconds, "ratios": ratios,
            "bars": BARS, "requests": REQUESTS, "prompt_tokens": PROMPT, "new_tokens": NEW, "adapters": args.adapters,
            "rank": args.rank, "rounds": args.rounds, "requests_equal_to_peft": equal, "requests_compared": total,
        },
        args.out,
    )  # fmt: skip
    return 0 if equal >= SAME * total else 1


if __name__ == "__main__":
    sys.exit(main())
