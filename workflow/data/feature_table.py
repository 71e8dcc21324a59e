"""The features of the usable images of a folder, and everything else that is computed from their files, in memory."""

from dataclasses import dataclass, field

from workflow.data.exif import Capture
from workflow.model import backbone
from workflow.model.backbone import Description

import numpy as np


@dataclass
class FeatureTable:
    """Features, thumbnails and captures of images: a row of each array for each image.

    Attributes:
        rows: the row of each usable image by its digest
        features: of the backbone, float32 of shape (images, FEATURES)
        thumbnails: uint8 of shape (images, THUMBNAIL, THUMBNAIL)
        since: when each image was first seen, int64 of shape (images,), ns since 1970
        captures: camera and time of each usable image by its digest
        reasons: why an image cannot be used, and whether that is permanent, by its digest
    """

    rows: dict[str, int]
    features: np.ndarray
    thumbnails: np.ndarray
    since: np.ndarray
    captures: dict[str, Capture] = field(default_factory=dict)
    reasons: dict[str, tuple[str, bool]] = field(default_factory=dict)

    @classmethod
    def reserve(cls, count: int) -> "FeatureTable":
        """Return an empty table with room for `count` images."""
        side = backbone.THUMBNAIL
        features, thumbnails = np.empty((count, backbone.FEATURES), "float32"), np.empty((count, side, side), "uint8")
        return cls({}, features, thumbnails, np.empty(count, "int64"))

    def add(self, digest: str, result: Description | str, since: int, is_permanent: bool = True) -> None:
        """Add the description of an image, or the reason why it cannot be used."""
        if isinstance(result, str):
            self.reasons[digest] = result, is_permanent
        elif digest not in self.rows:
            row = self.rows[digest] = len(self.rows)
            self.features[row], self.thumbnails[row], self.captures[digest] = result
            self.since[row] = since

    def knows(self, digest: str) -> bool:
        return digest in self.rows or digest in self.reasons
