"""Find photos that are nearly the same: resized, recompressed, slightly cropped or brightened, or taken a second later.

Candidates are pairs with similar features and similar tiny grayscale images. Their thumbnails, and crops of the
thumbnails, are then compared. Photos of two different apples on the same table are not near-duplicates. Small or
strongly compressed copies of a photo have different features, so pairs with nearly the same tiny image are compared by
their edges as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from workflow.data.features import FeatureRow

import numpy as np
from PIL import Image

TINY_PIXELS = 12  # width and height of the tiny images, which are compared for all pairs
MIN_TINY_CORRELATION = 0.65  # between the tiny images of a candidate pair
MIN_COSINE = 0.85  # between the features of a candidate pair
MIN_CORRELATION = 0.92  # between the thumbnails of near-duplicates
MIN_TINY_COPY_CORRELATION = 0.9  # between the tiny images of a pair that may be copies in spite of their features
MIN_EDGE_CORRELATION = 0.9  # between the edges of copies; measured: 0.93 or more for 96-pixel copies, 0.73
# for photos of different objects with the same outline on white
CROPS = (0.0125, 0.025, 0.0375, 0.05)  # fraction of the width and height that a crop removes, on average, per edge
MAX_CANDIDATES = 100_000  # pairs; the most similar ones are kept
MAX_CROPPED = 2000  # pairs whose crops are compared as well, which takes a few milliseconds per pair
BLOCK = 100  # photos or pairs compared at once


def group_near_duplicates(rows: Mapping[str, FeatureRow]) -> dict[str, str]:
    """Map the digest of each image that has near-duplicates to the digest of its group's representative.

    The representative is the image that was seen first, so its split does not change when copies are added later.
    """
    if not rows:
        return {}
    digests = list(rows)
    features, thumbnails = (np.stack(arrays) for arrays in zip(*(row[:2] for row in rows.values()), strict=True))
    pairs = [(digests[first], digests[second]) for first, second in find_pairs(features, thumbnails)]
    representatives = find_representatives(pairs, {digest: (row.since, digest) for digest, row in rows.items()})
    return {digest: representatives[digest] for digest in sorted({digest for pair in pairs for digest in pair})}


def group_copies(thumbnails: Mapping[str, np.ndarray], similar: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Map the digest of each copy of an earlier image, such as a smaller copy, to the original's digest.

    Other near-duplicates, such as crops, are only detected in `similar`, pairs of digests of images with similar
    features. The thumbnails have the shape (side, side).
    """
    if not thumbnails:
        return {}
    digests = list(thumbnails)
    indices = find_pairs(np.zeros((len(digests), 1), "float32"), np.stack(list(thumbnails.values())))
    pairs = [(digests[first], digests[second]) for first, second in indices]
    for pair in similar:
        if thumbnails.keys() >= set(pair) and correlate(*(thumbnails[digest] for digest in pair)) > MIN_CORRELATION:
            pairs.append(pair)
    representatives = find_representatives(pairs, {digest: number for number, digest in enumerate(digests)})
    return {digest: representatives[digest] for digest in sorted({digest for pair in pairs for digest in pair})}


def find_representatives(pairs: Iterable[tuple[str, str]], order: Mapping[str, Any]) -> dict[str, str]:
    """Return the representative of each item: the item of its connected component with the lowest key in `order`."""
    parent = {item: item for item in order}

    def find_root(item: str) -> str:
        while parent[item] != item:
            item = parent[item]
        return item

    for pair in pairs:
        first, second = sorted(map(find_root, pair), key=order.__getitem__)
        parent[second] = first
    return {item: find_root(item) for item in order}


def find_pairs(features: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Return the indices of each pair of near-duplicates, the smaller index first.

    Features have the shape (photos, FEATURES), thumbnails (photos, side, side).
    """
    candidates, cosines = find_candidates(features, thumbnails)
    has_similar_features = cosines > MIN_COSINE
    same = np.zeros(len(candidates), bool)
    for start in range(0, len(candidates), BLOCK):
        block = slice(start, start + BLOCK)
        first, second = (thumbnails[numbers] for numbers in candidates[block].T)
        edges = (normalize(find_edges(first)) * normalize(find_edges(second))).sum(axis=1)
        correlation = (normalize(first) * normalize(second)).sum(axis=1)
        is_copy = edges > MIN_EDGE_CORRELATION
        same[block] = is_copy | (has_similar_features[block] & (correlation > MIN_CORRELATION))
    cropped = [
        pair
        for pair in candidates[~same & has_similar_features][:MAX_CROPPED].tolist()
        if correlate(*thumbnails[pair]) > MIN_CORRELATION
    ]
    return sorted(map(tuple, [*candidates[same].tolist(), *cropped]))


def find_edges(thumbnails: np.ndarray) -> np.ndarray:
    """Return the horizontal and vertical differences between neighboring pixels: shape (photos, 2, side - 1, side - 1).

    `thumbnails` has the shape (photos, side, side).
    """
    images = thumbnails.astype("float32")
    return np.stack([np.diff(images, axis=1)[:, :, :-1], np.diff(images, axis=2)[:, :-1]], axis=1)


def find_candidates(features: np.ndarray, thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of photos that may be near-duplicates, shape (pairs, 2), and the similarity of their features.

    The pairs with the most similar features come first.
    """
    count, side = thumbnails.shape[:2]
    step = side // TINY_PIXELS
    tiny = normalize(thumbnails.reshape(count, TINY_PIXELS, step, TINY_PIXELS, step).mean(axis=(2, 4)))
    lengths = np.maximum(np.linalg.norm(features, axis=1), 1e-6)
    pairs, cosines = np.empty((0, 2), int), np.empty(0, "float32")
    for start in range(0, count, BLOCK):
        correlation = tiny[start : start + BLOCK] @ tiny[start:].T
        cosine = features[start : start + BLOCK] @ features[start:].T
        cosine /= lengths[start : start + BLOCK, None]
        cosine /= lengths[start:]
        is_candidate = (correlation > MIN_TINY_CORRELATION) & (cosine > MIN_COSINE)
        is_candidate |= correlation > MIN_TINY_COPY_CORRELATION
        rows, columns = np.nonzero(np.triu(is_candidate, k=1))
        pairs = np.concatenate([pairs, np.stack([rows, columns], axis=1) + start])
        cosines = np.concatenate([cosines, cosine[rows, columns]])
        if len(pairs) > MAX_CANDIDATES:
            best = np.argpartition(-cosines, MAX_CANDIDATES)[:MAX_CANDIDATES]
            pairs, cosines = pairs[best], cosines[best]
    order = np.argsort(-cosines, kind="stable")
    return pairs[order], cosines[order]


def normalize(images: np.ndarray) -> np.ndarray:
    """Return each image as a vector of mean 0 and length 1; the dot product of two vectors is their correlation."""
    vectors = images.reshape(len(images), -1).astype("float32")
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return vectors


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Return the highest correlation between one thumbnail and the crops of the other, in both directions."""
    return max(
        float((normalize(make_crops(whole)) @ normalize(crop[None]).T).max())
        for whole, crop in ((first, second), (second, first))
    )


def make_crops(thumbnail: np.ndarray) -> np.ndarray:
    """Return the thumbnail and its crops, enlarged to the same size: shape (crops + 1, side, side)."""
    side, image, crops = len(thumbnail), Image.fromarray(thumbnail), [thumbnail]
    for crop in CROPS:
        for x in np.linspace(0, 2 * crop, 5):
            for y in np.linspace(0, 2 * crop, 5):
                box = (side * x, side * y, side * (x + 1 - 2 * crop), side * (y + 1 - 2 * crop))
                crops.append(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box)))
    return np.stack(crops)
