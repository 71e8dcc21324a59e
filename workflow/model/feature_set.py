"""The features of images, with all else that a head is trained and judged on."""

from collections.abc import Sequence
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
        unevaluated: labels of the classes with too few groups, test images included, to judge any model
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    files: list[str]
    digests: list[str]
    groups: list[str]
    sessions: list[str]
    unevaluated: Sequence[int] = ()

    def mark_first(self, by_class: bool = False) -> np.ndarray:
        """Return true for the first image of each group of near-duplicates, or of each class in each group."""
        pairs = zip(self.labels, self.groups, strict=True)
        keys = [f"{label} {group}" for label, group in pairs] if by_class else self.groups
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        return first


def normalize(features: np.ndarray) -> np.ndarray:
    """Return the features with each row scaled to length 1."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)
