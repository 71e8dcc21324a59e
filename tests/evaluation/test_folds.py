"""Folds: near-duplicates are held out together, and each head is trained on all classes."""

from support.features import make_images
from workflow.data.datasets import ImageDataset
from workflow.data.split import split_images
from workflow.evaluation import folds
from workflow.records import DataVersion, ImageFile

import numpy as np
import pytest

SIZES = {  # of the groups of near-duplicates of each class
    "one photo each": [[1] * 6] * 3,
    "each photo twice": [[2] * 6] * 2,
    "three groups per class": [[1] * 3] * 3,
    "two groups per class": [[1, 1], [3, 1], [1] * 5],
    "one burst and two photos": [[8, 1, 1], [1] * 6],
    "bursts of all sizes": [[9, 4, 2, 1], [1, 1, 7], [2] * 5],
    "one class is a burst": [[6], [1] * 6, [1] * 6],
    "more photos than a small folder has": [[1] * 60, [2] * 30],
}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def images(request):
    return make_images(request.param)


def repeat_folds(images, sample=None) -> list[folds.Folds]:
    return folds.repeat_folds(images, np.ones(len(images.labels), bool) if sample is None else sample, seed=1)


def test_each_head_is_trained_on_all_classes(images):
    for repeat in repeat_folds(images):
        assert all(set(images.labels[mask]) == set(images.labels) for mask in repeat.trained_on)


def test_no_head_predicts_copies_of_its_training_images(images):
    groups = np.array(images.groups)
    for repeat in repeat_folds(images):
        for fold, mask in enumerate(repeat.trained_on):
            assert not set(groups[mask]) & set(groups[repeat.held_out_in == fold])


def test_unevaluated_classes_are_never_held_out(images):
    for repeat in repeat_folds(images):
        assert set(images.labels[repeat.held_out_in < 0]) == set(images.unevaluated)
        assert repeat.trained_on[:, np.isin(images.labels, images.unevaluated)].all()
    assert np.array_equal(folds.fold_by_group(images, seed=1), repeat_folds(images)[0].held_out_in)


def test_no_class_has_fewer_groups_than_folds(images):
    groups = min(count for count in folds.count_groups(images.labels, images.groups) if count > 1)
    (count,) = {len(repeat.trained_on) for repeat in repeat_folds(images)}
    assert count == min(groups, 10 if len(images.labels) <= folds.MAX_IMAGES_MANY_FOLDS else 5)


@pytest.mark.parametrize(
    ("duplicate_of", "unevaluated"),
    [({}, []), ({"a1": "a0"}, [0]), ({"b1": "b0"}, []), ({f"b{n}": "b0" for n in (1, 2, 3)}, [1])],
    ids=["no near-duplicates", "two of three", "two of five", "four of five"],
)
def test_class_with_two_independent_photos_is_unevaluated(duplicate_of, unevaluated):
    images = [
        ImageFile(f"{name}/{n}", name, f"{name}{n}") for name, count in (("a", 3), ("b", 5)) for n in range(count)
    ]
    data = DataVersion("", "", split_images(images, 0.1, 0.1, 11, duplicate_of), duplicate_of)
    inputs = dict.fromkeys([image.digest for image in images], np.zeros(1280, "float32"))
    train, validation = (ImageDataset(split, inputs, data, 8, 1, "none") for split in ("train", "validation"))
    merged = train.merge(validation)
    assert list(merged.unevaluated) == unevaluated
    assert sorted(merged.digests) == sorted(
        image.digest for image in data.files if image.split in ("train", "validation")
    )


def test_repeats_have_different_folds():
    first, second, *_ = repeat_folds(make_images(SIZES["one photo each"]))
    assert not np.array_equal(first.held_out_in, second.held_out_in)


def test_classes_of_one_burst_are_never_held_out():
    assert folds.fold_by_group(make_images([[5], [4]]), seed=1).tolist() == [-1] * 9


def test_copies_of_a_sample_are_held_out_with_it():
    images = make_images([[2] * 20] * 2)
    sample = images.mark_first() & (np.arange(80) % 40 < 15)
    for repeat in repeat_folds(images, sample):
        assert not repeat.trained_on[:, ~sample].any()
        assert np.array_equal(
            repeat.held_out_in[sample], repeat.held_out_in[np.roll(sample, 1)]
        )  # each copy is the next
        assert repeat.held_out_in.min() == 0


def test_learning_curve_counts_independent_photos():
    images = make_images([[4, 1, 1, 1, 1, 1], [2] * 6])
    curve = folds.make_learning_curve(images, repeat_folds(images)[0], np.random.default_rng(1))
    for size, point in zip([2, 4], curve, strict=True):
        for mask in point.trained_on:
            assert not (mask & ~images.mark_first()).any()
            assert np.bincount(images.labels[mask]).tolist() == [size, size]


def test_whole_sessions_are_held_out():
    images = make_images([[2] * 8] * 2, sessions=4)
    (by_session,) = folds.make_session_folds(images, np.ones(32, bool), seed=1)
    sessions = np.array(images.sessions)
    assert sorted(set(by_session.held_out_in)) == [0, 1, 2, 3]
    for fold, mask in enumerate(by_session.trained_on):
        assert not set(sessions[mask]) & set(sessions[by_session.held_out_in == fold])
        assert set(images.labels[mask]) == {0, 1}


@pytest.mark.parametrize(
    ("sessions", "sizes"),
    [(0, [[2] * 6] * 2), (2, [[1] * 6] * 2), (3, [[1] * 6, [1] * 2])],
)
def test_too_few_or_unknown_sessions_are_not_held_out(sessions, sizes):
    images = make_images(sizes, sessions=sessions)
    assert folds.make_session_folds(images, np.ones(len(images.labels), bool), seed=1) == []


def test_sessions_are_not_held_out_if_a_head_lacks_a_class():
    images = make_images([[1] * 4] * 2, sessions=4)
    images = images._replace(sessions=["all", "all", "all", "a3", "all", "all", "all", "b3"])
    assert folds.make_session_folds(images, np.ones(8, bool), seed=1) == []


def test_folds_are_stratified():
    labels = np.array([0] * 6 + [1] * 4)
    fold_of = folds.assign_folds(labels, 2, 1, groups=np.arange(10))
    assert [np.bincount(labels[fold_of == fold]).tolist() for fold in (0, 1)] == [[3, 2], [3, 2]]
