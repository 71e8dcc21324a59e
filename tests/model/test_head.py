"""Heads: fit_heads() computes the weights of model.fit(), and a saved model predicts like its head."""

from support.features import make_images
from workflow.model import backbone, head

import keras
import numpy as np
import pytest
import tensorflow as tf

IMAGES = make_images([[1] * 7, [1] * 5, [1] * 6], spread=4)
PARAMETERS = {"epochs": 4, "batch_size": 4, "learning_rate": 0.03, "seed": 3}


def fit_with_keras(rows: np.ndarray, dropout: float, epochs: int, batch_size: int, learning_rate: float, seed: int):
    """Return a head that model.fit() trained on these images, in the batches of fit_heads()."""
    features, labels = IMAGES.features[rows], IMAGES.labels[rows]
    batches = head.shuffle_batches(len(labels), batch_size, epochs, seed)
    batches = batches.map(lambda batch: (tf.gather(features, batch), tf.gather(labels, batch)))
    model, steps = head.build_head(3, dropout, seed), epochs * -(-len(labels) // batch_size)
    head.compile_model(model, learning_rate, steps)
    model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_head_has_the_weights_of_keras_fit(dropout):
    fitted = head.fit_head(IMAGES.features, IMAGES.labels, dropout=dropout, **PARAMETERS)
    expected = fit_with_keras(np.ones(18, bool), dropout, **PARAMETERS)
    for weights, expected_weights in zip(fitted.get_weights(), expected.get_weights(), strict=True):
        assert np.abs(expected_weights).max() > 0.01
        assert np.allclose(weights, expected_weights, atol=1e-6)


def test_each_of_many_heads_has_the_weights_of_keras_fit():
    trained_on = np.arange(18) % np.array([[20], [2], [3]]) > 0
    parameters = PARAMETERS | {"batch_size": 18, "dropout": 0}
    weights = head.fit_heads(IMAGES.features, IMAGES.labels, trained_on, **parameters)
    probabilities = head.predict_heads(weights, IMAGES.features)
    assert probabilities.shape == (18, 3, 3)
    for number, rows in enumerate(trained_on):
        expected = fit_with_keras(rows, **parameters)
        assert np.allclose(weights[:-1, number], expected.get_weights()[0], atol=1e-6)
        assert np.allclose(probabilities[:, number], expected(IMAGES.features).numpy(), atol=1e-6)


def test_seed_decides_the_weights():
    def fit(seed: int) -> np.ndarray:
        parameters = PARAMETERS | {"dropout": 0.5, "seed": seed}
        return head.fit_heads(IMAGES.features, IMAGES.labels, np.ones((2, 18), bool), **parameters)

    assert np.array_equal(fit(1), fit(1))
    assert not np.allclose(fit(1), fit(2), atol=1e-4)


def test_untrained_head_predicts_equal_probabilities():
    assert np.allclose(head.build_head(3, dropout=0.5)(IMAGES.features).numpy(), 1 / 3)


def test_learning_rate_is_zero_after_the_last_step():
    model = head.build_head(2, dropout=0)
    head.compile_model(model, 0.01, steps=10)
    rates = [float(model.optimizer._learning_rate(step)) for step in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saves with NumPy 2
def test_saved_model_predicts_like_its_head(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, backbone.IMAGE_SIZE, backbone.IMAGE_SIZE, 3), "uint8")
    features = backbone.compute_features(pixels)
    model = head.fit_head(features, np.arange(9) % 3, dropout=0.2, **PARAMETERS)
    head.add_backbone(model).save(tmp_path / "model.keras")
    assert (tmp_path / "model.keras").stat().st_size < 15_000_000
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.abs(loaded.predict(pixels, verbose=0) - model.predict(features, verbose=0)).max() < 1e-5
    assert [weights.shape for weights in loaded.trainable_weights] == [(backbone.FEATURES, 3), (3,)]
    of_another_size = loaded.predict(np.full((2, 31, 900, 3), 255, "uint8"), verbose=0)
    assert np.allclose(of_another_size.sum(1), 1)
