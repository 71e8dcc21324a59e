"""The training, validation and test datasets for Keras."""

from collections.abc import Iterator, Mapping
from typing import Any

from workflow.data.sessions import group_by_session
from workflow.data.split import MIN_IMAGES_PER_CLASS
from workflow.model.feature_set import FeatureSet
from workflow.records import DataVersion, Split

import numpy as np


class ImageDataset:
    """One split of a data version. Iterating yields batches of inputs and labels, int32 of shape (batch,).

    The inputs are the features of a backbone, float32 of shape (batch, FEATURES), or pixels, uint8 of shape
    (batch, size, size, 3).

    Attributes:
        split: train, validation or test
        inputs: features or pixels of the images of all splits, by digest
        data: the data version
        batch_size: images per batch
        seed: determines the order of the training images
        backbone: the name of the backbone, or "none"
        images: the images of the split
        file_names: their names
        class_names: the class names, sorted
        labels: indices into `class_names`, int32 of shape (images,)
        features: features of the images; None if the inputs are pixels
        batches: the batches as a tf.data.Dataset
    """

    def __init__(
        self,
        split: Split,
        inputs: Mapping[str, np.ndarray],
        data: DataVersion,
        batch_size: int,
        seed: int,
        backbone: str,
    ):
        self.images = [image for image in data.files if image.split == split]
        self.split, self.inputs, self.data = split, inputs, data
        self.batch_size, self.seed, self.backbone = batch_size, seed, backbone
        self.class_names, self.file_names = data.class_names, [image.file for image in self.images]
        self.labels = np.array([self.class_names.index(image.class_name) for image in self.images], "int32")
        array = np.stack([inputs[image.digest] for image in self.images])
        self.features = array if array.ndim == 2 else None
        self.batches = make_batches(split, array, self.labels, batch_size, seed)
        self.batches.batch_size = batch_size  # MLflow's autologging (3.17) reads it

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter(self.batches.as_numpy_iterator())

    def merge(self, other: "ImageDataset") -> FeatureSet:
        """Return the combined features of two datasets, which both need a backbone."""
        assert self.features is not None
        assert other.features is not None
        data, digests = self.data, [image.digest for image in self.images + other.images]
        sessions = group_by_session((image.digest for image in data.files), data.duplicate_of, data.sessions)
        return FeatureSet(
            np.concatenate([self.features, other.features]),
            np.concatenate([self.labels, other.labels]),
            self.class_names,
            self.file_names + other.file_names,
            digests,
            list(map(data.group_of, digests)),
            [sessions[digest] for digest in digests],
            self.find_unevaluated_classes(),
        )

    def find_unevaluated_classes(self) -> list[int]:
        """Return the labels of the classes with too few independent images, in all splits, to evaluate a model."""
        groups = {name: set[str]() for name in self.class_names}
        for image in self.data.files:
            if image.split:
                groups[image.class_name].add(self.data.group_of(image.digest))
        return [label for label, name in enumerate(self.class_names) if len(groups[name]) < MIN_IMAGES_PER_CLASS]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)


def make_batches(split: Split, inputs: np.ndarray, labels: np.ndarray, batch_size: int, seed: int) -> Any:
    """Return a tf.data.Dataset of batches (inputs, labels); only `train` is shuffled, differently in each epoch."""
    import tensorflow as tf

    rows = tf.data.Dataset.range(len(labels))
    if split == "train":
        rows = rows.shuffle(len(labels), seed=seed)
    values, all_labels = tf.constant(inputs), tf.constant(labels)
    batches = rows.batch(batch_size).map(lambda batch: (tf.gather(values, batch), tf.gather(all_labels, batch)))
    return batches.prefetch(tf.data.AUTOTUNE)
