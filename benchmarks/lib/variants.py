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

SMALL_EPOCHS = 45  # the small network improves up to this
LAST_BLOCK = "blocks15_expand_conv"  # the first layer to fine-tune
FINE_TUNING = {"epochs": 5, "learning_rate": 0.0003}  # after the head is trained like the default
SIZES = {"pixels": ml_workflow.SMALL_SIZE, "pixels of the lab": lab_network.SIZE}  # side of inputs that are pixels
CROPS = dict(zip(("whole", "center", "close"), backbone.VIEWS, strict=True))  # side of each view in pixels


def make_input_function(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that computes these inputs, or the features of this view, from the pixels of all photos."""
    import tensorflow as tf

    if name in ("features", *SIZES):
        return backbone.compute_features if name == "features" else lambda pixels: pixels
    model, shape = build_trunk() if name == "feature maps" else build_view(name), (None, *2 * [backbone.IMAGE_SIZE], 3)
    call = tf.function(lambda batch: model(batch, training=False), [tf.TensorSpec(shape, tf.uint8)], autograph=False)

    def compute(pixels: np.ndarray) -> np.ndarray:
        starts = range(0, len(pixels), backbone.BATCH)
        return np.concatenate([call(pixels[start : start + backbone.BATCH]).numpy() for start in starts])

    return compute


def build_view(name: str):
    """Return a Keras model that computes the features of one view, without normalization."""
    from keras import Input, Model, layers

    pixels, crop = Input((backbone.IMAGE_SIZE, backbone.IMAGE_SIZE, 3)), CROPS[name.split()[0]]
    view = layers.Resizing(backbone.VIEW_SIZE, backbone.VIEW_SIZE)(layers.CenterCrop(crop, crop)(pixels))
    view = layers.Rescaling(1 / 128, offset=-127 / 128)(view[:, :, ::-1] if name.endswith("mirrored") else view)
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    return Model(pixels, layers.GlobalAveragePooling2D()(backbone.convolutions(view, tensors)))


def build_trunk():
    """Return the backbone without its last block: pixels to the feature maps of its views (batch, 3, 7, 7, 192)."""
    from keras import Model, ops

    maps = backbone.build_backbone().get_layer(LAST_BLOCK).input
    return Model(backbone.build_backbone().input, ops.stack(ops.split(maps, len(CROPS), axis=0), axis=1))


def build_small(classes: int, dropout: float, seed: int):
    return build_small_network(classes, ml_workflow.SMALL_SIZE, ml_workflow.FILTERS, dropout, seed)


def compile_with_adam(model, learning_rate: float, steps: int) -> None:
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy")


def fit_default(inputs, labels, seed: int):
    """Return a head that is trained like that of a run."""
    return fit_head(inputs, labels, seed=seed, **PARAMETERS)


def fit(inputs, labels, seed: int, build=build_head, compile_model=compile_model, **changes):
    """Return a model that is trained like train_model() does, except for the changes."""
    names = ("dropout", "epochs", "learning_rate")
    dropout, epochs, learning_rate = ({name: getattr(ml_workflow, name.upper()) for name in names} | changes).values()
    model = build(int(labels.max()) + 1, dropout, seed=seed)
    compile_model(model, learning_rate, epochs * -(-len(labels) // ml_workflow.BATCH_SIZE))
    model.fit(inputs, labels, ml_workflow.BATCH_SIZE, epochs, verbose=0)
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


def fine_tune(inputs, labels, seed: int):
    """Return a head that is trained like the default, then together with the last layers of the backbone."""
    import keras
    from keras import Input, Model, Sequential, ops

    whole = backbone.build_backbone()
    end = Model(whole.get_layer(LAST_BLOCK).input, whole.output)
    weights, end = end.get_weights(), keras.models.clone_model(end)
    end.set_weights(weights)
    maps = Input(inputs.shape[1:])
    features = Model(maps, end(ops.concatenate([maps[:, view] for view in range(len(CROPS))], axis=0)))
    head = fit(features.predict(inputs, verbose=0), labels, seed)
    for layer in end.layers:  # each layer is frozen separately
        layer.trainable = True
    model = Sequential([Input(inputs.shape[1:]), features, *head.layers])
    return fit(inputs, labels, seed, build=lambda *_, **__: model, **FINE_TUNING)


EPOCHS, FEATURES, VIEWS = ml_workflow.EPOCHS, ("features",), tuple(CROPS)
VARIANTS: dict[str, tuple[tuple[str, ...], Callable]] = {  # the names of its inputs, and its training
    "default": (FEATURES, fit_default),
    "small network": (("pixels",), partial(fit, build=build_small, epochs=SMALL_EPOCHS)),
    "the lab's network": (("pixels of the lab",), lab_network.fit_lab_network),
    "whole image only": (("whole",), fit),
    "center only": (("center",), fit),
    "whole and center": (VIEWS[:2], fit),
    "mirrored views too": ((*VIEWS, *(f"{view} mirrored" for view in VIEWS)), fit),
    "not normalized": (VIEWS, fit),
    "Adam at 0.003": (FEATURES, partial(fit, compile_model=compile_with_adam, learning_rate=0.003)),
    "no dropout": (FEATURES, partial(fit, dropout=0)),
    "twice the learning rate": (FEATURES, partial(fit, learning_rate=2 * ml_workflow.LEARNING_RATE)),
    "half the epochs": (FEATURES, partial(fit, epochs=EPOCHS // 2)),
    "twice the epochs": (FEATURES, partial(fit, epochs=2 * EPOCHS)),
    "logistic regression": (FEATURES, fit_logistic_regression),
    "last block fine-tuned": (("feature maps",), fine_tune),
}
