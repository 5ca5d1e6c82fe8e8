"""A gallery on disk, in numbered versions: a start fits and embeds only what has changed since it was saved.

Beside the gallery's state (`state`) it holds a digest of the texts behind every candidate, so that texts that were
changed in between are noticed, and the name of the encoder whose rows they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux.router.gallery.state import GalleryState
from loramux.router.versions import Versions

KEPT = 2


@dataclass(frozen=True, slots=True)
class SavedGallery:
    """`texts` maps every candidate, and the base's key if it has examples, to a digest of what it is known by."""

    state: GalleryState
    encoder: str
    texts: Mapping[str, str]


def save_gallery(folder: Path, saved: SavedGallery) -> int:
    """Writes the next version and returns its number. Raises OSError when the disk refuses."""
    arrays, info = saved.state.pack()
    described = {"gallery": info, "encoder": saved.encoder, "texts": dict(saved.texts)}
    return _versions(folder).write(described, arrays, KEPT)


def load_gallery(folder: Path, encoder: str) -> SavedGallery | None:
    """The latest version; None where there is none, or of another encoder's rows. Raises ArtifactError for damage."""
    versions = _versions(folder)
    if not versions.numbers():
        return None
    number, value, arrays = versions.read()
    if value.get("encoder") != encoder:
        return None
    try:
        texts = {str(key): str(digest) for key, digest in value["texts"].items()}
        return SavedGallery(GalleryState.unpack(arrays, value["gallery"]), encoder, texts)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise versions.damaged(number, f"its parts do not fit together ({type(error).__name__}: {error})") from error


def _versions(folder: Path) -> Versions:
    return Versions(folder, "gallery", "let the server make another")
