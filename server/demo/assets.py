"""Where the demo's base model and adapters are, and how each adapter describes itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoAdapter:
    """One adapter of the demo: ``path`` holds PEFT's two files; the rest is what an upload would say of it."""

    name: str
    path: Path
    description: str
    examples: tuple[str, ...]


def demo_base_path() -> Path:
    """The folder of the demo's base model, in the Hugging Face layout."""
    return Path(__file__).parent / "base"


def demo_adapters() -> list[DemoAdapter]:
    """The demo's adapters, by name."""
    found = []
    for card_path in sorted((Path(__file__).parent / "adapters").glob("*/card.json")):
        card = json.loads(card_path.read_text(encoding="utf-8"))
        folder = card_path.parent
        found.append(DemoAdapter(folder.name, folder, card["description"], tuple(card["examples"])))
    return found
