"""Routing by example prompts or a description: centroids per adapter, and a calibrated "none of these"."""

from loramux.router.gallery.conformal import Calibration
from loramux.router.gallery.crossfit import nearest_threshold
from loramux.router.gallery.gallery import Gallery, GallerySnapshot
from loramux.router.gallery.state import GalleryState

__all__ = ["Calibration", "Gallery", "GallerySnapshot", "GalleryState", "nearest_threshold"]
