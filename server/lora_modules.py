"""How an adapter of this machine is named in the settings: `name=path`, or vLLM's JSON form."""

import json
from dataclasses import dataclass
from typing import Any

KEYS = {"name", "path", "base_model_name"}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter's name, and the directory that `save_pretrained` wrote."""

    name: str
    path: str


def parse_lora_modules(value: Any) -> tuple[LoraModule, ...]:
    """The modules of one flag, or of a variable's text: `name=path` entries with white space between them, a JSON
    object `{"name": ..., "path": ...}`, or a JSON list of such objects. Raises ValueError for anything else.

    `base_model_name`, which vLLM only shows, is accepted.
    """
    if isinstance(value, LoraModule):
        return (value,)
    text = str(value).strip()
    if text.startswith(("{", "[")):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is no valid JSON: {error}") from None
        entries = found if isinstance(found, list) else [found]
        return tuple(_of_json(entry) for entry in entries)
    return tuple(_of_text(entry) for entry in ([text] if "=" in text and " " not in text else text.split()))


def _of_json(entry: Any) -> LoraModule:
    if not isinstance(entry, dict) or not {"name", "path"} <= entry.keys() <= KEYS:
        raise ValueError('an entry is {"name": NAME, "path": DIRECTORY}, with "base_model_name" or without')
    return _checked(entry["name"], entry["path"])


def _of_text(entry: str) -> LoraModule:
    name, equals, path = entry.partition("=")
    if not equals:
        raise ValueError(f"{entry!r} is no NAME=DIRECTORY")
    return _checked(name, path)


def _checked(name: Any, path: Any) -> LoraModule:
    if not isinstance(name, str) or not isinstance(path, str) or not name or not path or "\0" in path:
        raise ValueError("an adapter needs a name and a directory, both text")
    return LoraModule(name, path)
