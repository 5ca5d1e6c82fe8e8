"""Scales and products against PEFT itself, on files that PEFT wrote."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from loramux.adapters_store.base_spec import base_spec_from_config
from loramux.adapters_store.canonical import read_canonical
from loramux.adapters_store.digests import blob_path
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.store import AdapterStore

LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)

CASES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "list": (LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "regex": (LLAMA, {"target_modules": r".*\.layers\.(0|2)\..*(q_proj|down_proj)"}),
    "layers": (
        LLAMA,
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "excluded": (LLAMA, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "head": (LLAMA, {"target_modules": ["lm_head", "o_proj"]}),
    "defaults": (LLAMA, {"r": 8, "lora_alpha": 8}),
    "rslora": (LLAMA, {"target_modules": ["q_proj"], "use_rslora": True, "r": 6}),
    "eva-like": (
        LLAMA,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 14.5},
        },
    ),
    "patterns": (
        LLAMA,
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.[12]\.mlp\..*": 3, "^model.layers.0.self_attn.k_proj": 5},
            "alpha_pattern": {
                r"layers\.1\..*proj": 40,
                "q_proj": 5,
                "self_attn.v_proj|o_proj": 6,
                r"(model\.)?layers\.\d+\.mlp\.(?:up|gate)_proj": 7,
                r"^q_proj": 100,
                "roj": 100,
            },
        },
    ),
    "conv1d": (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d without the flag": (GPT2, {"target_modules": ["c_attn"]}),
    "conv1d all": (GPT2, {"target_modules": "all-linear", "alpha_pattern": {"attn.c_proj": 3}}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_pefts(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    base_config, options = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base_config)
    settings = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    )
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(tmp_path / "saved")
    base = AutoModelForCausalLM.from_config(base_config)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")  # patterns count in the order of the file
    store = AdapterStore(
        tmp_path / "store", base_spec_from_config(base_config, name="base"), StoreLimits(min_free_bytes=0)
    )
    with store.begin_upload() as upload:
        for filename in ("adapter_config.json", "adapter_model.safetensors"):
            upload.open_file(filename).write((tmp_path / "saved" / filename).read_bytes())
        adapter = store.commit(upload, name="a").adapter
    modules = read_canonical(blob_path(store.blob_dir, adapter.digest), dtype=torch.float32)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in loaded.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert modules.keys() == layers.keys()
    for name, layer in layers.items():
        weights = modules[name]
        assert weights.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert weights.rank == layer.r["default"]
        delta = weights.scale * weights.B @ weights.A
        expected = layer.get_delta_weight("default").float()
        transposed = isinstance(base_config, GPT2Config)  # PEFT gives the delta in the layout of Conv1D's weight
        torch.testing.assert_close(delta, expected.T if transposed else expected, rtol=1e-5, atol=1e-6)
    assert adapter.rank == max(layer.r["default"] for layer in layers.values())
    store.close()
