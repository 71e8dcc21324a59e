"""Split photos into those that a model is trained on and those that evaluate it."""

from collections.abc import Iterator

from workflow.errors import WorkflowError

import numpy as np
from sklearn.model_selection import StratifiedKFold

FOLDS = 5  # if a class has too few photos to hold any out


def split_photos(
    labels: np.ndarray, photos: int, folds: int | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of the training photos and of the held-out photos: once, or for each fold.

    The training photos are a sample of `photos` per class; all others are held out. If a class has no others, or if
    `folds` is given, the photos are cross-validated instead.
    """
    smallest = np.bincount(labels).min()
    if folds or smallest <= photos:
        if smallest < (folds or FOLDS):
            raise WorkflowError(f"{folds or FOLDS} folds need as many photos per class, but a class has {smallest}")
        yield from StratifiedKFold(folds or FOLDS, shuffle=True, random_state=seed).split(labels, labels)
    else:
        rng = np.random.default_rng(seed)
        rows_of_class = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        train = np.concatenate([rng.choice(rows, photos, replace=False) for rows in rows_of_class])
        yield train, np.setdiff1d(np.arange(len(labels)), train)
