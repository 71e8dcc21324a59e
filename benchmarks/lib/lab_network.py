"""The network of the lab's notebook, trained as in the notebook: the baseline of whole_run.py and unseen.py.

It has one convolution and neither pretraining nor rescaling. As in the notebook, the loss expects logits although the
outputs are sigmoids; Keras warns, and uses the values before the sigmoid.
"""

SIZE, BATCH_SIZE, EPOCHS = 150, 8, 10  # side in pixels; images; passes over the training images


def build_lab_network(classes: int):
    """Return a compiled Keras model (batch, SIZE, SIZE, 3) -> (batch, classes) with 45 million parameters."""
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes, activation="sigmoid"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def fit_lab_network(inputs, labels, seed: int):
    """Return a model trained on pixels (images, SIZE, SIZE, 3) as in the notebook."""
    model = build_lab_network(int(labels.max()) + 1)
    model.fit(inputs, labels, BATCH_SIZE, EPOCHS, verbose=0)
    return model
