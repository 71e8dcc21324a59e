"""Metrics of predictions, and their uncertainty."""

import math
import re
from dataclasses import replace

from workflow.errors import WorkflowError
from workflow.evaluation import metrics
from workflow.records import Evidence, Prediction

import pytest
from scipy.stats import binomtest


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),  # from the paper's formula, with z = 1.959964
    [(0, 2, 0.0, 0.710), (1, 2, 0.095, 0.905), (2, 2, 0.290, 1.0), (95, 100, 0.885, 0.981), (900, 1000, 0.880, 0.917)],
)
def test_interval_equals_that_of_agresti_and_coull(correct, total, low, high):
    assert (interval := metrics.confidence_interval(correct, total)) == pytest.approx((low, high), abs=0.001)
    wilson = binomtest(correct, total).proportion_ci(method="wilson")
    assert interval[0] <= wilson.low + 1e-6
    assert interval[1] >= wilson.high - 1e-6


@pytest.mark.parametrize(
    ("better", "worse", "needed"), [(0.5, 0, 12), (1, 0, 6), (0.05, 0, 114), (0.1, 0.05, 270), (0.9, 0.1, 9)]
)
def test_required_images_agree_with_the_exact_test(better, worse, needed):
    assert metrics.required_images(better, worse) == needed
    for factor, significant in ((0.8, False), (1.2, True)):
        only_better, only_worse = round(factor * needed * better), round(factor * needed * worse)
        assert (binomtest(only_better, only_better + only_worse).pvalue <= 0.05) == significant


def predict(file: str, label: str, output: dict[str, float] | str, group: str = "") -> Prediction:
    """Return the prediction for these probabilities, or for the message with which a model rejects an image."""
    if isinstance(output, dict):
        best = max(output, key=output.get)
        output = {"label": best, "probability": output[best], "probabilities": output}
    return replace(metrics.to_prediction(file, label, output), digest=file, group=group or file)


PREDICTIONS = [
    predict("1", "a", {"a": 0.9, "b": 0.1}),
    predict("2", "a", {"a": 0.2, "b": 0.8}),
    predict("3", "b", {"a": 0.3, "b": 0.7}),
    predict("4", "a", "not an image"),
    predict("5", "a", {"a": 0.4, "b": 0.6}),
]


def test_rejected_image_counts_as_a_mistake():
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
    groupless = [replace(prediction, group="") for prediction in PREDICTIONS]  # stored by an earlier release
    assert metrics.one_per_group(groupless) == groupless


def test_output_of_an_earlier_release_is_not_marked_unsure():
    output = {"label": "a", "probability": 0.9, "probabilities": {"a": 0.9}, "unknown": False}
    assert metrics.to_prediction("1", "a", output).unsure is None
    assert metrics.to_prediction("1", "a", output | {"unsure": True}).unsure is True


def test_test_images_near_training_images_do_not_count():
    assert "2 of 5 " in metrics.describe_test(PREDICTIONS, PREDICTIONS)
    assert "1 of 2 " in metrics.describe_test(PREDICTIONS, PREDICTIONS[:2])
    assert "near-duplicates of training photos" in metrics.describe_test(PREDICTIONS, [])
    assert "only" in metrics.describe_test(PREDICTIONS, PREDICTIONS)
    many = [replace(one, file=f"{n}", digest=f"{n}", group=f"{n}") for n, one in enumerate(PREDICTIONS * 20)]
    assert "40 of 100 " in (sentence := metrics.describe_test(many, many))
    assert "only" not in sentence
    copies = [replace(one, file=f"copy {one.file}") for one in PREDICTIONS]
    assert re.search("2 of 5 .*5 near-duplicates", metrics.describe_test(PREDICTIONS + copies, PREDICTIONS))


def make_evidence(predictions: list[Prediction], **fields) -> Evidence:
    return Evidence(accuracy=0.4, predictions=predictions, **fields)


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (make_evidence(PREDICTIONS), r"2 of 5 .*class is a \(1 of 4 .*taken for b"),
        (make_evidence([*PREDICTIONS, replace(PREDICTIONS[0], file="6")]), "2 of 5 photos .*1 near-duplicate"),
        (make_evidence(PREDICTIONS[:1]), "1 of 1 photos"),
        (make_evidence(PREDICTIONS, unevaluated=["c\n"]), r"c\\n: .*2 of 5 photos"),
        (make_evidence([], unevaluated=["a", "b"]), "a, b: "),
        (make_evidence(PREDICTIONS, new_session=(1, 4)), "40%.* session.* 25%"),
    ],
    ids=["mistakes", "near-duplicates", "no mistake", "one unevaluated class", "no evaluated class", "sessions"],
)
def test_description_of_cross_validation_states_its_limits(evidence, words):
    lines = metrics.describe_cross_validation(evidence)
    assert re.search(words, lines, re.DOTALL)
    assert ("weakest" in lines) == (len(evidence.predictions) > 1)
    assert ("confidence" in lines) == (not evidence.unevaluated)


def test_metric_names_are_distinct_and_accepted_by_mlflow():
    classes = ["a", "c+", "c#", "a|b|c", "a:b:c", "x" * 240, "x" * 241, "a/b"]
    names = [metrics.metric_name(name) for name in classes]
    assert names[0] == "a"
    assert len(set(names)) == len(classes)
    assert all(len(f"test_recall_{name}") <= 250 for name in names)


@pytest.mark.refused("training: it diverges")
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_training_that_diverges_is_refused(loss):
    metrics.check_convergence({"loss": [1.0, 0.5], "val_loss": [1.0, 0.6]})
    for name in ("loss", "val_loss"):
        with pytest.raises(WorkflowError, match="--learning-rate"):
            metrics.check_convergence({"loss": [1.0, 0.5], "val_loss": [1.0, 0.6]} | {name: [1.0, loss]})


@pytest.mark.refused("training: all probabilities are exactly 1")
def test_saturated_model_is_refused():
    sure, unsure = (Prediction("a/1", "a", "a", probability, {"a": probability}) for probability in (1.0, 0.9999))
    metrics.check_saturation([sure, unsure])
    with pytest.raises(WorkflowError, match="--learning-rate"):
        metrics.check_saturation([sure, sure])
    assert str(metrics.cross_entropy([1.0, 1.0])) == "0.0"
