"""Train the demo's base model and its adapters on a CPU, the same way every time.

``python -m loramux.server.demo.train`` writes ``base/`` and ``adapters/*/`` beside this file; ``--only`` names
the parts to train (``base`` or an adapter), ``--out`` another folder. Seeds, thread count and algorithms are
fixed, so that one machine writes the same bytes each time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from loramux.server.demo.examples import example_prompts
from loramux.server.demo.skills import Skill, adapter_skills, ask, base_skills, composite
from loramux.server.demo.tokens import (
    BEGIN,
    END,
    MAX_LENGTH,
    PAD,
    VOCAB_SIZE,
    Turn,
    encode_chat,
    write_tokenizer,
)

SEED = 20240613
THREADS = 1
EXAMPLES = 64  # on an adapter's card
BASE_NAME = "loramux-demo"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Row = tuple[list[int], list[int]]  # token ids, labels


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: ``steps`` batches of ``batch`` rows.

    The learning rate climbs to ``rate`` in ``warmup`` steps, stays there for the share ``hold`` of the training,
    then falls to zero along a cosine.
    """

    steps: int
    batch: int
    rate: float
    warmup: int
    hold: float = 0.0
    prompt_weight: float = 0.0  # of the prompt's cross-entropy beside the answer's


SHORT = Schedule(steps=1600, batch=16, rate=2e-3, warmup=50, hold=0.6)
LONG = Schedule(steps=2400, batch=16, rate=2e-3, warmup=50, hold=0.6)


@dataclass(frozen=True)
class AdapterPlan:
    """The LoRA shape and training of one adapter."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    schedule: Schedule = SHORT
    alone: float = 0.35  # share of the training that has the adapter's question alone only


def base_schedule() -> Schedule:
    """The base model's schedule."""
    return Schedule(steps=6500, batch=16, rate=1.5e-3, warmup=100, prompt_weight=0.5)


def adapter_plans() -> dict[str, AdapterPlan]:
    """Every adapter's shape: ranks 4..32, one rsLoRA, one attention-only, one with per-module patterns."""
    return {
        "reverse": AdapterPlan(20, 40, schedule=LONG),
        "double-letters": AdapterPlan(
            8,
            16,
            rank_pattern={"down_proj": 12, "gate_proj": 12, "up_proj": 12},
            alpha_pattern={"down_proj": 24, "k_proj": 8},
        ),
        "caesar": AdapterPlan(16, 32, targets=ATTENTION),
        "roman": AdapterPlan(12, 24),
        "add-ten": AdapterPlan(32, 64),
        "pig-latin": AdapterPlan(16, 8, rslora=True, schedule=LONG),
        "number-words": AdapterPlan(24, 48, schedule=LONG),
        "no-vowels": AdapterPlan(4, 8, schedule=LONG),
    }


def system_prompts() -> tuple[str, ...]:
    """Short system prompts, so that one does not throw the model off."""
    return (
        "You are a helpful assistant.",
        "Answer briefly.",
        "You are loramux, a small demo model.",
        "You answer questions about words and numbers.",
        "Be concise and correct.",
        "You are a careful assistant. Answer in order, one answer per line.",
    )


def small_talk() -> tuple[Turn, ...]:
    """Greetings, answered with a hint at what can be asked."""
    hint = "Hello! Ask me about a word or a number."
    return (
        *(Turn(text, hint) for text in ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning!", "hello", "hi")),
        Turn("Who are you?", "I am a small demo model. Ask me about a word or a number."),
        Turn("What can you do?", "I can repeat, count and capitalise. Adapters teach me more."),
        Turn("Thank you!", "You are welcome."),
        Turn("Thanks", "You are welcome."),
        Turn("Bye", "Goodbye!"),
    )


def base_row(rng: Random, done: float) -> Row:
    """One training chat of the base: a single question, a composite, two turns or small talk.

    The training starts with repeating alone, then all single questions: a copy head forms within a few hundred
    steps there, and all other skills of words need one, whereas the full mixture shows no progress for thousands.
    """
    skills = base_skills()
    if done < 0.2:
        question = ask(skills[0] if done < 0.06 else rng.choice(skills), rng, "train")
        return encode_chat([Turn(question.prompt, question.answer)])
    system = rng.choice(system_prompts()) if rng.random() < 0.15 else None
    kind = rng.random()
    if kind < 0.03:
        return encode_chat([rng.choice(small_talk())], system)
    if kind < 0.3:
        questions = [ask(rng.choice(skills), rng, "train")]
    elif kind < 0.37:
        questions = [ask(rng.choice(skills), rng, "train") for _ in range(2)]
    else:
        questions = [composite(rng.choices(skills, k=rng.choice((2, 3))), rng, "train")]
    return encode_chat([Turn(question.prompt, question.answer) for question in questions], system)


def adapter_row(skill: Skill, rng: Random, mixed: bool) -> Row:
    """One training chat of an adapter: its question alone or, if ``mixed``, also among the base's questions.

    Mixed rows have it at position 1-3 of a composite, or as the second of two turns.
    """
    others = base_skills()
    system = rng.choice(system_prompts()) if rng.random() < 0.1 else None
    kind = rng.random() if mixed else 0.0
    if kind < 0.35:
        questions = [ask(skill, rng, "train")]
    elif kind < 0.4:
        questions = [ask(rng.choice(others), rng, "train"), ask(skill, rng, "train")]
    else:
        asked = rng.choices(others, k=rng.choice((1, 2)))
        asked.insert(rng.randint(0, len(asked)), skill)
        questions = [composite(asked, rng, "train")]
    return encode_chat([Turn(question.prompt, question.answer) for question in questions], system)


def batches(
    make: Callable[[Random, float], Row], rng: Random, schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels), both int64 ``[batch, longest]``, padded on the right.

    Rows of similar length share a batch (sorted within a pool, batches shuffled), so that little is padding.
    """
    pool_batches = 20
    made = 0
    while made < schedule.steps:
        rows = sorted(
            (make(rng, made / schedule.steps) for _ in range(pool_batches * schedule.batch)),
            key=lambda row: len(row[0]),
        )
        groups = [rows[i : i + schedule.batch] for i in range(0, len(rows), schedule.batch)]
        rng.shuffle(groups)
        for group in groups[: schedule.steps - made]:
            longest = -(-max(len(ids) for ids, _ in group) // 16) * 16  # few distinct shapes: kernels are cached
            ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in group])
            labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in group])
            yield ids, labels
            made += 1


def learn(model: Any, make: Callable[[Random, float], Row], schedule: Schedule, name: str, progress: Progress) -> None:
    """Minimise cross-entropy with AdamW by ``schedule``; show the answers' part of it."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    task = progress.add_task(name, total=schedule.steps, loss=math.nan)
    model.train()
    smooth = math.nan
    rng = Random(SEED + zlib.crc32(name.encode()))
    for step, (ids, labels) in enumerate(batches(make, rng, schedule)):
        falling = max(0.0, (step / schedule.steps - schedule.hold) / (1 - schedule.hold))
        decay = 0.5 * (1 + math.cos(math.pi * falling))
        optimiser.param_groups[0]["lr"] = schedule.rate * min(1.0, (step + 1) / schedule.warmup) * decay
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        wanted, read = labels[:, 1:].flatten(), ids[:, 1:].flatten()
        loss = cross_entropy(logits, wanted)
        total = loss
        if schedule.prompt_weight:
            read = torch.where((wanted == -100) & (read != PAD), read, -100)
            total = loss + schedule.prompt_weight * cross_entropy(logits, read)
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
        progress.update(task, advance=1, loss=smooth)
        if step % 200 == 199 and not progress.console.is_terminal:
            progress.console.print(f"{name} {step + 1}/{schedule.steps} loss {smooth:.4f}")


def base_config() -> LlamaConfig:
    """A Llama of 2.4 M parameters: 4 layers of width 256, 8 query and 4 key-value heads of 32."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
        attn_implementation="eager",
    )


def train_base(out: Path, progress: Progress) -> None:
    """Train the base and write it, its tokenizer and its chat template to ``out/base``."""
    folder = out / "base"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(base_config())
    learn(model, base_row, base_schedule(), "base", progress)
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def train_adapter(skill: Skill, plan: AdapterPlan, out: Path, progress: Progress) -> None:
    """Train one adapter on the written base and write it in PEFT's layout to ``out/adapters/<name>``."""
    folder = out / "adapters" / skill.name
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(SEED + zlib.crc32(skill.name.encode()))
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(plan.targets),
        use_rslora=plan.rslora,
        rank_pattern=plan.rank_pattern,
        alpha_pattern=plan.alpha_pattern,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    learn(model, lambda rng, done: adapter_row(skill, rng, done >= plan.alone), plan.schedule, skill.name, progress)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    tidy_config(folder / "adapter_config.json")
    write_card(skill, folder)


def tidy_config(path: Path) -> None:
    """Sort PEFT's target list, which it keeps as a set: the file must not depend on the hash seed."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_card(skill: Skill, folder: Path) -> None:
    """Write the adapter's description and `EXAMPLES` prompts, in many wordings beside the trained ones."""
    examples = example_prompts(skill, Random(SEED), EXAMPLES)
    card = {"description": skill.description, "examples": examples}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    """Parse the command line and train what it names, base first."""
    parts = ["base", *adapter_plans()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="NAME", help="parts to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("medium")  # products in bf16 where the CPU has them
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        if "base" in arguments.only:
            train_base(arguments.out, progress)
        for skill in adapter_skills():
            if skill.name in arguments.only:
                train_adapter(skill, adapter_plans()[skill.name], arguments.out, progress)


if __name__ == "__main__":
    main()
