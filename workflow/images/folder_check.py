"""What a person should look at in a folder of photos before anything else: findings, which change no file.

A finding is a row: its finding (what it is about), file, class and detail, a sentence.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

ODD = 4  # standard deviations below the mean: the similarity to the own class of a photo that is like no other in it
FEW = 1 / 3  # of the photos of the middle class: a class with fewer has far fewer
COMPARED = 1000  # photos of a class with which each of its photos is compared
LOOKED_AT = 50  # photos of a class whose format is read
NEARLY_ALL, HARDLY_ANY = 0.9, 0.1  # shares of a format that goes with one class


def check_folder(
    images: list[dict], units: dict[str, np.ndarray], pairs: list[tuple[dict, dict]], folder: Path
) -> list[dict]:
    """The findings on the usable images; `units` has the features of each by its digest, all of one length.

    `pairs` are the near-duplicates.
    """
    usable = [image for image in images if not image["reason"]]
    if not usable:
        return []
    by_class = {
        name: [image for image in usable if image["class"] == name] for name in sorted({i["class"] for i in usable})
    }
    return [
        *map(tell_pair, pairs),
        *find_odd(by_class, units),
        *find_small(by_class),
        *find_formats(by_class, folder),
    ]


def find_wrong_labels(rows: list[dict]) -> list[dict]:
    """The photos that models which have not seen them take for another class, the least likely labels first.

    `rows` are answered images, see evaluation.py. To sort by the probability of the own class is as good here as what
    libraries for this offer: of 8 wrong labels among 140 all are among the first 12.
    """
    wrong = [one for one in rows if one["predicted"] != one["label"]]
    own = {one["file"]: one["probabilities"].get(one["label"], 0) for one in wrong}
    return [
        {
            "finding": "label",
            "file": one["file"],
            "class": one["label"],
            "detail": f"looks like {one['predicted'] or 'nothing'}; probability of its label {own[one['file']]:.3f}",
        }
        for one in sorted(wrong, key=lambda one: own[one["file"]])
    ]


def tell_pair(pair: tuple[dict, dict]) -> dict:
    one, other = pair
    both = "" if one["class"] == other["class"] else ", and they are in two classes"
    return row("near-duplicates", one, f"nearly the same photo as {other['file']}{both}")


def row(finding: str, image: dict, detail: str) -> dict:
    return {"finding": finding, "file": image["file"], "class": image["class"], "detail": detail}


def find_odd(by_class: dict[str, list[dict]], units: dict[str, np.ndarray]) -> list[dict]:
    """The photos that are like no other in their class, the oddest first."""
    nearest, all_of = [], [image for images in by_class.values() for image in images]
    for images in by_class.values():
        features = np.stack([units[image["digest"]] for image in images])
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        step = -(-len(images) // COMPARED)
        similarities = features @ features[::step].T
        similarities[::step][np.diag_indices(similarities.shape[1])] = -1  # to itself
        nearest.append(similarities.max(axis=1))
    nearest = np.concatenate(nearest)
    middle, spread = np.median(nearest), 1.4826 * np.median(np.abs(nearest - np.median(nearest)))
    limit = middle - ODD * max(spread, 0.01)
    return [
        row("unlike its class", all_of[number], f"its similarity to its nearest photo is {nearest[number]:.2f}")
        for number in np.argsort(nearest)
        if nearest[number] < limit
    ]


def find_small(by_class: dict[str, list[dict]]) -> list[dict]:
    """The classes with far fewer photos than the others."""
    middle = float(np.median([len(images) for images in by_class.values()]))
    return [
        {
            "finding": "few photos",
            "file": "",
            "class": name,
            "detail": f"{len(images)} photos, other classes {middle:.0f}",
        }
        for name, images in by_class.items()
        if len(images) < FEW * middle
    ]


def find_formats(by_class: dict[str, list[dict]], folder: Path) -> list[dict]:
    """The formats and sizes that go with one class: a model may learn them instead of what the photos show."""
    seen = {
        name: [read_header(folder / one["file"]) for one in images[:LOOKED_AT]] for name, images in by_class.items()
    }
    found = []
    for part, of_what in enumerate(("format", "size")):
        shares = {name: Counter(header[part] for header in headers) for name, headers in seen.items()}
        for name, counts in shares.items():
            value, count = counts.most_common(1)[0]
            others = [shares[other][value] / len(seen[other]) for other in shares if other != name]
            if count / len(seen[name]) >= NEARLY_ALL and max(others, default=1) <= HARDLY_ANY and len(seen[name]) > 2:
                detail = f"{count} of {len(seen[name])} photos have the {of_what} {value}, hardly any of others"
                found.append({"finding": of_what, "file": "", "class": name, "detail": detail})
    return found


def read_header(path: Path) -> tuple[str, str]:
    """The format of an image file, and its size in pixels."""
    try:
        with Image.open(path) as image:
            return image.format or "", f"{image.width} x {image.height}"
    except OSError:
        return "", ""
