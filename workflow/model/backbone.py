"""The backbone: EfficientNet-Lite0 as it learned from the photos of ImageNet, as plain Keras layers.

It turns an image into 1,280 features, on which a small head is trained; its own weights never change. It looks at each
image three times, at the whole of it and at its centre, enlarged 1.5 and 2 times, and takes the mean:
`python benchmarks/unseen.py` shows what that gains.

The network is that of Tan and Le (EfficientNet, 2019) in the variant of Liu (EfficientNet-Lite, 2020), which has no
squeeze-and-excitation and ReLU6 as activation. backbone_weights.py says where its weights come from.
"""

import functools
from typing import Any, Final

from workflow.model import backbone_weights

import numpy as np

NAME: Final = "efficientnet-lite0"
IMAGE_SIZE = 336  # pixels, both sides, of an image that it is given
VIEWS = (336, 224, 168)  # pixels of the image, both sides: the whole, and its centre enlarged 1.5 and 2 times
VIEW_SIZE = 224  # pixels, both sides, of each view as the convolutions see it: the size at which they learned
BATCH = 8  # images at once, never fewer: so an image's features never depend on its neighbors
FEATURES = 1280
FEATURES_VERSION = 1  # increase when this file computes other features: cached features are then computed again
LENGTH = 8  # of the vector of features: a head learns steadily on vectors of one length
BLOCKS = (  # repeats, kernel size, stride of the first repeat, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EPSILON = 1e-3  # of its batch normalisation


@functools.cache
def build_backbone():
    """The Keras model, frozen: pixels (batch, height, width, 3), 0 to 255, in; features (batch, FEATURES) out.

    It is built once per process. Raises WorkflowError when the weights cannot be read.
    """
    import keras
    from keras import layers, ops

    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    pixels = keras.Input((None, None, 3))
    image = layers.Resizing(IMAGE_SIZE, IMAGE_SIZE)(pixels)
    views = [layers.Resizing(VIEW_SIZE, VIEW_SIZE)(layers.CenterCrop(size, size)(image)) for size in VIEWS]
    scaled = layers.Rescaling(1 / 128, offset=-127 / 128)(ops.concatenate(views, axis=0))
    found = layers.GlobalAveragePooling2D()(convolutions(scaled, tensors))
    mean = layers.Average()(ops.split(layers.UnitNormalization()(found), len(VIEWS), axis=0))
    features = layers.Rescaling(LENGTH)(layers.UnitNormalization()(mean))
    backbone = keras.Model(pixels, features, name="backbone")
    backbone.trainable = False
    return backbone


@functools.cache
def compiled_backbone():
    """The backbone as a function of TensorFlow: uint8 (batch, IMAGE_SIZE, IMAGE_SIZE, 3) to features."""
    import tensorflow as tf

    model, pixels = build_backbone(), tf.TensorSpec((None, IMAGE_SIZE, IMAGE_SIZE, 3), tf.uint8)
    return tf.function(lambda batch: model(batch, training=False), [pixels], autograph=False)


def compute_features(pixels: np.ndarray) -> np.ndarray:
    """The features (images, FEATURES) of uint8 pixels (images, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    padded = np.concatenate([pixels, np.zeros((-len(pixels) % BATCH, *pixels.shape[1:]), "uint8")])
    call = compiled_backbone()
    found = [call(padded[start : start + BATCH]).numpy() for start in range(0, len(padded), BATCH)]
    return np.concatenate(found)[: len(pixels)]


def convolutions(x: Any, tensors: dict[str, np.ndarray]):
    """The feature map (batch, height / 32, width / 32, FEATURES) of scaled pixels, a symbolic tensor of Keras.

    Batch normalisation is folded into the convolution before it, which changes no answer and halves the layers.
    """
    from keras import layers

    def convolve(x, kind, name: str, normalisation: str, activation: bool, **options):
        kernel, bias = fold(tensors, name, normalisation)
        layer = kind(padding="same", name=name.strip("_").replace(".", ""), **options)
        x = layer(x)
        layer.set_weights([kernel, bias])
        return layers.ReLU(6)(x) if activation else x

    def convolve_1x1(x, channels: int, name: str, normalisation: str, activation: bool):
        options = {"filters": channels, "kernel_size": 1}
        return convolve(x, layers.Conv2D, name, normalisation, activation, **options)

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


def fold(tensors: dict[str, np.ndarray], name: str, normalisation: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias, as Keras lays them out, of a convolution with the batch normalisation after it."""
    scale = tensors[f"{normalisation}.weight"] / np.sqrt(tensors[f"{normalisation}.running_var"] + EPSILON)
    bias = tensors[f"{normalisation}.bias"] - scale * tensors[f"{normalisation}.running_mean"]
    kernel = tensors[f"{name}.weight"] * scale[:, None, None, None]
    return kernel.transpose((2, 3, 0, 1) if "depthwise" in name else (2, 3, 1, 0)), bias
