"""How good a model is, from its predictions, and what so many of them prove."""

import math
import re
from dataclasses import replace

from workflow.evaluation import metrics
from workflow.records import Evidence, Prediction

import pytest
from scipy.stats import binomtest


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),  # from the paper's formula, with z = 1.959964
    [(0, 2, 0.0, 0.710), (1, 2, 0.095, 0.905), (2, 2, 0.290, 1.0), (95, 100, 0.885, 0.981), (900, 1000, 0.880, 0.917)],
)
def test_interval_is_that_of_agresti_and_coull(correct, total, low, high):
    assert (found := metrics.interval(correct, total)) == pytest.approx((low, high), abs=0.001)
    wilson = binomtest(correct, total).proportion_ci(method="wilson")
    assert found[0] <= wilson.low + 1e-6
    assert found[1] >= wilson.high - 1e-6


@pytest.mark.parametrize(
    ("better", "worse", "needed"), [(0.5, 0, 12), (1, 0, 6), (0.05, 0, 114), (0.1, 0.05, 270), (0.9, 0.1, 9)]
)
def test_images_to_settle_agree_with_the_exact_test(better, worse, needed):
    assert metrics.images_to_settle(better, worse) == needed
    for share, significant in ((0.8, False), (1.2, True)):
        only_one, only_other = round(share * needed * better), round(share * needed * worse)
        assert (binomtest(only_one, only_one + only_other).pvalue <= 0.05) == significant


def predict(file: str, label: str, answer: dict[str, float] | str, group: str = "") -> Prediction:
    """Return the prediction of a model that gives these probabilities, or this reason for none."""
    if isinstance(answer, dict):
        best = max(answer, key=answer.get)
        answer = {"label": best, "probability": answer[best], "probabilities": answer}
    return replace(metrics.to_prediction(file, label, answer), digest=file, group=group or file)


PREDICTIONS = [
    predict("1", "a", {"a": 0.9, "b": 0.1}),
    predict("2", "a", {"a": 0.2, "b": 0.8}),
    predict("3", "b", {"a": 0.3, "b": 0.7}),
    predict("4", "a", "not an image"),
    predict("5", "a", {"a": 0.4, "b": 0.6}),
]


def test_refused_image_counts_as_a_mistake():
    assert [one.predicted for one in PREDICTIONS] == ["a", "b", "b", "", "b"]
    assert metrics.count_correct(PREDICTIONS) == (2, 5)
    assert metrics.recall(PREDICTIONS) == {"a": 0.25, "b": 1.0}
    assert metrics.confusions(PREDICTIONS) == [("a", "b", 2), ("a", "", 1)]
    results = metrics.summarize(PREDICTIONS)
    assert results.accuracy == pytest.approx(0.4)
    assert results.loss == pytest.approx(-sum(map(math.log, (0.9, 0.2, 0.7, metrics.EPSILON, 0.4))) / 5)


def test_near_duplicates_count_once():
    copies = [replace(one, file=f"copy {one.file}") for one in PREDICTIONS]
    assert metrics.one_per_group(PREDICTIONS + copies) == PREDICTIONS
    assert metrics.count_correct(copies + PREDICTIONS) == (2, 5)
    nameless = [replace(one, group="") for one in PREDICTIONS]  # as an earlier release has stored them
    assert metrics.one_per_group(nameless) == nameless


def test_answer_of_an_earlier_release_is_neither_sure_nor_unsure():
    answer = {"label": "a", "probability": 0.9, "probabilities": {"a": 0.9}, "unknown": False}
    assert metrics.to_prediction("1", "a", answer).unsure is None
    assert metrics.to_prediction("1", "a", answer | {"unsure": True}).unsure is True


def test_test_images_like_training_images_prove_nothing():
    assert "2 of 5 " in metrics.describe_test(PREDICTIONS, PREDICTIONS)
    assert "1 of 2 " in metrics.describe_test(PREDICTIONS, PREDICTIONS[:2])
    assert "prove nothing" in metrics.describe_test(PREDICTIONS, [])
    assert "only" in metrics.describe_test(PREDICTIONS, PREDICTIONS)
    many = [replace(one, file=f"{n}", digest=f"{n}", group=f"{n}") for n, one in enumerate(PREDICTIONS * 20)]
    assert "40 of 100 " in (told := metrics.describe_test(many, many))
    assert "only" not in told


def make_evidence(predictions: list[Prediction], **fields) -> Evidence:
    return Evidence(accuracy=0.4, predictions=predictions, **fields)


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (make_evidence(PREDICTIONS), "2 of 5 .*class is a, with 1 of 4 .*taken for b"),
        (make_evidence([*PREDICTIONS, replace(PREDICTIONS[0], file="6")]), "2 of 5 photos .*1 near-duplicate"),
        (make_evidence(PREDICTIONS[:1]), "1 of 1 photos"),
        (make_evidence(PREDICTIONS, unevaluated=["c\n"]), r"c\\n: .*2 of 5 photos"),
        (make_evidence([], unevaluated=["a", "b"]), "a, b: "),
        (make_evidence(PREDICTIONS, new_session=(1, 4)), "40%.* session.* 25%"),
    ],
    ids=["mistakes", "near-duplicates", "no mistake", "a class of one burst", "bursts alone", "sessions"],
)
def test_cross_validation_is_described_with_its_limits(evidence, words):
    told = metrics.describe_cross_validation(evidence)
    assert re.search(words, told, re.DOTALL)
    assert ("weakest" in told) == (len(evidence.predictions) > 1)
    assert ("confidence" in told) == (not evidence.unevaluated)
