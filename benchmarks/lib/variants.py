"""The variants that unseen.py compares: the inputs and the training of each.

Each variant differs from the default in one respect.
"""

from collections.abc import Callable
from functools import partial

from lib import lab_network
from lib.product import PARAMETERS

import ml_workflow
from workflow.model import backbone, backbone_weights
from workflow.model.head import build_head, compile_model, fit_head
from workflow.model.small_network import build_small_network

import numpy as np
from sklearn.linear_model import LogisticRegression

SMALL_EPOCHS = 45  # the small network improves up to about this
SIZES = {"pixels": ml_workflow.SMALL_SIZE, "pixels of the lab": lab_network.SIZE}  # side of inputs that are pixels
CROPS = dict(zip(("whole", "center", "close"), backbone.VIEWS, strict=True))  # side of each view in pixels


def make_input_function(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that computes the inputs or view features with this name from the pixels of all photos."""
    import tensorflow as tf

    if name in ("features", *SIZES):
        return backbone.compute_features if name == "features" else lambda pixels: pixels
    model, shape = build_view(CROPS[name]), (None, *2 * [backbone.IMAGE_SIZE], 3)
    call = tf.function(lambda batch: model(batch, training=False), [tf.TensorSpec(shape, tf.uint8)], autograph=False)

    def compute(pixels: np.ndarray) -> np.ndarray:
        starts = range(0, len(pixels), backbone.BATCH)
        return np.concatenate([call(pixels[start : start + backbone.BATCH]).numpy() for start in starts])

    return compute


def build_view(crop: int):
    """Return a Keras model that computes the features of the center of an image, without normalization."""
    from keras import Input, Model, layers

    pixels = Input((backbone.IMAGE_SIZE, backbone.IMAGE_SIZE, 3))
    view = layers.Resizing(backbone.VIEW_SIZE, backbone.VIEW_SIZE)(layers.CenterCrop(crop, crop)(pixels))
    view = layers.Rescaling(1 / 128, offset=-127 / 128)(view)
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    return Model(pixels, layers.GlobalAveragePooling2D()(backbone.convolutions(view, tensors)))


def fit(inputs, labels, seed: int, **changes):
    """Return a head that is trained like that of a run, except for the changes."""
    return fit_head(inputs, labels, seed=seed, **PARAMETERS | changes)


def fit_small_network(inputs, labels, seed: int):
    """Return a small network that is trained like that of a run, but longer."""
    model = build_small_network(int(labels.max()) + 1, ml_workflow.SMALL_SIZE, ml_workflow.DROPOUT, seed)
    compile_model(model, ml_workflow.LEARNING_RATE, SMALL_EPOCHS * -(-len(labels) // ml_workflow.BATCH_SIZE))
    model.fit(inputs, labels, ml_workflow.BATCH_SIZE, SMALL_EPOCHS, verbose=0)
    return model


def fit_logistic_regression(inputs, labels, seed: int):
    """Return a head with the weights that scikit-learn fits."""
    regression = LogisticRegression(max_iter=1000).fit(inputs, labels)
    weights, bias = regression.coef_.T, regression.intercept_
    if len(bias) == 1:  # for two classes, scikit-learn only keeps the difference of their weights
        weights, bias = np.hstack([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    model = build_head(len(bias), 0)
    model.set_weights([weights, bias])
    return model


EPOCHS, FEATURES = ml_workflow.EPOCHS, ("features",)
VARIANTS: dict[str, tuple[tuple[str, ...], Callable]] = {  # the names of its inputs, and its training
    "default": (FEATURES, fit),
    "small network": (("pixels",), fit_small_network),
    "the lab's network": (("pixels of the lab",), lab_network.fit_lab_network),
    "whole image only": (("whole",), fit),
    "center only": (("center",), fit),
    "whole and center": (("whole", "center"), fit),
    "no dropout": (FEATURES, partial(fit, dropout=0)),
    "twice the learning rate": (FEATURES, partial(fit, learning_rate=2 * ml_workflow.LEARNING_RATE)),
    "half the epochs": (FEATURES, partial(fit, epochs=EPOCHS // 2)),
    "twice the epochs": (FEATURES, partial(fit, epochs=2 * EPOCHS)),
    "logistic regression": (FEATURES, fit_logistic_regression),
}
