"""Cross-validate models: predict each image once, by a model that was trained on the other folds.

Source: Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from workflow.evaluation.folds import assign_folds
from workflow.model import head, small_network

import numpy as np


def cross_validate_heads(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], folds: int, seed: int, **parameters: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of the images of each fold, and their probabilities (images, classes).

    Args:
        features: shape (images, FEATURES)
        labels: shape (images,)
        groups: near-duplicates, which share a fold
        folds: number of folds
        seed: for the folds and the training
        parameters: of fit_heads()
    """
    held_out_in = assign_folds(labels, folds, seed, groups)
    trained_on = held_out_in != np.arange(folds)[:, None]
    weights = head.fit_heads(features, labels, trained_on, seed=seed, **parameters)
    for fold, held_out in enumerate(~trained_on):
        yield np.flatnonzero(held_out), head.predict_heads(weights[:, [fold]], features[held_out])[:, 0]


def cross_validate_small(
    pixels: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    folds: int,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
    filters: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each fold the indices of its images, and the probabilities (images, classes) of a small network.

    It is a generator: if the caller stops early, the remaining networks are not trained.
    """
    import keras

    held_out_in = assign_folds(labels, folds, seed, groups)
    for fold in range(folds):
        train, held_out = np.flatnonzero(held_out_in != fold), np.flatnonzero(held_out_in == fold)
        keras.utils.set_random_seed(seed)
        model = small_network.build_small_network(int(labels.max()) + 1, pixels.shape[1], filters, dropout, seed)
        head.compile_model(model, learning_rate, steps=epochs * -(-len(train) // batch_size))
        model.fit(pixels[train], labels[train], batch_size, epochs, verbose=0)
        yield held_out, model(pixels[held_out], training=False).numpy()
