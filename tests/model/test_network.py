import itertools
import random

import ml_workflow
from workflow.model import network

import keras
import numpy as np
import pytest

PIXELS = np.random.default_rng(1).integers(0, 256, (3, 31, 200, 3), "uint8")


@pytest.fixture(scope="module")
def model():
    return network.build_small(2, ml_workflow.SMALL_SIZE, ml_workflow.FILTERS, ml_workflow.DROPOUT)


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 31, 200, 3)])
def test_small_network_takes_pixels_of_any_size(model, shape):
    probabilities = model.predict(np.full(shape, 255, "uint8"), verbose=0)
    assert probabilities.shape == (shape[0], 2)
    assert np.allclose(probabilities.sum(1), 1)
    assert model.count_params() < 100_000


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saves with NumPy 2
def test_saved_small_network_is_small_and_loads_without_our_code(model, tmp_path):
    network.compile_model(model, ml_workflow.LEARNING_RATE, steps=1)
    model.fit(PIXELS, np.array([0, 1, 0]), verbose=0)
    model.save(tmp_path / "model.keras")
    assert (tmp_path / "model.keras").stat().st_size < 2_000_000
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.array_equal(loaded.predict(PIXELS, verbose=0), model.predict(PIXELS, verbose=0))


def test_learning_rate_falls_to_zero_with_the_last_step(model):
    network.compile_model(model, 0.01, steps=10)
    rates = [float(model.optimizer._learning_rate(step)) for step in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0)


def test_images_are_changed_in_training_alone():
    changes = keras.Sequential(network.augmentation(itertools.count()))
    pixels = PIXELS.astype("float32")
    assert np.array_equal(changes(pixels, training=False).numpy(), pixels)
    assert not np.array_equal(changes(pixels, training=True).numpy(), pixels)


def test_seed_alone_decides_on_a_small_network():
    def made(seed: int) -> tuple:
        random.random()
        model = network.build_small(2, 16, 4, 0.5, seed=seed)
        pixels = np.full((2, 16, 16, 3), 100, "float32")
        return model(pixels, training=True).numpy(), *model.get_weights()

    first, again, other = made(1), made(1), made(2)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
