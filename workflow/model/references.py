"""The training photos that a model remembers, so that it can say that a photo is like none of them.

How alike two photos are is the cosine between their features. The limit below which a photo counts as unknown comes
from the training photos alone: from how alike each of them is to its nearest other one.
"""

from dataclasses import replace
from pathlib import Path

from workflow.files import write_arrays
from workflow.model.sampling import choose
from workflow.records import Results

import numpy as np

MOST = 1500  # photos that a model remembers: 4 MB; of more, a part of each class is drawn
NEIGHBOURS = 3  # photos that are shown beside a misjudged one
DEVIATIONS = 2.5  # of the similarities below their mean: that lets about 95 of 100 photos of the classes through


def remember(features: np.ndarray, labels: np.ndarray, files: list[str], seed: int, path: Path) -> float:
    """Writes the features of the photos, in half precision and of length 1, their files and the limit.

    Returns the limit. `features` has shape (photos, FEATURES). image_classifier.py reads the file.
    """
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen = np.flatnonzero(choose(labels, MOST, np.random.default_rng(seed)))
    limit = find_limit(units, chosen)
    write_arrays(path, features=units[chosen].astype("float16"), files=np.array(files)[chosen], limit=limit)
    return limit


def find_limit(units: np.ndarray, chosen: np.ndarray) -> float:
    """The similarity below which a photo counts as unknown."""
    similarities = units @ units[chosen].T
    similarities[chosen, np.arange(len(chosen))] = -1  # to itself
    nearest = similarities.max(axis=1)
    return float(nearest.mean() - DEVIATIONS * nearest.std())


def add_neighbours(results: Results, features: np.ndarray, path: Path) -> Results:
    """The results, each prediction with the files of the remembered photos that its image is nearest to.

    `features` has those of the images, in the order of the predictions.
    """
    with np.load(path) as saved:
        order = np.argsort(-(features @ saved["features"].astype("float32").T), axis=1)[:, :NEIGHBOURS]
        files = saved["files"][order].tolist()
    predictions = [replace(one, neighbours=some) for one, some in zip(results.predictions, files, strict=True)]
    return replace(results, predictions=predictions)
