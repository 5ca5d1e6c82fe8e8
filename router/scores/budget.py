"""How large a scorer may get by growing between trainings. What goes beyond it waits for the next training."""

MAX_BYTES = 256 << 20
"""Of what a scorer keeps of its queries; one that is larger when it was trained may stay as large."""
MAX_TAKEN = 1 << 16
"""Scores that a scorer has taken in since it was trained, one per query and candidate."""


class NoRoomError(ValueError):
    """The scorer would grow beyond its budget."""

    def __init__(self) -> None:
        super().__init__(f"the scorer would keep more than {MAX_BYTES} bytes or {MAX_TAKEN} scores")
