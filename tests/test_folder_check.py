"""What is found in a folder of photos: near-duplicates and the splits that they share, odd photos, wrong labels."""

from workflow.images import folder_check, image_folder, near_duplicates
from workflow.model.backbone import IMAGE_SIZE, make_thumbnail
from workflow.model.features import Described

import numpy as np
import pytest
from PIL import Image, ImageEnhance

SHARES = {"test_share": 0.1, "validation_share": 0.1, "salt": 11}


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


def describe(names: list[str], seen: dict[str, int]) -> tuple[list[dict], dict]:
    """Rows of one class, and what is known of each; a name's first letter is the picture that it is a copy of."""
    images = [{"file": f"a/{name}", "class": "a", "digest": image_folder.sha256(name), "reason": ""} for name in names]
    described = {
        image["digest"]: Described(np.ones(4, "float32"), shrink(paint(ord(name[0]))), seen.get(name, 0))
        for name, image in zip(names, images, strict=True)
    }
    return images, described


def split(names: list[str], seen: dict[str, int]) -> dict[str, str]:
    images, described = describe(names, seen)
    leaders, _ = near_duplicates.group_images(images, described)
    return {row["file"][2:]: row["split"] for row in image_folder.split_images(images, **SHARES, leaders=leaders)}


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


def test_class_of_ten_has_two_test_images():
    for start in range(0, 3000, 100):
        digests = [image_folder.sha256(number) for number in range(start, start + 10)]
        splits = list(image_folder.split_by_content(digests, **SHARES).values())
        assert splits.count("test") >= 2
        assert splits.count("train") >= 1


def test_each_finding_is_told_and_a_good_folder_has_none(tmp_path):
    draw, units, images = np.random.default_rng(2), {}, []
    for name, count in (("a", 12), ("b", 12), ("c", 3)):
        (tmp_path / name).mkdir()
        centre = draw.normal(size=50)
        for number in range(count):
            file = f"{name}/{number}.{'png' if name == 'b' else 'jpeg'}"
            Image.new("RGB", (40 + number, 40)).save(tmp_path / file)
            images.append({"file": file, "class": name, "digest": file, "reason": ""})
            units[file] = centre + 0.3 * draw.normal(size=50)
    good = [image for image in images if image["class"] != "b" and image["file"][0] != "c"]
    good += [image | {"class": "d"} for image in good]
    assert folder_check.check_folder(good, units, [], tmp_path) == []
    units["a/5.jpeg"] = draw.normal(size=50)
    found = folder_check.check_folder(images, units, [(images[0], images[20])], tmp_path)
    assert [(one["finding"], one["file"], one["class"]) for one in found] == [
        ("near-duplicates", "a/0.jpeg", "a"),
        ("unlike its class", "a/5.jpeg", "a"),
        ("few photos", "", "c"),
        ("format", "", "b"),
    ]
    assert "in two classes" in found[0]["detail"]


def test_doubtful_labels_come_with_the_least_likely_first():
    rows = [
        {"file": str(number), "label": "a", "predicted": "b" if own < 0.5 else "a", "probabilities": {"a": own}}
        for number, own in enumerate((0.4, 0.9, 0.01))
    ]
    assert [one["file"] for one in folder_check.find_wrong_labels(rows)] == ["2", "0"]
