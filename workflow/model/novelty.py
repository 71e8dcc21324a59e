"""Novelty: detect photos that belong to no class (out of distribution).

Features are whitened by their scatter within the classes, which reduces the weight of directions in which photos of
one class differ. The familiarity of a photo is the cosine between its whitened features and those of the nearest
training photo, times the square root of its highest probability; its novelty is 1 minus that. image_classifier.py
computes it for each image. `python benchmarks/findings.py` compares it with the plain cosine.

The limit is computed from the novelty of held-out training photos, with their out-of-fold probabilities.
"""

from dataclasses import replace
from pathlib import Path

from workflow.files import write_arrays
from workflow.image_classifier import fit_whitening
from workflow.model.feature_set import FeatureSet, normalize
from workflow.model.sampling import stratified_sample
from workflow.records import Results

import numpy as np

MAX_REFERENCES = 1000  # photos whose features a model stores (3 MB); a larger data set is sampled by class
NEIGHBORS = 3  # training photos shown next to a misclassified one
FALSE_UNKNOWN_RATE = 0.05  # fraction of held-out photos of the classes above the limit
Z = 1.645  # standard score that a normal variable exceeds at that rate


def write_reference_embeddings(
    images: FeatureSet, held_out_in: np.ndarray, probabilities: dict[str, float], seed: int, path: Path
) -> float:
    """Write the arrays from which a model computes the novelty of an image, and return the limit.

    The file contains the features of the photos (length 1, half precision), their labels and file names, and the limit,
    which is NaN if no photo can be held out.

    Args:
        images: training images of the model
        held_out_in: the fold of each image, -1 if it is never held out
        probabilities: the highest out-of-fold probability of each held-out image, by digest
        seed: for sampling MAX_REFERENCES photos
        path: file to write
    """
    first_of_group = images.mark_first()
    rng = np.random.default_rng(seed)
    sample = np.flatnonzero(stratified_sample(images.labels, MAX_REFERENCES, rng, first_of_group))
    units, labels = normalize(images.features[sample]), images.labels[sample]
    cosines = score_held_out(units, labels, held_out_in[sample])
    is_counted = (held_out_in[sample] >= 0) & first_of_group[sample]
    roots = [probabilities[images.digests[row]] ** 0.5 for row in sample[is_counted]]
    limit = compute_novelty_limit(1 - cosines[is_counted] * roots)
    files = np.array(images.files)[sample]
    write_arrays(path, features=units.astype("float16"), labels=labels, files=files, max_novelty=limit)
    return limit


def score_held_out(units: np.ndarray, labels: np.ndarray, held_out_in: np.ndarray) -> np.ndarray:
    """Return the cosine of each photo to its nearest one in the other folds, to which the whitening is fitted.

    The features are first expressed in an orthonormal basis of their span, which has few dimensions for few photos and
    changes no cosine. The value of a photo that is never held out is 0.
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


def compute_novelty_limit(novelty: np.ndarray) -> float:
    """Return the novelty that a fraction FALSE_UNKNOWN_RATE of these photos exceeds; NaN for fewer than two photos.

    It is the mean of the sample quantile and the quantile of a normal distribution, which is less noisy but ignores
    long tails.
    """
    if len(novelty) < 2:
        return float("nan")
    quantile = np.quantile(novelty, 1 - FALSE_UNKNOWN_RATE, method="weibull")
    return float((quantile + novelty.mean() + Z * novelty.std(ddof=1)) / 2)


def add_nearest_neighbors(results: Results, features: np.ndarray, path: Path) -> Results:
    """Return the results, with the files of the nearest training photos added to each prediction.

    Args:
        results: results of a model
        features: features of the images, in the order of the predictions
        path: file that write_reference_embeddings() wrote
    """
    with np.load(path) as saved:
        order = np.argsort(-(features @ saved["features"].astype("float32").T), axis=1)[:, :NEIGHBORS]
        files = saved["files"][order].tolist()
    pairs = zip(results.predictions, files, strict=True)
    return replace(results, predictions=[replace(prediction, neighbors=nearest) for prediction, nearest in pairs])
