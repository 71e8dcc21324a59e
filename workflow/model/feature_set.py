"""The features of images, with the labels and groups that training and evaluation need."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class FeatureSet(NamedTuple):
    """Features and metadata of images, in the same order.

    Attributes:
        features: float32 of shape (images, FEATURES)
        labels: indices into `class_names`, int32 of shape (images,)
        class_names: sorted
        files: names of the image files
        digests: SHA-256 of the image files
        groups: group of each image; near-duplicates share one
        sessions: session of each image, shared by photos of one session or of one group
        unevaluated: labels of classes with too few groups, test images included, to evaluate a model
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
        """Return a mask of the first image of each group of near-duplicates, or of each class in each group."""
        pairs = zip(self.labels, self.groups, strict=True)
        keys = [f"{label} {group}" for label, group in pairs] if by_class else self.groups
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        return first


def normalize(features: np.ndarray) -> np.ndarray:
    """Return the features with each row scaled to length 1."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)
