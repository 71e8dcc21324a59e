"""Probabilities that are true: how far they are from the fraction of correct predictions, and what corrects them."""

from workflow.evaluation import metrics
from workflow.records import Bin, Calibration

import numpy as np

TEMPERATURES = np.geomspace(0.1, 10, 101)  # among which the best is chosen
SURE_ACCURACY = 0.95  # of the predictions that are not unsure
MIN_SURE = 10  # predictions that have to remain: of fewer, an accuracy says nothing


def find_unsure_below(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the lowest probability from which on 95% of the predictions are correct; None when there is none.

    At least MIN_SURE predictions have to remain. If all do, the limit is no higher than SURE_ACCURACY: predictions with
    that probability are as often correct, because it is calibrated. `probabilities` has shape (images, classes).
    """
    largest = probabilities.max(axis=1)
    order = np.argsort(-largest, kind="stable")
    correct = (probabilities.argmax(axis=1) == labels)[order]
    counts = np.arange(1, len(order) + 1)
    is_last = np.append(np.diff(largest[order]) < 0, True)  # of the predictions with this probability
    enough = np.flatnonzero(is_last & (np.cumsum(correct) / counts >= SURE_ACCURACY) & (counts >= MIN_SURE))
    if not len(enough):
        return None
    limit = float(largest[order[enough[-1]]])
    return min(limit, SURE_ACCURACY) if enough[-1] == len(order) - 1 else limit


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities (..., classes) that the same logits give when they are divided by a temperature."""
    powers = np.maximum(probabilities, 1e-12) ** (1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of -log of each image's probability of its class.

    `probabilities` has shape (repeats, images, classes).
    """
    return metrics.cross_entropy(probabilities[:, np.arange(len(labels)), labels])


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest cross-entropy.

    The method is that of Guo et al. (On Calibration of Modern Neural Networks, 2017). The temperature is expected to be
    near 1: its logarithm has a normal prior of variance 1/2. Otherwise a few predictions that are all correct would
    make the model sure of everything. `probabilities` has shape (repeats, images, classes).
    """

    def loss(temperature: float) -> float:
        calibrated = apply_temperature(probabilities, temperature)
        return len(labels) * cross_entropy(calibrated, labels) + np.log(temperature) ** 2

    return float(min(TEMPERATURES, key=loss))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """Return the expected calibration error in ten bins, and the bins that are not empty.

    `probabilities` has shape (repeats, images, classes). The source is that of fit_temperature().
    """
    largest, correct = probabilities.max(axis=-1).ravel(), (probabilities.argmax(axis=-1) == labels).ravel()
    numbers = np.minimum((10 * largest).astype(int), 9)
    bins = [
        Bin(float(largest[mask].mean()), float(correct[mask].mean()), float(mask.mean()))
        for mask in (numbers == number for number in range(10))
        if mask.any()
    ]
    return Calibration(sum(one.fraction * abs(one.probability - one.accuracy) for one in bins), bins)
