"""Which photos a model learns from, and which it is judged by."""

from collections.abc import Iterator

from workflow.errors import WorkflowError

import numpy as np
from sklearn.model_selection import StratifiedKFold

FOLDS = 5  # where a class has too few photos to leave others


def split_photos(
    labels: np.ndarray, photos: int, folds: int | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The indices of the photos to learn from and of those to judge by: once, or for each fold.

    So many `photos` per class are to learn from, and all others are to judge by. Where a class has no others, or where
    `folds` are asked for, the photos are cross-validated instead.
    """
    fewest = np.bincount(labels).min()
    if folds or fewest <= photos:
        if fewest < (folds or FOLDS):
            raise WorkflowError(f"a class has {fewest} photo(s), but {folds or FOLDS} folds need one each")
        yield from StratifiedKFold(folds or FOLDS, shuffle=True, random_state=seed).split(labels, labels)
    else:
        draw = np.random.default_rng(seed)
        of_class = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        train = np.concatenate([draw.choice(one, photos, replace=False) for one in of_class])
        yield train, np.setdiff1d(np.arange(len(labels)), train)
