"""The head: a multinomial logistic regression on the features of the backbone.

train_model() in ml_workflow.py trains a Keras head with model.fit(), which MLflow logs. fit_heads() trains the many
heads of a cross-validation at once. It computes the same weights as model.fit(), without Keras's setup time. All heads
share the batches; an image that a head is not trained on has sample weight 0, and the other sample weights are
increased to compensate.
"""

import threading
from typing import Any

from workflow.model import backbone

import numpy as np

MOMENTUM = 0.9  # Nesterov momentum of stochastic gradient descent
training_lock = threading.Lock()  # one thread trains at a time: threads share TensorFlow's random generators


def build_head(classes: int, dropout: float, seed: int = 0):
    """Return a Keras model from features (batch, FEATURES) to probabilities (batch, classes).

    The weights are initialized to zero, so the seed only affects dropout.
    """
    from keras import Input, Sequential, layers

    inputs, dense = Input((backbone.FEATURES,)), layers.Dense(classes, kernel_initializer="zeros")
    return Sequential([inputs, layers.Dropout(dropout, seed=seed), dense, layers.Softmax()], name="head")


def compile_model(model: Any, learning_rate: float, steps: int) -> None:
    """Compile a model for training with this many steps, over which the learning rate decays to 0 along a cosine."""
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    optimizer = keras.optimizers.SGD(schedule, MOMENTUM, nesterov=True)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])


def add_backbone(head: Any, temperature: float = 1.0):
    """Return a Keras model from pixels (batch, height, width, 3), 0 to 255, to probabilities (batch, classes).

    The logits of the head are divided by the temperature, which calibrates the probabilities.
    """
    from keras import Input, Sequential, layers

    *hidden, softmax = head.layers
    calibration = layers.Rescaling(1 / temperature, name="temperature")
    layers_in_order = [Input((None, None, 3)), backbone.build_backbone(), *hidden, calibration, softmax]
    return Sequential(layers_in_order, name="image_classifier")


def fit_head(features: np.ndarray, labels: np.ndarray, dropout: float, seed: int, **parameters: Any):
    """Return a Keras head fitted to all these images. `parameters` are passed to fit_heads()."""
    all_images = np.ones((1, len(labels)), bool)
    weights = fit_heads(features, labels, all_images, dropout=dropout, seed=seed, **parameters)[:, 0]
    head = build_head(weights.shape[1], dropout, seed)
    head.set_weights([weights[:-1], weights[-1]])
    return head


def fit_heads(
    features: np.ndarray,
    labels: np.ndarray,
    trained_on: np.ndarray,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
    seed: int,
) -> np.ndarray:
    """Fit many heads at once, and return their weights (FEATURES + 1, heads, classes); the last row is the bias.

    Args:
        features: shape (images, FEATURES)
        labels: shape (images,)
        trained_on: whether a head is trained on an image, shape (heads, images)
        epochs, batch_size, learning_rate, dropout, seed: as for train_model()
    """
    import tensorflow as tf

    heads, classes = len(trained_on), int(labels.max()) + 1
    sample_weights = tf.constant((trained_on / trained_on.mean(axis=1, keepdims=True)).T[..., None], tf.float32)
    inputs, targets = tf.constant(features), tf.one_hot(labels, classes)[:, None]
    steps = epochs * -(-len(features) // batch_size)

    def step(state, batch):
        (weights, velocity), (number, rows) = state, batch
        rate = learning_rate * (1 + tf.cos(np.pi * tf.cast(number, tf.float32) / steps)) / 2
        x = drop(tf.gather(inputs, rows), dropout, [seed, number])
        x = tf.pad(x, [[0, 0], [0, 1]], constant_values=1)  # the input of the bias
        probabilities = tf.nn.softmax(tf.reshape(x @ weights, (-1, heads, classes)))
        scale = tf.gather(sample_weights, rows) * rate / tf.cast(tf.size(rows), tf.float32)
        errors = (probabilities - tf.gather(targets, rows)) * scale
        change = tf.matmul(x, tf.reshape(errors, (-1, heads * classes)), transpose_a=True)
        velocity = MOMENTUM * velocity - change
        return weights + MOMENTUM * velocity - change, velocity

    zeros = tf.zeros((features.shape[1] + 1, heads * classes))
    weights, _ = shuffle_batches(len(features), batch_size, epochs, seed).enumerate().reduce((zeros, zeros), step)
    return weights.numpy().reshape(-1, heads, classes)


def drop(x: Any, rate: float, seed: Any):
    """Apply dropout to a tensor, with the same mask as Keras's Dropout layer for this seed and step."""
    import tensorflow as tf

    return tf.where(tf.random.stateless_uniform(tf.shape(x), seed) >= rate, x / (1 - rate), 0)


def shuffle_batches(images: int, batch_size: int, epochs: int, seed: int):
    """Return a TensorFlow dataset of batches of image indices, reshuffled in each epoch."""
    import tensorflow as tf

    tf.random.set_seed(seed)
    return tf.data.Dataset.range(images).shuffle(images, seed=seed).batch(batch_size).repeat(epochs)


def predict_heads(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the probabilities (images, heads, classes) for features (images, FEATURES), with fit_heads()'s weights."""
    import tensorflow as tf

    return tf.nn.softmax(np.tensordot(features, weights[:-1], axes=1) + weights[-1]).numpy()
