"""Tiny random models of every supported family, saved in Hugging Face layout, and PEFT adapters for them."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from loramux.adapters_store.canonical import CanonicalTensor, write_canonical
from loramux.adapters_store.digests import blob_path, digest_from_hex

VOCAB = 128
EOS = 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 9},
    "gemma3_text": {"head_dim": 16, "sliding_window": 9},
    "phi3": {},
    "granite": {},
    "olmo2": {},
}

MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}

MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "num_key_value_heads": 4},
    "phi": {},
    "starcoder2": {},
    "gpt_neox": {},
    "smollm3": {},
    "cohere2": {"sliding_window": 9},
    "mixtral": MOE,
    "qwen3_moe": {**MOE, "head_dim": 16},
    "olmoe": MOE,
    "gpt_oss": {**MOE, "head_dim": 16, "sliding_window": 9},
}

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def family_config(family: str, **overrides: Any) -> Any:
    """The tiny configuration of a family."""
    return CONFIG_MAPPING[family](
        **{**COMMON, **FAMILIES.get(family, {}), **MORE_FAMILIES.get(family, {}), **overrides}
    )


def random_model(config: Any, *, seed: int = 0, std: float = 0.15, attention: str = "eager") -> Any:
    """A float32 model whose matrices are wide enough apart that greedy choices are clear."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    model.generation_config.eos_token_id = config.eos_token_id
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template; its ids start at 3, after <pad>, <bos> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(model: Any, directory: Path, *, tokenizer: bool = False) -> Path:
    """Writes the model (and the byte tokenizer) as a hub repository would hold it."""
    model.save_pretrained(directory)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class AdapterRecipe:
    """How to make one random adapter: PEFT's own configuration fields, and a seed."""

    name: str
    seed: int
    lora: dict[str, Any]


def linear_suffixes(model: Any) -> tuple[list[str], list[str]]:
    """The last names of the attention's and of the MLP's projections of a family, in order of appearance."""
    names = dict.fromkeys(
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")
    )
    names.pop("lm_head", None)
    mlp = [n for n in names if n in ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2")]
    return [n for n in names if n not in mlp], mlp


def mixed_recipes(model: Any) -> list[AdapterRecipe]:
    """Eight adapters that differ in rank, targets, scaling and patterns."""
    attention, mlp = linear_suffixes(model)
    whole: Any = "all-linear" if mlp else attention  # PEFT's all-linear takes routed experts in, which are refused
    mlp = mlp or attention[-1:]
    every = list(dict.fromkeys([*attention, *mlp]))
    first, last = attention[0], mlp[-1]
    return [
        AdapterRecipe("all-r8", 1, {"r": 8, "lora_alpha": 16, "target_modules": whole}),
        AdapterRecipe("first-r4", 2, {"r": 4, "lora_alpha": 8, "target_modules": [first]}),
        AdapterRecipe("attn-r16", 3, {"r": 16, "lora_alpha": 16, "target_modules": attention}),
        AdapterRecipe("mlp-r3", 4, {"r": 3, "lora_alpha": 6, "target_modules": mlp}),
        AdapterRecipe("rslora", 5, {"r": 9, "lora_alpha": 9, "use_rslora": True, "target_modules": every}),
        AdapterRecipe("patterns", 6, {"r": 8, "lora_alpha": 8, "target_modules": every,
                      "rank_pattern": {first: 2, last: 12}, "alpha_pattern": {first: 4, last: 24}}),
        AdapterRecipe("layer-1", 7, {"r": 8, "lora_alpha": 32, "target_modules": every, "layers_to_transform": [1]}),
        AdapterRecipe("regex", 8, {"r": 5, "lora_alpha": 10, "target_modules": rf".*\.{last}"}),
    ]  # fmt: skip


def save_adapter(model: Any, recipe: AdapterRecipe, directory: Path, *, std: float = 0.08) -> Path:
    """A random adapter exactly as `save_pretrained` writes it, in `directory/<name>`; the model is left as it was."""
    torch.manual_seed(recipe.seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **recipe.lora))
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, std, generator=generator)
    path = directory / recipe.name
    wrapped.save_pretrained(path)
    wrapped.unload()
    return path


@dataclass(frozen=True)
class _Bytes:
    data: bytes

    def chunks(self) -> Iterable[bytes]:
        yield self.data


def write_blob(model: Any, adapter_dir: Path, blob_dir: Path) -> str:
    """The canonical blob of a PEFT adapter, with the scales that PEFT itself computes; returns its digest."""
    wrapped = peft.PeftModel.from_pretrained(model, adapter_dir)
    tensors, scales = [], {}
    for name, module in wrapped.base_model.model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        for part, layers in (("A", module.lora_A), ("B", module.lora_B)):
            weight = layers["default"].weight.detach().float().contiguous()
            data = _Bytes(weight.numpy().tobytes())
            tensors.append(CanonicalTensor(name, "A" if part == "A" else "B", "F32", tuple(weight.shape), data))
        scales[name] = float(module.scaling["default"])
    wrapped.unload()
    blob_dir.mkdir(parents=True, exist_ok=True)
    temporary = blob_dir / f"tmp-{struct.pack('>q', hash(adapter_dir)).hex()}"
    with temporary.open("wb") as file:
        hexdigest, _ = write_canonical(file, tensors, scales)
    digest = digest_from_hex(hexdigest)
    temporary.rename(blob_path(blob_dir, digest))
    return digest


def saved_llama(root: Path, adapters: int) -> tuple[Path, Path, list[str]]:
    """A random Llama and the first so many of its mixed adapters in `root`: (base, blobs, the adapters' digests)."""
    model = random_model(family_config("llama"))
    base = save_model(model, root / "base")
    recipes = mixed_recipes(model)[:adapters]
    digests = [write_blob(model, save_adapter(model, recipe, root / "adapters"), root / "blobs") for recipe in recipes]
    return base, root / "blobs", digests


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy continuation by transformers' own generate."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return [int(t) for t in out[0, len(prompt) :]]
