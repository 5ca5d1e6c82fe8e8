"""The bytes that a token stands for, exactly: tokens may be parts of characters, which no string can show."""

import json
from functools import cached_property

from tokenizers import Tokenizer

WORD_START = "\u2581"


def _byte_level() -> dict[str, int]:
    """The byte of each character by which byte-level BPE (Radford et al., "GPT-2", 2019) writes bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """Looks tokens up one by one. Safe from several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content.encode() for i, token in tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _kinds(self) -> frozenset[str]:
        """What the tokenizer's decoder consists of."""
        if self._tokenizer.decoder is None:
            return frozenset()
        state = json.loads(self._tokenizer.decoder.__getstate__())
        return frozenset(part["type"] for part in state.get("decoders", [state]))

    @cached_property
    def _bytes(self) -> dict[str, int]:
        return _byte_level() if "ByteLevel" in self._kinds else {}

    def of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id that has no token. A word's first token has its space."""
        added = self._added.get(token_id)
        if added is not None:
            return added
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._kinds and all(char in self._bytes for char in token):
            return bytes(self._bytes[char] for char in token)
        if "ByteFallback" in self._kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        if self._kinds & {"Metaspace", "Replace"}:
            return token.replace(WORD_START, " ").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()
