"""The demo's tokenizer: one token per byte (its id is the byte) and six marks around the turns of a chat."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MARKS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BEGIN, END, PAD, SYSTEM, USER, ASSISTANT = range(256, 256 + len(MARKS))
VOCAB_SIZE = 264  # rounded up to a multiple of 8; the last two ids are never produced by the tokenizer
MAX_LENGTH = 1024

CHAT_TEMPLATE = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('unknown role: ' + message['role']) -}}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Turn:
    """One exchange of a chat: what the user asks and what the assistant answers."""

    prompt: str
    answer: str


def encode_chat(turns: list[Turn], system: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids of a whole chat as the chat template renders it, and its labels.

    Labels are the ids where the assistant speaks (its end mark included) and -100 elsewhere. Equal to
    ``apply_chat_template`` for texts without marks, and much faster.
    """
    ids = [BEGIN]
    labels = [-100]

    def say(mark: int, text: str, learn: bool) -> None:
        body = [*text.encode(), END]
        ids.extend([mark, *body])
        labels.extend([-100, *(body if learn else [-100] * len(body))])

    if system is not None:
        say(SYSTEM, system, learn=False)
    for turn in turns:
        say(USER, turn.prompt, learn=False)
        say(ASSISTANT, turn.answer, learn=True)
    return ids, labels


def byte_symbols() -> list[str]:
    """The printable character by which ByteLevel writes each byte, in byte order (the GPT-2 table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """A BPE tokenizer without merges: id = byte for 0..255, then the marks. Any UTF-8 text round-trips."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja in the Hugging Face layout."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": MARKS[0],
        "eos_token": MARKS[1],
        "pad_token": MARKS[2],
        "additional_special_tokens": list(MARKS[3:]),
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
