"""The training, validation and test datasets for Keras."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workflow.data.prepare import DIGEST_BYTES, read_pixels
from workflow.data.sessions import group_by_session
from workflow.data.split import MIN_IMAGES_PER_CLASS
from workflow.model.feature_set import FeatureSet
from workflow.records import DataVersion, Split

import numpy as np

MAX_MEMORY_BYTES = 50_000_000  # of the pixels of a split; more pixels are read again in each epoch


class ImageDataset:
    """One split of a data version. Iterating yields batches of inputs and labels, int32 of shape (batch,).

    The inputs are the features of a backbone, float32 of shape (batch, FEATURES), or pixels, uint8 of shape
    (batch, size, size, 3).

    Attributes:
        split: train, validation or test
        data: the data version
        class_names: the labels are indices of these
        file_names: of the images, in order
        digests: of the images
        groups: of the images; near-duplicates share a group
        sessions: of the images, for session-wise cross-validation: the photos of a session share one, and so do
            near-duplicates, across all splits
        labels: of the images, int32 of shape (images,)
        features: of the images, float32 of shape (images, FEATURES); None if the inputs are pixels
        inputs: features, or the path of the resized copy, of each image of all splits by its digest
        batches: the batches as a tf.data.Dataset
        batch_size: images per batch
        backbone: the name of the backbone, or "none"
        seed: of the run
        epoch: a tf.Variable with the number of the epoch, which determines with the seed the order of `train`
    """

    def __init__(
        self,
        split: Split,
        inputs: Mapping[str, np.ndarray | Path],
        data: DataVersion,
        batch_size: int,
        seed: int,
        backbone: str,
    ):
        """Select the images of the split.

        Args:
            split: train, validation or test
            inputs: features, or the path of the resized copy, of each image by its digest
            data: the data version
            batch_size: images per batch
            seed: determines the order of the training images
            backbone: the name of the backbone, or "none"
        """
        images = [image for image in data.files if image.split == split]
        values = [inputs[image.digest] for image in images]
        self.split, self.data, self.batch_size, self.backbone = split, data, batch_size, backbone
        self.class_names, self.file_names = data.class_names, [image.file for image in images]
        self.digests, self.inputs, self.seed = [image.digest for image in images], inputs, seed
        self.groups = [data.group_of(image.digest) for image in images]
        by_digest = group_by_session((image.digest for image in data.files), data.duplicate_of, data.sessions)
        self.sessions = [by_digest[image.digest] for image in images]
        self.labels = np.array([self.class_names.index(image.class_name) for image in images], "int32")
        self.paths = [value for value in values if isinstance(value, Path)]  # of resized copies
        self.features = None if self.paths else np.stack([value for value in values if isinstance(value, np.ndarray)])
        arrays = self.paths if self.features is None else self.features
        self.batches, self.epoch = make_batches(split, arrays, self.labels, batch_size, seed)
        self.batches.batch_size = batch_size  # MLflow's autologging (3.17) reads it

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter(self.batches.as_numpy_iterator())

    def merge(self, other: "ImageDataset") -> FeatureSet:
        """Return the features of two datasets with a backbone."""
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

    def read_inputs(self, rows: np.ndarray) -> np.ndarray:
        """Return the inputs of the images with these numbers."""
        if self.features is not None:
            return self.features[rows]
        return np.stack([read_pixels(self.paths[row]) for row in rows])

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)


def make_batches(
    split: Split, inputs: np.ndarray | list[Path], labels: np.ndarray, batch_size: int, seed: int
) -> tuple[Any, Any]:
    """Return a tf.data.Dataset of (inputs, labels), and the tf.Variable of its epoch.

    Args:
        split: only `train` is shuffled
        inputs: features, or paths of resized copies; up to MAX_MEMORY_BYTES of pixels are kept in memory
        labels: int32 of shape (images,)
        batch_size: images per batch
        seed: determines the order with the epoch
    """
    import tensorflow as tf

    epoch = tf.Variable(0, dtype=tf.int64, trainable=False)  # an interrupted training resumes with its order
    order = rows = tf.data.Dataset.range(len(labels))
    all_labels = tf.constant(labels)

    def shuffle(_):
        return rows.shuffle(len(labels), seed=seed * 2**20 + epoch, reshuffle_each_iteration=False)

    if split == "train":
        order = tf.data.Dataset.range(1).flat_map(shuffle)
        order = order.apply(tf.data.experimental.assert_cardinality(len(labels)))
    if isinstance(inputs, list) and len(inputs) * inputs[0].stat().st_size > MAX_MEMORY_BYTES:
        paths, shape = tf.constant([str(path) for path in inputs]), read_pixels(inputs[0]).shape

        def read(row):
            content = tf.strings.substr(tf.io.read_file(paths[row]), DIGEST_BYTES, -1)
            return tf.reshape(tf.io.decode_raw(content, tf.uint8), shape), all_labels[row]

        batches = order.map(read, tf.data.AUTOTUNE).batch(batch_size)
    else:
        values = tf.constant(inputs if isinstance(inputs, np.ndarray) else np.stack([read_pixels(p) for p in inputs]))
        batches = order.batch(batch_size).map(lambda batch: (tf.gather(values, batch), tf.gather(all_labels, batch)))
    return batches.prefetch(tf.data.AUTOTUNE), epoch
