"""Calibration: the temperature, the calibration error, and the threshold of unsure predictions."""

from workflow.evaluation import calibration

import numpy as np
import pytest


@pytest.mark.parametrize("sharpness", [0.3, 3])
def test_temperature_corrects_probabilities_in_both_directions(sharpness):
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(4000, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(3, p=row) for row in true])
    raw = calibration.apply_temperature(true, 1 / sharpness)[None]
    temperature = calibration.fit_temperature(raw, labels)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    corrected = calibration.apply_temperature(raw, temperature)
    before, after = (calibration.reliability(values, labels).error for values in (raw, corrected))
    assert after < 0.03 < before


def test_few_correct_predictions_cause_no_overconfidence():
    raw, labels = np.full((1, 10, 2), 0.1), np.tile([0, 1], 5)
    raw[0, np.arange(10), labels] = 0.9
    corrected = calibration.apply_temperature(raw, calibration.fit_temperature(raw, labels))
    assert 0.9 < corrected.max() < 0.999


def compute_threshold(*predictions: tuple[float, bool]) -> float | None:
    """Return the threshold for pairs of a probability and whether the prediction is correct."""
    probabilities = np.array([[probability, 1 - probability] for probability, _ in predictions])
    labels = np.array([0 if is_correct else 1 for _, is_correct in predictions])
    return calibration.compute_unsure_threshold(probabilities, labels)


def make_predictions(correct: int, wrong: int) -> list[tuple[float, bool]]:
    """Return predictions, the wrong ones first, with probabilities that increase from 0.5."""
    count = correct + wrong
    return [(0.5 + 0.5 * number / count, number >= wrong) for number in range(count)]


@pytest.mark.parametrize(
    ("correct", "wrong", "threshold"),
    [
        (10, 0, 0.5),  # all are sure
        (9, 0, None),  # too few
        (20, 20, 0.5 + 0.5 * 19 / 40),  # 20 of 21
        (19, 20, 0.5 + 0.5 * 19 / 39),  # 19 of 20
        (12, 20, 0.5 + 0.5 * 20 / 32),  # 12 of 12
        (9, 20, None),
    ],
)
def test_95_percent_of_sure_predictions_are_correct(correct, wrong, threshold):
    assert compute_threshold(*make_predictions(correct, wrong)) == (
        threshold if threshold is None else pytest.approx(threshold)
    )


def test_wrong_prediction_above_all_others_sets_no_threshold():
    assert compute_threshold(*make_predictions(15, 0), (0.999, False)) is None
    assert compute_threshold(*make_predictions(19, 0), (0.999, False)) == pytest.approx(0.5)


def test_equal_probabilities_are_on_the_same_side():
    assert compute_threshold(*[(0.9, True)] * 12, *[(0.9, False)] * 12) is None
    assert compute_threshold(*[(0.9, False)] * 12, *[(0.9, True)] * 12) is None
    assert compute_threshold(*[(0.95, True)] * 12, *[(0.9, True)] * 6, *[(0.9, False)] * 6) == pytest.approx(0.95)


def test_threshold_is_at_most_the_required_accuracy():
    assert compute_threshold(*[(0.999, True)] * 12) == calibration.MIN_SURE_ACCURACY
