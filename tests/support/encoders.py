"""A tiny random sentence encoder in Hugging Face layout, and score tables with a known structure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from loramux.router.scores.dataset import ScoreTable

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_encoder(folder: Path, *, seed: int = 0, pooling: str | None = None, modules: tuple[str, ...] = ()) -> Path:
    """A random two-layer BERT; `pooling` adds sentence-transformers' files, `modules` further module types in them."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    if pooling:
        kinds = ("Transformer", "Pooling", *modules)
        listed = [
            {"idx": i, "path": "1_Pooling" if kind == "Pooling" else "", "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


def clustered_table(
    rows: int = 240, dim: int = 12, candidates: int = 4, *, seed: int = 0, noise: float = 0.3
) -> ScoreTable:
    """Unit rows around one centre per candidate; the candidate of a row's centre scores 0.8 more than the others."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(candidates, dim))
    own = generator.integers(0, candidates, rows)
    embeddings = centres[own] + noise * generator.normal(size=(rows, dim))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores: Any = 0.1 * generator.random((rows, candidates))
    scores[np.arange(rows), own] += 0.8
    keys = tuple(f"c{i}" for i in range(candidates))
    return ScoreTable(embeddings.astype(np.float32), scores, keys, (own % 2).astype(np.int64))
