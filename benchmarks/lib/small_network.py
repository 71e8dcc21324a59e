"""Make the datasets of the small network, like preprocess_data() in ml_workflow.py but without MLflow."""

from pathlib import Path

import ml_workflow
from workflow.data.datasets import ImageDataset
from workflow.data.folder import digest_files
from workflow.data.prepare import prepare_pixels
from workflow.data.split import split_images
from workflow.records import DataVersion, Split


def load_splits(folder: Path, cache: Path, *names: Split) -> list[ImageDataset]:
    """Return the splits with these names; the digests are cached in `cache`."""
    images = digest_files(folder, cache)
    images, inputs, *_ = prepare_pixels(images, folder, ml_workflow.SMALL_SIZE)
    fractions = ml_workflow.TEST_FRACTION, ml_workflow.VALIDATION_FRACTION
    images = split_images(images, *fractions, ml_workflow.SPLIT_SALT)
    data = DataVersion(str(folder), str(folder), images)
    return [ImageDataset(name, inputs, data, ml_workflow.BATCH_SIZE, ml_workflow.SEED, "none") for name in names]
