"""The networks that are trained: a head on the features of a backbone, or a small network that learns from nothing.

Pixels of any size go into a saved model, a probability for each class comes out. The small network rescales the pixels
itself, and in training it also turns, shifts, scales and relights the images and takes the colour from some. The head
has no need of that: what it is trained on does not change. `python benchmarks/unseen.py` compares them.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

from workflow.model import backbone

import numpy as np

LOGIT_PENALTY = 0.02  # of the small network, in training: keeps it from growing overconfident on few images
MOMENTUM = 0.9  # of stochastic gradient descent, in Nesterov's form


def build_head(classes: int, dropout: float, seed: int = 0):
    """A Keras model on features (batch, FEATURES): probabilities (batch, classes) come out.

    It is a logistic regression. Its weights start at zero, so that the seed decides on the order of the images and on
    the dropout alone.
    """
    from keras import Input, Sequential, layers

    inputs, dense = Input((backbone.FEATURES,)), layers.Dense(classes, kernel_initializer="zeros")
    return Sequential([inputs, layers.Dropout(dropout, seed=seed), dense, layers.Softmax()], name="head")


def build_heads(heads: int, classes: int, dropout: float, seed: int = 0):
    """A Keras model that is many heads side by side: features (batch, FEATURES) in, (batch, heads, classes) out."""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((backbone.FEATURES,)),
            layers.Dropout(dropout, seed=seed),
            layers.Dense(heads * classes, kernel_initializer="zeros"),
            layers.Reshape((heads, classes)),
            layers.Softmax(),
        ]
    )


def on_pixels(model: Any, name: str, temperature: float = 1.0):
    """The trained network on raw pixels of any size, (batch, height, width, 3), 0 to 255: a head gets its backbone.

    Before its softmax the head also gets a layer that divides by the temperature, which makes the probabilities true.
    """
    from keras import Input, Sequential, layers

    if name == "none":
        return model
    *head, softmax = model.layers
    calibration = layers.Rescaling(1 / temperature, name="temperature")
    inside = [Input((None, None, 3)), backbone.build_backbone(), *head, calibration, softmax]
    return Sequential(inside, name="image_classifier")


def build_small(classes: int, image_size: int, filters: int, dropout: float, seed: int = 0):
    """A Keras model on raw pixels of any size, (batch, height, width, 3), 0 to 255: (batch, classes) comes out.

    It has three convolutions, the first with `filters`, each next with twice as many. Each layer has a seed of its own:
    Keras would draw them from Python's generator, which other threads use as well.
    """
    from keras import Input, Sequential, initializers, layers, regularizers

    seeds = count(seed)
    return Sequential(
        [
            Input((None, None, 3)),
            layers.Resizing(image_size, image_size),
            *augmentation(seeds),
            *convolutions(filters, seeds),
            layers.Dropout(dropout, seed=next(seeds)),
            layers.Dense(
                classes,
                kernel_initializer=initializers.GlorotUniform(next(seeds)),
                activity_regularizer=regularizers.L2(LOGIT_PENALTY),
            ),
            layers.Softmax(),
        ],
        name="image_classifier",
    )


def augmentation(seeds: Iterator[int]) -> list[Any]:
    """Layers that change an image as another photo of the same thing would differ; in training alone."""
    from keras import layers

    return [
        layers.RandomFlip("horizontal", seed=next(seeds)),
        layers.RandomRotation(0.1, seed=next(seeds)),
        layers.RandomTranslation(0.1, 0.1, seed=next(seeds)),
        layers.RandomZoom((-0.3, 0.2), seed=next(seeds)),
        layers.RandomBrightness(0.3, value_range=(0, 255), seed=next(seeds)),
        layers.RandomGrayscale(0.2, seed=next(seeds)),  # colour is not all there is to see
    ]


def convolutions(filters: int, seeds: Iterator[int]) -> list[Any]:
    """Three convolutions, each of which halves the image, and the strongest answer of each filter anywhere in it."""
    from keras import initializers, layers

    def convolution(times: int):
        weights = initializers.GlorotUniform(next(seeds))
        options = {"strides": 2, "padding": "same", "activation": "relu", "kernel_initializer": weights}
        return layers.Conv2D(filters * times, 3, name=f"convolution_{times}", **options)

    return [layers.Rescaling(1 / 127.5, offset=-1), *map(convolution, (1, 2, 4)), layers.GlobalMaxPooling2D()]


def compile_model(model: Any, learning_rate: float, steps: int, steps_per_execution: int = 1) -> None:
    """Ready a model to train for that many steps; the learning rate falls to 0 along a cosine."""
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    optimizer = keras.optimizers.SGD(schedule, MOMENTUM, nesterov=True)
    metrics, loss = ["accuracy"], "sparse_categorical_crossentropy"
    model.compile(optimizer, loss, metrics=metrics, steps_per_execution=steps_per_execution)


def fit(
    model: Any,
    features: np.ndarray,
    labels: np.ndarray,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    sample_weight: np.ndarray | None = None,
) -> None:
    """Fit a head, or many side by side, in one traced loop: as model.fit() with these parameters, in half of the time.

    Args:
        model: of build_head() or build_heads()
        features: shape (images, FEATURES)
        labels: shape (images,), or (images, heads)
        epochs: passes over the images, which are shuffled anew each time
        batch_size: images per step
        learning_rate: at the start
        seed: of the shuffling
        sample_weight: of each image, or of each image and head
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    per_epoch = -(-len(features) // batch_size)
    compile_model(model, learning_rate, epochs * per_epoch, steps_per_execution=epochs * per_epoch)
    arrays = [tf.constant(one) for one in (features, labels, sample_weight) if one is not None]
    rows = tf.data.Dataset.range(len(features)).shuffle(len(features), seed=seed).batch(batch_size).repeat(epochs)
    batches = rows.map(lambda batch: tuple(tf.gather(one, batch) for one in arrays))
    model.fit(batches, steps_per_epoch=epochs * per_epoch, shuffle=False, verbose=0)
