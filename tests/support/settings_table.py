"""The README's table of settings, from the settings class; `python tests/support/settings_table.py` rewrites it."""

from pathlib import Path

from loramux.server.settings import Settings, flag_of, variable_of

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"


def shown(field: str) -> str:
    """A default as a reader would type it."""
    info = Settings.model_fields[field]
    if field == "store_dir":
        return "`~/.local/share/loramux`"
    value = info.default
    if value in (None, (), ""):
        return ""
    human = getattr(value, "human_readable", None)
    return f"`{human(separator='') if human else value}`"


def table() -> str:
    """One row per setting."""
    rows = ["| flag | variable | default | |", "|---|---|---|---|"]
    for name, info in Settings.model_fields.items():
        rows.append(f"| `{flag_of(name)}` | `{variable_of(name)}` | {shown(name)} | {info.description} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Puts the table between its marks."""
    text = README.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(text[:start] + table() + text[end:])


if __name__ == "__main__":
    main()
