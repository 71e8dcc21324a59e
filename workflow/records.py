"""The rows that travel between the steps: an image file, a prediction, the results of a model, a decision."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, get_args

from workflow.files import sha256, write_whole

from pydantic import TypeAdapter

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


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

    def with_reason(self, reason: str, lasting: bool = True) -> "ImageFile":
        """The image file, set aside; when the reason may pass, its digest is another one than when it can be read."""
        return replace(self, reason=reason, digest=self.digest if lasting else sha256(f"{self.file}: {reason}"))


def digest_images(images: list[ImageFile]) -> str:
    """The data digest: over names and contents."""
    return sha256([[image.file, image.class_name, image.digest] for image in images])


@dataclass(frozen=True)
class Finding:
    """What a person should look at in a folder of photos."""

    kind: str  # such as "label" or "near-duplicates"
    file: str  # "" when it is about a class
    class_name: str
    detail: str


@dataclass(frozen=True)
class DataVersion:
    """One state of a folder of images."""

    source: str  # a URL, a folder, or why the sample images stand in
    folder: str
    files: list[ImageFile]
    leaders: dict[str, str] = field(default_factory=dict)  # digest of each near-duplicate: digest of the one it follows
    findings: list[Finding] = field(default_factory=list)
    drawn: bool = False  # whether these are the drawn sample images, and no photos

    @cached_property
    def digest(self) -> str:
        return digest_images(self.files)

    @property
    def class_names(self) -> list[str]:
        return sorted({image.class_name for image in self.files})

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
    neighbours: list[str] = field(default_factory=list)  # the files of the nearest ones, the nearest first

    @property
    def right(self) -> bool:
        return self.predicted == self.class_name


@dataclass(frozen=True)
class Results:
    """How good a model is on the test images."""

    loss: float  # cross-entropy
    accuracy: float
    recall: dict[str, float]  # by class
    predictions: list[Prediction]
    version: str | None = None  # the registered version; None for a model that is not registered yet
    drawn: bool = False  # whether the model was trained on the drawn sample images


@dataclass(frozen=True)
class Evaluation(Record):
    """What evaluate_model leaves for register_model: both models on the same test images."""

    candidate: Results
    champion: Results | None
    data: DataVersion
    findings: list[Finding]


@dataclass(frozen=True)
class Bin:
    """The answers of about one probability."""

    probability: float  # their mean
    right: float  # share of right ones
    share: float  # of all answers


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
    images: int  # that were answered


@dataclass(frozen=True)
class Evidence(Record):
    """What cross-validation says of a model."""

    accuracy: float
    loss: float
    recall: dict[str, float]
    temperature: float
    before: Calibration  # of the probabilities before they are divided by the temperature
    after: Calibration
    curve: list[CurvePoint]
    predictions: list[Prediction]


@dataclass(frozen=True)
class Decision:
    """What the gate decides, and why."""

    promoted: bool
    reason: str
