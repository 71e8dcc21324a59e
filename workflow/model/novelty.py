"""Novelty: detect out-of-distribution images, which belong to none of the classes.

Features are whitened with their within-class covariance, which reduces the weight of directions in which images of the
same class differ. The novelty of an image is 1 - s * sqrt(p), where s is the cosine similarity between its whitened
features and those of the nearest training image, and p its highest probability. image_classifier.py computes it.
`python benchmarks/report_accuracy.py` compares it with the cosine similarity of the original features.

An image is unknown if its novelty exceeds a threshold, which is determined from held-out training images.
"""

from dataclasses import replace
from pathlib import Path

from workflow.files import write_arrays
from workflow.image_classifier import fit_whitening
from workflow.model.feature_set import FeatureSet, normalize
from workflow.model.sampling import stratified_sample
from workflow.records import Results

import numpy as np

MAX_REFERENCES = 1000  # images whose features a model stores (3 MB); a larger dataset is sampled by class
NEIGHBORS = 3  # training images that the report shows next to a misclassified image
FALSE_UNKNOWN_RATE = 0.05  # fraction of held-out training images whose novelty exceeds the threshold
Z = 1.645  # standard score that a normal variable exceeds at that rate


def write_reference_embeddings(
    images: FeatureSet, held_out_in: np.ndarray, probabilities: dict[str, float], seed: int, path: Path
) -> float:
    """Write the arrays from which a model computes the novelty of an image, and return the threshold.

    The file contains the images' features (L2-normalized, half precision), their labels and file names, and the
    threshold, which is NaN if no image can be held out.

    Args:
        images: training images of the model
        held_out_in: the fold that holds out each image, -1 if none does
        probabilities: the highest out-of-fold probability of each held-out image, by digest
        seed: for sampling MAX_REFERENCES images
        path: file to write
    """
    first_of_group = images.mark_first()
    rng = np.random.default_rng(seed)
    sample = np.flatnonzero(stratified_sample(images.labels, MAX_REFERENCES, rng, first_of_group))
    embeddings, labels = normalize(images.features[sample]), images.labels[sample]
    cosines = score_held_out(embeddings, labels, held_out_in[sample])
    is_counted = (held_out_in[sample] >= 0) & first_of_group[sample]
    roots = [probabilities[images.digests[row]] ** 0.5 for row in sample[is_counted]]
    threshold = compute_novelty_threshold(1 - cosines[is_counted] * roots)
    files = np.array(images.files)[sample]
    write_arrays(path, features=embeddings.astype("float16"), labels=labels, files=files, max_novelty=threshold)
    return threshold


def score_held_out(embeddings: np.ndarray, labels: np.ndarray, held_out_in: np.ndarray) -> np.ndarray:
    """Return each image's cosine similarity to the nearest one in the other folds, to which the whitening is fitted.

    To save time, the features are first expressed in an orthonormal basis of their span, which has few dimensions if
    there are few images and does not change the similarities. The value of an image that is never held out is 0.
    """
    dimensions = embeddings.shape[1]
    if len(embeddings) < dimensions:
        embeddings = np.linalg.qr(embeddings.T.astype("float64"))[1].T
    cosines = np.zeros(len(embeddings))
    for fold in range(held_out_in.max() + 1):
        held_out = held_out_in == fold
        whitening = fit_whitening(embeddings[~held_out], labels[~held_out], dimensions)
        cosines[held_out] = np.max(whitening.compare(embeddings[held_out]), axis=1)
    return cosines


def compute_novelty_threshold(novelty: np.ndarray) -> float:
    """Return the novelty that a fraction FALSE_UNKNOWN_RATE of these images exceeds; NaN for fewer than two images.

    It is the mean of the sample quantile and the quantile of a fitted normal distribution, which is less noisy but
    ignores long tails.
    """
    if len(novelty) < 2:
        return float("nan")
    quantile = np.quantile(novelty, 1 - FALSE_UNKNOWN_RATE, method="weibull")
    return float((quantile + novelty.mean() + Z * novelty.std(ddof=1)) / 2)


def add_nearest_neighbors(results: Results, features: np.ndarray, path: Path) -> Results:
    """Return the results, with the files of the nearest training images added to each prediction.

    Args:
        results: results of a model
        features: features of the images, in the order of the predictions
        path: file written by write_reference_embeddings()
    """
    with np.load(path) as saved:
        order = np.argsort(-(features @ saved["features"].astype("float32").T), axis=1)[:, :NEIGHBORS]
        files = saved["files"][order].tolist()
    pairs = zip(results.predictions, files, strict=True)
    return replace(results, predictions=[replace(prediction, neighbors=nearest) for prediction, nearest in pairs])
