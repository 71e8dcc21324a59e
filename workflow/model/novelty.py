"""What tells photos of other things from photos of the classes.

Features are whitened by their scatter within the classes, so that directions in which photos of one class differ count
less. A photo is as familiar as the cosine between its whitened features and those of the nearest training photo, times
the square root of its highest probability; its novelty is 1 minus that. `python benchmarks/findings.py` compares it
with the plain cosine. image_classifier.py has the formula, because it computes the novelty of each image that it is
given.

The limit comes from the novelty of training photos that were held out, with their near-duplicates, together with the
probability that cross-validation gave them.
"""

from dataclasses import replace
from pathlib import Path

from workflow.files import write_arrays
from workflow.image_classifier import fit_whitening
from workflow.model.feature_set import FeatureSet
from workflow.model.sampling import choose
from workflow.records import Results

import numpy as np

MAX_REFERENCES = 1000  # photos that a model keeps the features of: 3 MB; of more, a part of each class is drawn
NEIGHBORS = 3  # photos that are shown beside a misclassified one
OWN_UNKNOWN = 0.05  # fraction of held-out photos of the classes that are called unknown
Z = 1.645  # standard deviations above its mean, where a normal variable has that fraction left


def write_references(
    images: FeatureSet, held_out_in: np.ndarray, probabilities: dict[str, float], seed: int, path: Path
) -> float:
    """Write the data by which a model finds images of other things, and return the limit of the novelty.

    The file has the features of the photos, of length 1 in half precision, their labels and files, and the limit, which
    is NaN where no photo could be held out.

    Args:
        images: that the model is trained on
        held_out_in: the fold of each, -1 for one that is never held out
        probabilities: the highest probability of each photo that was held out, by its digest
        seed: draws MAX_REFERENCES of more photos
        path: of the file
    """
    first_of_group = images.mark_first()
    chosen = np.flatnonzero(choose(images.labels, MAX_REFERENCES, np.random.default_rng(seed), first_of_group))
    units, labels = images.features[chosen], images.labels[chosen]
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    familiarity = score_held_out(units, labels, held_out_in[chosen])
    counted = np.flatnonzero((held_out_in[chosen] >= 0) & first_of_group[chosen])
    roots = [probabilities[images.digests[chosen[row]]] ** 0.5 for row in counted]
    limit = find_limit(1 - familiarity[counted] * roots)
    write_arrays(
        path,
        features=units.astype("float16"),
        labels=labels,
        files=np.array(images.files)[chosen],
        max_novelty=limit,
    )
    return limit


def score_held_out(units: np.ndarray, labels: np.ndarray, held_out_in: np.ndarray) -> np.ndarray:
    """Return the cosine of each photo to its nearest one in another fold; the whitening is fitted to those other folds.

    The features are first written in an orthonormal basis of their own span, which has few dimensions for few photos
    and changes no cosine. Photos that are never held out get 0.
    """
    dimensions = units.shape[1]
    if len(units) < dimensions:
        units = np.linalg.qr(units.T.astype("float64"))[1].T
    cosines = np.zeros(len(units))
    for fold in range(held_out_in.max() + 1):
        held_out = held_out_in == fold
        whitening = fit_whitening(units[~held_out], labels[~held_out], dimensions)
        cosines[held_out] = np.max(whitening.compare(units[held_out]), axis=1)
    return cosines


def find_limit(novelty: np.ndarray) -> float:
    """Return the novelty above which a photo is unknown: OWN_UNKNOWN of the classes' own photos are.

    It is the mean of the quantile of these photos and of that of a normal distribution, which has less noise but knows
    nothing of long tails. It is NaN for fewer than two photos.
    """
    if len(novelty) < 2:
        return float("nan")
    quantile = np.quantile(novelty, 1 - OWN_UNKNOWN, method="weibull")
    return float((quantile + novelty.mean() + Z * novelty.std(ddof=1)) / 2)


def add_nearest_neighbors(results: Results, features: np.ndarray, path: Path) -> Results:
    """Return the results, each prediction with the files of the training photos that its image is nearest to.

    `features` has those of the images, in the order of the predictions.
    """
    with np.load(path) as saved:
        order = np.argsort(-(features @ saved["features"].astype("float32").T), axis=1)[:, :NEIGHBORS]
        files = saved["files"][order].tolist()
    predictions = [replace(one, neighbors=some) for one, some in zip(results.predictions, files, strict=True)]
    return replace(results, predictions=predictions)
