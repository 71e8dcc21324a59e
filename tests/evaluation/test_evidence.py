"""Evidence from cross-validation: each image is judged by heads that have not seen it or a near-duplicate of it."""

import functools

from support.features import make_images
from workflow.evaluation import evidence, metrics
from workflow.records import Evidence

import numpy as np
import pytest

PARAMETERS = {"epochs": 20, "batch_size": 8, "learning_rate": 0.03, "dropout": 0.1, "seed": 1}
ONE_EACH = ((1,) * 12,) * 3
TWO_EACH = ((2,) * 12,) * 3
HARD = 9  # spread of images that a head often mistakes


@functools.cache
def cross_validate(sizes: tuple[tuple[int, ...], ...], **options) -> Evidence:
    return evidence.cross_validate(make_images(sizes, **options), **PARAMETERS)


def test_each_image_is_predicted_by_heads_that_have_not_seen_it():
    images = make_images([[1] * 8] * 3)
    images.labels[0] = 1  # it looks like class a
    found = evidence.cross_validate(images, **PARAMETERS)
    assert [one.file for one in found.predictions] == images.files
    assert [one.digest for one in found.predictions] == images.digests
    assert [one.file for one in found.predictions if not one.correct] == images.files[:1]
    assert found.predictions[0].predicted == "a"
    assert found.accuracy == pytest.approx(23 / 24)
    assert found.training_images[images.digests[0]] == ("b", "a0")


def test_learning_curve_rises_from_two_photos_to_all():
    found = cross_validate(ONE_EACH, spread=HARD)
    assert [round(point.images_per_class) for point in found.curve] == [2, 4, 8, 11]
    assert found.curve[0].accuracy < found.curve[-1].accuracy == found.accuracy


def test_many_images_are_predicted_by_heads_of_a_sample(monkeypatch):
    monkeypatch.setattr(evidence, "MAX_TRAINED", 30)
    monkeypatch.setattr(evidence, "BLOCK", 50)
    train_heads, images = evidence.train_heads, []

    def count(features, labels, trained_on, **parameters):
        images.append((len(features), len(labels), trained_on.shape[1]))
        return train_heads(features, labels, trained_on, **parameters)

    monkeypatch.setattr(evidence, "train_heads", count)
    found = evidence.cross_validate(make_images([[1] * 60] * 3), **PARAMETERS)
    assert images == [(30, 30, 30)]  # a step with images that do not count would cost as much as one that teaches
    assert len(found.predictions) == 180
    assert found.accuracy > 0.95
    assert found.sampled


@pytest.mark.parametrize("sizes", [((6,),) * 3, ((1,), (4,))])
def test_nothing_is_measured_without_independent_photos(sizes):
    found = cross_validate(sizes)
    assert (found.accuracy, found.loss, found.before, found.after) == (None, None, None, None)
    assert (found.temperature, found.unsure_below, found.new_session) == (1, None, None)
    assert (found.recall, found.curve, found.predictions) == ({}, [], [])
    assert found.unevaluated == list("abc"[: len(sizes)])
    assert found.training_images.keys() == set(make_images(sizes).digests)
    assert evidence.to_metrics(found) == {"temperature": 1}


def test_class_of_one_burst_is_learned_but_never_judged():
    found = cross_validate(((6,), (1,) * 6, (1,) * 6))
    assert found.unevaluated == ["a"]
    assert (found.accuracy, found.loss, found.curve, found.temperature) == (None, None, [], 1)
    assert {one.class_name for one in found.predictions} == {"b", "c"}
    assert found.recall.keys() == {"b", "c"}
    assert all(one.correct and one.probabilities["a"] > 0 for one in found.predictions)
    assert evidence.to_metrics(found).keys() == {"temperature", "cv_recall_b", "cv_recall_c"}


def test_each_photo_twice_gives_the_numbers_of_each_photo_once():
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


def test_numbers_of_uneven_groups_count_each_group_once():
    sizes = ((8, 1, 1), (1,) * 6)
    found = cross_validate(sizes)
    assert len(found.predictions) == 16
    assert metrics.count_correct(found.predictions) == (9, 9)
    assert {point.images for point in found.curve} == {9}
    assert found.accuracy == 1
    assert found.unevaluated == []


def test_class_of_near_duplicates_of_another_class_is_learned(monkeypatch):
    monkeypatch.setattr(evidence, "MAX_TRAINED", 12)
    images = make_images([[1] * 8] * 2)
    images = images._replace(groups=images.groups[:8] * 2)
    found = evidence.cross_validate(images, **PARAMETERS)
    assert [one.probabilities.keys() for one in found.predictions] == [{"a", "b"}] * 16


def test_photos_of_a_new_session_are_harder():
    found = cross_validate(((1,) * 12,) * 2, spread=0.5, sessions=4, class_spread=0, seed=1)
    correct, total = found.new_session
    assert total == 24
    assert correct / total < found.accuracy - 0.3
    assert evidence.to_metrics(found)["cv_accuracy_new_session"] == correct / total
    told = metrics.describe_cross_validation(found)
    assert f"photos of a new session: {correct / total:.0%}" in told


def test_near_duplicates_in_sessions_count_once():
    found = cross_validate(((3,) * 6,) * 2, sessions=3)
    assert found.new_session[1] == 12


@pytest.mark.parametrize("sessions", [0, 2])
def test_too_few_sessions_say_nothing_of_new_ones(sessions):
    found = cross_validate(((1,) * 6,) * 2, sessions=sessions)
    assert found.new_session is None
    assert "cv_accuracy_new_session" not in evidence.to_metrics(found)


def test_probabilities_are_calibrated():
    found = cross_validate(ONE_EACH, spread=HARD)
    assert found.temperature < 0.8
    assert found.after.error < found.before.error
    assert found.loss == pytest.approx(metrics.summarize(found.predictions).loss, rel=0.3)  # a mean over repeats


def test_limit_below_which_predictions_are_unsure_is_measured():
    found = cross_validate(ONE_EACH, spread=HARD)
    sure = [one for one in found.predictions if one.probability >= found.unsure_below]
    assert 10 <= len(sure) < len(found.predictions)
    assert sum(one.correct for one in sure) / len(sure) >= 0.95 > found.accuracy
    assert evidence.to_metrics(found)["unsure_below"] == found.unsure_below


def test_evidence_reads_what_it_has_written(tmp_path):
    for number, sizes in enumerate((((6,), (1,) * 6, (1,) * 6), ONE_EACH)):
        found = cross_validate(sizes, spread=HARD if number else 1)
        found.write(tmp_path / "cross_validation.json")
        assert Evidence.read(tmp_path / "cross_validation.json") == found
