"""The network of the lab's notebook, and how it learns there: the baseline of whole_run.py and unseen.py.

One convolution, no pretraining, and pixels as they are. The loss is told that the outputs are logits, though
they are sigmoids, as in the notebook. Keras warns of it, and takes the numbers before the sigmoid instead.
"""

SIZE, BATCH_SIZE, EPOCHS = 150, 8, 10  # pixels of both sides; images; passes over the training images


def build_lab_network(classes: int):
    """A compiled Keras model (batch, SIZE, SIZE, 3) -> (batch, classes); 45 million parameters."""
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
    """A new model that has learned from pixels (images, SIZE, SIZE, 3) as in the notebook."""
    model = build_lab_network(int(labels.max()) + 1)
    model.fit(inputs, labels, BATCH_SIZE, EPOCHS, verbose=0)
    return model
