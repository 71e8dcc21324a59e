"""How well a way of training does on images that it has not seen, measured with few images.

Each image is held out once: the folds are stratified, and what answers for an image was trained on all other folds
(Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from workflow.model import network

import numpy as np


def assign_folds(
    labels: np.ndarray, folds: int, seed: int, groups: Sequence[Any] | np.ndarray | None = None
) -> np.ndarray:
    """The fold that holds out each image, drawn by seed; the images of each class are spread evenly over the folds.

    Images of one of the `groups`, of which each image names its own, have the same fold.
    """
    _, first, of_group = np.unique(
        range(len(labels)) if groups is None else groups, return_index=True, return_inverse=True
    )
    order = np.lexsort((np.random.default_rng(seed).random(len(first)), labels[first]))  # by class, shuffled within it
    fold = np.empty(len(first), int)
    fold[order] = np.arange(len(first)) % folds
    return fold[of_group]


def train_heads(
    features: np.ndarray,
    labels: np.ndarray,
    trained_on: np.ndarray,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
    seed: int,
):
    """A Keras model that is many heads side by side, each trained on some of the images.

    It gives the probabilities (images, heads, classes). `trained_on` (heads, images) is true where a head is trained on
    an image. All heads are trained at once: the loss of each counts only its own images, and no weight belongs to two
    heads. So many heads take hardly longer than one.
    """
    import keras

    heads, images = trained_on.shape
    keras.utils.set_random_seed(seed)
    model = network.build_heads(heads, int(labels.max()) + 1, dropout, seed)
    network.compile_model(model, learning_rate, steps=epochs * -(-images // batch_size))
    share = trained_on.mean(axis=1, keepdims=True)  # of the images; it makes up for those that do not count
    weights = np.transpose(heads * trained_on / share).astype("float32")
    targets = np.repeat(labels[:, None], heads, axis=1)
    model.fit(features, targets, batch_size, epochs, sample_weight=weights, verbose=0)
    return model


def cross_validate_heads(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], folds: int, seed: int, **parameters: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each fold the indices of its images, and the probabilities (images, classes) of a head on their features.

    `parameters` are those of train_heads().
    """
    held_out_in = assign_folds(labels, folds, seed, groups)
    trained_on = held_out_in != np.arange(folds)[:, None]
    found = train_heads(features, labels, trained_on, seed=seed, **parameters)(features, training=False).numpy()
    for fold, held_out in enumerate(~trained_on):
        yield np.flatnonzero(held_out), found[held_out, fold]


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
        model = network.build_small(int(labels.max()) + 1, pixels.shape[1], filters, dropout, seed)
        network.compile_model(model, learning_rate, steps=epochs * -(-len(train) // batch_size))
        model.fit(pixels[train], labels[train], batch_size, epochs, verbose=0)
        yield held_out, model(pixels[held_out], training=False).numpy()
