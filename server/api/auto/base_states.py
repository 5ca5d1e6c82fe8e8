"""The frozen base as a sentence encoder: a prompt's mean hidden state at one layer, asked of the engine.

    row = e / |e|,   e = S h,   h = mean over the prompt's tokens of the normalised input of layer l

S is the identity for states of up to `DIM` numbers; wider ones are projected by a fixed matrix of signs / sqrt(DIM)
(Achlioptas 2003, "Database-friendly random projections"), which keeps differences between rows up to some 6%, so that
ten thousand adapters fit the processor's caches whatever the base.

The prompt is what `probing.Prompts` makes of the text.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats
from loramux.server.api.auto.probing import Prompts
from loramux.server.api.rendering import Renderer
from loramux.server.engine.protocol import EngineInfo, PoolingParams

DIM = 256
_VERSION = 1  # part of the name: raise it when the row of any text would change
_SEED = 20030601
_PIECES, _PIECE_BYTES = 64, 64 << 10


def base_identity(model: Path, chat_template: str | None) -> str:
    """A digest that tells bases apart: configuration, tokenizer, template, evenly spaced pieces of every weight file.

    Reading all of 16 GB would take longer than loading them; training changes nearly every number, so pieces show it.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = model / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    digest.update((chat_template or "").encode())
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(piece * max(size - _PIECE_BYTES, 0) // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def sign_projection(hidden: int) -> npt.NDArray[np.float32] | None:
    """S [hidden, DIM] of the module, the same on every machine; None where none is needed."""
    if hidden <= DIM:
        return None
    words = np.random.PCG64(_SEED).random_raw(-(-hidden * DIM // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: hidden * DIM]
    return np.asarray((bits.reshape(hidden, DIM) * 2.0 - 1) / np.sqrt(DIM), dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class BaseStates:
    """What to ask of an engine for a text, and the row that its answer makes.

    `layer` counts from 0; the number of layers itself stands for the final hidden states.
    """

    name: str
    hidden: int
    layer: int
    prompts: Prompts
    projection: npt.NDArray[np.float32] | None = field(repr=False)

    @classmethod
    def of(
        cls, info: EngineInfo, renderer: Renderer, identity: str, *, layer: int | None, max_tokens: int
    ) -> "BaseStates":
        """For a loaded engine. `identity` is the base's (`base_identity`); `layer` None is the middle one."""
        chosen = info.num_layers // 2 if layer is None else layer
        limit = min(max_tokens, info.max_model_len)
        options = json.dumps([_VERSION, identity, info.dtype, info.hidden_size, chosen, limit, renderer.can_chat])
        name = f"base-{hashlib.sha256(options.encode()).hexdigest()[:32]}"
        return cls(name, info.hidden_size, chosen, Prompts(renderer, limit), sign_projection(info.hidden_size))

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return min(self.hidden, DIM)

    @property
    def pooling(self) -> PoolingParams:
        """The mean over the prompt's tokens at the layer."""
        return PoolingParams((self.layer,))

    def row(self, embedding: bytes) -> Floats:
        """float32 [dim] of norm 1, from the engine's mean hidden state."""
        state = np.frombuffer(embedding, "<f4")
        projected = state if self.projection is None else state @ self.projection
        norm = float(np.linalg.norm(projected))
        return np.asarray(projected / norm if norm > 0 else projected, dtype=np.float32)
