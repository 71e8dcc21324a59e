"""Split images into training, validation and test images by their content."""

from collections.abc import Mapping
from dataclasses import replace

from workflow.files import sha256
from workflow.records import ImageFile, Split

import numpy as np

MIN_IMAGES_PER_CLASS = 3  # usable images per class: one for each split


def split_by_content(
    digests: list[str], test_fraction: float, validation_fraction: float, salt: int
) -> dict[str, Split]:
    """Assign each image of one class to a split, by its content alone; return {} for fewer than three images.

    No split is empty: the test split borrows an image from the validation split, which borrows one from the training
    split. When new images take the place of borrowed ones, the borrowed ones return to their own split; no other image
    changes its split. The training split borrows only if all images fall into the other splits; for three images, the
    probability of this is 1/125 by default.

    Args:
        digests: digests of the images
        test_fraction: fraction of test images
        validation_fraction: fraction of validation images
        salt: change it to reassign all images
    """
    if len(digests) < MIN_IMAGES_PER_CLASS:
        return {}
    position = {digest: int(sha256(f"{salt}:{digest}".encode())[:8], 16) / 16**8 for digest in digests}
    order = sorted(position, key=position.__getitem__)
    held_out = sum(position[digest] < test_fraction + validation_fraction for digest in order)
    held_out = min(max(held_out, 2), len(order) - 1)
    test = min(max(sum(position[digest] < test_fraction for digest in order), 1), held_out - 1)
    names: list[Split] = ["test", "validation", "train"]
    splits = np.repeat(names, [test, held_out - test, len(order) - held_out]).tolist()
    return dict(zip(order, splits, strict=True))


def split_images(
    images: list[ImageFile],
    test_fraction: float,
    validation_fraction: float,
    salt: int,
    duplicate_of: Mapping[str, str] | None = None,
) -> list[ImageFile]:
    """Assign each image to a split, or to None if it is skipped or its class has too few usable images.

    Near-duplicates get the split of their representative if the class has at least three groups of near-duplicates.

    Args:
        images: images of all classes
        test_fraction: fraction of test images in each class
        validation_fraction: fraction of validation images in each class
        salt: change it to reassign all images
        duplicate_of: maps the digest of each near-duplicate to that of its representative
    """
    splits: dict[str, Split] = {}
    for name in {image.class_name for image in images}:
        usable = [image.digest for image in images if image.class_name == name and not image.reason]
        representatives = {digest: (duplicate_of or {}).get(digest, digest) for digest in usable}
        if len(set(representatives.values())) < MIN_IMAGES_PER_CLASS:
            representatives = {digest: digest for digest in usable}
        unique = list(dict.fromkeys(representatives.values()))
        assigned = split_by_content(unique, test_fraction, validation_fraction, salt)
        splits |= {digest: assigned[representatives[digest]] for digest in usable if assigned}
    return [replace(image, split=None if image.reason else splits.get(image.digest)) for image in images]
