"""Prompts, templates and the model's own sampling settings."""

import json
from pathlib import Path

import pytest
from api.harness import ASSISTANT, BEGIN, END, TEMPLATE, USER, byte_tokenizer

from loramux.server.api.errors import APIError
from loramux.server.api.rendering import (
    INLINE_CHARS,
    PromptTooLongError,
    Renderer,
    SamplingDefaults,
    TokenizerError,
)

MESSAGES = [{"role": "user", "content": "hi"}]


def write_model(folder: Path, *, template: str | None = TEMPLATE, generation: dict | None = None) -> Path:
    """A directory with a tokenizer in Hugging Face layout."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|stop|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_load(tmp_path: Path) -> None:
    renderer = Renderer.load(write_model(tmp_path))
    assert renderer.can_chat
    assert renderer.encode(renderer.render(MESSAGES), add_special_tokens=False) == [
        BEGIN, USER, *b"hi", END, ASSISTANT,
    ]  # fmt: skip
    assert renderer.defaults == SamplingDefaults()
    assert renderer.detokenizer([]).feed(104) == "h"


@pytest.mark.anyio
async def test_no_more_tokens_than_asked_for(tmp_path: Path) -> None:
    renderer = Renderer.load(write_model(tmp_path))
    assert renderer.encode("hello", add_special_tokens=False, most=5) == list(b"hello")
    assert len(renderer.prompt(MESSAGES, most=6).token_ids) == 6
    with pytest.raises(PromptTooLongError) as raised:
        renderer.encode("hello", add_special_tokens=False, most=4)
    assert raised.value.tokens == 5
    with pytest.raises(PromptTooLongError):
        renderer.prompt(MESSAGES, most=5)
    for length in (5, INLINE_CHARS + 1):
        with pytest.raises(PromptTooLongError):
            await renderer.text_tokens(["x", "x" * length], most=4)


def test_template_file_replaces_the_models_own(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{{ messages[0]['content'] }}|{{ eos_token }}")
    assert Renderer.load(write_model(tmp_path), chat_template=own).render(MESSAGES) == "<|begin|>hi|<|stop|>"


def test_no_template(tmp_path: Path) -> None:
    renderer = Renderer.load(write_model(tmp_path, template=None))
    assert not renderer.can_chat
    with pytest.raises(APIError, match="no chat template"):
        renderer.render(MESSAGES)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError):
        Renderer.load(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for c in messages.append({}) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ undefined_thing.attribute }}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(APIError) as caught:
        Renderer(byte_tokenizer(), chat_template=template).render(MESSAGES)
    assert caught.value.status == 400


def test_generation_config(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "eos_token_id": [1, 2]}
    assert Renderer.load(write_model(tmp_path, generation=given)).defaults == SamplingDefaults(0.6, 0.95, 20, 0.1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"do_sample": False, "top_p": 0.9}, SamplingDefaults(temperature=0.0, top_p=0.9)),
        ({"do_sample": True, "temperature": 0.7}, SamplingDefaults(temperature=0.7)),
        ({"temperature": None, "top_p": "x", "top_k": -1, "min_p": True}, SamplingDefaults()),
        ({"temperature": 50, "top_p": float("nan")}, SamplingDefaults()),
    ],
)
def test_sampling_defaults(config: dict, expected: SamplingDefaults) -> None:
    assert SamplingDefaults.from_generation_config(config) == expected
