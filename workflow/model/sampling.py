"""A part of many images, drawn by class."""

import numpy as np


def choose(labels: np.ndarray, most: int, draw: np.random.Generator, mask: np.ndarray | None = None) -> np.ndarray:
    """Return true for at most so many images, or three per class if that is more: of each class the same fraction.

    Of more images, only those where the mask is true are drawn.
    """
    if len(labels) <= most:
        return np.ones(len(labels), bool)
    mask = np.ones(len(labels), bool) if mask is None else mask
    counts = np.bincount(labels[mask], minlength=labels.max() + 1)
    counts = np.maximum(np.minimum(counts, 3), counts * min(1, most / mask.sum())).astype(int)
    return take(mask, labels, counts, draw)


def take(mask: np.ndarray, labels: np.ndarray, counts: int | np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """True for so many images of each class, drawn from those where the mask is true."""
    taken = np.zeros(len(labels), bool)
    for label, count in enumerate(np.broadcast_to(counts, labels.max() + 1)):
        taken[draw.permutation(np.flatnonzero(mask & (labels == label)))[:count]] = True
    return taken
