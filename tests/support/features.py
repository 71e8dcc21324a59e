"""Features of images that never existed, for tests of what is computed from features alone."""

from collections.abc import Sequence

from workflow.model.feature_set import FeatureSet

import numpy as np

FEATURES, LENGTH = 1280, 8  # as the backbone's
COPY_SPREAD = 0.05  # of near-duplicates around their group's centre


def make_images(
    sizes: Sequence[Sequence[int]], spread: float = 1, sessions: int = 0, class_spread: float = 1, seed: int = 1
) -> FeatureSet:
    """Return images around one centre per class; more groups, or larger ones, change no centre and no first image.

    A class of one group cannot be judged.

    Args:
        sizes: for each class, the sizes of its groups of near-duplicates
        spread: of the groups around the centre of their class or session
        sessions: how many each class has, with centres of their own; 0 for groups that are their own sessions
        class_spread: of the centres of the classes
        seed: draws everything
    """
    names = list("abcdefgh"[: len(sizes)])
    rows, labels, groups, session_names = [], [], [], []
    for label, of_class in enumerate(sizes):
        draw, draw_copy = (np.random.default_rng([seed, label, number]) for number in range(2))
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
    unevaluated = [label for label, of_class in enumerate(sizes) if len(of_class) < 2]
    labels = np.array(labels, "int32")
    return FeatureSet(features, labels, names, files, digests, groups, session_names, unevaluated)


def make_strangers(count: int) -> np.ndarray:
    """Return features of photos of other things."""
    strangers = np.random.default_rng(9).normal(size=(count, FEATURES))
    return (LENGTH * strangers / np.linalg.norm(strangers, axis=1, keepdims=True)).astype("float32")
