"""Near-duplicates: found whatever was done to a copy, and never in two splits."""

from workflow.data import near_duplicates
from workflow.data.split import split_images
from workflow.files import sha256
from workflow.model.backbone import IMAGE_SIZE, make_thumbnail
from workflow.records import ImageFile

import numpy as np
import pytest
from PIL import Image, ImageEnhance


def paint(seed: int) -> Image.Image:
    """A picture of soft blots, another one for each seed."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (8, 8, 3), "uint8")).resize((400, 300), Image.Resampling.BICUBIC)


def shrink(picture: Image.Image) -> np.ndarray:
    return make_thumbnail(np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)))


CHANGES = {
    "smaller": lambda picture: picture.resize((200, 150)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "cropped in the middle": lambda picture: picture.crop((10, 8, 390, 292)),
    "cropped at one side": lambda picture: picture.crop((0, 0, 380, 285)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copy_is_found_and_no_other_picture(change):
    pictures = [paint(seed) for seed in range(20)]
    thumbnails = np.stack([shrink(picture) for picture in [*pictures, CHANGES[change](pictures[7])]])
    features = np.ones((21, 4), "float32")  # they tell nothing apart
    assert near_duplicates.find_pairs(features, thumbnails) == [(7, 20)]


def test_pictures_with_other_features_are_no_duplicates_though_they_look_alike_in_grey():
    thumbnails = np.stack([shrink(paint(1)), shrink(paint(1))])
    assert near_duplicates.find_pairs(np.eye(2, dtype="float32"), thumbnails) == []


def split(names: list[str], seen: dict[str, int]) -> dict[str, str]:
    """The split of each image of one class; a name's first letter is the picture that it is a copy of."""
    images = [ImageFile(f"a/{name}", "a", sha256(name)) for name in names]
    rows = {image.digest: row for row, image in enumerate(images)}
    features, thumbnails = (
        np.ones((len(names), 4), "float32"),
        np.stack([shrink(paint(ord(name[0]))) for name in names]),
    )
    since = np.array([seen.get(name, 0) for name in names])
    duplicate_of, _ = near_duplicates.group_images(images, rows, features, thumbnails, since)
    return {image.file[2:]: image.split for image in split_images(images, 0.1, 0.1, 11, duplicate_of)}


def test_copies_that_arrive_later_go_to_the_split_of_the_first_and_move_none():
    first = [chr(letter) for letter in range(ord("A"), ord("A") + 30)]
    before = split(first, {})
    copies = [f"{name} again" for name in first] + [f"{name} once more" for name in first]
    after = split(copies + first, dict.fromkeys(copies, 1))
    assert {name: after[name] for name in first} == before
    assert all(after[copy] == before[copy[0]] for copy in copies)
    assert set(before.values()) == {"train", "validation", "test"}


def test_class_of_copies_alone_is_split_all_the_same():
    assert sorted(split(["A1", "A2", "A3"], {}).values()) == ["test", "train", "validation"]
