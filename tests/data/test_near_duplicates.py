"""Near-duplicates are found whatever was done to a copy, and share a split."""

from support.images import encoded
from workflow.data.exif import Capture
from workflow.data.features import FeatureRow, make_thumbnail, read_thumbnail
from workflow.data.near_duplicates import find_pairs, find_representatives, group_copies, group_near_duplicates
from workflow.data.split import split_images
from workflow.files import sha256
from workflow.model.backbone import IMAGE_SIZE
from workflow.records import ImageFile

import numpy as np
import pytest
from PIL import Image, ImageEnhance


def paint(seed: int) -> Image.Image:
    """Return an image of soft blots, which depends on the seed."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (8, 8, 3), "uint8")).resize((400, 300), Image.Resampling.BICUBIC)


def to_thumbnail(image: Image.Image) -> np.ndarray:
    return make_thumbnail(np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)))


CHANGES = {
    "smaller": lambda image: image.resize((200, 150)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "cropped in the middle": lambda image: image.crop((10, 8, 390, 292)),
    "cropped at one side": lambda image: image.crop((0, 0, 380, 285)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_changed_copy_is_a_near_duplicate(change):
    images = [paint(seed) for seed in range(20)]
    thumbnails = np.stack([to_thumbnail(image) for image in [*images, CHANGES[change](images[7])]])
    features = np.ones((21, 4), "float32")  # the same for all images
    assert find_pairs(features, thumbnails) == [(7, 20)]


def test_similar_images_with_different_features_are_not_a_pair():
    first, second = paint(1), Image.blend(paint(1), paint(2), 0.3)
    thumbnails = np.stack([to_thumbnail(first), to_thumbnail(second)])
    assert float(np.corrcoef(thumbnails.reshape(2, -1))[0, 1]) > 0.9
    assert find_pairs(np.eye(2, dtype="float32"), thumbnails) == []


@pytest.mark.survived("data: small or strongly compressed copies beside each photo")
def test_copies_are_found_whatever_their_features(tmp_path):
    changes = {
        "small": lambda image: encoded(image.resize((96, 72)), "JPEG"),
        "compressed": lambda image: encoded(image, "JPEG", quality=10),
        "other format": lambda image: encoded(image, "WEBP"),
    }
    contents = {f"{seed}": encoded(paint(seed), "JPEG", quality=95) for seed in range(14)}
    contents |= {f"{seed} {name}": change(paint(seed)) for seed in range(14) for name, change in changes.items()}
    thumbnails = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        thumbnails[name] = read_thumbnail(tmp_path / name)
    copies = group_copies(thumbnails)
    assert copies == {name: name.partition(" ")[0] for name in contents}


def test_empty_folder_has_no_near_duplicates():
    assert group_near_duplicates({}) == {}


def test_first_item_of_a_component_is_its_representative():
    order = {"a": 2, "b": 1, "c": 3, "d": 0}
    assert find_representatives([("a", "c"), ("c", "b")], order) == {"a": "b", "b": "b", "c": "b", "d": "d"}


def split(names: list[str], seen: dict[str, int]) -> dict[str, str]:
    """Return the split of each image of one class; the first letter of a name is the image that it copies."""
    images = [ImageFile(f"a/{name}", "a", sha256(name)) for name in names]
    rows = {
        sha256(name): FeatureRow(np.ones(4, "float32"), to_thumbnail(paint(ord(name[0]))), Capture(), seen.get(name, 0))
        for name in names
    }
    split = split_images(images, 0.1, 0.1, 11, group_near_duplicates(rows))
    return {image.file[2:]: image.split for image in split}


def test_later_copies_join_the_split_of_the_first_image():
    first = [chr(letter) for letter in range(ord("A"), ord("A") + 30)]
    before = split(first, {})
    copies = [f"{name} again" for name in first] + [f"{name} once more" for name in first]
    after = split(copies + first, dict.fromkeys(copies, 1))
    assert {name: after[name] for name in first} == before
    assert all(after[copy] == before[copy[0]] for copy in copies)
    assert set(before.values()) == {"train", "validation", "test"}


def test_class_of_copies_alone_is_split():
    assert sorted(split(["A1", "A2", "A3"], {}).values()) == ["test", "train", "validation"]
