from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from loramux.adapters_store.base_spec import LinearSpec, base_spec_from_config


def test_lists_linears_and_names_the_rest() -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, vocab_size=99
    )
    spec = base_spec_from_config(config, name="x")
    assert (spec.name, spec.model_type, spec.architecture) == ("x", "llama", "LlamaForCausalLM")
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (64, 2, 99)
    assert spec.linears["model.layers.1.self_attn.k_proj"] == LinearSpec(64, 16)
    assert spec.linears["lm_head"] == LinearSpec(64, 99)
    assert len(spec.linears) == 2 * 7 + 1
    assert spec.other_modules["model.embed_tokens"] == "Embedding"
    assert not spec.linears.keys() & spec.other_modules.keys()


def test_knows_conv1d() -> None:
    spec = base_spec_from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2))
    assert spec.linears["transformer.h.0.attn.c_attn"] == LinearSpec(32, 96, transposed=True)
    assert (spec.hidden_size, spec.num_layers) == (32, 1)


def test_reads_a_folder_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "my-base"
    LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(folder)
    spec = base_spec_from_config(folder)
    assert spec.name == "my-base"
    assert spec.linears


def test_never_runs_code_of_the_repository(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((ValueError, OSError)):
        base_spec_from_config(tmp_path)
    assert not (tmp_path / "ran").exists()
