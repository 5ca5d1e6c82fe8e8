import json
from typing import Any

import pytest
from store_helpers import BASE, config

from loramux.adapters_store.errors import AdapterError, InvalidAdapter, UnsupportedAdapter
from loramux.adapters_store.peft_config import parse_config


def test_defaults_are_pefts() -> None:
    parsed = parse_config(b'{"peft_type": "LORA"}', BASE)
    assert (parsed.rank, parsed.alpha, parsed.use_rslora) == (8, 8.0, False)
    assert parsed.targets is None
    assert parsed.warnings == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 0.5},
        {"r": None, "lora_alpha": None},
        {"target_modules": "all-linear"},
        {"target_modules": "(.*(language_model).*(q_proj|v_proj).*)"},
        {"target_modules": "(a+)+$" * 50},
        {"target_modules": []},
        {"exclude_modules": "(a+)+$"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"rank_pattern": None, "alpha_pattern": None},
        {"rank_pattern": {"((((": 4}},
        {"task_type": None},
        {"task_type": None, "auto_mapping": {"base_model_class": "Qwen3ForCausalLM", "parent_library": "os; rm"}},
        {"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}},
        {"auto_mapping": {"base_model_class": BASE.architecture}},
        {"auto_mapping": {}},
        {"megatron_core": "os.path"},
        {"bias": None},
        {"modules_to_save": []},
        {"enable_lora": None, "merge_weights": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": False},
        {"fan_in_fan_out": True},
        {"loftq_config": {"loftq_bits": 4}},
        {"use_something_new": False, "new_config": None, "target_new": [], "lora_new": 0},
        {"base_model_name_or_path": None},
    ],
)
def test_accepts_what_changes_nothing(changes: dict[str, Any]) -> None:
    assert parse_config(config(**changes), BASE).warnings == ()


def test_byte_order_marks_and_line_ends_are_fine() -> None:
    text = config().replace(b", ", b",\r\n")
    assert parse_config(b"\xef\xbb\xbf" + text, BASE).rank == 4


def test_notes_of_the_trainer_are_a_warning() -> None:
    parsed = parse_config(config(comment="first try", dataset={"a": 1}), BASE)
    assert "comment, dataset" in parsed.warnings[0]


UNSUPPORTED: list[tuple[dict[str, Any], str, str]] = [
    ({"peft_type": "IA3"}, "unsupported_peft_type", "IA3"),
    ({"peft_type": "ADALORA", "task_type": "SEQ_CLS"}, "unsupported_peft_type", "ADALORA"),
    ({"use_dora": True}, "unsupported_option", "use_dora"),
    ({"bias": "all"}, "unsupported_option", "'all'"),
    ({"bias": "lora_only"}, "unsupported_option", "'lora_only'"),
    ({"modules_to_save": ["lm_head"]}, "unsupported_option", "modules_to_save"),
    ({"lora_bias": True}, "unsupported_option", "lora_bias"),
    ({"target_parameters": ["experts.gate"]}, "unsupported_option", "experts"),
    ({"trainable_token_indices": [1]}, "unsupported_option", "trainable_token_indices"),
    ({"trainable_token_indices": {"embed_tokens": [1]}}, "unsupported_option", "trainable_token_indices"),
    ({"layer_replication": [[0, 4], [2, 5]]}, "unsupported_option", "layer_replication"),
    ({"alora_invocation_tokens": [1, 2]}, "unsupported_option", "alora"),
    ({"use_qalora": True}, "unsupported_option", "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "unsupported_option", "use_bdlora"),
    ({"arrow_config": {"top_k": 3}}, "unsupported_option", "arrow_config"),
    ({"kasa_config": {"beta": 1}}, "unsupported_option", "kasa_config"),
    ({"monteclora_config": {"x": 1}}, "unsupported_option", "monteclora_config"),
    ({"megatron_config": {"x": 1}}, "unsupported_option", "megatron_config"),
    ({"enable_lora": [True, False, True]}, "unsupported_option", "enable_lora"),
    ({"init_lora_weights": "pissa_niter_16"}, "unsupported_option", "path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "olora"}, "unsupported_option", "olora"),
    ({"init_lora_weights": "loftq"}, "unsupported_option", "loftq"),
    ({"use_newlora": True}, "unsupported_option", "use_newlora"),
    ({"other_config": {"a": 1}}, "unsupported_option", "other_config"),
    ({"task_type": "SEQ_CLS"}, "unsupported_task", "SEQ_CLS"),
    ({"task_type": "TOKEN_CLS"}, "unsupported_task", "TOKEN_CLS"),
    ({"task_type": "SEQ_2_SEQ_LM"}, "unsupported_task", "encoder-decoder"),
    ({"task_type": "QUESTION_ANS"}, "unsupported_task", "QUESTION_ANS"),
    ({"task_type": "FEATURE_EXTRACTION"}, "unsupported_task", "embeddings"),
    ({"auto_mapping": {"base_model_class": "UNet2DConditionModel"}}, "unsupported_task", "UNet2DConditionModel"),
    ({"peft_type": ..., "lora_parameters": {"rank": 8}}, "unsupported_format", "MLX"),
]


@pytest.mark.parametrize(("changes", "code", "phrase"), UNSUPPORTED)
def test_refuses_by_name_what_is_not_carried_out(changes: dict[str, Any], code: str, phrase: str) -> None:
    with pytest.raises(UnsupportedAdapter) as refusal:
        parse_config(config(**changes), BASE)
    assert refusal.value.code == code
    assert phrase in refusal.value.message
    assert refusal.value.field is not None
    assert refusal.value.field.startswith("adapter_config.json:")


INVALID: list[tuple[bytes, str, str]] = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git_lfs_pointer", "Git LFS"),
    (b"", "invalid_config", "not JSON"),
    (b"\x00\xff", "invalid_config", "not UTF-8"),
    (b"[1]", "invalid_config", "not a JSON object"),
    (b"{" * 100_000, "invalid_config", "not JSON"),
    (b'{"a":' * 100_000, "invalid_config", "nested"),
    (b'{"peft_type": "LORA", "r": 8, "r": 16}', "invalid_config", "'r' appears twice"),
    (config(lora_alpha=float("nan")), "invalid_config", "NaN"),
    (config(lora_alpha=float("-inf")), "invalid_config", "-Infinity"),
    (config().replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999'), "invalid_config", "out of range"),
    (config().replace(b'"lora_alpha": 8', b'"lora_alpha": ' + b"9" * 400), "invalid_alpha", "out of range"),
    (config().replace(b'"lora_alpha": 8', b'"lora_alpha": ' + b"9" * 9000), "invalid_config", "adapter_config.json"),
    (config(lora_alpha="8"), "invalid_alpha", "number"),
    (config(lora_alpha=True), "invalid_alpha", "number"),
    (config(r=0), "invalid_rank", "at least 1"),
    (config(r=-4), "invalid_rank", "at least 1"),
    (config(r=True), "invalid_rank", "at least 1"),
    (config(r=8.0), "invalid_rank", "at least 1"),
    (config(r=[8]), "invalid_rank", "at least 1"),
    (config(rank_pattern={"a": 0}), "invalid_rank", "rank_pattern.a"),
    (config(rank_pattern=[1]), "invalid_config", "rank_pattern"),
    (config(alpha_pattern={"a": None}), "invalid_alpha", "alpha_pattern.a"),
    (config(alpha_pattern="x"), "invalid_config", "alpha_pattern"),
    (config(use_rslora="yes"), "invalid_config", "use_rslora"),
    (config(fan_in_fan_out=3), "invalid_config", "fan_in_fan_out"),
    (config(bias=1), "invalid_config", "bias"),
    (config(task_type=1), "invalid_config", "task_type"),
    (config(task_type="CHAT"), "invalid_config", "CHAT"),
    (config(peft_type=3), "invalid_config", "peft_type"),
    (config(target_modules={"a": 1}), "invalid_config", "target_modules"),
    (config(target_modules=[1]), "invalid_config", "target_modules"),
    (config(auto_mapping=[]), "invalid_config", "auto_mapping"),
    (config(auto_mapping={"base_model_class": 3}), "invalid_config", "auto_mapping"),
    (config(base_model_name_or_path=7), "invalid_config", "base_model_name_or_path"),
    (config(init_lora_weights=3), "invalid_config", "init_lora_weights"),
    (b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', "not_an_adapter_config", "config.json"),
    (b'{"base_model": "x"}', "not_an_adapter_config", "no `peft_type`"),
]


@pytest.mark.parametrize(("data", "code", "phrase"), INVALID)
def test_refuses_malformed_files(data: bytes, code: str, phrase: str) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        parse_config(data, BASE)
    assert refusal.value.code == code
    assert phrase in refusal.value.message
    assert len(refusal.value.message) < 600
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("key", sorted(json.loads(config())))
@pytest.mark.parametrize("value", [None, [], {}, "", "\ud800", 0, -1, 1e300, True, [[[]]], {"a": {"b": [None]}}])
def test_no_value_of_any_type_escapes_the_checks(key: str, value: Any) -> None:
    message = ""
    try:
        parse_config(config(**{key: value}), BASE)
    except AdapterError as refusal:
        message = refusal.message
    assert "\n" not in message
    assert message.encode() is not None
