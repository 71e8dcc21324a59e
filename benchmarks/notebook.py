"""The lab's notebook as a plain script: its model, its way of reading, no tracking.

    python benchmarks/notebook.py FOLDER

This is the baseline of whole_run.py.
"""

import sys

import keras
from keras import layers

SIZE, BATCH_SIZE, EPOCHS = (150, 150), 8, 10

train, held_out = keras.utils.image_dataset_from_directory(
    sys.argv[1], validation_split=0.2, subset="both", seed=42, image_size=SIZE, batch_size=None, verbose=False
)
validation = held_out.take(len(held_out) // 2).batch(BATCH_SIZE)
test = held_out.skip(len(held_out) // 2).batch(BATCH_SIZE)
model = keras.Sequential(
    [
        keras.Input((*SIZE, 3)),
        layers.Rescaling(1 / 255),
        layers.Conv2D(32, 3, activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(2, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(train.batch(BATCH_SIZE), validation_data=validation, epochs=EPOCHS, verbose=0)
print(model.evaluate(test, return_dict=True, verbose=0))
