"""Measure and improve calibration: how well probabilities match the fraction of correct predictions."""

from workflow.evaluation import metrics
from workflow.records import Bin, Calibration

import numpy as np

TEMPERATURES = np.geomspace(0.1, 10, 101)  # to choose from
MIN_SURE_ACCURACY = 0.95  # of the predictions that are not marked unsure
MIN_SURE_PREDICTIONS = 10  # fewer predictions say too little about the accuracy


def compute_unsure_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the lowest probability at or above which 95% of the predictions are correct; None if there is none.

    At least MIN_SURE_PREDICTIONS predictions must reach it. If all reach it, the threshold is lowered to
    MIN_SURE_ACCURACY, because calibrated predictions with that probability are correct that often.

    Args:
        probabilities: calibrated, shape (images, classes)
        labels: shape (images,)
    """
    largest = probabilities.max(axis=1)
    order = np.argsort(-largest, kind="stable")
    correct = (probabilities.argmax(axis=1) == labels)[order]
    counts = np.arange(1, len(order) + 1)
    is_last = np.append(np.diff(largest[order]) < 0, True)  # of several predictions with the same probability
    is_sure = (np.cumsum(correct) / counts >= MIN_SURE_ACCURACY) & (counts >= MIN_SURE_PREDICTIONS)
    candidates = np.flatnonzero(is_last & is_sure)
    if not len(candidates):
        return None
    threshold = float(largest[order[candidates[-1]]])
    return min(threshold, MIN_SURE_ACCURACY) if candidates[-1] == len(order) - 1 else threshold


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logits of probabilities (..., classes) by a temperature, and return the new probabilities."""
    powers = np.maximum(probabilities, 1e-12) ** (1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimizes the cross-entropy of probabilities (repeats, images, classes).

    The method is temperature scaling (Guo et al., On Calibration of Modern Neural Networks, 2017), with a normal prior
    of variance 1/2 on the log temperature. Without the prior, the model would become overconfident if all predictions
    for a small dataset were correct.
    """
    rows = np.arange(len(labels))

    def loss(temperature: float) -> float:
        calibrated = apply_temperature(probabilities, temperature)
        return len(labels) * metrics.cross_entropy(calibrated[..., rows, labels]) + np.log(temperature) ** 2

    return float(min(TEMPERATURES, key=loss))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """Return the expected calibration error (Guo et al., 2017) of probabilities (..., images, classes), in ten bins."""
    largest, correct = probabilities.max(axis=-1).ravel(), (probabilities.argmax(axis=-1) == labels).ravel()
    numbers = np.minimum((10 * largest).astype(int), 9)
    bins = [
        Bin(float(largest[mask].mean()), float(correct[mask].mean()), float(mask.mean()))
        for mask in (numbers == number for number in range(10))
        if mask.any()
    ]
    return Calibration(sum(b.fraction * abs(b.probability - b.accuracy) for b in bins), bins)
