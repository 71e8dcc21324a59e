"""Class activation maps: which regions of an image led to its prediction.

The head is linear in the features, which are averages over the positions of the backbone's feature maps. The
contribution of each position to each logit is therefore exact, without gradients (Zhou et al., Learning Deep Features
for Discriminative Localization, 2016). A map distributes the margin of the predicted class over the image: its logit
minus the mean logit of the other classes, before temperature scaling. The values of a map and the bias add up to the
margin.

Maps are coarse, because each view of the backbone has 7 x 7 positions. Views overlap in the center, where values are
therefore higher. A map shows which regions matter, not what the model recognizes in them.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from workflow.files import group
from workflow.image_classifier import USUAL_SIZE, encode_jpeg, open_image, read_image, resize_to_rgb

import numpy as np
from PIL import Image

BATCH_SIZE = 8  # images whose feature maps are in memory at the same time
MAX_BATCH_BYTES = 100_000_000  # size of their files
SPREAD = 0.55  # standard deviation of the Gaussian that replaces a position, in units of the distance between positions
EPSILON = 1e-6  # smallest divisor, for an image whose features are all zero
OVERLAY_PIXELS = 400  # longer side of an image with its map
COLORMAP = "inferno"  # in Matplotlib; perceptually uniform and suitable for color-blind people
MIN_OPACITY, MAX_OPACITY = 0.3, 0.7  # of the colors over the grayscale image


def is_explainable(classifier: Any) -> bool:
    """Return whether the predictions of an ImageClassifier can be explained, which requires a backbone."""
    return find_pooling(classifier.model) is not None


def find_pooling(model: Any):
    """Return the layer that averages the feature maps of the backbone; None if the model has no backbone."""
    from keras import Model, layers

    first = model.layers[0]
    inner_layers = first.layers if isinstance(first, Model) else []
    return next((layer for layer in inner_layers if isinstance(layer, layers.GlobalAveragePooling2D)), None)


@functools.lru_cache(maxsize=1)
def build_extractor(model: Any):
    """Return a TensorFlow function from uint8 pixels (images, height, width, 3) to feature maps and features."""
    import keras
    import tensorflow as tf

    backbone, pixels = model.layers[0], tf.TensorSpec((None, None, None, 3), tf.uint8)
    extractor = keras.Model(backbone.input, [find_pooling(model).input, backbone.output])
    return tf.function(lambda batch: extractor(batch, training=False), [pixels], autograph=False)


def list_views(classifier: Any) -> list[int]:
    """Return the sizes of the backbone's views in pixels of the input: first the whole image, then center crops."""
    from keras import layers

    crops = [layer.height for layer in classifier.model.layers[0].layers if isinstance(layer, layers.CenterCrop)]
    return sorted({classifier.image_size, *crops}, reverse=True)


def subtract_other_classes(values: np.ndarray) -> np.ndarray:
    """Return the value of each class minus the mean value of the other classes; the last axis holds the classes."""
    classes = values.shape[-1]
    return (values - values.mean(axis=-1, keepdims=True)) * classes / (classes - 1)


def compute_contributions(classifier: Any, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the contribution of each position of each view to the margin of the predicted class.

    The backbone averages a view's feature map, scales the result to length 1, averages the views, and scales again. For
    a given image these scales are constants, so the margin is linear in the feature maps.

    Args:
        classifier: a loaded ImageClassifier
        pixels: uint8, shape (images, image_size, image_size, 3)

    Returns:
        The contributions (images, views, rows, columns), the biases (images,), which must be added to get the margins,
        and the indices of the predicted classes (images,).
    """
    from keras import layers

    feature_maps, features = (tensor.numpy() for tensor in build_extractor(classifier.model)(pixels))
    feature_maps = feature_maps.reshape(-1, len(pixels), *feature_maps.shape[1:])  # views are the first axis
    dense = next(layer for layer in classifier.model.layers if isinstance(layer, layers.Dense))
    kernel, bias = dense.get_weights()
    predicted = (features @ kernel + bias).argmax(axis=1)
    pooled = feature_maps.mean(axis=(2, 3))
    lengths = np.maximum(np.linalg.norm(pooled, axis=2, keepdims=True), EPSILON)
    mean_length = np.linalg.norm((pooled / lengths).mean(axis=0), axis=1)
    scale = np.linalg.norm(features, axis=1) / np.maximum(mean_length, EPSILON)
    views, _, rows, columns, _ = feature_maps.shape
    scales = scale / lengths[..., 0] / (views * rows * columns)
    weights = subtract_other_classes(kernel)[:, predicted]
    values = np.einsum("vnrcf,fn,vn->nvrc", feature_maps, weights, scales, optimize=True)
    return values, subtract_other_classes(bias)[predicted], predicted


def spread_positions(positions: int, view: int, size: int) -> np.ndarray:
    """Return a matrix (size, positions) that upsamples the positions of a centered view along one axis.

    A position becomes a Gaussian whose pixels add up to 1. Beyond the outermost positions, it stays constant up to the
    edge of the image, but decays outside a smaller view.
    """
    step = view / positions
    centers = (size - view) / 2 + step * (np.arange(positions) + 0.5)
    pixels = np.clip(np.arange(size) + 0.5, step / 2, size - step / 2)
    heights = np.exp(-(((pixels[:, None] - centers) / (SPREAD * step)) ** 2) / 2)
    return heights / heights.sum(axis=0)


def compute_maps(classifier: Any, pixels: np.ndarray) -> np.ndarray:
    """Return the maps of the predicted classes, float32, shape (images, image_size, image_size)."""
    contributions, _, _ = compute_contributions(classifier, pixels)
    maps = np.zeros(pixels.shape[:3], "float32")
    for view, values in zip(list_views(classifier), contributions.swapaxes(0, 1), strict=True):
        rows, columns = (spread_positions(positions, view, pixels.shape[1]) for positions in values.shape[1:])
        maps += rows @ values @ columns.T
    return maps


def read_photo(content: bytes) -> Image.Image:
    """Return an image upright, scaled to OVERLAY_PIXELS on its longer side; read_image() must accept it."""
    with open_image(content, USUAL_SIZE)[0] as image:
        return resize_to_rgb(image, OVERLAY_PIXELS, keep_aspect=True)


def draw_map(photo: Image.Image, activation_map: np.ndarray) -> bytes:
    """Return a JPEG file with the colors of a map over the grayscale image; regions with negative values stay dark."""
    from matplotlib import colormaps

    heat = np.clip(activation_map / max(activation_map.max(), EPSILON), 0, 1)
    heat = np.asarray(Image.fromarray(heat).resize(photo.size, Image.Resampling.BILINEAR))
    opacity = (MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * heat)[..., None]
    gray = np.asarray(photo.convert("L"))[..., None]
    overlay = (1 - opacity) * gray + opacity * 255 * colormaps[COLORMAP](heat)[..., :3]
    return encode_jpeg(overlay.round().astype("uint8"))


def explain_images(classifier: Any, contents: Iterable[bytes]) -> Iterator[bytes | str]:
    """Yield a JPEG file with the map of each image file, or the reason why the image is unusable."""
    for batch in group(contents, len, BATCH_SIZE, MAX_BATCH_BYTES):
        images = [read_pixels(content, classifier.image_size) for content in batch]
        usable = [pixels for pixels in images if not isinstance(pixels, str)]
        maps = iter(compute_maps(classifier, np.stack(usable)) if usable else ())
        for content, pixels in zip(batch, images, strict=True):
            yield pixels if isinstance(pixels, str) else draw_map(read_photo(content), next(maps))


def read_pixels(content: bytes, size: int) -> np.ndarray | str:
    """Return the pixels of an image file, or the reason why it is unusable."""
    try:
        return read_image(content, size)
    except ValueError as error:
        return str(error)
