"""Log-probabilities, penalties and several choices over HTTP, against transformers' and PEFT's own numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
from support.live import LiveServer, live_server
from support.models import byte_tokenizer, family_config, mixed_recipes, random_model, save_adapter, save_model

VOCAB = 262
TEXT = "The quick brown fox jumps over the lazy dog. Voil\u00e0 \u2014 done, after more than one chunk of tokens."


class World:
    """A server with a model and its adapters, and the same model here."""

    def __init__(self, server: LiveServer, model: Any, adapters: dict[str, Path]) -> None:
        self.model, self.adapters = model, adapters
        self.client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        self.tokens: list[int] = byte_tokenizer()(TEXT)["input_ids"]

    def reference(self, tokens: Sequence[int], name: str) -> torch.Tensor:
        """log_softmax before each token but the first."""
        model = self.model if name == "base" else peft.PeftModel.from_pretrained(self.model, self.adapters[name])
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0, :-1].double(), dim=-1)
        if name != "base":
            model.unload()
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("logprobs")
    model = random_model(family_config("llama", vocab_size=VOCAB))
    save_model(model, root / "base", tokenizer=True)
    adapters = {r.name: save_adapter(model, r, root / "adapters") for r in mixed_recipes(model)[:2]}
    flags = ["--model", str(root / "base"), "--dtype", "float32", "--max-num-seqs", "8",
             "--max-batched-tokens", "64"]  # fmt: skip
    with live_server(root, *flags) as server:
        for name, path in adapters.items():
            assert server.upload(name, path).status_code == 201
        yield World(server, model, adapters)


def check(found: Any, reference: torch.Tensor, tokens: Sequence[int], first: int = 0) -> None:
    """Token by token from number `first` on, of a text completion's logprobs."""
    for i, token in enumerate(tokens[first:], first):
        assert found.token_logprobs[i] == pytest.approx(float(reference[i - 1, token]), abs=1e-3)
        assert max(found.top_logprobs[i].values()) == pytest.approx(float(reference[i - 1].max()), abs=1e-3)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_likelihoods_are_the_models(world: World, number: int, max_tokens: int) -> None:
    name = ["base", *world.adapters][number]
    answer = world.client.completions.create(
        model=name, prompt=[world.tokens, world.tokens[:9]], echo=True, logprobs=1, max_tokens=max_tokens,
        temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    for choice, prompt in zip(answer.choices, (world.tokens, world.tokens[:9]), strict=True):
        tokens = [*prompt, *choice.token_ids]  # type: ignore[attr-defined]
        assert choice.logprobs is not None
        assert len(tokens) == len(prompt) + max_tokens == len(choice.logprobs.token_logprobs or ())
        assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None  # type: ignore[index]
        check(choice.logprobs, world.reference(tokens, name), tokens, 1)
    assert answer.choices[0].text.startswith(TEXT)
    assert answer.usage.prompt_tokens == len(world.tokens) + 9  # type: ignore[union-attr]


def test_offsets_point_at_the_tokens(world: World) -> None:
    (choice,) = world.client.completions.create(
        model="base", prompt=TEXT, echo=True, logprobs=0, max_tokens=8, seed=1
    ).choices
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert offsets == sorted(offsets)
    for token, offset in list(zip(tokens, offsets, strict=True))[: len(world.tokens)]:
        assert token.startswith("bytes:\\x") or token.startswith("<") or choice.text[offset:].startswith(token)
    parts = [t.encode() if not t.startswith("bytes:") else bytes.fromhex(t[6:].replace("\\x", "")) for t in tokens]
    assert b"".join(parts[: len(world.tokens)]).decode() == TEXT


def test_a_stream_has_what_the_whole_answer_has(world: World) -> None:
    options: dict[str, Any] = {
        "model": "base", "prompt": TEXT[:20], "echo": True, "logprobs": 2, "max_tokens": 12, "seed": 5,
    }  # fmt: skip
    (whole,) = world.client.completions.create(**options).choices
    chunks = [chunk.choices[0] for chunk in world.client.completions.create(**options, stream=True) if chunk.choices]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert whole.logprobs is not None
    for column in ("tokens", "token_logprobs", "text_offset"):
        joined = [item for chunk in chunks if chunk.logprobs for item in getattr(chunk.logprobs, column)]
        if column == "token_logprobs":
            assert joined[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-4)  # type: ignore[index]
        else:
            assert joined == getattr(whole.logprobs, column)


def test_chat_tokens_are_exact_to_the_byte(world: World) -> None:
    options: dict[str, Any] = {
        "model": "base", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3,
        "max_tokens": 12, "seed": 2,
    }  # fmt: skip
    answer = world.client.chat.completions.create(**options, extra_body={"return_token_ids": True, "ignore_eos": True})
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    ids: list[int] = choice.token_ids  # type: ignore[attr-defined]
    reference = world.reference([*answer.prompt_token_ids, *ids], "base")[-len(ids) :]  # type: ignore[attr-defined]
    assert len(content) == len(ids)
    for entry, token, row in zip(content, ids, reference, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    shown = b"".join(bytes(entry.bytes or ()) for entry in content if not entry.token.startswith("<"))
    assert shown.decode(errors="replace").replace("\ufffd", "") == (choice.message.content or "").replace("\ufffd", "")


def test_choices_share_the_prompt_and_differ(world: World) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": TEXT, "max_tokens": 10, "seed": 3, "n": 4}
    answer = world.client.completions.create(**options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 4
    assert answer.usage.prompt_tokens == len(world.tokens)  # type: ignore[union-attr]
    assert [choice.text for choice in world.client.completions.create(**options).choices] == texts
    assert world.client.completions.create(**{**options, "n": 1}).choices[0].text == texts[0]
    streamed = dict.fromkeys(range(4), "")
    for chunk in world.client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == texts
    with pytest.raises(openai.BadRequestError, match="max-num-seqs"):
        world.client.completions.create(**{**options, "n": 9})


def test_the_best_of_several(world: World) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": "abc", "max_tokens": 6, "seed": 4, "logprobs": 0,
                               "extra_body": {"ignore_eos": True}}  # fmt: skip
    every = world.client.completions.create(**options, n=5)
    best = world.client.completions.create(**options, n=2, best_of=5)
    ranked = sorted(every.choices, key=lambda choice: -sum(choice.logprobs.token_logprobs))  # type: ignore
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == every.usage.completion_tokens == 30  # type: ignore[union-attr]


def test_penalties_and_biases(world: World) -> None:
    ask = world.client.completions.create
    (b,) = byte_tokenizer()("B", add_special_tokens=False)["input_ids"]
    always = ask(model="base", prompt="a", max_tokens=6, logit_bias={str(b): 100}, temperature=0)
    assert always.choices[0].text == "B" * 6
    never = ask(model="base", prompt="a", max_tokens=30, logit_bias={str(b): 100}, temperature=0,
                frequency_penalty=2, presence_penalty=2)  # fmt: skip
    assert never.choices[0].text == "B" * 30  # a bias of 100 outweighs what 30 repetitions cost
    plain = ask(model="base", prompt=TEXT, max_tokens=30, temperature=0)
    changed = ask(model="base", prompt=TEXT, max_tokens=30, temperature=0, extra_body={"repetition_penalty": 2.0})
    assert plain.choices[0].text != changed.choices[0].text
