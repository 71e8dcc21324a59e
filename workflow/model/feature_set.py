"""The features of images, with all else that a head is trained and judged on."""

from typing import NamedTuple

import numpy as np


class FeatureSet(NamedTuple):
    """The features of images, and what is known of each image, in one order.

    Attributes:
        features: float32 of shape (images, FEATURES)
        labels: indices of the class names, int32 of shape (images,)
        class_names: of all classes, sorted
        files: names of the image files
        digests: SHA-256 of the image files
        groups: near-duplicates have the same one
        sessions: photos of one session, or of one group, have the same one
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    files: list[str]
    digests: list[str]
    groups: list[str]
    sessions: list[str]

    def mark_first(self) -> np.ndarray:
        """Return true for the first image of each group of near-duplicates."""
        first = np.zeros(len(self.groups), bool)
        first[np.unique(self.groups, return_index=True)[1]] = True
        return first
