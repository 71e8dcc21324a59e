"""How well a head does on images that it was not trained on, measured with few images.

Each image is held out once: the folds are stratified, and an image is predicted by a head trained on all other folds
(Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from workflow.model import network

import numpy as np


def assign_folds(
    labels: np.ndarray, folds: int, seed: int, groups: Sequence[Any] | np.ndarray | None = None
) -> np.ndarray:
    """Return the fold that holds out each image, drawn by seed.

    The images of one group share a fold. The groups, the largest first, go to the fold that has the smallest fraction
    of their classes so far, so that each class is spread as evenly as its groups allow.

    Args:
        labels: of the images, shape (images,)
        folds: how many there are
        seed: draws the order of groups of one size
        groups: the group of each image; by default, each image is a group of its own
    """
    _, of_group = np.unique(range(len(labels)) if groups is None else groups, return_inverse=True)
    counts = np.zeros((of_group.max() + 1, labels.max() + 1))
    np.add.at(counts, (of_group, labels), 1)
    weights = counts / np.maximum(counts.sum(axis=0), 1)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    filled, fold = np.zeros((folds, counts.shape[1])), np.empty(len(counts), int)
    for group in order:
        of_classes, of_all = filled @ weights[group], filled.sum(axis=1)
        fold[group] = np.lexsort((of_all, of_classes))[0]
        filled[fold[group]] += weights[group]
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
    """Return a Keras model that is many heads side by side, each trained on some of the images.

    It gives probabilities of shape (images, heads, classes). All heads are trained at once: the loss of each counts
    only its own images, and no weight belongs to two heads. So many heads take hardly longer than one.

    Args:
        features: shape (images, FEATURES)
        labels: shape (images,)
        trained_on: shape (heads, images), true where a head is trained on an image
        epochs, batch_size, learning_rate, dropout, seed: as for the head of a run
    """
    heads = len(trained_on)
    model = network.build_heads(heads, int(labels.max()) + 1, dropout, seed)
    fraction = trained_on.mean(axis=1, keepdims=True)  # of the images; it makes up for those that do not count
    weights = np.transpose(heads * trained_on / fraction).astype("float32")
    targets = np.repeat(labels[:, None], heads, axis=1)
    network.fit(model, features, targets, epochs, batch_size, learning_rate, seed, weights)
    return model


def cross_validate_heads(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], folds: int, seed: int, **parameters: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each fold the indices of its images, and the probabilities (images, classes) that a head gives them.

    `parameters` are those of train_heads().
    """
    held_out_in = assign_folds(labels, folds, seed, groups)
    trained_on = held_out_in != np.arange(folds)[:, None]
    probabilities = train_heads(features, labels, trained_on, seed=seed, **parameters)(features, training=False).numpy()
    for fold, held_out in enumerate(~trained_on):
        yield np.flatnonzero(held_out), probabilities[held_out, fold]
