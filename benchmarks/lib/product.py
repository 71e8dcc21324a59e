"""Train like a run of ml_workflow.py, without servers or image files: same split, refit, evidence and thresholds."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_workflow
from workflow.data.datasets import ImageDataset
from workflow.data.split import split_images
from workflow.evaluation import comparison, metrics
from workflow.evaluation.calibration import apply_temperature
from workflow.image_classifier import fit_whitening, read_image
from workflow.model import backbone
from workflow.model.feature_set import normalize
from workflow.records import DataVersion, Evidence, ImageFile, Prediction

import numpy as np

BLOCK = 64  # images to read at once
NAMES = ("epochs", "batch_size", "learning_rate", "dropout")
PARAMETERS = {name: getattr(ml_workflow, name.upper()) for name in NAMES}


def compute_features(files: list[Path]) -> np.ndarray:
    """Return the features of image files."""
    blocks = [files[start : start + BLOCK] for start in range(0, len(files), BLOCK)]
    pixels = (np.stack([read_image(file, backbone.IMAGE_SIZE) for file in block]) for block in blocks)
    return np.concatenate([backbone.compute_features(block) for block in pixels])


def split_like_run(labels: np.ndarray, digests: Sequence[str]) -> np.ndarray:
    """Return the split of each image of a folder, as in preprocess_data()."""
    images = [ImageFile(digest, str(label), digest) for label, digest in zip(labels.tolist(), digests, strict=True)]
    fractions = ml_workflow.TEST_FRACTION, ml_workflow.VALIDATION_FRACTION
    return np.array([image.split for image in split_images(images, *fractions, ml_workflow.SPLIT_SALT)])


class Run(NamedTuple):
    """The model of a run, and its evidence.

    Attributes:
        data: the data version
        test: the test dataset
        evidence: of the cross-validation
        head: a Keras model on features, without temperature
        references: the reference embeddings, labels, files and novelty threshold
    """

    data: DataVersion
    test: ImageDataset
    evidence: Evidence
    head: Any
    references: dict[str, np.ndarray]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the calibrated probabilities (images, classes)."""
        return apply_temperature(self.head(features, training=False).numpy(), self.evidence.temperature)

    def find_unknown(self, features: np.ndarray) -> np.ndarray:
        """Return whether each image is unknown."""
        units, roots = normalize(features), self.predict(features).max(axis=1) ** 0.5
        references = self.references["features"].astype("float32")
        cosines = fit_whitening(references, self.references["labels"], features.shape[1]).compare(units)
        return 1 - np.max(cosines, axis=1) * roots > float(self.references["max_novelty"])

    def collect(self) -> list[Prediction]:
        """Return the predictions for photos that the model was not trained on, as for the gate."""
        test_images = [image for image in self.data.files if image.split == "test"]
        results = metrics.summarize(to_predictions(self, test_images, self.test.inputs))
        return comparison.collect_predictions(results, self.evidence)


def to_predictions(run: Run, images: list[ImageFile], inputs: Any) -> list[Prediction]:
    """Return the predictions of a run for images; `inputs` maps their digests to features."""
    if not images:
        return []
    rows = run.predict(np.stack([inputs[image.digest] for image in images])).tolist()
    names, data = run.data.class_names, run.data
    return [
        Prediction.from_probabilities(image, names, row, data.group_of(image.digest))
        for image, row in zip(images, rows, strict=True)
    ]


def train(
    features: np.ndarray,
    labels: Sequence[str],
    digests: Sequence[str],
    seed: int = ml_workflow.SEED,
    duplicate_of: dict[str, str] | None = None,
    sessions: dict[str, str] | None = None,
) -> Run:
    """Train on a folder of these images, and return the run.

    Args:
        features: shape (images, FEATURES)
        labels: the class of each image
        digests: of the image files, which determine the split
        seed: of the run
        duplicate_of: maps the digest of each near-duplicate to that of its representative
        sessions: maps the digests of images to their sessions
    """
    import keras

    keras.utils.clear_session()  # releases the graphs of earlier models
    duplicate_of, files = duplicate_of or {}, []
    for label, digest in zip(labels, digests, strict=True):
        files.append(ImageFile(f"{label}/{digest[:12]}.jpeg", label, digest))
    fractions = ml_workflow.TEST_FRACTION, ml_workflow.VALIDATION_FRACTION
    files = split_images(files, *fractions, ml_workflow.SPLIT_SALT, duplicate_of)
    data = DataVersion("", "", files, duplicate_of, sessions=sessions or {})
    inputs = dict(zip(digests, features, strict=True))
    options = ml_workflow.BATCH_SIZE, seed, ml_workflow.BACKBONE
    train, validation, test = (ImageDataset(split, inputs, data, *options) for split in ("train", "validation", "test"))
    with tempfile.TemporaryDirectory() as folder:
        head, _ = ml_workflow.refit_head(train.merge(validation), Path(folder), seed=seed, **PARAMETERS)
        with np.load(Path(folder, "reference_embeddings.npz")) as saved:
            references = dict(saved)
        evidence = Evidence.read(Path(folder, "cross_validation.json"))
    return Run(data, test, evidence, head, references)
