"""The records that tasks pass to each other, and the file names of a run's artifacts."""

import errno
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, get_args

from workflow.files import read_verified, sha256, write_whole
from workflow.text import from_text

from pydantic import TypeAdapter

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Kinds of data issues. data_issues.SHORTCUTS has four more.
MISLABELED, HARD, OUTLIER = "mislabeled", "hard", "outlier"
NEAR_DUPLICATE, IMBALANCE, SKIPPED, BLANK = "near_duplicate", "imbalance", "skipped", "blank"


class Artifact(StrEnum):
    """The files that a run writes to its scratch folder or logs to MLflow as artifacts."""

    IMAGES = "images.json"  # every image with its split, or why it is skipped
    WEIGHTS = "model.weights.h5"
    MODEL = "model.keras"
    REFERENCE_EMBEDDINGS = "reference_embeddings.npz"
    EVIDENCE = "cross_validation.json"
    LEARNING_CURVES = "learning_curves.png"
    EVALUATION = "evaluation.json"
    ISSUES = "data_issues.json"
    CONFUSION_MATRIX = "confusion_matrix.png"
    MISCLASSIFIED = "misclassified_images.png"
    EVIDENCE_CURVES = "evidence_curves.png"
    REPORT = "report.html"


@dataclass(frozen=True)
class Record:
    """A record that is stored as a JSON file."""

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self)).encode())

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        return TypeAdapter(cls).validate_json(content)

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls.from_json(path.read_bytes())

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Return the record in a file; None if there is no file."""
        return cls.read(path) if path.exists() else None


@dataclass(frozen=True)
class ImageFile:
    """A file in a class folder."""

    file: str  # path relative to the folder, with forward slashes, as to_text() returns it
    class_name: str
    digest: str  # SHA-256 of the content
    reason: str = ""  # why the file is skipped; "" for a usable image
    split: Split | None = None  # None if it is skipped

    def path_in(self, folder: Path) -> Path:
        """Return the path of the file in the folder."""
        return folder / from_text(self.file)

    def with_reason(self, reason: str, is_permanent: bool = True) -> "ImageFile":
        """Return a copy that is skipped for this reason.

        For a temporary reason, the copy has a different digest, so the data digest changes when the reason no
        longer applies.
        """
        return replace(self, reason=reason, digest=self.digest if is_permanent else sha256(f"{self.file}: {reason}"))


def digest_images(images: list[ImageFile]) -> str:
    """Return the data digest: a hash of the names, classes and contents of all images."""
    return sha256([[image.file, image.class_name, image.digest] for image in images])


@dataclass(frozen=True)
class DataIssue:
    """A photo or class that someone should check."""

    kind: str  # such as "mislabeled" or "near_duplicate"
    file: str  # "" if the issue concerns a whole class
    class_name: str
    detail: str


@dataclass(frozen=True)
class DataVersion:
    """The state of a folder of images in one run."""

    source: str  # URL or folder of the images, or why the sample images replace them
    folder: str  # path of the folder, as to_text() returns it
    files: list[ImageFile]  # all images, including skipped ones
    duplicate_of: dict[str, str] = field(default_factory=dict)  # digest of near-duplicate -> of representative
    issues: list[DataIssue] = field(default_factory=list)
    synthetic: bool = False  # whether the images are the synthetic samples
    sessions: dict[str, str] = field(default_factory=dict)  # session by digest, if camera and time are known
    model_name: str = ""  # of the registered model, if the user chose one; "" names it after the classes

    @cached_property
    def digest(self) -> str:
        return digest_images(self.files)

    @property
    def class_names(self) -> list[str]:
        return sorted({image.class_name for image in self.files})

    @cached_property
    def by_file(self) -> dict[str, ImageFile]:
        return {image.file: image for image in self.files}

    def path_of(self, file: str) -> Path:
        """Return the path of an image file."""
        return from_text(self.folder) / from_text(file)

    def read(self, file: str) -> bytes:
        """Return the content of an image file; raise OSError if it is unlisted, unreadable or has changed."""
        if file not in self.by_file:
            raise FileNotFoundError(errno.ENOENT, "not an image of this data version", file)
        return read_verified(self.path_of(file), self.by_file[file].digest)

    def group_of(self, digest: str) -> str:
        """Return the group of near-duplicates that an image belongs to: the digest of their representative."""
        return self.duplicate_of.get(digest, digest)

    def describe_splits(self) -> str:
        """Return the number of images in each split and of skipped images, as text."""
        counts = Counter(image.split for image in self.files)
        return ", ".join([*(f"{counts[name]} {name}" for name in SPLITS), f"{counts[None]} skipped"])

    def describe(self) -> str:
        """Return a one-line summary of the images."""
        used = sum(image.split is not None for image in self.files)
        return f"{used} images in {len(self.class_names)} classes, data digest {self.digest[:12]}, {self.source}"


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for a labeled image."""

    file: str
    class_name: str  # the true class
    predicted: str  # "" if the model rejected the image
    probability: float
    probabilities: dict[str, float]
    similarity: float | None = None  # to the nearest training image
    unknown: bool | None = None
    nearest: str | None = None  # file of the nearest training image
    neighbors: list[str] = field(default_factory=list)  # files of the nearest training images, nearest first
    unsure: bool | None = None  # None if cross-validation determined no threshold
    digest: str = ""  # SHA-256 of the image file
    group: str = ""  # shared by near-duplicates

    @property
    def correct(self) -> bool:
        return self.predicted == self.class_name

    @classmethod
    def from_probabilities(cls, image: "ImageFile", class_names: list[str], row: list[float], group: str) -> Self:
        """Return the prediction for an image, given its probabilities in the order of the class names."""
        probabilities = dict(zip(class_names, row, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        values = image.file, image.class_name, label, probabilities[label], probabilities
        return cls(*values, digest=image.digest, group=group)


@dataclass(frozen=True)
class Results:
    """Metrics and predictions of a model on images that it was not trained on."""

    loss: float  # cross-entropy
    accuracy: float
    recall: dict[str, float]  # by class
    predictions: list[Prediction]

    @property
    def mistakes(self) -> list[Prediction]:
        return [prediction for prediction in self.predictions if not prediction.correct]


@dataclass(frozen=True)
class Comparison:
    """Predictions of candidate and champion for the same photos, on which neither of them was trained.

    Near-duplicates count once: the comparison uses one photo per group.
    """

    version: str  # of the champion
    candidate: list[Prediction]
    champion: list[Prediction]
    training_images: int = 0  # of the candidate
    champion_training_images: int | None = None  # None for a version without stored out-of-fold predictions
    new_images: int = 0  # training images of the candidate that the champion was not trained on
    synthetic: bool = False  # whether only the candidate was trained on the synthetic sample images
    champion_synthetic: bool = False  # whether only the champion was
    shared_images: int | None = None  # number of images that both runs have in common; None if unknown
    same_task: bool = False  # whether --name was given, or the champion's images are the samples

    @property
    def unknown(self) -> list[bool]:
        """Whether each photo that the champion had to predict is unknown to it; [] for a model without a backbone."""
        return [prediction.unknown for prediction in self.champion if prediction.unknown is not None]


@dataclass(frozen=True)
class Evaluation(Record):
    """The output of evaluate_model, which register_model reads."""

    test: Results  # results of the candidate on the test images
    candidate: list[Prediction]  # its predictions for the test images, and out-of-fold for all other images
    comparison: Comparison | None  # with the champion; None without a champion
    data: DataVersion
    issues: list[DataIssue]
    unevaluated: list[str] = field(default_factory=list)  # classes with too few independent images to evaluate


@dataclass(frozen=True)
class RunData(Record):
    """The part of an Evaluation that every release of this project has written."""

    data: DataVersion


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: predictions with similar probabilities."""

    probability: float  # mean
    accuracy: float
    fraction: float  # of all predictions


@dataclass(frozen=True)
class Calibration:
    """How closely probabilities match the fraction of correct predictions."""

    error: float  # expected calibration error
    bins: list[Bin]


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curve of accuracy by number of training images."""

    images_per_class: float  # mean number of training images
    accuracy: float
    images: int  # number of predicted images; near-duplicates count once


@dataclass(frozen=True)
class Evidence(Record):
    """The results of cross-validation.

    A class in `unevaluated` has fewer than three images that are not near-duplicates. It is never held out, so its
    recall is unknown; accuracy, loss, calibration and learning curve are then missing, and the temperature is 1.
    """

    accuracy: float | None = None  # fraction of correct predictions
    loss: float | None = None  # cross-entropy
    recall: dict[str, float] = field(default_factory=dict)  # by class
    temperature: float = 1.0  # divides the logits
    before: Calibration | None = None  # calibration without the temperature
    after: Calibration | None = None  # calibration with the temperature
    curve: list[CurvePoint] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)  # out-of-fold, of all evaluated classes
    unevaluated: list[str] = field(default_factory=list)  # classes with too few independent images to evaluate
    sampled: bool = False  # whether the models were trained on a sample of the images
    unsure_below: float | None = None  # threshold of the probability; None if no threshold is accurate enough
    new_session: tuple[int, int] | None = None  # correct and total predictions with whole sessions held out
    training_images: dict[str, tuple[str, str]] = field(default_factory=dict)  # class and group by digest
    features_key: str = ""  # of the code that computed the features

    @property
    def out_of_fold(self) -> dict[str, Prediction]:
        """The predictions by image digest; none if the models were trained on a sample, which makes them too weak."""
        return {} if self.sampled else {prediction.digest: prediction for prediction in self.predictions}

    @property
    def training_groups(self) -> set[str]:
        """The near-duplicate groups of the training and validation images."""
        return {group for _, group in self.training_images.values()}


@dataclass(frozen=True)
class Decision:
    """The decision of the gate."""

    promoted: bool
    reason: str
