from workflow.evaluation import cross_validation
from workflow.model import network

import keras
import numpy as np
import pytest

LABELS = np.array([0] * 6 + [1] * 4)
GROUPS = list("abcdefghij")
DRAW = np.random.default_rng(1)
FEATURES = DRAW.normal(size=(10, 1280)).astype("float32")
PIXELS = DRAW.integers(0, 256, (10, 8, 8, 3), "uint8")
HEADS = {"epochs": 3, "batch_size": 10, "learning_rate": 0.03, "dropout": 0.0}
SMALL = HEADS | {"filters": 2}
METHODS = pytest.mark.parametrize(
    ("cross_validate", "inputs", "parameters"),
    [
        (cross_validation.cross_validate_heads, FEATURES, HEADS),
        (cross_validation.cross_validate_small, PIXELS, SMALL),
    ],
    ids=["heads", "small networks"],
)


@METHODS
def test_each_image_is_held_out_once_in_stratified_folds(cross_validate, inputs, parameters):
    found = list(cross_validate(inputs, LABELS, GROUPS, folds=2, seed=1, **parameters))
    assert sorted(np.concatenate([held_out for held_out, _ in found])) == list(range(10))
    assert [np.bincount(LABELS[held_out]).tolist() for held_out, _ in found] == [[3, 2], [3, 2]]


@METHODS
def test_seed_repeats_predictions_and_each_fold_has_its_model(cross_validate, inputs, parameters):
    first, again = (
        [answers for _, answers in cross_validate(inputs, LABELS, GROUPS, folds=2, seed=1, **parameters)]
        for _ in range(2)
    )
    assert np.array_equal(first, again)
    assert np.allclose(np.sum(first, axis=2), 1, atol=1e-5)
    assert not np.allclose(first[0], first[1], atol=1e-6)


def test_heads_side_by_side_equal_heads_trained_one_by_one():
    trained_on = np.array([LABELS >= 0, np.arange(10) % 2 == 0, np.arange(10) % 3 > 0])
    together = cross_validation.train_heads(FEATURES, LABELS, trained_on, **HEADS, seed=1)
    for answers, mine in zip(np.swapaxes(together(FEATURES).numpy(), 0, 1), trained_on, strict=True):
        keras.utils.set_random_seed(1)
        alone = network.build_head(2, dropout=0)
        network.compile_model(alone, HEADS["learning_rate"], steps=HEADS["epochs"])
        alone.fit(FEATURES[mine], LABELS[mine], batch_size=10, epochs=HEADS["epochs"], verbose=0)
        assert np.allclose(answers, alone(FEATURES).numpy(), atol=1e-5)


@METHODS
def test_near_duplicates_are_held_out_together(cross_validate, inputs, parameters):
    groups = list("aabbccddee")
    for held_out, _ in cross_validate(inputs, LABELS, groups, folds=2, seed=1, **parameters):
        mine = {groups[number] for number in held_out}
        assert not mine & {group for number, group in enumerate(groups) if number not in held_out}
