"""The small convolutional network, which is trained on pixels from scratch, without a backbone (`--backbone none`).

It contains the layers that rescale the pixels and augment them during training. `python benchmarks/unseen.py` compares
it with a head on the features of the backbone.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

FILTERS = 32  # in the first convolution; each later one has twice as many
LOGIT_PENALTY = 0.02  # L2 regularization of the logits, which prevents overconfidence on small datasets


def build_small_network(classes: int, image_size: int, dropout: float, seed: int = 0):
    """Return a Keras model from pixels (batch, height, width, 3), 0 to 255, to probabilities (batch, classes).

    Each layer has its own seed, because Keras would otherwise generate one with Python's random module, which other
    threads use as well.
    """
    from keras import Input, Sequential, initializers, layers, regularizers

    seeds = count(seed)
    return Sequential(
        [
            Input((None, None, 3)),
            layers.Resizing(image_size, image_size),
            *augmentation(seeds),
            *convolutions(seeds),
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
    """Return the layers that augment images during training."""
    from keras import layers

    return [
        layers.RandomFlip("horizontal", seed=next(seeds)),
        layers.RandomRotation(0.1, seed=next(seeds)),
        layers.RandomTranslation(0.1, 0.1, seed=next(seeds)),
        layers.RandomZoom((-0.3, 0.2), seed=next(seeds)),
        layers.RandomBrightness(0.3, value_range=(0, 255), seed=next(seeds)),
        layers.RandomGrayscale(0.2, seed=next(seeds)),  # otherwise the network may rely on color alone
    ]


def convolutions(seeds: Iterator[int]) -> list[Any]:
    """Return layers that rescale the pixels, three convolutions with stride 2, and global max pooling."""
    from keras import initializers, layers

    def convolution(factor: int):
        weights = initializers.GlorotUniform(next(seeds))
        options = {"strides": 2, "padding": "same", "activation": "relu", "kernel_initializer": weights}
        return layers.Conv2D(FILTERS * factor, 3, name=f"convolution_{factor}", **options)

    return [layers.Rescaling(1 / 127.5, offset=-1), *map(convolution, (1, 2, 4)), layers.GlobalMaxPooling2D()]
