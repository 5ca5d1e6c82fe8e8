"""Embeddings over HTTP equal the final hidden states of transformers and PEFT; adapters come from `--lora-modules`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import peft
import pytest
import torch
from support.live import LiveServer, live_server
from support.models import byte_tokenizer, family_config, mixed_recipes, random_model, save_adapter, save_model

TOLERANCE = 1e-3
TEXTS = ["hello there", "a", "The quick brown fox jumps over the lazy dog. " * 3]


@dataclass
class World:
    server: LiveServer
    model: Any
    adapters: dict[str, Path]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", max_retries=0)


def expected(model: Any, text: str) -> np.ndarray:
    """The mean of the final hidden states, of length 1."""
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0].double()
    mean = states.mean(0).numpy()
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("embeddings")
    model = random_model(family_config("llama", vocab_size=262))
    save_model(model, root / "base", tokenizer=True)
    adapters = {r.name: save_adapter(model, r, root / "adapters") for r in mixed_recipes(model)}
    flags = ["--model", str(root / "base"), "--dtype", "float32", "--max-batched-tokens", "64", "--max-num-seqs", "8"]
    modules = [f"{name}={path}" for name, path in adapters.items()]
    with live_server(root, *flags, "--lora-modules", *modules, "--served-model-name", "base", "alias") as server:
        yield World(server, model, adapters)


def test_the_bases_states_are_transformers(world: World) -> None:
    for name in ("base", "alias"):
        answer = world.client.embeddings.create(model=name, input=TEXTS)
        for item, text in zip(answer.data, TEXTS, strict=True):
            np.testing.assert_allclose(item.embedding, expected(world.model, text), atol=TOLERANCE)


def test_adapters_states_are_pefts(world: World) -> None:
    apart = 0.0
    for name, path in world.adapters.items():
        answer = world.client.embeddings.create(model=name, input=TEXTS, encoding_format="float")
        wrapped = peft.PeftModel.from_pretrained(world.model, path)
        for item, text in zip(answer.data, TEXTS, strict=True):
            np.testing.assert_allclose(item.embedding, expected(wrapped, text), atol=TOLERANCE, err_msg=name)
        wrapped.unload()
        base = world.client.embeddings.create(model="base", input=TEXTS[0]).data[0].embedding
        apart = max(apart, float(np.abs(np.subtract(base, answer.data[0].embedding)).max()))
    assert apart > 10 * TOLERANCE


def test_token_ids_and_responses(world: World) -> None:
    ids = byte_tokenizer()(TEXTS[0])["input_ids"]
    answers = [world.client.embeddings.create(model="rslora", input=given) for given in (ids, TEXTS[0])]
    by_ids, by_text = (answer.data[0].embedding for answer in answers)
    np.testing.assert_allclose(by_ids, by_text, atol=1e-6)
    answer = world.client.responses.create(model="rslora", input="hello", max_output_tokens=5, temperature=0)
    assert answer.status in ("incomplete", "completed")
    chat = world.client.chat.completions.create(
        model="rslora", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0
    )
    assert answer.output_text == chat.choices[0].message.content
