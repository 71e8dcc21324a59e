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
        class_names: sorted; a label is an index into them
        file_names: files of the split's images, in order
        digests: SHA-256 of the images
        groups: group of each image; near-duplicates share a group
        sessions: group of each image for session-wise cross-validation; photos of one session share a group, and so do
            near-duplicates, across all splits
        labels: int32 of shape (images,)
        array: the inputs of the images
        features: the same as `array`; None if the inputs are pixels
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
        images = [image for image in data.files if image.split == split]
        self.split, self.inputs, self.data = split, inputs, data
        self.batch_size, self.seed, self.backbone = batch_size, seed, backbone
        self.class_names, self.file_names = data.class_names, [image.file for image in images]
        self.digests = [image.digest for image in images]
        self.groups = [data.group_of(digest) for digest in self.digests]
        by_digest = group_by_session((image.digest for image in data.files), data.duplicate_of, data.sessions)
        self.sessions = [by_digest[digest] for digest in self.digests]
        self.labels = np.array([self.class_names.index(image.class_name) for image in images], "int32")
        self.array = np.stack([inputs[digest] for digest in self.digests])
        self.features = self.array if self.array.ndim == 2 else None
        self.batches = make_batches(split, self.array, self.labels, batch_size, seed)
        self.batches.batch_size = batch_size  # MLflow's autologging (3.17) reads it

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter(self.batches.as_numpy_iterator())

    def merge(self, other: "ImageDataset") -> FeatureSet:
        """Return the features of two datasets together; both need a backbone."""
        assert self.features is not None
        assert other.features is not None
        return FeatureSet(
            np.concatenate([self.features, other.features]),
            np.concatenate([self.labels, other.labels]),
            self.class_names,
            self.file_names + other.file_names,
            self.digests + other.digests,
            self.groups + other.groups,
            self.sessions + other.sessions,
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
