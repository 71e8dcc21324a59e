"""Synthetic features, for tests that need no images."""

from collections.abc import Sequence

from workflow.model.feature_set import FeatureSet

import numpy as np

FEATURES, LENGTH = 1280, 8  # number and norm, like those of the backbone
COPY_SPREAD = 0.05  # of near-duplicates around the first image of their group


def make_images(
    sizes: Sequence[Sequence[int]], spread: float = 1, sessions: int = 0, class_spread: float = 1, seed: int = 1
) -> FeatureSet:
    """Return images around one center per class; adding groups or enlarging them changes no other image.

    A class with one group cannot be evaluated.

    Args:
        sizes: for each class, the sizes of its groups of near-duplicates
        spread: of the groups around the center of their class or session
        sessions: per class, each with its center; 0 makes every group a session
        class_spread: of the centers of the classes
        seed: for the random generator
    """
    names = list("abcdefgh"[: len(sizes)])
    rows, labels, groups, session_names = [], [], [], []
    for label, group_sizes in enumerate(sizes):
        rng, copy_rng = (np.random.default_rng([seed, label, number]) for number in range(2))
        center, offsets = class_spread * rng.normal(size=FEATURES), rng.normal(size=(sessions, FEATURES))
        for group, size in enumerate(group_sizes):
            session = group % max(sessions, 1)
            first = center + spread * rng.normal(size=FEATURES) + (offsets[session] if sessions else 0)
            rows += [first, *(first + COPY_SPREAD * copy_rng.normal(size=FEATURES) for _ in range(size - 1))]
            labels += [label] * size
            groups += [f"{names[label]}{group}"] * size
            session_names += [f"{names[label]}-{session}" if sessions else groups[-1]] * size
    features = np.stack(rows)
    features = (LENGTH * features / np.linalg.norm(features, axis=1, keepdims=True)).astype("float32")
    files = [f"{names[label]}/{number}.jpeg" for number, label in enumerate(labels)]
    digests = [f"digest of {file}" for file in files]
    unevaluated = [label for label, group_sizes in enumerate(sizes) if len(group_sizes) < 2]
    labels = np.array(labels, "int32")
    return FeatureSet(features, labels, names, files, digests, groups, session_names, unevaluated)


def make_unknown(count: int) -> np.ndarray:
    """Return features of images that belong to no class."""
    features = np.random.default_rng(9).normal(size=(count, FEATURES))
    return (LENGTH * features / np.linalg.norm(features, axis=1, keepdims=True)).astype("float32")
