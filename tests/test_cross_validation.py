import cross_validation

import keras
import numpy as np
import pytest

LABELS = np.array([0] * 6 + [1] * 4)
PIXELS = np.random.default_rng(1).integers(0, 256, (10, 8, 8, 3), "uint8")


def folds(seed: int) -> list:
    def build(seed):
        return keras.Sequential([keras.layers.Flatten(), keras.layers.Dropout(0.2), keras.layers.Dense(2, "softmax")])

    return list(cross_validation.cross_validate(PIXELS, LABELS, build, 1, 4, 0.01, seed, folds=2))


@pytest.fixture(scope="module")
def found() -> list:
    return folds(seed=1)


def test_each_image_is_held_out_once_and_each_fold_has_its_share_of_each_class(found):
    assert sorted(np.concatenate([held_out for _, held_out in found])) == list(range(10))
    assert [np.bincount(LABELS[held_out]).tolist() for _, held_out in found] == [[3, 2], [3, 2]]


def test_each_fold_has_a_model_of_its_own_which_the_seed_repeats(found):
    def weights(some: list) -> list:
        return [np.concatenate([weight.ravel() for weight in model.get_weights()]) for model, _ in some]

    first, again = weights(found), weights(folds(seed=1))
    assert found[0][0] is not found[1][0]
    assert not np.allclose(first[0], first[1], atol=1e-6)
    assert np.array_equal(first, again)
