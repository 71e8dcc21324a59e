"""What a person should look at in a folder of photos before anything else: issues, which change no file."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from workflow.data.exif import Capture
from workflow.data.sessions import describe_sessions
from workflow.image_classifier import FORMATS
from workflow.records import HARD, IMBALANCE, MISLABELED, NEAR_DUPLICATE, OUTLIER, DataIssue, ImageFile, Prediction
from workflow.text import locate

import numpy as np
from PIL import Image

MISLABELED_BELOW = 0.1  # probability of a label that is probably wrong
GUESS_FRACTION = 0.5  # of the probability of a random guess, 1 / classes: the limit for more than five classes
ODD = 4  # robust standard deviations below the median, of the similarity to the nearest photo of the class
MAD = 1.4826  # makes the median absolute deviation comparable to a standard deviation
FEW_SHARE = 1 / 3  # of the photos of the middle class: a class with fewer has far fewer
COMPARED = 1000  # photos of a class with which each of its photos is compared
LOOKED_AT = 50  # photos of a class whose format and size are read
MIN_PHOTOS = 3  # of a class; fewer may have the same camera or format by chance
NEARLY_ALL, HARDLY_ANY = 0.9, 0.1  # fractions of photos with a value that belongs to one class
SHORTCUTS = {  # kind: how photos have the value, and what a model may learn instead of what the photos show
    "format": ("have the format", "the format"),
    "size": ("have the size", "the size"),
    "camera": ("come from one camera,", "the camera"),
    "session": ("come from one session,", "its light and background"),
}


def check_folder(
    images: list[ImageFile],
    features: dict[str, np.ndarray],
    pairs: list[tuple[ImageFile, ImageFile]],
    folder: Path,
    captures: Mapping[str, Capture],
    sessions: Mapping[str, str],
) -> list[DataIssue]:
    """Return the issues on the usable images.

    Args:
        images: all image files
        features: of each usable image by its digest, all of one length
        pairs: near-duplicates: the follower, and the leader that it follows
        folder: the folder of the image files
        captures: camera and time of each usable image by its digest
        sessions: of the images that have one, by digest
    """
    usable = [image for image in images if not image.reason]
    if not usable:
        return []
    by_class = {
        name: [image for image in usable if image.class_name == name]
        for name in sorted({image.class_name for image in usable})
    }
    return [
        *(describe_pair(*pair) for pair in pairs),
        *find_odd(by_class, features),
        *find_small(by_class),
        *find_shortcuts(by_class, folder, captures, sessions),
    ]


def find_label_issues(predictions: list[Prediction]) -> list[DataIssue]:
    """Return the misclassified photos, the least likely labels first.

    A photo is mislabeled if the probability of its label is below MISLABELED_BELOW and below GUESS_FRACTION of that of
    a random guess, and hard otherwise. `python benchmarks/findings.py` measures how often that is true.

    Args:
        predictions: of models that were not trained on the photo
    """
    mistakes = [(one.probabilities.get(one.class_name, 0.0), one) for one in predictions if not one.correct]
    issues = []
    for probability, one in sorted(mistakes, key=lambda pair: pair[0]):
        limit = min(MISLABELED_BELOW, GUESS_FRACTION / max(len(one.probabilities), 1))
        kind = MISLABELED if one.predicted and probability < limit else HARD
        detail = f"looks like {one.predicted or 'nothing'}; probability of its label {probability:.3f}"
        issues.append(DataIssue(kind, one.file, one.class_name, detail))
    return sorted(issues, key=lambda issue: issue.kind == HARD)


def describe_pair(follower: ImageFile, leader: ImageFile) -> DataIssue:
    both = "" if follower.class_name == leader.class_name else ", and they are in two classes"
    return DataIssue(
        NEAR_DUPLICATE, follower.file, follower.class_name, f"nearly the same photo as {leader.file}{both}"
    )


def find_odd(by_class: dict[str, list[ImageFile]], features: dict[str, np.ndarray]) -> list[DataIssue]:
    """Return the photos that are like no other in their class, the oddest first.

    A photo has to stand out among the photos of all classes and among those of its own, which may be a varied class.
    """
    images = [image for of_class in by_class.values() for image in of_class]
    classes = [compare_with_nearest(of_class, features) for of_class in by_class.values()]
    nearest = np.concatenate(classes)
    limits = np.concatenate([np.full(len(own), min(find_low(own), find_low(nearest))) for own in classes])
    return [
        DataIssue(
            OUTLIER,
            images[number].file,
            images[number].class_name,
            f"its similarity to its nearest photo is {nearest[number]:.2f}",
        )
        for number in np.argsort(nearest)
        if nearest[number] < limits[number]
    ]


def compare_with_nearest(images: list[ImageFile], features: dict[str, np.ndarray]) -> np.ndarray:
    """Return the similarity of each photo of a class to the nearest of the others, of which a part is drawn."""
    units = np.stack([features[image.digest] for image in images])
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    step = -(-len(images) // COMPARED)
    similarities = units @ units[::step].T
    similarities[::step][np.diag_indices(similarities.shape[1])] = -1  # to itself
    return similarities.max(axis=1)


def find_low(values: np.ndarray) -> float:
    """Return the value below which one is odd: ODD robust standard deviations below the median."""
    middle = np.median(values)
    return float(middle - ODD * max(MAD * np.median(np.abs(values - middle)), 0.01))


def find_small(by_class: dict[str, list[ImageFile]]) -> list[DataIssue]:
    """The classes with far fewer photos than the others."""
    middle = float(np.median([len(images) for images in by_class.values()]))
    return [
        DataIssue(IMBALANCE, "", name, f"{len(images)} photos, other classes have {middle:.0f}")
        for name, images in by_class.items()
        if len(images) < FEW_SHARE * middle
    ]


def find_shortcuts(
    by_class: Mapping[str, list[ImageFile]],
    folder: Path,
    captures: Mapping[str, Capture],
    sessions: Mapping[str, str],
) -> list[DataIssue]:
    """Find the formats, sizes, cameras and sessions that belong to one class: a model may learn them as a shortcut."""
    headers = {
        name: [read_header(locate(folder, image.file)) for image in images[:LOOKED_AT]]
        for name, images in by_class.items()
    }
    names = describe_sessions(captures, sessions)
    values = {
        "format": {name: [header[0] for header in of_class] for name, of_class in headers.items()},
        "size": {name: [header[1] for header in of_class] for name, of_class in headers.items()},
        "camera": {
            name: [captures.get(image.digest, Capture()).camera for image in images]
            for name, images in by_class.items()
        },
        "session": {name: [names.get(image.digest, "") for image in images] for name, images in by_class.items()},
    }
    return [finding for kind, by_name in values.items() for finding in compare_classes(kind, by_name)]


def compare_classes(kind: str, values: Mapping[str, list[str]]) -> list[DataIssue]:
    """Return a finding for each class that has a value which hardly any photo of another class has.

    Args:
        kind: a key of SHORTCUTS
        values: for each class, the value of each photo; "" when it is unknown
    """
    counts = {name: Counter(of_class) for name, of_class in values.items()}
    phrase, learned = SHORTCUTS[kind]
    issues = []
    for name, of_class in values.items():
        value, count = max(counts[name].items(), key=lambda item: (item[0] != "", item[1]))
        others = [other for other in values if other != name]
        largest = max((counts[other][value] / len(values[other]) for other in others), default=1)
        if not value or len(of_class) < MIN_PHOTOS or count / len(of_class) < NEARLY_ALL or largest > HARDLY_ANY:
            continue
        unknown, total = sum(counts[other][""] for other in others), sum(len(values[other]) for other in others)
        subject = f"all {count} photos" if count == len(of_class) else f"{count} of {len(of_class)} photos"
        exception = f" ({kind} unknown for {unknown} of {total})" if unknown else ""
        detail = f"{subject} {phrase} {value}, and hardly any photo of the other classes does{exception}"
        issues.append(DataIssue(kind, "", name, f"{detail}: the model may learn {learned}"))
    return issues


def read_header(path: Path) -> tuple[str, str]:
    """The format of an image file, and its size in pixels."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format or "", f"{image.width} x {image.height}"
    except Exception:  # read_image() says what is wrong with it
        return "", ""
