"""Photos that are nearly the same: another size, another compression, a little cropped or brighter, a second later.

Candidates are alike in a tiny grey picture and in their features. Their thumbnails then show whether they are the same;
one may be a crop of the other. Photos of two different apples on one table are not near-duplicates.
"""

from collections.abc import Mapping, Sequence

from workflow.records import ImageFile

import numpy as np
from PIL import Image

TINY = 12  # pixels, both sides, of the pictures that are compared for all pairs
ALIKE = 0.65  # correlation of the tiny pictures of a candidate
SIMILAR = 0.85  # cosine between the features of a candidate
SAME = 0.92  # correlation of the thumbnails of near-duplicates
CUTS = (0.0125, 0.025, 0.0375, 0.05)  # shares of the side that a crop removes, on average, at each edge
CANDIDATES = 100_000  # pairs that are looked at, the most similar ones
CROPPED = 2000  # at most so many pairs are also tested for crops, which takes some milliseconds per pair
BLOCK = 100  # photos that are compared with all others at once


def find_pairs(features: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """The numbers of the photos of each pair of near-duplicates, the smaller one first.

    `features` has shape (photos, FEATURES); `thumbnails` is uint8, (photos, side, side).
    """
    count, side = thumbnails.shape[:2]
    step = side // TINY
    tiny = normalize(thumbnails.reshape(count, TINY, step, TINY, step).mean(axis=(2, 4)))
    lengths = np.linalg.norm(features, axis=1)
    found, similarities = np.empty((0, 2), int), np.empty(0, "float32")
    for start in range(0, count, BLOCK):
        alike = tiny[start : start + BLOCK] @ tiny[start:].T > ALIKE
        similar = features[start : start + BLOCK] @ features[start:].T
        similar /= lengths[start : start + BLOCK, None]
        similar /= lengths[start:]
        rows, columns = np.nonzero(np.triu(alike & (similar > SIMILAR), k=1))
        found = np.concatenate([found, np.stack([rows, columns], axis=1) + start])
        similarities = np.concatenate([similarities, similar[rows, columns]])
        if len(found) > CANDIDATES:
            best = np.argpartition(-similarities, CANDIDATES)[:CANDIDATES]
            found, similarities = found[best], similarities[best]
    found = found[np.argsort(-similarities, kind="stable")]
    same = np.zeros(len(found), bool)
    for start in range(0, len(found), BLOCK):
        one, other = (normalize(thumbnails[numbers]) for numbers in found[start : start + BLOCK].T)
        same[start : start + BLOCK] = (one * other).sum(axis=1) > SAME
    cropped = [pair for pair in found[~same][:CROPPED].tolist() if correlate(*thumbnails[pair]) > SAME]
    return sorted(map(tuple, [*found[same].tolist(), *cropped]))


def normalize(pictures: np.ndarray) -> np.ndarray:
    """Each picture as a vector of mean 0 and length 1: the product of two is their correlation."""
    vectors = pictures.reshape(len(pictures), -1).astype("float32")
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return vectors


def correlate(one: np.ndarray, other: np.ndarray) -> float:
    """The highest correlation of two thumbnails, also where one is a crop of the other."""
    return max(float((normalize(crops(a)) @ normalize(b[None]).T).max()) for a, b in ((one, other), (other, one)))


def crops(thumbnail: np.ndarray) -> np.ndarray:
    """The thumbnail, and what crops of it by CUTS look like at the same size."""
    side, picture, found = len(thumbnail), Image.fromarray(thumbnail), [thumbnail]
    for cut in CUTS:
        for x in np.linspace(0, 2 * cut, 5):
            for y in np.linspace(0, 2 * cut, 5):
                box = (side * x, side * y, side * (x + 1 - 2 * cut), side * (y + 1 - 2 * cut))
                found.append(np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, box)))
    return np.stack(found)


def find_representatives(pairs: list[tuple[int, int]], order: Sequence[tuple[int, str]]) -> list[int]:
    """For each photo the one that leads its group of near-duplicates: the first by `order`, itself when it has none."""
    duplicate_of = list(range(len(order)))

    def leader(photo: int) -> int:
        while duplicate_of[photo] != photo:
            photo = duplicate_of[photo]
        return photo

    for pair in pairs:
        first, second = sorted(map(leader, pair), key=order.__getitem__)
        duplicate_of[second] = first
    return [leader(photo) for photo in range(len(order))]


def group_images(
    images: list[ImageFile],
    rows: Mapping[str, int],
    features: np.ndarray,
    thumbnails: np.ndarray,
    since: np.ndarray,
) -> tuple[dict[str, str], list[tuple[ImageFile, ImageFile]]]:
    """The digest of the leader of each image that has near-duplicates, by its digest; and pairs of follower and leader.

    `rows` has the row of each usable image, by its digest, in the arrays: features and thumbnails as for find_pairs(),
    and the time at which it was first seen. The image that was seen first leads: so its split stays what it was when
    copies of it arrive later.
    """
    by_row = {rows[image.digest]: image for image in images if not image.reason}
    count = len(by_row)  # the rows are 0, 1, 2, ...
    pairs = find_pairs(features[:count], thumbnails[:count]) if count else []
    duplicate_of = find_representatives(pairs, [(int(since[row]), by_row[row].digest) for row in range(count)])
    members = sorted({row for pair in pairs for row in pair}, key=lambda row: by_row[row].file)
    return (
        {by_row[row].digest: by_row[duplicate_of[row]].digest for row in members},
        [(by_row[row], by_row[duplicate_of[row]]) for row in members if duplicate_of[row] != row],
    )
