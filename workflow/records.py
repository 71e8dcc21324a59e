"""The rows that travel between the steps: an image file, a prediction, the results of a model, a decision."""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, get_args

from workflow.files import sha256, write_whole

from pydantic import TypeAdapter

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Kinds of data issues. A shortcut, such as a camera that only one class has, is named after what its photos share.
MISLABELED, HARD, OUTLIER = "mislabeled", "hard", "outlier"
NEAR_DUPLICATE, IMBALANCE, SKIPPED = "near_duplicate", "imbalance", "skipped"
MAX_NAME_CHARACTERS = 200  # MLflow allows 250, including a prefix and a suffix


def replace_forbidden(name: str) -> str:
    """Return the name with _ for each character that MLflow forbids in the names of metrics and models."""
    return re.sub(r"[^\w .-]", "_", name)


def metric_name(class_name: str) -> str:
    """Return a name for a class that is allowed in the names of MLflow metrics, and unique."""
    name = replace_forbidden(class_name)[:MAX_NAME_CHARACTERS]
    return name if name == class_name else f"{name}-{sha256(class_name)[:8]}"


@dataclass(frozen=True)
class Record:
    """What all records can do: be written as JSON and read again."""

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        return TypeAdapter(cls).validate_json(path.read_bytes())

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """The record in a file; None when there is no file."""
        return cls.read(path) if path.exists() else None


@dataclass(frozen=True)
class ImageFile:
    """A file of a class folder."""

    file: str  # relative to the data set's folder, with /
    class_name: str
    digest: str  # SHA-256 of the content
    reason: str = ""  # why it was set aside; "" when it can be used
    split: Split | None = None  # None when it was set aside

    def with_reason(self, reason: str, is_permanent: bool = True) -> "ImageFile":
        """The image file, set aside; when the reason may pass, its digest is another one than when it can be read."""
        return replace(self, reason=reason, digest=self.digest if is_permanent else sha256(f"{self.file}: {reason}"))


def digest_images(images: list[ImageFile]) -> str:
    """The data digest: over names and contents."""
    return sha256([[image.file, image.class_name, image.digest] for image in images])


@dataclass(frozen=True)
class DataIssue:
    """What a person should look at in a folder of photos."""

    kind: str  # such as "mislabeled" or "near_duplicate"
    file: str  # "" when it is about a class
    class_name: str
    detail: str


@dataclass(frozen=True)
class DataVersion:
    """One state of a folder of images."""

    source: str  # a URL, a folder, or why the sample images stand in
    folder: str
    files: list[ImageFile]
    duplicate_of: dict[str, str] = field(
        default_factory=dict
    )  # digest of each near-duplicate: digest of the one it follows
    issues: list[DataIssue] = field(default_factory=list)
    synthetic: bool = False  # whether these are the drawn sample images, and no photos
    sessions: dict[str, str] = field(default_factory=dict)  # digest of each image with camera and time: its session

    @cached_property
    def digest(self) -> str:
        return digest_images(self.files)

    @property
    def class_names(self) -> list[str]:
        return sorted({image.class_name for image in self.files})

    def group_of(self, digest: str) -> str:
        """Return what near-duplicates have in common: the digest of the image that they follow."""
        return self.duplicate_of.get(digest, digest)

    def describe(self) -> str:
        """A sentence on the images, for people."""
        used = sum(image.split is not None for image in self.files)
        return f"{used} images of {len(self.class_names)} classes, data digest {self.digest[:12]}, {self.source}"


@dataclass(frozen=True)
class Prediction:
    """What a model said of one image whose class is known."""

    file: str
    class_name: str  # the true one
    predicted: str  # "" when the model refused the image
    probability: float
    probabilities: dict[str, float]
    similarity: float | None = None  # to the nearest training image
    unknown: bool | None = None
    nearest: str | None = None  # the file of the nearest training image
    neighbors: list[str] = field(default_factory=list)  # the files of the nearest ones, the nearest first
    unsure: bool | None = None  # None when cross-validation sets no limit
    digest: str = ""  # SHA-256 of the image file
    group: str = ""  # near-duplicates have the same one

    @property
    def correct(self) -> bool:
        return self.predicted == self.class_name

    @classmethod
    def from_probabilities(cls, image: "ImageFile", class_names: list[str], row: list[float], group: str) -> Self:
        """Return the prediction of an image with these probabilities, in the order of the classes."""
        probabilities = dict(zip(class_names, row, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        values = image.file, image.class_name, label, probabilities[label], probabilities
        return cls(*values, digest=image.digest, group=group)


@dataclass(frozen=True)
class Results:
    """How good a model is on images that it has not learned from."""

    loss: float  # cross-entropy
    accuracy: float
    recall: dict[str, float]  # by class
    predictions: list[Prediction]


@dataclass(frozen=True)
class Comparison:
    """The predictions of candidate and champion for the same photos, one per group of near-duplicates.

    Neither model has learned from a photo that it is compared on. Photos are counted as groups of near-duplicates.
    """

    version: str  # the champion
    candidate: list[Prediction]
    champion: list[Prediction]
    training_images: int = 0  # photos that the candidate has learned from
    champion_training_images: int | None = None  # None for a version that has not stored its out-of-fold predictions
    new_images: int = 0  # of the photos that the candidate has learned from, those that the champion has not
    synthetic: bool = False  # whether only the candidate was trained on the synthetic sample images


@dataclass(frozen=True)
class Evaluation(Record):
    """What evaluate_model leaves for register_model.

    Attributes:
        test: the candidate's results on the test images, as served
        candidate: its predictions for all photos with evidence: the test images, and out-of-fold for all others
        comparison: with the champion; None when there is no champion
        unevaluated: classes of which too few independent photos exist to judge any model
    """

    test: Results
    candidate: list[Prediction]
    comparison: Comparison | None
    data: DataVersion
    issues: list[DataIssue]
    unevaluated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunData(Record):
    """The part of an Evaluation that every version of this project has written."""

    data: DataVersion


@dataclass(frozen=True)
class Bin:
    """The predictions with about one probability."""

    probability: float  # their mean
    accuracy: float
    fraction: float  # of all predictions


@dataclass(frozen=True)
class Calibration:
    """How true probabilities are."""

    error: float  # expected calibration error
    bins: list[Bin]


@dataclass(frozen=True)
class CurvePoint:
    """A point of the learning curve by images per class."""

    images_per_class: float
    accuracy: float
    images: int  # that were predicted; near-duplicates count once


@dataclass(frozen=True)
class Evidence(Record):
    """What cross-validation says of a model.

    A class in `unevaluated` has fewer than three independent photos. It is never held out, so its recall is unknown. In
    that case there is no overall accuracy, no calibration and no learning curve, and the temperature is 1.

    Attributes:
        accuracy: fraction of correct predictions
        loss: cross-entropy
        recall: by class
        temperature: that the logits are divided by
        before: calibration without the temperature
        after: calibration with it
        curve: the learning curve
        predictions: out-of-fold, for each training and validation image of a class that can be judged
        unevaluated: classes with too few independent photos
        sampled: whether the models that predict were trained on a sample of the images only
        unsure_below: probability below which a prediction is unsure; None when no limit keeps the promise
        new_session: correct and all predictions when whole sessions are held out; None when that is not possible
        training_images: class and group of near-duplicates of each training and validation image, by its digest
    """

    accuracy: float | None = None
    loss: float | None = None
    recall: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    before: Calibration | None = None
    after: Calibration | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    unevaluated: list[str] = field(default_factory=list)
    sampled: bool = False
    unsure_below: float | None = None
    new_session: tuple[int, int] | None = None
    training_images: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What the gate decides, and why."""

    promoted: bool
    reason: str
