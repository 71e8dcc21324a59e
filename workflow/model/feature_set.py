"""The features of images, with the labels and groups that training and evaluation need."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class FeatureSet(NamedTuple):
    """Features and metadata of images, in the same order."""

    features: np.ndarray  # float32 of shape (images, FEATURES)
    labels: np.ndarray  # indices into `class_names`, int32 of shape (images,)
    class_names: list[str]  # sorted
    files: list[str]  # names of the image files
    digests: list[str]  # SHA-256 of the image files
    groups: list[str]  # near-duplicates have the same group
    sessions: list[str]  # photos of the same session, and near-duplicates, have the same value
    unevaluated: Sequence[int] = ()  # labels of classes with too few groups, including test images, to evaluate a model

    def mark_first(self, by_class: bool = False) -> np.ndarray:
        """Return a mask of the first image of each near-duplicate group, or of each class within each group."""
        pairs = zip(self.labels, self.groups, strict=True)
        keys = [f"{label} {group}" for label, group in pairs] if by_class else self.groups
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        return first


def normalize(features: np.ndarray) -> np.ndarray:
    """Return the features with each row scaled to length 1."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)
