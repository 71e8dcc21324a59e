"""Features of images that never existed, for tests of what is computed from features alone."""

from collections.abc import Sequence

from workflow.model.feature_set import FeatureSet

import numpy as np

FEATURES, LENGTH = 1280, 8  # as the backbone's
COPY_SPREAD = 0.05  # of near-duplicates around their group's centre


def make_images(
    sizes: Sequence[Sequence[int]], spread: float = 1, sessions: int = 0, class_spread: float = 1, seed: int = 7
) -> FeatureSet:
    """Return images around one centre per class; the first image of a group is the same whatever the sizes.

    Args:
        sizes: for each class, the sizes of its groups of near-duplicates
        spread: of the groups around the centre of their class or session
        sessions: how many each class has, with centres of their own; 0 for images that are their own sessions
        class_spread: distance of the centres of the classes
        seed: draws everything
    """
    names = list("abcdefgh"[: len(sizes)])
    draw, draw_copy = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    rows, labels, groups, session_names = [], [], [], []
    for label, of_class in enumerate(sizes):
        center, offsets = class_spread * draw.normal(size=FEATURES), draw.normal(size=(sessions, FEATURES))
        for group, size in enumerate(of_class):
            session = group % max(sessions, 1)
            first = center + spread * draw.normal(size=FEATURES) + (offsets[session] if sessions else 0)
            rows += [first, *(first + COPY_SPREAD * draw_copy.normal(size=FEATURES) for _ in range(size - 1))]
            labels += [label] * size
            groups += [f"{names[label]}{group}"] * size
            session_names += [f"{names[label]}-{session}" if sessions else groups[-1]] * size
    features = np.stack(rows)
    features = (LENGTH * features / np.linalg.norm(features, axis=1, keepdims=True)).astype("float32")
    files = [f"{names[label]}/{number}.jpeg" for number, label in enumerate(labels)]
    digests = [f"digest of {file}" for file in files]
    return FeatureSet(features, np.array(labels, "int32"), names, files, digests, groups, session_names)
