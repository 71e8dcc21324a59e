"""The variants that unseen.py compares: each has something to learn from, and a way to learn from it.

All but the default differ from it in one thing.
"""

from collections.abc import Callable
from functools import partial

from lib import lab_network

import ml_workflow
from workflow.model import backbone, backbone_weights, network

import numpy as np
from sklearn.linear_model import LogisticRegression

SMALL_EPOCHS = 45  # the small network gains by so many
LAST_BLOCK = "blocks15_expand_conv"  # the first layer of what is fine-tuned
TUNING = {"epochs": 5, "learning_rate": 0.0003}  # of the fine-tuning, after the head has learned as in the default
# Both sides of the pixels from which a variant learns directly; the backbone sees IMAGE_SIZE.
SIZES = {"pixels": ml_workflow.SMALL_SIZE, "pixels of the lab": lab_network.SIZE}
CUTS = dict(zip(("whole", "centre", "close"), backbone.VIEWS, strict=True))  # pixels of the image that a view shows


def look_with(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What computes from the pixels of all photos that from which a variant learns, or one view of it."""
    import tensorflow as tf

    if name in ("features", *SIZES):
        return backbone.compute_features if name == "features" else lambda pixels: pixels
    model, shape = trunk() if name == "feature maps" else view_model(name), (None, *2 * [backbone.IMAGE_SIZE], 3)
    call = tf.function(lambda batch: model(batch, training=False), [tf.TensorSpec(shape, tf.uint8)], autograph=False)

    def compute(pixels: np.ndarray) -> np.ndarray:
        starts = range(0, len(pixels), backbone.BATCH)
        return np.concatenate([call(pixels[start : start + backbone.BATCH]).numpy() for start in starts])

    return compute


def view_model(name: str):
    """A Keras model that sees an image in one way: pixels in, features that are not normalised out."""
    from keras import Input, Model, layers

    pixels, cut = Input((backbone.IMAGE_SIZE, backbone.IMAGE_SIZE, 3)), CUTS[name.split()[0]]
    view = layers.Resizing(backbone.VIEW_SIZE, backbone.VIEW_SIZE)(layers.CenterCrop(cut, cut)(pixels))
    view = layers.Rescaling(1 / 128, offset=-127 / 128)(view[:, :, ::-1] if name.endswith("mirrored") else view)
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    return Model(pixels, layers.GlobalAveragePooling2D()(backbone.convolutions(view, tensors)))


def trunk():
    """The backbone without its last block: pixels in, the feature maps of its views (batch, 3, 7, 7, 192) out."""
    from keras import Model, ops

    maps = backbone.build_backbone().get_layer(LAST_BLOCK).input
    return Model(backbone.build_backbone().input, ops.stack(ops.split(maps, len(CUTS), axis=0), axis=1))


def build_small(classes: int, dropout: float, seed: int):
    return network.build_small(classes, ml_workflow.SMALL_SIZE, ml_workflow.FILTERS, dropout, seed)


def compile_with_adam(model, learning_rate: float, steps: int) -> None:
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy")


def fit_as_shipped(inputs, labels, seed: int):
    """Return a new head, trained as the one that a run ships."""
    head = network.build_head(int(labels.max()) + 1, ml_workflow.DROPOUT, seed)
    options = ml_workflow.EPOCHS, ml_workflow.BATCH_SIZE, ml_workflow.LEARNING_RATE
    network.fit(head, inputs, labels, *options, seed)
    return head


def fit(inputs, labels, seed: int, build=network.build_head, compile_model=network.compile_model, **changes):
    """A new model that has learned as train_model() lets it learn, but for the changes."""
    names = ("dropout", "epochs", "learning_rate")
    dropout, epochs, learning_rate = ({name: getattr(ml_workflow, name.upper()) for name in names} | changes).values()
    model = build(int(labels.max()) + 1, dropout, seed=seed)
    compile_model(model, learning_rate, epochs * -(-len(labels) // ml_workflow.BATCH_SIZE))
    model.fit(inputs, labels, ml_workflow.BATCH_SIZE, epochs, verbose=0)
    return model


def fit_logistic_regression(inputs, labels, seed: int):
    """A head with the weights that scikit-learn finds for it."""
    found = LogisticRegression(max_iter=1000).fit(inputs, labels)
    weights, bias = found.coef_.T, found.intercept_
    if len(bias) == 1:  # for two classes scikit-learn has the difference between their weights alone
        weights, bias = np.hstack([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    model = network.build_head(len(bias), 0)
    model.set_weights([weights, bias])
    return model


def fine_tune(inputs, labels, seed: int):
    """A head that has learned as in the default, and then together with the backbone's last block and convolution."""
    import keras
    from keras import Input, Model, Sequential, ops

    whole = backbone.build_backbone()
    end = Model(whole.get_layer(LAST_BLOCK).input, whole.output)
    weights, end = end.get_weights(), keras.models.clone_model(end)
    end.set_weights(weights)
    maps = Input(inputs.shape[1:])
    features = Model(maps, end(ops.concatenate([maps[:, view] for view in range(len(CUTS))], axis=0)))
    head = fit(features.predict(inputs, verbose=0), labels, seed)
    for layer in end.layers:  # each is frozen by itself
        layer.trainable = True
    model = Sequential([Input(inputs.shape[1:]), features, *head.layers])
    return fit(inputs, labels, seed, build=lambda *_, **__: model, **TUNING)


EPOCHS, FEATURES, VIEWS = ml_workflow.EPOCHS, ("features",), tuple(CUTS)
VARIANTS: dict[str, tuple[tuple[str, ...], Callable]] = {  # what a variant learns from, and how
    "default": (FEATURES, fit_as_shipped),
    "small network": (("pixels",), partial(fit, build=build_small, epochs=SMALL_EPOCHS)),
    "the lab's network": (("pixels of the lab",), lab_network.fit_lab_network),
    "whole image only": (("whole",), fit),
    "centre only": (("centre",), fit),
    "whole and centre": (VIEWS[:2], fit),
    "mirrored views too": ((*VIEWS, *(f"{view} mirrored" for view in VIEWS)), fit),
    "not normalised": (VIEWS, fit),
    "Adam at 0.003": (FEATURES, partial(fit, compile_model=compile_with_adam, learning_rate=0.003)),
    "no dropout": (FEATURES, partial(fit, dropout=0)),
    "twice the learning rate": (FEATURES, partial(fit, learning_rate=2 * ml_workflow.LEARNING_RATE)),
    "half the epochs": (FEATURES, partial(fit, epochs=EPOCHS // 2)),
    "twice the epochs": (FEATURES, partial(fit, epochs=2 * EPOCHS)),
    "logistic regression": (FEATURES, fit_logistic_regression),
    "last block fine-tuned": (("feature maps",), fine_tune),
}
