"""Cross-validate models: predict each image once, by a model that was trained on the other folds.

Source: Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from workflow.evaluation.folds import assign_folds
from workflow.model import head

import numpy as np


def cross_validate_heads(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], folds: int, seed: int, **parameters: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of the images of each fold, and their probabilities (images, classes).

    Args:
        features: shape (images, FEATURES)
        labels: shape (images,)
        groups: group of each image; a group shares a fold
        folds: number of folds
        seed: for the folds and the training
        parameters: passed to fit_heads()
    """
    held_out_in = assign_folds(labels, folds, seed, groups)
    trained_on = held_out_in != np.arange(folds)[:, None]
    weights = head.fit_heads(features, labels, trained_on, seed=seed, **parameters)
    for fold, held_out in enumerate(~trained_on):
        yield np.flatnonzero(held_out), head.predict_heads(weights[:, [fold]], features[held_out])[:, 0]
