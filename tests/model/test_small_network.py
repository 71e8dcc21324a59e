"""The small network trains on pixels, with augmentation."""

import itertools
import random

import ml_workflow
from workflow.model import small_network
from workflow.model.head import compile_model

import keras
import numpy as np
import pytest

PIXELS = np.random.default_rng(1).integers(0, 256, (3, 31, 200, 3), "uint8")


@pytest.fixture(scope="module")
def model():
    return small_network.build_small_network(2, ml_workflow.SMALL_SIZE, ml_workflow.DROPOUT)


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 31, 200, 3)])
def test_small_network_accepts_images_of_any_size(model, shape):
    probabilities = model.predict(np.full(shape, 255, "uint8"), verbose=0)
    assert probabilities.shape == (shape[0], 2)
    assert np.allclose(probabilities.sum(1), 1)
    assert model.count_params() < 100_000


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saves with NumPy 2
def test_saved_small_network_loads_in_safe_mode(model, tmp_path):
    compile_model(model, ml_workflow.LEARNING_RATE, steps=1)
    model.fit(PIXELS, np.array([0, 1, 0]), verbose=0)
    model.save(tmp_path / "model.keras")
    assert (tmp_path / "model.keras").stat().st_size < 2_000_000
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.array_equal(loaded.predict(PIXELS, verbose=0), model.predict(PIXELS, verbose=0))


def test_images_are_augmented_only_in_training():
    layers = keras.Sequential(small_network.augmentation(itertools.count()))
    pixels = PIXELS.astype("float32")
    assert np.array_equal(layers(pixels, training=False).numpy(), pixels)
    assert not np.array_equal(layers(pixels, training=True).numpy(), pixels)


def test_only_the_seed_decides_weights_and_augmentation():
    def build_and_call(seed: int) -> tuple:
        random.random()
        model = small_network.build_small_network(2, 16, 0.5, seed=seed)
        pixels = np.full((2, 16, 16, 3), 100, "float32")
        return model(pixels, training=True).numpy(), *model.get_weights()

    first, second, different = build_and_call(1), build_and_call(1), build_and_call(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], different[0])
