"""The backbone: EfficientNet-Lite0, pretrained on ImageNet, as plain Keras layers.

It extracts 1,280 features from an image, on which a head is trained; its weights are frozen. The features are the mean
over three views of the image: the whole image, and its center enlarged 1.5 and 2 times. `python benchmarks/unseen.py`
measures how much this helps.

Sources: Tan and Le, EfficientNet, 2019; Liu, EfficientNet-Lite, 2020, with ReLU6 and without squeeze-and-excitation.
backbone_weights.py reads the weights.
"""

import functools
from typing import Any, Final

from workflow.model import backbone_weights
from workflow.model.keras_import import import_keras

import numpy as np

NAME: Final = "efficientnet-lite0"
IMAGE_SIZE = 336  # width and height of an input image, in pixels
VIEWS = (336, 224, 168)  # IMAGE_SIZE, and width and height of the center that each further view shows
VIEW_SIZE = 224  # width and height of a view after resizing, as in pretraining
BATCH = 8  # images; smaller batches are padded, so that the features of an image do not depend on its batch
FEATURES = 1280
FEATURES_VERSION = 1  # increase when this file computes different features, so that cached ones are recomputed
LENGTH = 8  # L2 norm of every feature vector; a constant norm makes the training of a head stable
BLOCKS = (  # repeats, kernel size, stride of the first repeat, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EPSILON = 1e-3  # in batch normalization


@functools.cache
def build_backbone():
    """Return the frozen Keras model: pixels (batch, height, width, 3), 0 to 255, to features (batch, FEATURES).

    Raises:
        WorkflowError: the weights cannot be read
    """
    import_keras()
    import keras
    from keras import layers, ops

    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    pixels = keras.Input((None, None, 3))
    image = layers.Resizing(IMAGE_SIZE, IMAGE_SIZE)(pixels)
    views = [layers.Resizing(VIEW_SIZE, VIEW_SIZE)(layers.CenterCrop(size, size)(image)) for size in VIEWS]
    scaled = layers.Rescaling(1 / 128, offset=-127 / 128)(ops.concatenate(views, axis=0))
    pooled = layers.GlobalAveragePooling2D()(convolutions(scaled, tensors))
    mean = layers.Average()(ops.split(layers.UnitNormalization()(pooled), len(VIEWS), axis=0))
    features = layers.Rescaling(LENGTH)(layers.UnitNormalization()(mean))
    backbone = keras.Model(pixels, features, name="backbone")
    backbone.trainable = False
    return backbone


@functools.cache
def compiled_backbone():
    """Return the backbone as a TensorFlow function: uint8 pixels (batch, IMAGE_SIZE, IMAGE_SIZE, 3) to features."""
    import tensorflow as tf

    model, pixels = build_backbone(), tf.TensorSpec((None, IMAGE_SIZE, IMAGE_SIZE, 3), tf.uint8)
    return tf.function(lambda batch: model(batch, training=False), [pixels], autograph=False)


def compute_features(pixels: np.ndarray) -> np.ndarray:
    """Return the features (images, FEATURES) of uint8 pixels (images, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    padded = np.concatenate([pixels, np.zeros((-len(pixels) % BATCH, *pixels.shape[1:]), "uint8")])
    call = compiled_backbone()
    batches = [call(padded[start : start + BATCH]).numpy() for start in range(0, len(padded), BATCH)]
    return np.concatenate(batches)[: len(pixels)]


def convolutions(x: Any, tensors: dict[str, np.ndarray]):
    """Return the feature maps (batch, height / 32, width / 32, FEATURES) of scaled pixels, a symbolic Keras tensor.

    Batch normalization is folded into the preceding convolution, which halves the number of
    layers and does not change the output.
    """
    from keras import layers

    def convolve(x, kind, name: str, normalization: str, activation: bool, **options):
        kernel, bias = fold(tensors, name, normalization)
        layer = kind(padding="same", name=name.strip("_").replace(".", ""), **options)
        x = layer(x)
        layer.set_weights([kernel, bias])
        return layers.ReLU(6)(x) if activation else x

    def convolve_1x1(x, channels: int, name: str, normalization: str, activation: bool):
        options = {"filters": channels, "kernel_size": 1}
        return convolve(x, layers.Conv2D, name, normalization, activation, **options)

    x = convolve(x, layers.Conv2D, "_conv_stem", "_bn0", True, filters=32, kernel_size=3, strides=2)
    number = 0
    for repeats, kernel_size, stride, expansion, channels in BLOCKS:
        for repeat in range(repeats):
            block, y = f"_blocks.{number}.", x
            if expansion > 1:
                y = convolve_1x1(y, expansion * x.shape[-1], f"{block}_expand_conv", f"{block}_bn0", True)
            options = {"kernel_size": kernel_size, "strides": 1 if repeat else stride}
            y = convolve(y, layers.DepthwiseConv2D, f"{block}_depthwise_conv", f"{block}_bn1", True, **options)
            y = convolve_1x1(y, channels, f"{block}_project_conv", f"{block}_bn2", False)
            x = layers.Add()([x, y]) if repeat else y
            number += 1
    return convolve_1x1(x, FEATURES, "_conv_head", "_bn1", True)


def fold(tensors: dict[str, np.ndarray], name: str, normalization: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel and bias, in Keras's layout, of a convolution with the batch normalization folded into it."""
    scale = tensors[f"{normalization}.weight"] / np.sqrt(tensors[f"{normalization}.running_var"] + EPSILON)
    bias = tensors[f"{normalization}.bias"] - scale * tensors[f"{normalization}.running_mean"]
    kernel = tensors[f"{name}.weight"] * scale[:, None, None, None]
    return kernel.transpose((2, 3, 0, 1) if "depthwise" in name else (2, 3, 1, 0)), bias
