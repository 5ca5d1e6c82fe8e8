"""What the router is made of before anything runs: the encoder that the settings name, and the base's own examples."""

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from loramux.adapters_store import strict_json
from loramux.router.encoders.concat import NGRAM_WEIGHT, ConcatEncoder
from loramux.router.encoders.ngram import NgramEncoder
from loramux.router.gallery.sample import MAX_BASE_EXAMPLES
from loramux.router.interface import Encoder
from loramux.server.api.auto.base_states import BaseStates, base_identity
from loramux.server.api.auto.embedders import (
    PROBES_AT_ONCE,
    Embedder,
    JoinedEmbedder,
    LocalEmbedder,
    ProbeEmbedder,
)
from loramux.server.api.rendering import Renderer
from loramux.server.demo.base_examples import demo_base_examples
from loramux.server.engine.protocol import EngineClient
from loramux.server.settings import Settings

NGRAM_DIM = 1024  # fewer cost accuracy; with the base's states ten thousand adapters take some 150 MB
NGRAM_LENGTHS = (1, 4)  # of those tried, these tell held-out examples best from the base's and from other adapters'
MAX_EXAMPLE_CHARS = 1 << 20


class RouterSetupError(ValueError):
    """The router cannot be set up; the message names the flag and the remedy."""


@dataclass(frozen=True, slots=True)
class RouterParts:
    """The parts of a router that is switched on.

    `uses_base`: rows hold the base's hidden states, of which `identity` tells one base from another; `local` is the
    encoder that runs in this process, None where there is none. `base_examples` are prompts that the base is to answer.
    """

    uses_base: bool
    identity: str
    layer: int | None
    max_tokens: int
    local: Encoder | None
    base_examples: tuple[str, ...] = ()

    def embedder(
        self, engine: EngineClient, renderer: Renderer, threads: Executor, at_once: int = PROBES_AT_ONCE
    ) -> Embedder:
        """The encoder; see `ProbeEmbedder` for `at_once`. Raises `EngineDeadError` for an engine never ready so far."""
        found: list[Embedder] = []
        if self.uses_base:
            states = BaseStates.of(engine.info, renderer, self.identity, layer=self.layer, max_tokens=self.max_tokens)
            found.append(ProbeEmbedder(engine, states, at_once))
        if self.local is not None:
            found.append(LocalEmbedder(self.local, threads))
        return found[0] if len(found) == 1 else JoinedEmbedder(found)


def prepare(settings: Settings, model: Path, num_layers: int) -> RouterParts | None:
    """The parts for a base that lies in `model`; None where routing is switched off. Raises `RouterSetupError`."""
    if settings.router == "off":
        return None
    if settings.router_layer is not None and settings.router_layer > num_layers:
        raise RouterSetupError(
            f"--router-layer {settings.router_layer}: the base has layers 0 to {num_layers - 1}, and {num_layers} is "
            "its final hidden state"
        )
    examples: tuple[str, ...] = ()
    if settings.router_base_examples is not None:
        examples = read_examples(settings.router_base_examples)
    elif settings.model is None:
        examples = demo_base_examples()
    parts = settings.router_encoder.split("+")
    names_parts = set(parts) <= {"base", "ngram"} and len(set(parts)) == len(parts)
    template = None if settings.chat_template is None else settings.chat_template.read_text(encoding="utf-8")
    local: Encoder | None = None
    if not names_parts:
        local = sentence_encoder(settings.router_encoder)
    elif "ngram" in parts:
        local = NgramEncoder(NGRAM_DIM, *NGRAM_LENGTHS)
    uses_base = names_parts and "base" in parts
    identity = base_identity(model, template) if uses_base else ""
    return RouterParts(uses_base, identity, settings.router_layer, settings.router_max_tokens, local, examples)


def sentence_encoder(spec: str) -> Encoder:
    """A sentence encoder by path or hub name, beside n-grams where "+ngram" follows or "ngram+" comes before it.

    Raises `RouterSetupError`.
    """
    source = spec.removeprefix("ngram+") if spec.startswith("ngram+") else spec.removesuffix("+ngram")
    from loramux.router.encoders.huggingface import EncoderError, HuggingFaceEncoder  # transformers takes seconds

    try:
        sentences = HuggingFaceEncoder(source)
    except EncoderError as error:
        raise RouterSetupError(
            f"--router-encoder {spec}: {error}; give base, ngram, base+ngram, or the path or hub name of an encoder, "
            "+ngram after it or not"
        ) from error
    if source == spec:
        return sentences
    return ConcatEncoder([sentences, NgramEncoder(NGRAM_DIM, *NGRAM_LENGTHS)], [1.0, NGRAM_WEIGHT])


def read_examples(path: Path) -> tuple[str, ...]:
    """Prompts from a file: one per line, or in a `.jsonl` file a JSON text or `{"query": text}` per line.

    Evenly spread over the file, as many as the router looks at. Raises `RouterSetupError` naming file and line.
    """
    where = f"--router-base-examples {path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RouterSetupError(f"{where}: cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            text = _json_text(line, f"{where}, line {number}") if path.suffix == ".jsonl" else line.strip()
            found.append(text[:MAX_EXAMPLE_CHARS])
    if not found:
        raise RouterSetupError(f"{where}: has no prompt in it")
    step = max(len(found) / MAX_BASE_EXAMPLES, 1)
    return tuple(found[int(i * step)] for i in range(min(len(found), MAX_BASE_EXAMPLES)))


def _json_text(line: str, where: str) -> str:
    try:
        value = strict_json.loads(line.encode())
    except ValueError as error:
        raise RouterSetupError(f"{where}: {error}") from error
    text = value.get("query") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text.strip():
        raise RouterSetupError(f'{where}: must be a JSON text, or an object with a text "query"')
    return text
