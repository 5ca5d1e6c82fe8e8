"""A mixed batch of many adapters gives, for each, the tokens that PEFT gives one adapter at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.engines import drain, make_core, request, tokens_of
from support.models import (
    FAMILIES,
    MORE_FAMILIES,
    VOCAB,
    AdapterRecipe,
    family_config,
    greedy,
    mixed_recipes,
    random_model,
    save_adapter,
    save_model,
    write_blob,
)

TOKENS = 12


@dataclass
class Case:
    model: Any
    model_dir: Path
    blob_dir: Path
    adapters: list[AdapterRecipe]
    paths: dict[str, Path]
    digests: dict[str, str]

    def with_peft(self, name: str) -> Any:
        return peft.PeftModel.from_pretrained(self.model, self.paths[name])

    def restore(self, wrapped: Any) -> None:
        wrapped.unload()


def build(tmp_path: Path, family: str) -> Case:
    model = random_model(family_config(family))
    model_dir = save_model(model, tmp_path / "base")
    recipes = mixed_recipes(model)
    paths = {r.name: save_adapter(model, r, tmp_path / "adapters") for r in recipes}
    digests = {name: write_blob(model, path, tmp_path / "blobs") for name, path in paths.items()}
    return Case(model, model_dir, tmp_path / "blobs", recipes, paths, digests)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def fused_reference(case: Case, parts: dict[str, float], prompt: list[int]) -> list[int]:
    """Greedy tokens of the base with the weighted sum of the adapters' deltas added to its weights."""
    saved = {k: v.clone() for k, v in case.model.state_dict().items()}
    total: dict[str, torch.Tensor] = {}
    for name, weight in parts.items():
        wrapped = case.with_peft(name)
        for path, module in wrapped.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
                delta = weight * module.get_delta_weight("default").detach()
                total[path] = total.get(path, torch.zeros_like(delta)) + delta
        case.restore(wrapped)
    with torch.no_grad():
        for path, delta in total.items():
            case.model.get_submodule(path).weight += delta
    tokens = greedy(case.model, prompt, TOKENS)
    case.model.load_state_dict(saved)
    return tokens


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_mixed_batch_equals_peft_one_at_a_time(family: str, tmp_path: Path) -> None:
    case = build(tmp_path, family)
    names = [None, *case.digests, None, "all-r8", "rslora"]
    texts = prompts(len(names) + 1)
    fusion = {"attn-r16": 0.7, "mlp-r3": 0.5}
    core = make_core(case.model_dir, case.blob_dir)
    for i, (name, prompt) in enumerate(zip(names, texts, strict=False)):
        adapters = [] if name is None else [(case.digests[name], 1.0)]
        core.add(request(str(i), prompt, TOKENS, adapters))
    core.add(request("fused", texts[-1], TOKENS, [(case.digests[n], w) for n, w in fusion.items()]))
    got = {key: tokens_of(outputs) for key, outputs in drain(core).items()}
    core.close()

    for i, (name, prompt) in enumerate(zip(names, texts, strict=False)):
        if name is None:
            expected = greedy(case.model, prompt, TOKENS)
        else:
            wrapped = case.with_peft(name)
            expected = greedy(wrapped, prompt, TOKENS)
            case.restore(wrapped)
        assert got[str(i)] == expected, (family, name)
    assert got["fused"] == fused_reference(case, fusion, texts[-1])
    different = {tuple(got[str(i)]) for i in range(len(names))}
    assert len(different) > len(names) // 2
    assert core.blocks.num_used == 0
