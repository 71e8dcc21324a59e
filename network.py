"""The network that is trained: raw pixels in, a probability for each class out.

It rescales the pixels itself, and in training it also turns, shifts, scales and relights the images,
so the saved model cannot be fed wrongly.
"""


def build_model(classes: int, image_size: int, filters: int, dropout: float, backbone: str | None = None):
    """A Keras model on raw pixels of any size, (batch, height, width, 3), 0 to 255: (batch, classes) comes out.

    Its features are three convolutions, the first with `filters`, each next with twice as many; or those of a
    backbone. Raises WorkflowError when the weights of the backbone cannot be had.
    """
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((None, None, 3)),
            layers.Resizing(image_size, image_size),
            *augmentation(),
            *(pretrained(image_size) if backbone else convolutions(filters)),
            layers.Dropout(dropout),
            layers.Dense(classes, activation="softmax"),
        ],
        name="image_classifier",
    )


def augmentation() -> list:
    """Layers that change an image as another photo of the same thing would differ; in training alone."""
    from keras import layers

    return [
        layers.RandomFlip("horizontal"),
        layers.RandomRotation(0.1),
        layers.RandomTranslation(0.1, 0.1),
        layers.RandomZoom((-0.3, 0.2)),
        layers.RandomBrightness(0.1, value_range=(0, 255)),
        layers.RandomContrast(0.1, value_range=(0, 255)),
        layers.RandomSaturation((0.3, 0.7), value_range=(0, 255)),
    ]


def convolutions(filters: int) -> list:
    """Three convolutions, each of which halves the image, and the strongest answer of each filter anywhere in it."""
    from keras import layers

    return [
        layers.Rescaling(1 / 127.5, offset=-1),
        *(
            layers.Conv2D(filters * times, 3, strides=2, padding="same", activation="relu", name=f"convolution_{times}")
            for times in (1, 2, 4)
        ),
        layers.GlobalMaxPooling2D(),
    ]


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
