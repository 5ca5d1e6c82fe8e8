"""Random models of known shapes and random adapters for them, made in place: nothing is downloaded."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loramux.adapters_store.canonical import CanonicalTensor, Part, write_canonical
from loramux.adapters_store.digests import blob_path, digest_from_hex
from loramux.kernels.attention.interface import AttentionShape
from loramux.kernels.cost import Model, decoder
from loramux.server.bench.workload import Request, prompt_ids
from loramux.server.engine.attention import ATTENTION_NAME, register_attention
from loramux.server.engine.loading import LoadedModel, prepare_model

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder in the manner of Llama, and the transformers family that has them."""

    name: str
    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    std: float = WEIGHT_STD

    def config(self, max_positions: int = 8192) -> Any:
        """The transformers configuration."""
        return CONFIG_MAPPING[self.family](
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=max_positions, tie_word_embeddings=self.tied,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=self.std,
        )  # fmt: skip

    @property
    def attention(self) -> AttentionShape:
        """Heads and dims of a layer."""
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.head_dim)

    def costs(self, itemsize: int) -> Model:
        """What the cost model counts: packed projections, attention, output projection."""
        return decoder(
            hidden=self.hidden, intermediate=self.intermediate, layers=self.layers, shape=self.attention,
            vocabulary=self.vocab, itemsize=itemsize,
        )  # fmt: skip

    def modules(self, names: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
        """{module path: (in, out)} of the projections of all layers, or of those with these last names."""
        wanted = None if names is None else set(names)
        return {
            part.module: (site.in_features, part.out_features)
            for site in self.costs(2).sites
            for part in site.slices
            if wanted is None or part.module.rpartition(".")[2] in wanted
        }


LLAMA_8B = Shape("Llama-3.1-8B", "llama", 128256, 4096, 14336, 32, 32, 8, 128)
QWEN_05B = Shape("Qwen2.5-0.5B", "qwen2", 151936, 896, 4864, 24, 14, 2, 64, tied=True)
TINY_LLAMA = Shape("tiny Llama", "llama", 128, 64, 96, 2, 4, 2, 16, std=0.15)
TINY_QWEN = Shape("tiny Qwen2", "qwen2", 128, 48, 64, 2, 3, 1, 16, tied=True, std=0.15)


def transformers_model(shape: Shape, *, dtype: torch.dtype, device: torch.device, attention: str, seed: int = 0) -> Any:
    """A model of the shape with random weights, made on the device; `attention` is transformers' name of one."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def engine_model(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0, pack: bool = True
) -> LoadedModel:
    """The same model for `EngineCore`; it knows no end-of-sequence id."""
    register_attention()
    model = transformers_model(shape, dtype=dtype, device=device, attention=ATTENTION_NAME, seed=seed)
    return prepare_model(model, model.config, (), pack=pack)


@dataclass(frozen=True, slots=True)
class _Random:
    """The bytes of a random matrix, drawn when they are written."""

    count: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    std: float

    def chunks(self) -> Iterable[memoryview]:
        drawn = torch.empty(self.count, dtype=self.dtype, device=self.device)
        drawn.normal_(0.0, self.std, generator=self.generator)
        yield drawn.cpu().view(torch.uint8).numpy().data


def write_adapters(
    folder: Path, modules: Mapping[str, tuple[int, int]], *, rank: int, count: int, files: int, dtype: torch.dtype,
    device: torch.device, seed: int = 0, std: float = WEIGHT_STD,
) -> list[str]:  # fmt: skip
    """Digests of `count` random adapters in `folder`, which need the disk space of `files` of them.

    Adapter i has the contents of file i % files under a digest of its own (a hard link), so that the engine loads,
    stores and reads each of them apart. Weights are N(0, std^2) in `dtype`, scales 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests: list[str] = []
    for number in range(min(files, count)):
        generator = torch.Generator(device).manual_seed(seed + number)
        tensors = []
        for module, (inputs, outputs) in modules.items():
            sizes: tuple[tuple[Part, tuple[int, int]], ...] = (("A", (rank, inputs)), ("B", (outputs, rank)))
            for part, (rows, columns) in sizes:
                source = _Random(rows * columns, dtype, device, generator, std)
                tensors.append(CanonicalTensor(module, part, DTYPE_NAMES[dtype], (rows, columns), source))
        temporary = folder / f"new-{number}"
        with temporary.open("wb") as file:
            hexdigest, _ = write_canonical(file, tensors, dict.fromkeys(modules, 1.0))
        digests.append(digest_from_hex(hexdigest))
        temporary.replace(blob_path(folder, digests[-1]))
    for number in range(len(digests), count):
        original = digests[number % files]
        digests.append(digest_from_hex(hashlib.sha256(f"{original}/{number}".encode()).hexdigest()))
        os.link(blob_path(folder, original), blob_path(folder, digests[-1]))
    return digests


def random_prompt(seed: int, index: int, tokens: int, vocab: int) -> tuple[int, ...]:
    """Random token ids; no two (seed, index) are alike, so that no prefix cache finds anything."""
    return tuple(prompt_ids(seed, Request(index, 0.0, None, tokens, 1), 3, vocab))


def names_of(adapters: Sequence[str], rows: int, distinct: int) -> list[str | None]:
    """Who serves each of `rows` requests when `distinct` adapters share them evenly, neighbours together."""
    if not distinct:
        return [None] * rows
    return [adapters[row * distinct // rows] for row in range(rows)]
