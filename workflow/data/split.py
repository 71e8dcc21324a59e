"""Which images a model is trained on, which choose between models, and which judge them: decided by content."""

from collections.abc import Mapping
from dataclasses import replace

from workflow.files import sha256
from workflow.records import ImageFile, Split

MIN_IMAGES_PER_CLASS = 3  # usable images per class: one for each split


def split_by_content(
    digests: list[str], test_fraction: float, validation_fraction: float, salt: int
) -> dict[str, Split]:
    """The split of each image of one class, by its content alone; {} for fewer than three.

    Each class has at least one test and one validation image. A class that has drawn none for a split borrows one from
    the next split. When new images arrive, they replace the borrowed ones, and no other image moves. The training split
    borrows only where all images have drawn another split, which happens with three images once in 125 times.
    """
    if len(digests) < MIN_IMAGES_PER_CLASS:
        return {}
    draw = {digest: int(sha256(f"{salt}:{digest}".encode())[:8], 16) / 16**8 for digest in digests}
    order = sorted(draw, key=draw.__getitem__)
    held_out = sum(draw[digest] < test_fraction + validation_fraction for digest in order)
    held_out = min(max(held_out, 2), len(order) - 1)
    test = min(max(sum(draw[digest] < test_fraction for digest in order), 1), held_out - 1)
    sizes: list[tuple[Split, int]] = [
        ("test", test),
        ("validation", held_out - test),
        ("train", len(order) - held_out),
    ]
    splits = [name for name, size in sizes for _ in range(size)]
    return dict(zip(order, splits, strict=True))


def split_images(
    images: list[ImageFile],
    test_fraction: float,
    validation_fraction: float,
    salt: int,
    duplicate_of: Mapping[str, str] | None = None,
) -> list[ImageFile]:
    """The image files with their split; None for what is set aside and for a class with too few usable images.

    Near-duplicates share the split of the image at `duplicate_of`, as long as the class has enough other images.
    """
    splits: dict[str, Split] = {}
    for name in {image.class_name for image in images}:
        usable = [image.digest for image in images if image.class_name == name and not image.reason]
        leader = {digest: (duplicate_of or {}).get(digest, digest) for digest in usable}
        if len(set(leader.values())) < MIN_IMAGES_PER_CLASS:
            leader = dict(zip(usable, usable, strict=True))
        unique = list(dict.fromkeys(leader.values()))
        assigned = split_by_content(unique, test_fraction, validation_fraction, salt)
        splits |= {digest: assigned[leader[digest]] for digest in usable if assigned}
    return [replace(image, split=None if image.reason else splits.get(image.digest)) for image in images]
