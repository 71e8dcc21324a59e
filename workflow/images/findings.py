"""What a person should look at in a folder of photos before anything else: findings, which change no file."""

from collections import Counter
from pathlib import Path

from workflow.model.image_classifier import FORMATS
from workflow.names import locate
from workflow.records import Finding, ImageFile, Prediction

import numpy as np
from PIL import Image

ODD = 4  # robust standard deviations below the median: the similarity to its nearest photo in its class of an odd photo
MAD = 1.4826  # makes the median absolute deviation comparable to a standard deviation
FEW_SHARE = 1 / 3  # of the photos of the middle class: a class with fewer has far fewer
COMPARED = 1000  # photos of a class with which each of its photos is compared
LOOKED_AT = 50  # photos of a class whose format is read
NEARLY_ALL, HARDLY_ANY = 0.9, 0.1  # shares of a format that goes with one class


def check_folder(
    images: list[ImageFile],
    features: dict[str, np.ndarray],
    pairs: list[tuple[ImageFile, ImageFile]],
    folder: Path,
) -> list[Finding]:
    """The findings on the usable images; `features` has those of each image by its digest, all of one length.

    `pairs` are the near-duplicates: the follower, and the leader that it follows.
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
        *find_formats(by_class, folder),
    ]


def find_doubtful_labels(predictions: list[Prediction]) -> list[Finding]:
    """The photos that models which have not seen them take for another class, the least likely labels first.

    To sort by the probability of the own class is as good here as what libraries for this offer: of 8 wrong labels
    among 140 photos all are among the first 12.
    """
    wrong = [(one.probabilities.get(one.class_name, 0.0), one) for one in predictions if not one.right]
    return [
        Finding(
            "label",
            one.file,
            one.class_name,
            f"looks like {one.predicted or 'nothing'}; probability of its label {probability:.3f}",
        )
        for probability, one in sorted(wrong, key=lambda pair: pair[0])
    ]


def describe_pair(follower: ImageFile, leader: ImageFile) -> Finding:
    both = "" if follower.class_name == leader.class_name else ", and they are in two classes"
    return Finding(
        "near-duplicates", follower.file, follower.class_name, f"nearly the same photo as {leader.file}{both}"
    )


def find_odd(by_class: dict[str, list[ImageFile]], features: dict[str, np.ndarray]) -> list[Finding]:
    """The photos that are like no other in their class, the oddest first."""
    found, all_of = [], [image for images in by_class.values() for image in images]
    for images in by_class.values():
        units = np.stack([features[image.digest] for image in images])
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        step = -(-len(images) // COMPARED)
        similarities = units @ units[::step].T
        similarities[::step][np.diag_indices(similarities.shape[1])] = -1  # to itself
        found.append(similarities.max(axis=1))
    nearest = np.concatenate(found)
    middle, spread = np.median(nearest), MAD * np.median(np.abs(nearest - np.median(nearest)))
    limit = middle - ODD * max(spread, 0.01)
    return [
        Finding(
            "unlike its class",
            all_of[number].file,
            all_of[number].class_name,
            f"its similarity to its nearest photo is {nearest[number]:.2f}",
        )
        for number in np.argsort(nearest)
        if nearest[number] < limit
    ]


def find_small(by_class: dict[str, list[ImageFile]]) -> list[Finding]:
    """The classes with far fewer photos than the others."""
    middle = float(np.median([len(images) for images in by_class.values()]))
    return [
        Finding("few photos", "", name, f"{len(images)} photos, other classes have {middle:.0f}")
        for name, images in by_class.items()
        if len(images) < FEW_SHARE * middle
    ]


def find_formats(by_class: dict[str, list[ImageFile]], folder: Path) -> list[Finding]:
    """The formats and sizes that go with one class: a model may learn them instead of what the photos show."""
    seen = {
        name: [read_header(locate(folder, image.file)) for image in images[:LOOKED_AT]]
        for name, images in by_class.items()
    }
    found = []
    for part, of_what in enumerate(("format", "size")):
        shares = {name: Counter(header[part] for header in headers) for name, headers in seen.items()}
        for name, counts in shares.items():
            value, count = counts.most_common(1)[0]
            others = [shares[other][value] / len(seen[other]) for other in shares if other != name]
            if count / len(seen[name]) >= NEARLY_ALL and max(others, default=1) <= HARDLY_ANY and len(seen[name]) > 2:
                told = f"{count} of {len(seen[name])} photos have the {of_what} {value}"
                detail = f"{told}, but hardly any photo of the other classes"
                found.append(Finding(of_what, "", name, detail))
    return found


def read_header(path: Path) -> tuple[str, str]:
    """The format of an image file, and its size in pixels."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format or "", f"{image.width} x {image.height}"
    except Exception:  # read_image() says what is wrong with it
        return "", ""
