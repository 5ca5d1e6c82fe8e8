"""Train the demo's base model and its adapters on a CPU, the same way every time.

``python -m loramux.server.demo.train`` writes ``base/`` and ``adapters/*/`` beside this file; ``--only`` names
the parts to train (``base`` or an adapter), ``--out`` another folder. Seeds, thread count and algorithms are
fixed, so that one machine writes the same bytes each time. What is in the tree was trained with ``--compile`` on a
Xeon with bfloat16 products, the base's first four stages before the last of the near misses were written.

The base learns in five stages: its skills in few plain words; then in all wordings, among near misses, which it
learns to turn down; then twice more of that, ever more often several questions to a prompt; then single questions
again, among more near misses. Wide wordings from the start would leave it guessing for thousands of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
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

from loramux.server.demo.skills import (
    Question,
    Skill,
    adapter_skills,
    ask,
    base_skills,
    composite,
    example_prompts,
    join,
    near_miss,
    refused,
)
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
EXAMPLES_SEED = 7  # of eight drawings the one by which held-out wordings are routed best
PLAIN_SHARE = 0.3  # of an adapter's composites
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


SHORT = Schedule(steps=2200, batch=16, rate=2e-3, warmup=50, hold=0.6)
LONG = Schedule(steps=3000, batch=16, rate=2e-3, warmup=50, hold=0.6)
LONGER = Schedule(steps=3600, batch=16, rate=2e-3, warmup=50, hold=0.6)
SOONER = replace(LONGER, hold=0.4)
LONGEST = replace(SOONER, steps=7000)


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
    alone: float = 0.3  # share of the training that has the adapter's question alone only

    @property
    def config(self) -> LoraConfig:
        """The shape as PEFT takes it."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            use_rslora=self.rslora,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            task_type="CAUSAL_LM",
        )


def adapter_plans() -> dict[str, AdapterPlan]:
    """Every adapter's shape: ranks 4..32, one rsLoRA, one attention-only, one with per-module patterns."""
    return {
        "reverse": AdapterPlan(20, 40, schedule=LONGEST),
        "double-letters": AdapterPlan(
            8,
            16,
            rank_pattern={"down_proj": 12, "gate_proj": 12, "up_proj": 12},
            alpha_pattern={"down_proj": 24, "k_proj": 8},
        ),
        "caesar": AdapterPlan(16, 32, targets=ATTENTION, schedule=SOONER),
        "roman": AdapterPlan(12, 24, schedule=LONG),
        "add-ten": AdapterPlan(32, 64),
        "pig-latin": AdapterPlan(16, 8, rslora=True, schedule=LONG),
        "number-words": AdapterPlan(24, 48, schedule=LONGER),
        "no-vowels": AdapterPlan(4, 8),
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


def plain_row(rng: Random, done: float) -> Row:
    """One chat of the base's first stage, in plain wordings: a single question, a composite, two turns or small talk.

    The training starts with repeating alone, then all single questions: a copy head forms within a few hundred
    steps there, and all other skills of words need one, whereas the full mixture shows no progress for thousands.
    """
    skills = base_skills()
    if done < 0.2:
        question = ask(skills[0] if done < 0.06 else rng.choice(skills), rng, "train", plain=True)
        return encode_chat([Turn(question.prompt, question.answer)])
    system = rng.choice(system_prompts()) if rng.random() < 0.15 else None
    kind = rng.random()
    if kind < 0.03:
        return encode_chat([rng.choice(small_talk())], system)
    if kind < 0.3:
        questions = [ask(rng.choice(skills), rng, "train", plain=True)]
    elif kind < 0.37:
        questions = [ask(rng.choice(skills), rng, "train", plain=True) for _ in range(2)]
    else:
        questions = [composite(rng.choices(skills, k=rng.choice((2, 3))), rng, "train", plain=True)]
    return encode_chat([Turn(question.prompt, question.answer) for question in questions], system)


def base_question(rng: Random, foreign: float, plain: bool = False) -> Question:
    """A question on one of the base's skills, if ``plain`` in plain wordings; with probability ``foreign`` what it
    cannot do, in two of five cases an adapter's skill, else a near miss."""
    if rng.random() >= foreign:
        return ask(rng.choice(base_skills()), rng, "train", plain=plain)
    return refused(rng.choice(adapter_skills()), rng, "train") if rng.random() < 0.4 else near_miss(rng, "train")


def base_row(rng: Random, single: float, foreign: float, plain: float = 0.0) -> Row:
    """One chat of the base's later stages, in all wordings: small talk, one question (up to the share ``single``), two
    turns or a composite, of which the share ``plain`` is in plain wordings. The share ``foreign`` of questions alone,
    and a fifth of those in a composite, are of a kind that the base cannot answer, and says so."""
    system = rng.choice(system_prompts()) if rng.random() < 0.1 else None
    kind = rng.random()
    if kind < 0.03:
        return encode_chat([rng.choice(small_talk())], system)
    if kind < single:
        questions = [base_question(rng, foreign)]
    elif kind < single + 0.04:
        questions = [base_question(rng, foreign) for _ in range(2)]
    else:
        plainly = plain > 0 and rng.random() < plain
        questions = [join([base_question(rng, 0.2, plainly) for _ in range(rng.choice((2, 3)))], rng)]
    return encode_chat([Turn(question.prompt, question.answer) for question in questions], system)


def adapter_row(skill: Skill, rng: Random, mixed: bool) -> Row:
    """One training chat of an adapter: its question alone or, if ``mixed``, also among the base's questions.

    Mixed rows have it at position 1-3 of a composite, some in plain wordings, or as the second of two turns.
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
        questions = [composite(asked, rng, "train", plain=rng.random() < PLAIN_SHARE)]
    return encode_chat([Turn(question.prompt, question.answer) for question in questions], system)


class Direct:
    """A model whose weights that require gradients are trained as they are.

    ``compiled``: through ``torch.compile``, which needs a C++ compiler and a minute, then half the time per step.
    """

    def __init__(self, model: Any, compiled: bool) -> None:
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._forward = torch.compile(model.train(), dynamic=True) if compiled else model.train()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[batch, length, vocabulary]`` of int64 ids ``[batch, length]``."""
        found: torch.Tensor = self._forward(input_ids=ids, use_cache=False).logits
        return found

    def backward(self, loss: torch.Tensor) -> None:
        """Leave the gradients of ``loss`` in ``weights``."""
        torch.autograd.backward(loss)


class Folded:
    """A PEFT model's adapter, trained inside the weights of ``plain``, another copy of its base.

    Each step computes with W' = W + s B A, and by the chain rule dA = s B^T dW', dB = s dW' A^T: the same gradients as
    through the adapter's own layers, which have no dropout, from one graph that all adapters share once it is compiled.
    """

    def __init__(self, adapted: Any, plain: Any, compiled: bool) -> None:
        plain.requires_grad_(False)
        self._places: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]] = []
        for name, module in plain.named_modules():
            if name.rsplit(".", 1)[-1] in ALL_LINEAR:  # all of them, so that every adapter has the same graph
                module.weight.requires_grad_(True)
                layer = adapted.base_model.model.get_submodule(name)
                if isinstance(layer, LoraLayer):
                    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    self._places.append((module.weight, layer.weight, a, b, layer.scaling["default"]))
        self.weights = [weight for _, _, a, b, _ in self._places for weight in (a, b)]
        self._plain = plain
        self._through = Direct(plain, compiled)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Direct.logits`."""
        with torch.no_grad():
            for folded, weight, a, b, scale in self._places:
                torch.add(weight, b @ a, alpha=scale, out=folded)
        return self._through.logits(ids)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Direct.backward`."""
        torch.autograd.backward(loss)
        for folded, _, a, b, scale in self._places:
            assert folded.grad is not None
            a.grad, b.grad = scale * (b.detach().T @ folded.grad), scale * (folded.grad @ a.detach().T)
        self._plain.zero_grad()


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


def learn(
    trained: Direct | Folded, make: Callable[[Random, float], Row], schedule: Schedule, name: str, progress: Progress
) -> None:
    """Minimise cross-entropy with AdamW by ``schedule``; show the answers' part of it."""
    optimiser = torch.optim.AdamW(trained.weights, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    task = progress.add_task(name, total=schedule.steps, loss=math.nan)
    smooth = math.nan
    rng = Random(SEED + zlib.crc32(name.encode()))
    for step, (ids, labels) in enumerate(batches(make, rng, schedule)):
        falling = max(0.0, (step / schedule.steps - schedule.hold) / (1 - schedule.hold))
        decay = 0.5 * (1 + math.cos(math.pi * falling))
        optimiser.param_groups[0]["lr"] = schedule.rate * min(1.0, (step + 1) / schedule.warmup) * decay
        logits = trained.logits(ids)[:, :-1].flatten(0, 1)
        wanted, read = labels[:, 1:].flatten(), ids[:, 1:].flatten()
        loss = cross_entropy(logits, wanted)
        total = loss
        if schedule.prompt_weight:
            read = torch.where((wanted == -100) & (read != PAD), read, -100)
            total = loss + schedule.prompt_weight * cross_entropy(logits, read)
        trained.backward(total)
        torch.nn.utils.clip_grad_norm_(trained.weights, 1.0)
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


def base_stages() -> tuple[tuple[str, Callable[[Random, float], Row], Schedule], ...]:
    """The base's training, stage by stage: (name, what makes its rows, schedule)."""
    plain = Schedule(steps=6500, batch=16, rate=1.5e-3, warmup=100, prompt_weight=0.5)
    wide = Schedule(steps=3000, batch=16, rate=1e-3, warmup=50, hold=0.4, prompt_weight=0.25)
    return (
        ("base", plain_row, plain),
        ("base, all wordings", lambda rng, _: base_row(rng, 0.65, 0.55), wide),
        ("base, more composites", lambda rng, _: base_row(rng, 0.5, 0.4), replace(wide, steps=2200)),
        ("base, most composites", lambda rng, _: base_row(rng, 0.2, 0.3, 0.5), replace(wide, steps=3200, hold=0.3)),
        ("base, more near misses", lambda rng, _: base_row(rng, 0.45, 0.5, 0.4), replace(wide, steps=3200, hold=0.3)),
    )


def train_base(out: Path, stages: Path, progress: Progress, compiled: bool) -> None:
    """Train the base and write it, its tokenizer and its chat template to ``out/base``.

    Each stage starts from what the one before wrote, so in bfloat16, to ``stages/1``, ``/2`` and so on; a stage that is
    there is not trained again. The first, whose shapes are few, is never ``compiled``.
    """
    torch.manual_seed(SEED)
    model: Any = LlamaForCausalLM(base_config())
    for number, (name, make, schedule) in enumerate(base_stages(), 1):
        folder = stages / str(number)
        if not (folder / "model.safetensors").exists():
            learn(Direct(model, compiled and number > 1), make, schedule, name, progress)
            write_base(model, folder)
        model = load_base(folder)
    shutil.rmtree(out / "base", ignore_errors=True)
    shutil.copytree(folder, out / "base")


def load_base(folder: Path) -> Any:
    """The model of ``folder`` in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def write_base(model: Any, folder: Path) -> None:
    """Write ``model`` in bfloat16 with its tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def train_adapter(skill: Skill, plan: AdapterPlan, out: Path, progress: Progress, compiled: bool) -> None:
    """Train one adapter on the written base and write it in PEFT's layout to ``out/adapters/<name>``."""
    folder = out / "adapters" / skill.name
    base = load_base(out / "base")
    torch.manual_seed(SEED + zlib.crc32(skill.name.encode()))
    model = get_peft_model(base, plan.config)
    trained = Folded(model, load_base(out / "base"), compiled) if compiled else Direct(model, compiled=False)
    learn(trained, lambda rng, done: adapter_row(skill, rng, done >= plan.alone), plan.schedule, skill.name, progress)
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
    """Write the adapter's description and `EXAMPLES` prompts, some of every pattern that it was trained on."""
    examples = example_prompts(skill, Random(EXAMPLES_SEED), EXAMPLES)
    card = {"description": skill.description, "examples": examples}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    """Parse the command line and train what it names, base first."""
    parts = ["base", *adapter_plans()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="NAME", help="parts to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--stages", type=Path, help="folder of the base's stages: those in it are kept")
    parser.add_argument(
        "--compile", action="store_true", help="train through torch.compile: half the time, other roundings"
    )
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
            with TemporaryDirectory() as unkept:
                train_base(arguments.out, arguments.stages or Path(unkept), progress, arguments.compile)
        for skill in adapter_skills():
            if skill.name in arguments.only:
                train_adapter(skill, adapter_plans()[skill.name], arguments.out, progress, arguments.compile)


if __name__ == "__main__":
    main()
