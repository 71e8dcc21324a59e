"""Probabilities that are true: the temperature, the calibration error, and the limit below which they are unsure."""

from workflow.evaluation import calibration

import numpy as np
import pytest


@pytest.mark.parametrize("sharpness", [0.3, 3])
def test_temperature_corrects_probabilities_in_both_directions(sharpness):
    draw = np.random.default_rng(3)
    logits = draw.normal(scale=2, size=(4000, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([draw.choice(3, p=row) for row in true])
    raw = calibration.apply_temperature(true, 1 / sharpness)[None]
    temperature = calibration.fit_temperature(raw, labels)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    corrected = calibration.apply_temperature(raw, temperature)
    before, after = (calibration.reliability(one, labels).error for one in (raw, corrected))
    assert after < 0.03 < before


def test_few_correct_predictions_do_not_make_a_model_sure():
    raw, labels = np.full((1, 10, 2), 0.1), np.tile([0, 1], 5)
    raw[0, np.arange(10), labels] = 0.9
    corrected = calibration.apply_temperature(raw, calibration.fit_temperature(raw, labels))
    assert 0.9 < corrected.max() < 0.999


def find_unsure_below(*predictions: tuple[float, bool]) -> float | None:
    """Return the limit for predictions with these probabilities, which are correct or not."""
    probabilities = np.array([[one, 1 - one] for one, _ in predictions])
    return calibration.find_unsure_below(probabilities, np.array([0 if correct else 1 for _, correct in predictions]))


def rise(correct: int, wrong: int) -> list[tuple[float, bool]]:
    """Return predictions whose probabilities rise from 0.5, the wrong ones first."""
    count = correct + wrong
    return [(0.5 + 0.5 * number / count, number >= wrong) for number in range(count)]


@pytest.mark.parametrize(
    ("correct", "wrong", "limit"),
    [
        (10, 0, 0.5),  # all are sure
        (9, 0, None),  # too few to say so
        (20, 20, 0.5 + 0.5 * 19 / 40),  # 20 of 21
        (19, 20, 0.5 + 0.5 * 19 / 39),  # 19 of 20
        (12, 20, 0.5 + 0.5 * 20 / 32),  # 12 of 12
        (9, 20, None),
    ],
)
def test_95_of_100_predictions_above_the_limit_are_correct(correct, wrong, limit):
    assert find_unsure_below(*rise(correct, wrong)) == (limit if limit is None else pytest.approx(limit))


def test_surest_prediction_that_is_wrong_sets_no_limit():
    assert find_unsure_below(*rise(15, 0), (0.999, False)) is None
    assert find_unsure_below(*rise(19, 0), (0.999, False)) == pytest.approx(0.5)


def test_equal_probabilities_are_on_one_side_of_the_limit():
    assert find_unsure_below(*[(0.9, True)] * 12, *[(0.9, False)] * 12) is None
    assert find_unsure_below(*[(0.9, False)] * 12, *[(0.9, True)] * 12) is None
    assert find_unsure_below(*[(0.95, True)] * 12, *[(0.9, True)] * 6, *[(0.9, False)] * 6) == pytest.approx(0.95)


def test_limit_is_no_higher_than_the_accuracy_it_promises():
    assert find_unsure_below(*[(0.999, True)] * 12) == calibration.SURE_ACCURACY
