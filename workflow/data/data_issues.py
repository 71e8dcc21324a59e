"""Find data issues: photos and classes that someone should check. Files are never changed.

To add a kind of issue, write a function that takes a Folder and returns DataIssues, and add it to CHECKS.
"""

from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from workflow.data.exif import Capture
from workflow.data.sessions import describe_sessions
from workflow.errors import WorkflowError
from workflow.image_classifier import FORMATS
from workflow.records import (
    BLANK,
    HARD,
    IMBALANCE,
    MISLABELED,
    NEAR_DUPLICATE,
    OUTLIER,
    DataIssue,
    ImageFile,
    Prediction,
)

import numpy as np
from PIL import Image

MAX_LABEL_PROBABILITY = 0.1  # a label with a lower probability is probably wrong
MAX_GUESS_FRACTION = 0.5  # of the probability of a random guess, 1 / classes; the stricter rule for more than 5 classes
OUTLIER_DEVIATIONS = 4  # robust standard deviations below the median similarity to the nearest photo of the class
MAD_TO_STANDARD_DEVIATION = 1.4826  # for a median absolute deviation of normally distributed values
MIN_CLASS_FRACTION = 1 / 3  # of the photos of the median class
MAX_COMPARED = 1000  # photos of the same class that each photo is compared with
MAX_HEADERS = 50  # photos per class whose format and size are checked
MIN_PHOTOS = 3  # in a class, to report a shortcut; fewer photos may share a camera or format by chance
MIN_FRACTION, MAX_OTHER_FRACTION = 0.9, 0.1  # of photos with the same value, in the class and in any other class
SHORTCUTS = {  # by kind: phrase for the message, and what a model may learn instead of the objects
    "format": ("have the format", "the format"),
    "size": ("have the size", "the size"),
    "camera": ("come from one camera,", "the camera"),
    "session": ("come from one session,", "its lighting and background"),
}


class Folder(NamedTuple):
    """The usable images of a folder and their properties; the mappings are keyed by image digest."""

    path: Path  # path of the folder
    images: list[ImageFile]  # the usable images
    features: Mapping[str, np.ndarray]
    duplicate_of: Mapping[str, str]  # digest of the representative of each near-duplicate
    captures: Mapping[str, Capture]  # camera and time of each image
    sessions: Mapping[str, str]  # of the images whose camera and time are known
    blank: Container[str] = ()  # digests of the single-color images

    def by_class(self) -> dict[str, list[ImageFile]]:
        names = sorted({image.class_name for image in self.images})
        return {name: [image for image in self.images if image.class_name == name] for name in names}


def find_issues(folder: Folder) -> list[DataIssue]:
    """Return the issues that all checks find."""
    return [issue for check in CHECKS for issue in check(folder)] if folder.images else []


def find_label_issues(predictions: list[Prediction]) -> list[DataIssue]:
    """Return the misclassified photos: mislabeled ones first, then hard ones, each group sorted by label probability.

    A photo is mislabeled if the probability of its label is below MAX_LABEL_PROBABILITY and below MAX_GUESS_FRACTION of
    that of a random guess, and hard otherwise. `python benchmarks/report_accuracy.py` measures how often that is true.

    Args:
        predictions: each from a model that was not trained on the photo
    """
    issues = []
    for prediction in predictions:
        if prediction.correct:
            continue
        probability = prediction.probabilities.get(prediction.class_name, 0.0)
        threshold = min(MAX_LABEL_PROBABILITY, MAX_GUESS_FRACTION / max(len(prediction.probabilities), 1))
        kind = MISLABELED if prediction.predicted and probability < threshold else HARD
        looks = f"looks like {prediction.predicted}" if prediction.predicted else "rejected by the model"
        detail = f"{looks}; the probability of its label is {probability:.3f}"
        issues.append((kind == HARD, probability, DataIssue(kind, prediction.file, prediction.class_name, detail)))
    return [issue for *_, issue in sorted(issues, key=lambda row: row[:2])]


def collect_issues(predictions: list[Prediction], folder_issues: list[DataIssue]) -> list[DataIssue]:
    """Return label issues and folder issues, without reporting a mislabeled photo as an outlier as well."""
    label_issues = find_label_issues(predictions)
    mislabeled = {issue.file for issue in label_issues if issue.kind == MISLABELED}
    return label_issues + [issue for issue in folder_issues if issue.kind != OUTLIER or issue.file not in mislabeled]


def find_near_duplicates(folder: Folder) -> list[DataIssue]:
    """Return an issue for each near-duplicate that is not a representative."""
    by_digest, issues = {image.digest: image for image in folder.images}, []
    for image in sorted(folder.images, key=lambda image: image.file):
        original = by_digest[folder.duplicate_of.get(image.digest, image.digest)]
        if original != image:
            conflict = "" if original.class_name == image.class_name else ", which is in another class"
            detail = f"nearly the same photo as {original.file}{conflict}"
            issues.append(DataIssue(NEAR_DUPLICATE, image.file, image.class_name, detail))
    return issues


def find_outliers(folder: Folder) -> list[DataIssue]:
    """Return the photos that resemble no other photo of their class, the least similar first.

    An outlier must stand out both among all photos and within its class, because some classes vary more than others.
    """
    by_class = folder.by_class()
    nearest = {name: compare_with_nearest(images, folder.features) for name, images in by_class.items()}
    threshold = outlier_threshold(np.concatenate(list(nearest.values())))
    outliers = [
        (similarity, image)
        for name, images in by_class.items()
        for similarity, image in zip(nearest[name], images, strict=True)
        if similarity < min(threshold, outlier_threshold(nearest[name]))
    ]
    return [
        DataIssue(OUTLIER, image.file, image.class_name, f"similarity to its nearest photo: {similarity:.2f}")
        for similarity, image in sorted(outliers, key=lambda outlier: outlier[0])
    ]


def compare_with_nearest(images: list[ImageFile], features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the cosine similarity of each photo of a class to the nearest of up to MAX_COMPARED others."""
    normalized = np.stack([features[image.digest] for image in images])
    normalized /= np.linalg.norm(normalized, axis=1, keepdims=True)
    step = -(-len(images) // MAX_COMPARED)
    similarities = normalized @ normalized[::step].T
    similarities[::step][np.diag_indices(similarities.shape[1])] = -1  # exclude the photo itself
    return similarities.max(axis=1)


def outlier_threshold(values: np.ndarray) -> float:
    """Return the threshold below which a value is an outlier."""
    median = np.median(values)
    deviation = MAD_TO_STANDARD_DEVIATION * np.median(np.abs(values - median))
    return float(median - OUTLIER_DEVIATIONS * max(deviation, 0.01))


def find_blank(folder: Folder) -> list[DataIssue]:
    """Return the single-color images.

    Raises:
        WorkflowError: all images of a class are blank
    """
    issues = []
    for name, images in folder.by_class().items():
        blank = [image for image in images if image.digest in folder.blank]
        if len(blank) == len(images):
            raise WorkflowError(
                f"class {name} has only single-color images, such as {blank[0].file}; export them again, or "
                "remove the class"
            )
        issues += [DataIssue(BLANK, image.file, name, "has only one color") for image in blank]
    return issues


def find_imbalance(folder: Folder) -> list[DataIssue]:
    """Return the classes with far fewer photos than the others."""
    counts = Counter(image.class_name for image in folder.images)
    median = float(np.median(list(counts.values())))
    return [
        DataIssue(IMBALANCE, "", name, f"{count} photos; the median class has {median:.0f}")
        for name, count in sorted(counts.items())
        if count < MIN_CLASS_FRACTION * median
    ]


def find_shortcuts(folder: Folder) -> list[DataIssue]:
    """Return an issue for each shortcut that a model may learn: a format, size, camera or session of a single class."""
    by_class = folder.by_class()
    headers = {
        name: [read_header(image.path_in(folder.path)) for image in images[:MAX_HEADERS]]
        for name, images in by_class.items()
    }
    cameras = {digest: capture.camera for digest, capture in folder.captures.items()}
    sessions = describe_sessions(folder.captures, folder.sessions)

    def list_values(by_digest: Mapping[str, str]) -> dict[str, list[str]]:
        return {name: [by_digest.get(image.digest, "") for image in images] for name, images in by_class.items()}

    values = {
        "format": {name: [kind for kind, _ in rows] for name, rows in headers.items()},
        "size": {name: [size for _, size in rows] for name, rows in headers.items()},
        "camera": list_values(cameras),
        "session": list_values(sessions),
    }
    return [issue for kind, by_name in values.items() for issue in compare_classes(kind, by_name)]


def compare_classes(kind: str, values: Mapping[str, list[str]]) -> list[DataIssue]:
    """Return an issue for each class whose photos nearly all share a value that is rare in the other classes.

    `kind` is a key of SHORTCUTS. `values` lists the value of each photo, "" if unknown, by class.
    """
    counts = {name: Counter(class_values) for name, class_values in values.items()}
    phrase, shortcut = SHORTCUTS[kind]
    issues = []
    for name, class_values in values.items():
        value, count = max(counts[name].items(), key=lambda item: (item[0] != "", item[1]))
        others = [other for other in values if other != name]
        largest = max((counts[other][value] / len(values[other]) for other in others), default=1)
        is_typical = count / len(class_values) >= MIN_FRACTION and largest <= MAX_OTHER_FRACTION
        if not value or len(class_values) < MIN_PHOTOS or not is_typical:
            continue
        unknown, total = sum(counts[other][""] for other in others), sum(len(values[other]) for other in others)
        subject = f"all {count} photos" if count == len(class_values) else f"{count} of {len(class_values)} photos"
        exception = f" ({kind} unknown for {unknown} of {total})" if unknown else ""
        detail = f"{subject} {phrase} {value}, unlike nearly all photos of the other classes{exception}"
        issues.append(DataIssue(kind, "", name, f"{detail}: the model may learn {shortcut}"))
    return issues


def read_header(path: Path) -> tuple[str, str]:
    """Return the format of an image file and its size in pixels, or empty strings for an unreadable file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format or "", f"{image.width} x {image.height}"
    except Exception:  # Pillow may raise any exception; read_image() reports the reason
        return "", ""


CHECKS = (find_blank, find_near_duplicates, find_outliers, find_imbalance, find_shortcuts)
