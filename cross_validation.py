"""How well a way of training does on images that it has not seen, measured with few images.

Each image is held out once: the folds are stratified, and a new model is trained on all other folds
(Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974).
"""

from collections.abc import Callable, Iterator

import network

import numpy as np


def cross_validate(
    inputs: np.ndarray,
    labels: np.ndarray,
    build: Callable,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    folds: int,
) -> Iterator[tuple[object, np.ndarray]]:
    """For each fold the model that has not seen it, and the indices of its images.

    `inputs` has an image's features or pixels in each row, `labels` has shape (images,), `build(seed=...)` gives a new
    model. Stop early, and no further model is trained.
    """
    import keras
    from sklearn.model_selection import StratifiedKFold

    for train, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(inputs, labels):
        keras.utils.set_random_seed(seed)
        model = build(seed=seed)
        network.compile_model(model, learning_rate, steps=epochs * -(-len(train) // batch_size))
        model.fit(inputs[train], labels[train], batch_size, epochs, verbose=0)
        yield model, held_out
