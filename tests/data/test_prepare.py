"""Pixels of images: resized, with a reason for each unusable image."""

import shutil
from pathlib import Path

from workflow.data import prepare
from workflow.data.folder import check_classes, digest_files
from workflow.data.split import split_images
from workflow.errors import WorkflowError
from workflow.files import write_whole
from workflow.image_classifier import read_image
from workflow.records import NEAR_DUPLICATE, ImageFile, digest_images

import numpy as np
import pytest
from PIL import Image


def resize(folder: Path, cache: Path, size: int = 32) -> tuple[list[ImageFile], dict[str, np.ndarray]]:
    """Return the images of a folder, and their pixels."""
    images, inputs, *_ = prepare.prepare_pixels(digest_files(folder, cache), folder, size)
    return images, inputs


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_images_are_resized(folder, tmp_path):
    images, inputs = resize(folder, tmp_path / "cache")
    assert len(inputs) == 20
    for image in images:
        assert np.array_equal(inputs[image.digest], read_image(image.path_in(folder), 32))


def test_temporary_fault_is_reported(folder, tmp_path):
    images = digest_files(folder, tmp_path / "cache")
    path = folder / "apples/apple-1.jpeg"
    content = path.read_bytes()
    path.unlink()
    faulty, *_ = prepare.prepare_pixels(images, folder, 32)
    assert [image.file for image in faulty if image.reason] == ["apples/apple-1.jpeg"]
    assert digest_images(faulty) != digest_images(images)
    path.write_bytes(content)
    repaired, *_ = prepare.prepare_pixels(images, folder, 32)
    assert repaired == images


def test_broken_link_does_not_change_the_data_digest(folder, tmp_path):
    (folder / "apples/gone.jpeg").symlink_to("nowhere")
    images = digest_files(folder, tmp_path / "cache")
    resized, _ = resize(folder, tmp_path / "cache")
    assert [image.reason for image in images if image.reason] == ["No such file or directory"]
    assert digest_images(resized) == digest_images(images)


def test_small_class_is_refused_with_count_and_reasons(folder, tmp_path):
    for number in range(3, 11):
        (folder / f"oranges/orange-{number}.jpeg").write_text(f"broken {number}")
    images = split_images(resize(folder, tmp_path / "dataset")[0], 0.1, 0.1, 11)
    with pytest.raises(WorkflowError, match=r"oranges has 2 .*orange-10.jpeg: not an image"):
        check_classes(images)


def test_unwritable_file_is_reported(tmp_path):
    (tmp_path / "dataset").write_text("a file instead of the folder")
    with pytest.raises(WorkflowError, match="cannot be written"):
        write_whole(tmp_path / "dataset/image.jpeg", b"")


@pytest.mark.survived("data: copies beside each photo, without a backbone")
def test_copies_are_found_in_pixels(folder, tmp_path):
    for path in list(folder.glob("*/*.jpeg")):
        with Image.open(path) as image:
            image.convert("RGB").resize((96, 96)).save(path.with_name(f"{path.stem}-thumb.jpeg"))
    prepared = prepare.prepare_pixels(digest_files(folder, tmp_path / "cache"), folder, 64)
    files = {image.digest: image.file for image in prepared.images}
    assert len(prepared.duplicate_of) == 40
    names = {digest: file.replace("-thumb", "") for digest, file in files.items()}
    assert all(names[copy] == names[first] for copy, first in prepared.duplicate_of.items())
    assert {issue.kind for issue in prepared.issues} == {NEAR_DUPLICATE}


@pytest.mark.survived("data: an image of a single color")
@pytest.mark.refused("data: a class of single-color images only")
def test_images_of_one_color_are_reported_and_a_class_refused(folder, tmp_path):
    for path in sorted(folder.glob("apples/*"))[1:]:
        number = int(path.stem.partition("-")[2])
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path, "PNG")
    prepared = prepare.prepare_pixels(digest_files(folder, tmp_path / "cache"), folder, 32)
    assert [issue.kind for issue in prepared.issues].count("blank") == 9
    for path in folder.glob("apples/*"):
        path.write_bytes(path.read_bytes() + b" ")
    sorted(folder.glob("apples/*"))[0].unlink()
    with pytest.raises(WorkflowError, match=r"class apples has only single-color images, such as apples/"):
        prepare.prepare_pixels(digest_files(folder, tmp_path / "cache"), folder, 32)
