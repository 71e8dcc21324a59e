"""The shrunk copies of images: each is made once, whole or not at all."""

import shutil
from pathlib import Path

from workflow.data import shrunk
from workflow.data.folder import check_classes, digest_files
from workflow.data.shrunk import load_shrunk
from workflow.data.split import split_images
from workflow.data.verified_image import read_verified
from workflow.errors import WorkflowError
from workflow.files import write_whole
from workflow.image_classifier import read_image
from workflow.records import ImageFile, digest_images

import numpy as np
import pytest
from PIL import Image


def shrink(folder: Path, into: Path, size: int = 32) -> tuple[list[ImageFile], dict[str, Path]]:
    """The image files of a folder, and their shrunk copies."""
    return load_shrunk(digest_files(folder, into), folder, into, size)


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The digests of all images that are read from now on."""
    digests = []

    def record(digest, content, size):
        digests.append(digest)
        return read_verified(digest, content, size)

    monkeypatch.setattr(shrunk, "read_verified", record)
    return digests


def test_each_image_is_shrunk_once_also_in_a_folder_that_has_grown(folder, tmp_path, read):
    first = shrink(folder, tmp_path / "cache")
    assert shrink(folder, tmp_path / "cache") == first
    assert len(read) == 20
    Image.new("RGB", (20, 20), "red").save(folder / "apples/new.png")
    shrink(folder, tmp_path / "cache")
    assert len(read) == 21
    shrink(folder, tmp_path / "cache", 9)
    assert len(read) == 21 + 21


@pytest.mark.survived("small network: a shrunk copy is empty, cut or changed")
@pytest.mark.parametrize("damage", [lambda body: b"", lambda body: body[:-1], lambda body: body[:-1] + b"x"])
def test_damaged_copy_is_made_anew(folder, tmp_path, read, damage):
    _, copies = shrink(folder, tmp_path / "cache")
    copy = next(iter(copies.values()))
    content = copy.read_bytes()
    copy.write_bytes(damage(content))
    shrink(folder, tmp_path / "cache")
    assert copy.read_bytes() == content
    assert len(read) == 21


def test_copy_has_the_pixels_of_the_image(folder, tmp_path):
    images, copies = shrink(folder, tmp_path / "cache")
    for image in images:
        assert np.array_equal(shrunk.read_pixels(copies[image.digest]), read_image(folder / image.file, 32))


def test_fault_that_passes_is_not_remembered(folder, tmp_path):
    images = digest_files(folder, tmp_path / "cache")
    path = folder / "apples/apple-1.jpeg"
    content = path.read_bytes()
    path.unlink()
    told, _ = load_shrunk(images, folder, tmp_path / "cache", 32)
    assert [image.file for image in told if image.reason == "No such file or directory"] == ["apples/apple-1.jpeg"]
    assert digest_images(told) != digest_images(images)
    path.write_bytes(content)
    told, _ = load_shrunk(images, folder, tmp_path / "cache", 32)
    assert told == images


def test_file_that_can_never_be_read_leaves_the_data_digest_as_it_is(folder, tmp_path):
    (folder / "apples/gone.jpeg").symlink_to("nowhere")
    images = digest_files(folder, tmp_path / "cache")
    told, _ = shrink(folder, tmp_path / "cache")
    assert [image.reason for image in images if image.reason] == ["No such file or directory"]
    assert digest_images(told) == digest_images(images)


def test_interrupted_shrinking_leaves_no_part_of_a_file(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shrunk, "read_verified", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shrink(folder, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]


def test_too_small_class_is_named_with_its_count_and_reasons(folder, tmp_path):
    for number in range(3, 11):
        (folder / f"oranges/orange-{number}.jpeg").write_text(f"broken {number}")
    images = split_images(shrink(folder, tmp_path / "dataset")[0], 0.1, 0.1, 11)
    with pytest.raises(WorkflowError, match=r"class oranges has 2 usable image\(s\).*orange-10.jpeg: not an image"):
        check_classes(images)


def test_folder_that_cannot_be_written_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "dataset").write_text("a file where the folder should be")
    with pytest.raises(WorkflowError, match=r"cannot be written: (File exists|Not a directory)"):
        shrink(folder, tmp_path / "dataset")
    with pytest.raises(WorkflowError, match="cannot be written"):
        write_whole(tmp_path / "dataset/image.jpeg", b"")
