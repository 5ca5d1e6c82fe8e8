"""What a person does on the page, in words."""

import base64
from pathlib import Path
from typing import Any

FILES = ("adapter_config.json", "adapter_model.safetensors")
DROP = """([files, target]) => {
  const transfer = new DataTransfer();
  for (const [name, text] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
  }
  const node = document.querySelector(target);
  for (const type of ["dragenter", "dragover", "drop"]) {
    node.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""


def pick(page: Any, column: int, model: str) -> None:
    """Chooses what answers in a column, by typing."""
    box = page.get_by_role("combobox", name="Model or adapter").nth(column)
    box.click()
    box.fill(model)
    page.get_by_role("option").filter(has_text=model).first.click()


def column(page: Any, index: int) -> Any:
    """One column."""
    return page.get_by_role("region", name="Conversation column").nth(index)


def send(page: Any, prompt: str) -> None:
    """Types a prompt and presses Enter."""
    page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
    page.keyboard.press("Enter")


def view(page: Any, name: str) -> None:
    """Goes to a tab."""
    page.get_by_role("tab", name=name).click()


def drop(page: Any, target: str, folder: Path, names: tuple[str, ...] = FILES) -> None:
    """Drops files as the browser would hand them over."""
    files = [(name, base64.b64encode((folder / name).read_bytes()).decode()) for name in names]
    page.evaluate(DROP, [files, target])


def row(page: Any, name: str) -> Any:
    """The table's row of an adapter."""
    return page.get_by_role("row").filter(has=page.get_by_role("button", name=name, exact=True))
