"""Make the datasets of the small network, like preprocess_data() in ml_workflow.py but without MLflow."""

from pathlib import Path

import ml_workflow
from workflow.data.datasets import ImageDataset
from workflow.data.folder import digest_files
from workflow.data.shrunk import load_shrunk
from workflow.data.split import split_images
from workflow.records import DataVersion, Split


def load_splits(folder: Path, cache: Path, *names: Split) -> list[ImageDataset]:
    """Return the datasets of these splits; `cache` is the folder of the shrunk copies."""
    images = digest_files(folder, cache)
    images, inputs = load_shrunk(images, folder, cache, ml_workflow.SMALL_SIZE)
    fractions = ml_workflow.TEST_FRACTION, ml_workflow.VALIDATION_FRACTION
    images = split_images(images, *fractions, ml_workflow.SPLIT_SALT)
    data = DataVersion(str(folder), str(folder), images)
    return [ImageDataset(name, inputs, data, ml_workflow.BATCH_SIZE, ml_workflow.SEED, "none") for name in names]
