"""Evidence: each image is predicted by heads that were not trained on it or its near-duplicates."""

import functools

from support.features import make_images
from workflow.evaluation import evidence, metrics
from workflow.records import Evidence

import numpy as np
import pytest

PARAMETERS = {"epochs": 20, "batch_size": 8, "learning_rate": 0.03, "dropout": 0.1, "seed": 1}
ONE_EACH = ((1,) * 12,) * 3
TWO_EACH = ((2,) * 12,) * 3
HARD = 9  # spread of images that a head often misclassifies


@functools.cache
def cross_validate(sizes: tuple[tuple[int, ...], ...], **options) -> Evidence:
    return evidence.cross_validate(make_images(sizes, **options), **PARAMETERS)


def test_heads_predict_only_images_they_are_not_trained_on():
    images = make_images([[1] * 8] * 3)
    images.labels[0] = 1  # it looks like class a
    result = evidence.cross_validate(images, **PARAMETERS)
    assert [prediction.file for prediction in result.predictions] == images.files
    assert [prediction.digest for prediction in result.predictions] == images.digests
    assert [prediction.file for prediction in result.predictions if not prediction.correct] == images.files[:1]
    assert result.predictions[0].predicted == "a"
    assert result.accuracy == pytest.approx(23 / 24)
    assert result.training_images[images.digests[0]] == ("b", "a0")


def test_learning_curve_rises_with_the_number_of_photos():
    result = cross_validate(ONE_EACH, spread=HARD)
    assert [round(point.images_per_class) for point in result.curve] == [2, 4, 8, 11]
    assert result.curve[0].accuracy < result.curve[-1].accuracy == result.accuracy


def test_heads_of_a_sample_predict_a_large_data_set(monkeypatch):
    monkeypatch.setattr(evidence, "MAX_TRAINED", 30)
    monkeypatch.setattr(evidence, "BLOCK", 50)
    fit_heads, sizes = evidence.fit_heads, []

    def count(features, labels, trained_on, **parameters):
        sizes.append((len(features), len(labels), trained_on.shape[1]))
        return fit_heads(features, labels, trained_on, **parameters)

    monkeypatch.setattr(evidence, "fit_heads", count)
    result = evidence.cross_validate(make_images([[1] * 60] * 3), **PARAMETERS)
    assert sizes == [(30, 30, 30)]  # other images would only cost time
    assert len(result.predictions) == 180
    assert result.accuracy > 0.95
    assert result.sampled


@pytest.mark.parametrize("sizes", [((6,),) * 3, ((1,), (4,))])
def test_nothing_is_measured_without_independent_photos(sizes):
    result = cross_validate(sizes)
    assert (result.accuracy, result.loss, result.before, result.after) == (None, None, None, None)
    assert (result.temperature, result.unsure_below, result.new_session) == (1, None, None)
    assert (result.recall, result.curve, result.predictions) == ({}, [], [])
    assert result.unevaluated == list("abc"[: len(sizes)])
    assert result.training_images.keys() == set(make_images(sizes).digests)
    assert evidence.to_metrics(result) == {"temperature": 1}


def test_class_of_one_burst_is_trained_on_but_not_evaluated():
    result = cross_validate(((6,), (1,) * 6, (1,) * 6))
    assert result.unevaluated == ["a"]
    assert (result.accuracy, result.loss, result.curve, result.temperature) == (None, None, [], 1)
    assert {prediction.class_name for prediction in result.predictions} == {"b", "c"}
    assert result.recall.keys() == {"b", "c"}
    assert all(prediction.correct and prediction.probabilities["a"] > 0 for prediction in result.predictions)
    assert evidence.to_metrics(result).keys() == {"temperature", "cv_recall_b", "cv_recall_c"}


def test_copies_do_not_change_the_evidence():
    once, twice = cross_validate(ONE_EACH, spread=HARD), cross_validate(TWO_EACH, spread=HARD)
    assert len(twice.predictions) == 2 * len(once.predictions)
    assert metrics.count_correct(twice.predictions)[1] == len(once.predictions) == 36
    assert twice.accuracy == pytest.approx(once.accuracy, abs=0.1)
    assert once.accuracy < 0.9
    assert twice.loss == pytest.approx(once.loss, rel=0.25)
    assert twice.temperature == pytest.approx(once.temperature, rel=0.25)
    assert [point.images for point in twice.curve] == [point.images for point in once.curve]
    assert [point.images_per_class for point in twice.curve] == [point.images_per_class for point in once.curve]
    measured = evidence.to_metrics(twice)
    width = measured["cv_accuracy_high"] - measured["cv_accuracy_low"]
    assert width == pytest.approx(np.diff(metrics.confidence_interval(36 * twice.accuracy, 36))[0])


def test_groups_of_any_size_count_once():
    sizes = ((8, 1, 1), (1,) * 6)
    result = cross_validate(sizes)
    assert len(result.predictions) == 16
    assert metrics.count_correct(result.predictions) == (9, 9)
    assert {point.images for point in result.curve} == {9}
    assert result.accuracy == 1
    assert result.unevaluated == []


def test_near_duplicates_in_two_classes_train_both_classes(monkeypatch):
    monkeypatch.setattr(evidence, "MAX_TRAINED", 12)
    images = make_images([[1] * 8] * 2)
    images = images._replace(groups=images.groups[:8] * 2)
    result = evidence.cross_validate(images, **PARAMETERS)
    assert [prediction.probabilities.keys() for prediction in result.predictions] == [{"a", "b"}] * 16


def test_photos_of_a_new_session_are_harder():
    result = cross_validate(((1,) * 12,) * 2, spread=0.5, sessions=4, class_spread=0, seed=1)
    correct, total = result.new_session
    assert total == 24
    assert correct / total < result.accuracy - 0.3
    assert evidence.to_metrics(result)["cv_accuracy_new_session"] == correct / total
    assert f"{correct / total:.0%}" in metrics.describe_cross_validation(result)


def test_near_duplicates_in_sessions_count_once():
    result = cross_validate(((3,) * 6,) * 2, sessions=3)
    assert result.new_session[1] == 12


@pytest.mark.parametrize("sessions", [0, 2])
def test_accuracy_on_new_sessions_is_unknown_for_few_sessions(sessions):
    result = cross_validate(((1,) * 6,) * 2, sessions=sessions)
    assert result.new_session is None
    assert "cv_accuracy_new_session" not in evidence.to_metrics(result)


def test_probabilities_are_calibrated():
    result = cross_validate(ONE_EACH, spread=HARD)
    assert result.temperature < 0.8
    assert result.after.error < result.before.error
    assert result.loss == pytest.approx(
        metrics.summarize(result.predictions).loss, rel=0.3
    )  # loss is a mean over repeats


def test_unsure_predictions_are_those_below_the_threshold():
    result = cross_validate(ONE_EACH, spread=HARD)
    sure = [prediction for prediction in result.predictions if prediction.probability >= result.unsure_below]
    assert 10 <= len(sure) < len(result.predictions)
    assert sum(prediction.correct for prediction in sure) / len(sure) >= 0.95 > result.accuracy
    assert evidence.to_metrics(result)["unsure_below"] == result.unsure_below


def test_written_evidence_can_be_read(tmp_path):
    for number, sizes in enumerate((((6,), (1,) * 6, (1,) * 6), ONE_EACH)):
        result = cross_validate(sizes, spread=HARD if number else 1)
        result.write(tmp_path / "cross_validation.json")
        assert Evidence.read(tmp_path / "cross_validation.json") == result
