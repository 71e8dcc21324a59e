"""The lab's notebook as a plain script: its network and data loading, without tracking.

    python benchmarks/notebook.py FOLDER

This is the baseline of whole_run.py. The notebook downloads its images to one folder per split; here Keras splits an
existing folder.
"""

import sys

from lib.lab_network import BATCH_SIZE, EPOCHS, SIZE, build_lab_network

import keras

train, held_out = keras.utils.image_dataset_from_directory(
    sys.argv[1], validation_split=0.2, subset="both", seed=42, image_size=(SIZE, SIZE), batch_size=None, verbose=False
)
validation = held_out.take(len(held_out) // 2).batch(BATCH_SIZE)
test = held_out.skip(len(held_out) // 2).batch(BATCH_SIZE)
model = build_lab_network(len(train.class_names))
model.fit(train.batch(BATCH_SIZE), validation_data=validation, epochs=EPOCHS, verbose=0)
print(model.evaluate(test, return_dict=True, verbose=0))
