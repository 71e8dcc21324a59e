"""The network that is trained: raw pixels in, a probability for each class out.

It rescales the pixels itself, and in training it also turns, shifts, scales and relights the images and takes the
colour from some, so the saved model cannot be fed wrongly. Why these layers: `python benchmarks/candidates.py --source
FOLDER`.
"""

from collections.abc import Iterator
from itertools import count

LOGIT_PENALTY = 0.02  # part of the loss in training: keeps the network from growing overconfident on few images


def build_model(
    classes: int, image_size: int, filters: int, dropout: float, backbone: str | None = None, seed: int = 0
):
    """A Keras model on raw pixels of any size, (batch, height, width, 3), 0 to 255: (batch, classes) comes out.

    Its features are three convolutions, the first with `filters`, each next with twice as many; or those of a
    backbone. Each layer has a seed of its own: Keras would draw them from Python's generator, which other threads use
    as well. Raises WorkflowError when the weights of the backbone cannot be had.
    """
    from keras import Input, Sequential, initializers, layers, regularizers

    seeds = count(seed)
    return Sequential(
        [
            Input((None, None, 3)),
            layers.Resizing(image_size, image_size),
            *augmentation(seeds),
            *(pretrained(image_size) if backbone else convolutions(filters, seeds)),
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


def augmentation(seeds: Iterator[int]) -> list:
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


def convolutions(filters: int, seeds: Iterator[int]) -> list:
    """Three convolutions, each of which halves the image, and the strongest answer of each filter anywhere in it."""
    from keras import initializers, layers

    def convolution(times: int):
        weights = initializers.GlorotUniform(next(seeds))
        options = {"strides": 2, "padding": "same", "activation": "relu", "kernel_initializer": weights}
        return layers.Conv2D(filters * times, 3, name=f"convolution_{times}", **options)

    return [layers.Rescaling(1 / 127.5, offset=-1), *map(convolution, (1, 2, 4)), layers.GlobalMaxPooling2D()]


def pretrained(image_size: int, weights: str | None = "imagenet") -> list:
    """MobileNetV3 (small) as it learned from ImageNet, frozen; Keras checks the digest of what it fetches."""
    from keras.applications import MobileNetV3Small

    try:
        backbone = MobileNetV3Small((image_size, image_size, 3), include_top=False, weights=weights, pooling="avg")
    except Exception as error:  # Keras raises no narrower one
        from tracking import WorkflowError

        remedy = "check the network, or do without --backbone"
        raise WorkflowError(f"the weights of the backbone cannot be had ({error}): {remedy}") from error
    backbone.trainable = False
    return [backbone]


def compile_model(model, learning_rate: float, steps: int) -> None:
    """Readies a model to learn for that many steps; the learning rate falls to 0 along a cosine."""
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
