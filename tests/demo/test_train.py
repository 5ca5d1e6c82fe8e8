"""The demo's training: an adapter folded into the weights learns what its own layers would; stages are kept."""

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from peft import get_peft_model
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from loramux.server.demo import train
from loramux.server.demo.assets import demo_base_path
from loramux.server.demo.skills import PLAIN, adapter_skills, base_skills, phrase
from loramux.server.demo.train import (
    Direct,
    Folded,
    adapter_plans,
    adapter_row,
    base_row,
    base_stages,
    load_base,
    plain_row,
    train_base,
)


@pytest.mark.parametrize("name", ["double-letters", "caesar", "pig-latin"])
def test_a_folded_adapter_has_the_gradients_of_its_layers(name: str) -> None:
    plan = adapter_plans()[name]
    torch.manual_seed(0)
    model = get_peft_model(load_base(demo_base_path()), plan.config)
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.02)
    skill = next(skill for skill in adapter_skills() if skill.name == name)
    tokens, labels = (torch.tensor([row]) for row in adapter_row(skill, Random(1), mixed=True))
    seen = []
    for trained in (Direct(model, compiled=False), Folded(model, load_base(demo_base_path()), compiled=False)):
        loss = cross_entropy(trained.logits(tokens)[0, :-1], labels[0, 1:])
        trained.backward(loss)
        learnt = [weight for weight in model.parameters() if weight.requires_grad]
        assert len(trained.weights) == len(learnt)
        seen.append([loss.detach(), *(weight.grad.clone() for weight in learnt if weight.grad is not None)])
        model.zero_grad()
    assert len(seen[0]) == len(seen[1]) == len(learnt) + 1
    for own, folded in zip(*seen, strict=True):
        torch.testing.assert_close(folded, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))


def test_rows_repeat_with_the_seed_and_begin_with_repeating() -> None:
    def rows() -> list[object]:
        rng = Random(4)
        plain = [plain_row(rng, done) for done in (0.0, 0.1, 0.5, 0.9)]
        return [*plain, *(base_row(rng, 0.4, 0.3) for _ in range(20))]

    assert rows() == rows()
    tokens, labels = plain_row(Random(4), 0.0)
    asked = bytes(token for token in tokens if token < 256).decode()
    answer = bytes(label for label in labels if 0 <= label < 256).decode()
    assert asked in {phrase(plain, answer) + answer for plain in base_skills()[0].patterns.lines[:PLAIN]}


def test_stages_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[str] = []
    monkeypatch.setattr(train, "learn", lambda trained, make, schedule, name, progress: learnt.append(name))
    out, stages = tmp_path / "out", tmp_path / "stages"
    names = [name for name, _, _ in base_stages()]
    train_base(out, stages, Progress(), compiled=False)
    assert learnt == names
    shutil.rmtree(stages / str(len(names)))
    train_base(out, stages, Progress(), compiled=False)
    assert learnt == [*names, names[-1]]
    last = stages / str(len(names))
    assert {path.name for path in last.iterdir()} == {path.name for path in demo_base_path().iterdir()}
    assert (out / "base/model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
