"""How good a model is, from its predictions, and what so many of them prove."""

from workflow.judging import evaluation
from workflow.records import Prediction

import pytest
from scipy.stats import binomtest


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # from the paper's formula, with z = 1.959964
    [(0, 2, 0.0, 0.710), (1, 2, 0.095, 0.905), (2, 2, 0.290, 1.0), (95, 100, 0.885, 0.981), (900, 1000, 0.880, 0.917)],
)
def test_interval_is_that_of_agresti_and_coull_and_holds_wilsons(right, total, low, high):
    assert (found := evaluation.interval(right, total)) == pytest.approx((low, high), abs=0.001)
    wilson = binomtest(right, total).proportion_ci(method="wilson")
    assert found[0] <= wilson.low + 1e-6
    assert found[1] >= wilson.high - 1e-6


@pytest.mark.parametrize(
    ("better", "worse", "needed"), [(0.5, 0, 12), (1, 0, 6), (0.05, 0, 114), (0.1, 0.05, 270), (0.9, 0.1, 9)]
)
def test_images_to_settle_agree_with_the_exact_test(better, worse, needed):
    assert evaluation.images_to_settle(better, worse) == needed
    for share, significant in ((0.8, False), (1.2, True)):
        only_one, only_other = round(share * needed * better), round(share * needed * worse)
        assert (binomtest(only_one, only_one + only_other).pvalue <= 0.05) == significant


def predict(file: str, label: str, chances: dict | str) -> Prediction:
    """The prediction of a model that gives these probabilities, or this reason for none."""
    if isinstance(chances, dict):
        best = max(chances, key=chances.get)
        chances = {"label": best, "probability": chances[best], "probabilities": chances}
    return evaluation.to_prediction(file, label, chances)


def test_score_counts_right_answers_recall_and_confusions_and_a_refused_image_is_wrong():
    found = [
        predict("1", "a", {"a": 0.9, "b": 0.1}),
        predict("2", "a", {"a": 0.2, "b": 0.8}),
        predict("3", "b", {"a": 0.3, "b": 0.7}),
        predict("4", "a", "not an image"),
        predict("5", "a", {"a": 0.4, "b": 0.6}),
    ]
    assert [one.predicted for one in found] == ["a", "b", "b", "", "b"]
    assert evaluation.count_right(found) == 2
    assert evaluation.recall(found) == {"a": 0.25, "b": 1.0}
    assert evaluation.confusions(found) == [("a", "b", 2), ("a", "", 1)]
    assert "2 of 5 test images are right. So few images only show" in evaluation.describe_test(found)
    assert "That shows" in evaluation.describe_test(found * 20)
