import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_helpers import BASE, config, lora, safetensors, values

from loramux.adapters_store.canonical import read_header
from loramux.adapters_store.errors import AdapterError, IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.peft_format import AdapterPlan, plan_adapter, write_plan

LAYER = "base_model.model.model.layers.0"


def plan(folder: Path, tensors: Any, configuration: bytes | None = None, **limits: int) -> AdapterPlan:
    (folder / "c").write_bytes(config() if configuration is None else configuration)
    (folder / "w").write_bytes(tensors if isinstance(tensors, bytes) else safetensors(tensors))
    return plan_adapter(folder / "c", folder / "w", BASE, StoreLimits(**limits))


def write(folder: Path, tensors: Any, configuration: bytes | None = None) -> tuple[str, bytes, list[str]]:
    output = io.BytesIO()
    planned = plan(folder, tensors, configuration)
    digest, size, warnings = write_plan(planned, folder / "w", output)
    assert size == len(output.getvalue())
    return digest, output.getvalue(), [*planned.warnings, *warnings]


def matrix(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, values(shape)


def test_targets_and_ranks_come_from_the_tensors(tmp_path: Path) -> None:
    tensors = lora(4, ["q_proj"]) | lora(2, ["down_proj", "lm_head"])
    found = plan(tmp_path, tensors, config(rank_pattern={"((": 2}, target_modules="all-linear", use_rslora=True))
    assert found.ranks == (2, 4)
    assert found.target_modules == ("down_proj", "lm_head", "q_proj")
    assert {m.module: round(m.scale, 6) for m in found.modules if m.module.startswith("model.layers.0")} == {
        "model.layers.0.self_attn.q_proj": 4.0,
        "model.layers.0.mlp.down_proj": round(8 / 2**0.5, 6),
    }
    assert found.warnings == ()


def test_order_prefixes_and_training_settings_do_not_change_the_digest(tmp_path: Path) -> None:
    tensors = lora()
    digest, data, _ = write(tmp_path, tensors)
    shuffled = dict(reversed(tensors.items()))
    bare = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    for variant in (shuffled, bare, named):
        assert write(tmp_path, variant)[:2] == (digest, data)
    other = config(lora_dropout=0.3, target_modules="all-linear", base_model_name_or_path=None, alpha_pattern={"x": 1})
    assert write(tmp_path, tensors, other)[0] == digest
    assert write(tmp_path, safetensors(tensors, {"format": "pt"}))[0] == digest
    assert write(tmp_path, tensors, config(lora_alpha=9))[0] != digest
    assert write(tmp_path, lora(seed=1))[0] != digest


def test_the_canonical_file_is_fixed_to_the_byte(tmp_path: Path) -> None:
    tensors = {
        f"{LAYER}.self_attn.q_proj.lora_B.weight": ("BF16", (16, 1), np.arange(16, dtype="<u2").tobytes()),
        f"{LAYER}.self_attn.q_proj.lora_A.weight": ("F32", (1, 16), np.arange(16, dtype="<f4").tobytes()),
    }
    digest, data, _ = write(tmp_path, tensors, config(r=1, lora_alpha=3))
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert data[8 : 8 + length].rstrip() == (
        b'{"__metadata__":{"format":"loramux.lora/1","scales":"{\\"model.layers.0.self_attn.q_proj\\":3.0}"},'
        b'"model.layers.0.self_attn.q_proj.A":{"dtype":"F32","shape":[1,16],"data_offsets":[0,64]},'
        b'"model.layers.0.self_attn.q_proj.B":{"dtype":"BF16","shape":[16,1],"data_offsets":[64,96]}}'
    )
    assert data[8 + length :] == np.arange(16, dtype="<f4").tobytes() + np.arange(16, dtype="<u2").tobytes()
    assert digest == hashlib.sha256(data).hexdigest()
    (tmp_path / "out").write_bytes(data)
    assert read_header(tmp_path / "out").ranks == {"model.layers.0.self_attn.q_proj": 1}


def test_a_typo_in_the_targets_is_a_warning(tmp_path: Path) -> None:
    found = plan(tmp_path, lora(4, ["v_proj"]), config(target_modules=["q_prpj", "v_proj"]))
    assert found.warnings == ("target_modules that no tensor belongs to, so they were not trained: 'q_prpj'",)


def test_another_base_name_with_the_same_shapes_is_a_warning(tmp_path: Path) -> None:
    found = plan(tmp_path, lora(), config(base_model_name_or_path="/data/me/other-base"))
    assert "'/data/me/other-base'" in found.warnings[0]
    assert "'tiny-base'" in found.warnings[0]


def test_the_copy_of_the_output_layer_that_peft_saves_is_ignored(tmp_path: Path) -> None:
    tensors = lora(4, ["lm_head"])
    copied = tensors | {"base_model.model.lm_head.base_layer.weight": matrix(32, 16)}
    plain, _, _ = write(tmp_path, tensors, config(target_modules="all-linear"))
    digest, _, warnings = write(tmp_path, copied, config(target_modules="all-linear"))
    assert digest == plain
    assert "'lm_head' was ignored" in warnings[0]


def test_an_untrained_adapter_is_a_warning(tmp_path: Path) -> None:
    tensors = {k: (d, s, b"\0" * len(v) if "lora_B" in k else v) for k, (d, s, v) in lora().items()}
    assert "changes nothing" in write(tmp_path, tensors)[2][0]


Q = f"{LAYER}.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": matrix(4, 16), f"{Q}.lora_B.weight": matrix(16, 4)}

REFUSED: dict[str, tuple[dict[str, Any], type[AdapterError], str, str]] = {
    "nothing": ({}, InvalidAdapter, "empty_adapter", "no tensors"),
    "no B": ({f"{Q}.lora_A.weight": matrix(4, 16)}, InvalidAdapter, "missing_tensor", "no lora_B"),
    "no A": ({f"{Q}.lora_B.weight": matrix(16, 4)}, InvalidAdapter, "missing_tensor", "no lora_A"),
    "transposed": (
        {f"{Q}.lora_A.weight": matrix(16, 4), f"{Q}.lora_B.weight": matrix(4, 16)},
        InvalidAdapter,
        "transposed_weights",
        "PEFT stores lora_A as [r, in]",
    ),
    "rank differs": (
        {f"{Q}.lora_A.weight": matrix(4, 16), f"{Q}.lora_B.weight": matrix(16, 2)},
        InvalidAdapter,
        "invalid_rank",
        "[4, 16] and lora_B [16, 2]",
    ),
    "rank zero": (
        {f"{Q}.lora_A.weight": matrix(0, 16), f"{Q}.lora_B.weight": matrix(16, 0)},
        InvalidAdapter,
        "invalid_rank",
        "zero",
    ),
    "rank not configured": (
        {f"{Q}.lora_A.weight": matrix(3, 16), f"{Q}.lora_B.weight": matrix(16, 3)},
        InvalidAdapter,
        "invalid_rank",
        "gives rank 4",
    ),
    "transposed, in differs from out": (
        {k.replace("q_proj", "v_proj"): matrix(*((16, 4) if "A" in k else (4, 8))) for k in PAIR},
        InvalidAdapter,
        "transposed_weights",
        "[16, 4] and lora_B [4, 8]",
    ),
    "transposed, unknown module": (
        {k.replace("q_proj", "x_proj"): matrix(*((16, 4) if "A" in k else (4, 8))) for k in PAIR},
        InvalidAdapter,
        "transposed_weights",
        "[16, 4] and lora_B [4, 8]",
    ),
    "three dimensions": (
        {f"{Q}.lora_A.weight": matrix(4, 16), f"{Q}.lora_B.weight": matrix(16, 4, 1)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "3 dimensions",
    ),
    "two adapters": (
        {
            k.replace(".weight", f".{n}.weight"): v
            for n in ("one", "two")
            for k, v in PAIR.items()
            if ("A" in k) == (n == "one")
        },
        InvalidAdapter,
        "unexpected_tensor",
        "several adapters (one, two)",
    ),
    "two names of one": (
        PAIR | {k.removeprefix("base_model.model."): v for k, v in PAIR.items()},
        InvalidAdapter,
        "unexpected_tensor",
        "two lora_A",
    ),
    "other shape": (
        {f"{Q}.lora_A.weight": matrix(4, 32), f"{Q}.lora_B.weight": matrix(32, 4)},
        IncompatibleAdapter,
        "incompatible_base",
        "'model.layers.0.self_attn.q_proj' takes 16 inputs to 16 outputs in tiny-base, the adapter's takes 32 to 32",
    ),
    "more layers": (
        {k.replace("layers.0", "layers.7"): v for k, v in PAIR.items()},
        IncompatibleAdapter,
        "incompatible_base",
        "layers.7.self_attn.q_proj', which tiny-base (LlamaForCausalLM) does not have; it says its base is 'someone",
    ),
    "doubled prefix": (
        {f"base_model.model.{k}": v for k, v in PAIR.items()},
        IncompatibleAdapter,
        "incompatible_base",
        "does not have",
    ),
    "embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": matrix(4, 32)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "LoRA on embeddings",
    ),
    "not a linear": (
        {k.replace("layers.0.self_attn.q_proj", "embed_tokens"): v for k, v in PAIR.items()},
        UnsupportedAdapter,
        "unsupported_module",
        "which is Embedding in tiny-base",
    ),
    "dora": (PAIR | {f"{Q}.lora_magnitude_vector": matrix(16)}, UnsupportedAdapter, "unsupported_tensor", "DoRA"),
    "lora bias": (PAIR | {f"{Q}.lora_B.bias": matrix(16)}, UnsupportedAdapter, "unsupported_tensor", "bias"),
    "bias": (PAIR | {f"{Q}.bias": matrix(16)}, UnsupportedAdapter, "unsupported_tensor", "a trained bias"),
    "kasa": (PAIR | {f"{Q}.lora_diag": matrix(4)}, UnsupportedAdapter, "unsupported_tensor", "KaSA"),
    "adalora": (PAIR | {f"{Q}.lora_E": matrix(4, 1)}, UnsupportedAdapter, "unsupported_tensor", "AdaLoRA"),
    "saved whole": (
        PAIR | {"base_model.model.lm_head.modules_to_save.weight": matrix(32, 16)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "modules_to_save",
    ),
    "nested": (
        PAIR | {"base_model.model.classifier.modules_to_save.lora_A.weight": matrix(4, 16)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "modules_to_save",
    ),
    "base weights": (
        PAIR | {f"{Q.replace('q_proj', 'v_proj')}.base_layer.weight": matrix(8, 16)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "the base model itself",
    ),
    "resized base weights": (
        PAIR | {f"{Q}.base_layer.weight": matrix(18, 16)},
        IncompatibleAdapter,
        "incompatible_base",
        "vocabulary resized",
    ),
    "classifier": (
        PAIR | {"base_model.model.score.weight": matrix(6, 16)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "a head that is not",
    ),
    "full module": (
        PAIR | {"base_model.model.lm_head.weight": matrix(32, 16)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "not part of a LoRA adapter",
    ),
    "experts": (
        {k.replace("self_attn.q_proj", "mlp.experts.0.up_proj"): v for k, v in PAIR.items()},
        UnsupportedAdapter,
        "unsupported_tensor",
        "experts",
    ),
    "fused experts": (
        {f"{LAYER}.mlp.experts.base_layer.lora_A.weight": matrix(4, 16)},
        UnsupportedAdapter,
        "unsupported_tensor",
        "experts",
    ),
    "mlx": ({"model.layers.0.self_attn.q_proj.lora_a": matrix(16, 4)}, UnsupportedAdapter, "unsupported_tensor", "MLX"),
    "ia3": ({f"{Q}.ia3_l": matrix(16, 1)}, UnsupportedAdapter, "unsupported_tensor", "another method"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path: Path, case: str) -> None:
    tensors, kind, code, phrase = REFUSED[case]
    with pytest.raises(kind) as refusal:
        plan(tmp_path, tensors)
    assert type(refusal.value) is kind
    assert refusal.value.code == code
    assert phrase in refusal.value.message
    assert refusal.value.field


def test_refuses_ranks_over_the_limit(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="has rank 4, the limit is 2"):
        plan(tmp_path, PAIR, max_rank=2)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        ("F32", np.array([np.nan], "<f4").tobytes()),
        ("F32", np.array([-np.inf], "<f4").tobytes()),
        ("F16", np.array([np.nan], "<f2").tobytes()),
        ("F16", np.array([np.inf], "<f2").tobytes()),
        ("BF16", b"\x80\x7f"),
        ("BF16", b"\xc0\xff"),
    ],
)
@pytest.mark.parametrize("where", [0, 37, 63])
def test_one_bad_number_anywhere_is_found(tmp_path: Path, dtype: str, bad: bytes, where: int) -> None:
    data = bytearray(64 * len(bad))
    data[where * len(bad) : (where + 1) * len(bad)] = bad
    tensors = {**PAIR, f"{Q}.lora_A.weight": (dtype, (4, 16), bytes(data))}
    with pytest.raises(InvalidAdapter, match=f"NaN or infinite.*element {where}") as refusal:
        write(tmp_path, tensors)
    assert refusal.value.code == "non_finite_weights"


def test_the_largest_finite_numbers_pass(tmp_path: Path) -> None:
    data = np.full(64, np.finfo("<f4").max, "<f4").tobytes()
    write(tmp_path, {**PAIR, f"{Q}.lora_A.weight": ("F32", (4, 16), data)})


@pytest.mark.parametrize("key", ["(a+)+$", "(.*)*x", r"(\w+\.)*nothing", "(?=x)", "(" * 100, "[", "a" * 2000])
def test_expression_bombs_in_alpha_pattern_end(tmp_path: Path, key: str) -> None:
    found: list[str] = []
    try:
        found += plan(tmp_path, lora(), config(alpha_pattern={key: 1.0})).target_modules
    except UnsupportedAdapter as refusal:
        found += [refusal.code, refusal.field or ""]
    assert found in (["q_proj", "v_proj"], ["unsupported_pattern", "adapter_config.json:alpha_pattern"])


def test_long_lists_in_the_configuration_are_read_in_one_pass(tmp_path: Path) -> None:
    names = [f"x{i}" for i in range(50_000)]
    assert "'x0'" in plan(tmp_path, lora(), config(target_modules=names)).warnings[0]
    patterns = dict.fromkeys(names[:20_000], 1.0)
    assert plan(tmp_path, lora(), config(alpha_pattern=patterns)).ranks == (4,)
    with pytest.raises(UnsupportedAdapter, match="too long"):
        plan(tmp_path, lora(), config(alpha_pattern={f"({i})": 1.0 for i in range(2000)}), max_pattern_work=100_000)


def test_many_alpha_patterns_are_bounded_together(tmp_path: Path) -> None:
    patterns = {f"(.*.*)*{i}": 1.0 for i in range(2000)}
    with pytest.raises(UnsupportedAdapter, match="too long"):
        plan(tmp_path, lora(), config(alpha_pattern=patterns), max_pattern_work=50_000)
