"""A part of many images, drawn by class."""

import numpy as np


def choose(labels: np.ndarray, most: int, draw: np.random.Generator) -> np.ndarray:
    """True for at most so many images (two per class at least), of each class the same share."""
    share = min(1, most / len(labels))
    counts = np.maximum(np.minimum(np.bincount(labels), 2), np.bincount(labels) * share).astype(int)
    return take(np.ones(len(labels), bool), labels, counts, draw)


def take(mask: np.ndarray, labels: np.ndarray, counts: int | np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """True for so many images of each class, drawn from those where the mask is true."""
    taken = np.zeros(len(labels), bool)
    for label, count in enumerate(np.broadcast_to(counts, labels.max() + 1)):
        taken[draw.permutation(np.flatnonzero(mask & (labels == label)))[:count]] = True
    return taken
