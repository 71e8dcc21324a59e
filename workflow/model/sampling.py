"""Sample images by class."""

import numpy as np


def stratified_sample(
    labels: np.ndarray, max_images: int, rng: np.random.Generator, mask: np.ndarray | None = None
) -> np.ndarray:
    """Return a mask of the sampled images: all if there are at most `max_images`, else a fraction of each class.

    At least three images of each class are sampled, if it has that many. If not all images are sampled, the sample is
    taken from those in `mask`.
    """
    if len(labels) <= max_images:
        return np.ones(len(labels), bool)
    mask = np.ones(len(labels), bool) if mask is None else mask
    counts = np.bincount(labels[mask], minlength=labels.max() + 1)
    counts = np.maximum(np.minimum(counts, 3), counts * min(1, max_images / mask.sum())).astype(int)
    return sample_per_class(mask, labels, counts, rng)


def sample_per_class(
    mask: np.ndarray, labels: np.ndarray, counts: int | np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return a mask of at most `counts` images of each class, sampled from those in `mask`."""
    is_sampled = np.zeros(len(labels), bool)
    for label, count in enumerate(np.broadcast_to(counts, labels.max() + 1)):
        is_sampled[rng.permutation(np.flatnonzero(mask & (labels == label)))[:count]] = True
    return is_sampled
