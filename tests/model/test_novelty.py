"""Novelty separates photos of other things from photos of the classes."""

import json
from pathlib import Path

from support.features import make_images, make_unknown
from workflow.evaluation.folds import fold_by_group
from workflow.image_classifier import fit_whitening
from workflow.model import novelty
from workflow.records import Prediction, Results

import numpy as np
import pytest

SURE = 0.95  # the highest probability of each photo


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "reference_embeddings.npz"


def write(sizes, path: Path) -> float:
    """Write the reference embeddings of synthetic images, and return the threshold."""
    images = make_images(sizes)
    held_out_in, probabilities = fold_by_group(images, seed=1), dict.fromkeys(images.digests, SURE)
    return novelty.write_reference_embeddings(images, held_out_in, probabilities, 1, path)


def find_unknown(path: Path, features: np.ndarray) -> np.ndarray:
    """Return whether images with these features are unknown; see image_classifier.py."""
    with np.load(path) as saved:
        references, limit = saved["features"].astype("float32"), float(saved["max_novelty"])
        whitening = fit_whitening(references, saved["labels"], references.shape[1])
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    return 1 - np.max(whitening.compare(units), axis=1) * SURE**0.5 > limit


def make_new(sizes) -> np.ndarray:
    """Return the features of new photos of the same classes."""
    images = make_images([[1] * (len(groups) + 30) for groups in sizes])
    old = {f"{name}{number}" for name, groups in zip("abc", sizes, strict=False) for number in range(len(groups))}
    return images.features[[group not in old for group in images.groups]]


@pytest.mark.parametrize(
    "sizes",
    [[[1] * 12] * 3, [[2] * 12] * 3, [[8, 1, 1, 1], [1] * 12]],
    ids=["one each", "each photo twice", "a burst"],
)
def test_other_things_are_unknown_and_most_new_photos_known(sizes, path):
    limit = write(sizes, path)
    assert 0 < limit < 1
    assert find_unknown(path, make_new(sizes)).mean() < 0.15
    assert find_unknown(path, make_unknown(30)).all()


def test_copies_do_not_change_the_threshold(path):
    assert write([[3] * 12] * 2, path) == pytest.approx(write([[1] * 12] * 2, path), abs=0.02)


@pytest.mark.parametrize(
    ("sizes", "has_limit"), [([[6], [5]], False), ([[1], [2]], False), ([[6], [1] * 4], True), ([[1, 4]] * 2, True)]
)
def test_threshold_is_nan_only_if_no_photo_can_be_held_out(sizes, has_limit, path):
    assert np.isnan(write(sizes, path)) != has_limit
    with np.load(path) as saved:
        assert len(saved["features"]) == sum(map(sum, sizes))


def test_large_data_set_is_sampled_by_class(path, monkeypatch):
    monkeypatch.setattr(novelty, "MAX_REFERENCES", 30)
    assert 0 < write([[2] * 40] * 3, path) < 1
    with np.load(path) as saved:
        assert sorted(file[0] for file in saved["files"]) == [name for name in "abc" for _ in range(10)]
        assert np.linalg.norm(saved["features"].astype("float32"), axis=1) == pytest.approx(1, abs=1e-3)
        assert [f"{'abc'[label]}" for label in saved["labels"]] == [file[0] for file in saved["files"]]


def test_cosines_of_few_photos_are_those_of_all_dimensions():
    images = make_images([[2] * 5] * 2)
    units, folds = images.features / 8, fold_by_group(images, seed=1)
    expected = np.zeros(len(units))
    for fold in range(folds.max() + 1):
        held_out = folds == fold
        whitening = fit_whitening(units[~held_out], images.labels[~held_out], units.shape[1])
        expected[held_out] = np.max(whitening.compare(units[held_out]), axis=1)
    assert novelty.score_held_out(units, images.labels, folds) == pytest.approx(expected, abs=1e-4)


def test_threshold_is_between_sample_and_normal_quantile():
    scores = np.random.default_rng(2).exponential(size=200)
    quantile, normal = np.quantile(scores, 0.95), scores.mean() + 1.645 * scores.std()
    assert min(quantile, normal) < novelty.compute_novelty_threshold(scores) < max(quantile, normal)
    assert (scores > novelty.compute_novelty_threshold(scores)).mean() == pytest.approx(0.05, abs=0.03)
    assert np.isnan(novelty.compute_novelty_threshold(scores[:1]))


def test_predictions_list_their_nearest_training_photos(path):
    write([[1] * 6] * 3, path)
    images = make_images([[1] * 6] * 3)
    results = Results(0.0, 1.0, {}, [Prediction(file, file[0], file[0], 1.0, {}) for file in images.files[:7:6]])
    predictions = novelty.add_nearest_neighbors(results, images.features[:7:6], path).predictions
    assert [prediction.neighbors[0] for prediction in predictions] == images.files[:7:6]
    assert [[file[0] for file in prediction.neighbors] for prediction in predictions] == [["a"] * 3, ["b"] * 3]
    assert json.dumps(predictions[0].neighbors)
