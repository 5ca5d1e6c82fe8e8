"""Adapters as people really publish them: what becomes of each, and that it is refused for the right reason.

The files are measured from a folder beside the repository, or the one that LORAMUX_SHARED_DATA names; they are no part
of the project, which passes without them. Weights are made here with the published names and shapes.
"""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_helpers import config, safetensors

from loramux.adapters_store.base_spec import BaseSpec, LinearSpec
from loramux.adapters_store.errors import AdapterError, InvalidAdapter
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.peft_format import AdapterPlan, plan_adapter, write_plan

DATA = Path(os.environ.get("LORAMUX_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data") / "wild_adapters"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the collection of published adapters is not on this machine")

OK = ""
MLX = ("unsupported_format", "MLX")
CLASSIFIER = ("unsupported_task", "SEQ_CLS")
SEQ2SEQ = ("unsupported_task", "SEQ_2_SEQ_LM")
GROUPED = ("unsupported_option", "enable_lora")
EMPTY_BASE = BaseSpec("base", "llama", "LlamaForCausalLM", 64, 1, 100, {}, {})

# What becomes of each configuration when the weights are what it says: (code, phrase of the refusal), or OK with
# phrases of the warnings that must be there.
CONFIGS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        "001 002 003 004 006 007 008 009 010 012 013 014 015 019 021 022 023 024 025 026 027 028 029 034 035 040 041 "
        "045 046 048 049 055 056 060 063 064 066 067 068 070 072 073 074 099 100".split(),
        (OK, "this server's is 'base'"),
    ),
    "020": (OK, "'q_prpj'"),
    "043": (OK, "no peft_type"),
    "047": ("unsupported_tensor", "LoRA on embeddings"),
    **dict.fromkeys("037 038 039 042 054 076".split(), MLX),
    **dict.fromkeys("005 011 018 030 031 032 082".split(), CLASSIFIER),
    **dict.fromkeys("036 454".split(), SEQ2SEQ),
    **dict.fromkeys("033 078".split(), ("unsupported_task", "FEATURE_EXTRACTION is an encoder")),
    "058": ("unsupported_task", "TOKEN_CLS"),
    "059": ("unsupported_task", "WhisperForConditionalGeneration"),
    "062": ("unsupported_task", "UNet2DConditionModel"),
    "095": ("unsupported_task", "trained on ModelConv2D"),
    "096": ("unsupported_task", "trained on ModelEmbConv1D"),
    **dict.fromkeys("097 098".split(), ("unsupported_task", "trained on MLP")),
    **dict.fromkeys("051 075".split(), GROUPED),
    "044": ("not_an_adapter_config", "a model's config.json"),
    "053": ("not_an_adapter_config", "keys: base_model"),
    "057": ("not_an_adapter_config", "keys: adapter_type"),
    "071": ("git_lfs_pointer", "Git LFS pointer"),
    "079": ("unsupported_peft_type", "DIAG"),
    **dict.fromkeys("080 091 092 093 094".split(), ("unsupported_peft_type", "IA3")),
    "081": ("unsupported_peft_type", "VERA"),
    **dict.fromkeys("083 084 085".split(), ("unsupported_peft_type", "UILINLORA")),
    **dict.fromkeys("086 087".split(), ("unsupported_peft_type", "FINEGATES")),
    "088": ("unsupported_peft_type", "UNILORA"),
    **dict.fromkeys("089 090".split(), ("unsupported_peft_type", "ADALORA")),
}

# What becomes of the published weights under a causal LoRA configuration of their rank, against a base of their shapes.
HEAD = ("unsupported_tensor", "a head that is not the language model's")
WEIGHTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys("002 003 009 019 023 097 099 100".split(), (OK, "")),
    "010": ("non_finite_weights", "NaN or infinite values (the first is element 0)"),
    **dict.fromkeys("005 018 030 031 032 082 086 087".split(), HEAD),
    "011": ("unsupported_tensor", "classifier"),
    "043": ("transposed_weights", "PEFT stores lora_A as [r, in]"),
    "051": ("unsupported_tensor", "[2048, 8, 1]"),
    "076": ("unsupported_tensor", "MLX"),
    "078": ("truncated", "it is truncated"),
    **dict.fromkeys("080 088 091 092 093 094".split(), ("unsupported_tensor", "another method")),
    "089": ("unsupported_tensor", "is not part of a LoRA adapter"),
    "095": ("unsupported_tensor", "4 dimensions"),
    "096": ("unsupported_tensor", "LoRA on embeddings"),
    "098": ("unsupported_tensor", "is not part of a LoRA adapter"),
}


def find(folder: str, number: str) -> Path:
    found = sorted((DATA / folder).glob(f"{number}__*"))
    assert len(found) == 1, number
    return found[0]


def plan(folder: Path, configuration: bytes, weights: bytes, base: BaseSpec) -> AdapterPlan:
    (folder / "c").write_bytes(configuration)
    (folder / "w").write_bytes(weights)
    return plan_adapter(folder / "c", folder / "w", base, StoreLimits())


def example_weights(raw: dict[str, Any]) -> dict[str, Any]:
    """One layer of what the configuration says was trained; its typo matched nothing, and its expression one module."""
    targets = raw.get("target_modules")
    names = ["language_model.q_proj"] if isinstance(targets, str) else list(targets or ["q_proj"])
    tensors: dict[str, Any] = {}
    for name in names:
        if name == "q_prpj":
            continue
        key, rank = f"base_model.model.model.layers.0.{name}", raw.get("r", 8)
        if name == "embed_tokens":
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = ("F32", (rank, 100), bytes(400 * rank))
            continue
        tensors[f"{key}.lora_A.weight"] = ("F32", (rank, 64), bytes(256 * rank))
        tensors[f"{key}.lora_B.weight"] = ("F32", (96, rank), bytes(384 * rank))
    return tensors


def base_for(tensors: dict[str, Any], *, transposed: bool = False) -> BaseSpec:
    """A base whose modules have the sizes that the pairs claim."""
    linears: dict[str, LinearSpec] = {}
    for name, (_, shape, _) in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        other = tensors[name.replace("lora_A", "lora_B")][1]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        linears[module] = LinearSpec(shape[0], other[1]) if transposed else LinearSpec(shape[1], other[0])
    return replace(EMPTY_BASE, linears=linears)


def published(number: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The published names and shapes, filled with small numbers."""
    header = json.loads(find("headers", number).read_text())
    metadata = header.pop("__metadata__", None)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, info in header.items():
        dtype = "F32" if info["dtype"] == "FloatStorage" else info["dtype"]
        numbers = rng.standard_normal(int(np.prod(info["shape"]))).astype("<f2" if dtype == "F16" else "<f4")
        data = b"\xff\x7f" * numbers.size if number == "010" else numbers.tobytes()
        tensors[name] = (dtype, tuple(info["shape"]), data)
    return tensors, metadata


def rank_of(tensors: dict[str, Any]) -> int:
    shapes = [shape for name, (_, shape, _) in tensors.items() if name.endswith("lora_A.weight")]
    return min(shapes[0][:2]) if shapes else 8


def test_the_tables_cover_everything() -> None:
    for folder, table in (("configs", CONFIGS), ("headers", WEIGHTS)):
        assert sorted(p.name.partition("__")[0] for p in (DATA / folder).iterdir()) == sorted(table)
    assert (len(CONFIGS), len(WEIGHTS)) == (93, 32)


@pytest.mark.parametrize("number", sorted(CONFIGS))
def test_configurations(tmp_path: Path, number: str) -> None:
    code, phrase = CONFIGS[number]
    data = find("configs", number).read_bytes()
    raw = json.loads(data) if data.lstrip().startswith(b"{") else {}
    tensors = example_weights(raw)
    if code:
        with pytest.raises(AdapterError) as refusal:
            plan(tmp_path, data, safetensors(tensors), base_for(tensors))
        assert refusal.value.code == code
        assert refusal.value.status == 400
        assert phrase in refusal.value.message
        return
    found = plan(tmp_path, data, safetensors(tensors), base_for(tensors))
    assert phrase in " ".join(found.warnings)
    assert {m.scale for m in found.modules} == {raw.get("lora_alpha", 8) / raw.get("r", 8)}


@pytest.mark.parametrize("number", sorted(WEIGHTS))
def test_weights(tmp_path: Path, number: str) -> None:
    code, phrase = WEIGHTS[number]
    tensors, metadata = published(number)
    weights = safetensors(tensors, metadata)
    if number == "078":
        weights = weights[:-5]  # what a conversion of line ends did to it
    configuration = config(r=rank_of(tensors), lora_alpha=16)
    try:
        found = plan(tmp_path, configuration, weights, base_for(tensors, transposed=number == "043"))
        output = io.BytesIO()
        write_plan(found, tmp_path / "w", output)
        assert len(output.getvalue()) > sum(len(data) for _, _, data in tensors.values())
        assert len(found.modules) == len(tensors) // 2
        assert not code
    except AdapterError as refusal:
        assert (refusal.code, phrase in refusal.message) == (code, True), refusal.message  # noqa: PT017


@pytest.mark.parametrize("number", sorted(WEIGHTS))
def test_weights_under_their_own_configuration(tmp_path: Path, number: str) -> None:
    """Together the two files are refused for the configuration's reason when it has one, else for the weights'."""
    code, _ = CONFIGS[number]
    tensors, metadata = published(number)
    data = safetensors(tensors, metadata)
    if "bin" in find("headers", number).name:
        buffer = io.BytesIO()
        torch.save({"x": torch.zeros(1)}, buffer)
        data = buffer.getvalue()
        code = code or "pickle_refused"
    if number == "078":
        data = data[:-5]
    code = code or WEIGHTS[number][0]
    try:
        found = plan(
            tmp_path, find("configs", number).read_bytes(), data, base_for(tensors, transposed=number == "043")
        )
        write_plan(found, tmp_path / "w", io.BytesIO())
        assert not code
    except AdapterError as refusal:
        assert refusal.code == code, refusal.message  # noqa: PT017


def test_pointers_in_place_of_weights(tmp_path: Path) -> None:
    pointers = sorted((DATA / "lfs_pointers").iterdir())
    assert len(pointers) == 23
    for path in pointers:
        with pytest.raises(InvalidAdapter) as refusal:
            plan(tmp_path, config(), path.read_bytes(), EMPTY_BASE)
        assert refusal.value.code == "git_lfs_pointer"
        assert "git lfs pull" in refusal.value.message
