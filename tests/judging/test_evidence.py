"""What is told of a model without its test images: cross-validated evidence, the temperature, and what is unknown."""

from workflow.judging import cross_validation, evaluation, evidence
from workflow.model import references
from workflow.records import Evidence, Prediction, Results

import numpy as np
import pytest

PARAMETERS = {"epochs": 20, "batch_size": 8, "learning_rate": 0.03, "dropout": 0.1, "seed": 1}
NAMES = ["a", "b", "c"]


def draw_features(per_class: int, spread: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features of length 8 around one centre per class, their labels and files."""
    draw = np.random.default_rng(7)
    labels = np.repeat(np.arange(len(NAMES)), per_class)
    found = draw.normal(size=(len(NAMES), 1280))[labels] + spread * draw.normal(size=(len(labels), 1280))
    features = (8 * found / np.linalg.norm(found, axis=1, keepdims=True)).astype("float32")
    return features, labels, [f"{NAMES[label]}/{number}.jpeg" for number, label in enumerate(labels)]


def assess(features, labels, files) -> Evidence:
    return evidence.assess(features, labels, files, NAMES, files, **PARAMETERS)


def test_each_image_is_answered_once_by_what_has_not_seen_it_and_a_wrong_label_comes_first():
    features, labels, files = draw_features(per_class=8, spread=1)
    labels = labels.copy()
    labels[0] = 1  # it looks like class a
    found = assess(features, labels, files)
    assert [one.file for one in found.predictions] == files
    own = [one.probabilities[one.class_name] for one in found.predictions]
    assert np.argmin(own) == 0
    assert found.predictions[0].predicted == "a"
    assert found.accuracy == pytest.approx(23 / 24)
    told = evaluation.describe_cross_validation(found.predictions)
    assert "In cross-validation 23 of 24 photos were right" in told
    assert "The weakest class is b: 8 of 9 are right (89%). It is most often taken for a." in told


def test_learning_curve_rises_from_two_photos_to_all_that_there_are():
    found = assess(*draw_features(per_class=20, spread=6))
    assert [round(point.images_per_class) for point in found.curve] == [2, 4, 8, 16, 18]
    assert found.curve[0].accuracy < found.curve[-1].accuracy - 0.1


def test_many_images_are_all_answered_though_heads_learn_from_a_part(monkeypatch):
    monkeypatch.setattr(evidence, "MOST_TRAINED", 30)
    monkeypatch.setattr(evidence, "BLOCK", 50)
    train_heads, images = cross_validation.train_heads, []

    def count(features, labels, trained_on, **parameters):
        images.append((len(features), len(labels), trained_on.shape[1]))
        return train_heads(features, labels, trained_on, **parameters)

    monkeypatch.setattr(cross_validation, "train_heads", count)
    found = assess(*draw_features(per_class=60, spread=1))
    assert images == [(30, 30, 30)]  # a step with images that do not count would cost as much as one that teaches
    assert len(found.predictions) == 180
    assert found.accuracy > 0.95


def test_two_photos_per_class_are_enough():
    found = assess(*draw_features(per_class=2, spread=1))
    assert len(found.predictions) == 6
    assert len(found.curve) == 1


@pytest.mark.parametrize("sharpness", [0.3, 3])
def test_temperature_makes_probabilities_true_that_were_too_sure_or_not_sure_enough(sharpness):
    draw = np.random.default_rng(3)
    logits = draw.normal(scale=2, size=(4000, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([draw.choice(3, p=row) for row in true])
    told = evidence.soften(true, 1 / sharpness)[None]
    temperature = evidence.fit_temperature(told, labels)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    before, after = (evidence.reliability(one, labels).error for one in (told, evidence.soften(told, temperature)))
    assert after < 0.03 < before


def test_few_answers_that_are_all_right_do_not_make_it_sure_of_everything():
    told = np.full((1, 10, 2), 0.1)
    labels = np.tile([0, 1], 5)
    told[0, np.arange(10), labels] = 0.9
    softened = evidence.soften(told, evidence.fit_temperature(told, labels))
    assert 0.9 < softened.max() < 0.999


def test_photos_of_other_things_are_below_the_limit_and_nearly_all_of_the_classes_above(tmp_path):
    features, labels, files = draw_features(per_class=40, spread=1)
    known, rest = np.arange(len(labels)) % 2 == 0, np.arange(len(labels)) % 2 == 1
    limit = references.remember(features[known], labels[known], np.array(files)[known].tolist(), 1, tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as saved:
        similarity = (features / 8) @ saved["features"].astype("float32").T
        assert float(saved["limit"]) == limit
        assert saved["files"].tolist() == np.array(files)[known].tolist()
    assert (similarity[rest].max(axis=1) < limit).mean() < 0.1
    strangers = np.random.default_rng(9).normal(size=(50, 1280))
    strangers /= np.linalg.norm(strangers, axis=1, keepdims=True)
    assert ((strangers @ (features[known] / 8).T).max(axis=1) < limit).all()
    results = Results(0.0, 1.0, {}, [Prediction(files[0], "a", "a", 1.0, {})])
    (nearest,) = (
        one.neighbours for one in references.add_neighbours(results, features[:1], tmp_path / "r.npz").predictions
    )
    assert len(nearest) == 3
    assert nearest[0] == files[0]
    assert {file[0] for file in nearest} == {"a"}


def test_model_remembers_a_part_of_each_class_when_there_are_many_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MOST", 30)
    features, labels, files = draw_features(per_class=40, spread=1)
    limit = references.remember(features, labels, files, 1, tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as saved:
        assert sorted(file[0] for file in saved["files"]) == [name for name in NAMES for _ in range(10)]
    assert 0 < limit < 1


def test_no_head_answers_for_a_near_duplicate_of_what_it_has_seen_though_only_a_part_is_trained_on():
    labels, groups = np.repeat([0, 1], 40), [str(number % 20 + 20 * (number // 40)) for number in range(80)]
    chosen = np.arange(80) % 40 < 15
    folds = evidence.assign_all_folds(labels, groups, chosen, folds=5, seed=1)
    for group in {groups[number] for number in np.flatnonzero(chosen)}:
        assert len({int(folds[number]) for number in range(80) if groups[number] == group}) == 1
