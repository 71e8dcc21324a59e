"""Resized copies of images: each is written once, whole or not at all."""

import shutil
from pathlib import Path

from workflow.data import prepare
from workflow.data.features import decode
from workflow.data.folder import check_classes, digest_files
from workflow.data.split import split_images
from workflow.errors import WorkflowError
from workflow.files import write_whole
from workflow.image_classifier import read_image
from workflow.records import ImageFile, digest_images

import numpy as np
import pytest
from PIL import Image


def resize(folder: Path, cache: Path, size: int = 32) -> tuple[list[ImageFile], dict[str, np.ndarray]]:
    """Return the images of a folder, and their pixels."""
    images, inputs, *_ = prepare.prepare_pixels(digest_files(folder, cache), folder, cache, size)
    return images, inputs


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The digests of all images decoded from now on."""
    digests = []

    def record(digest, source, size):
        digests.append(digest)
        return decode(digest, source, size)

    monkeypatch.setattr(prepare, "decode", record)
    return digests


def test_each_image_is_resized_once(folder, tmp_path, decoded):
    images, inputs = resize(folder, tmp_path / "cache")
    cached_images, cached_inputs = resize(folder, tmp_path / "cache")
    assert cached_images == images
    assert all(np.array_equal(cached_inputs[digest], inputs[digest]) for digest in inputs)
    assert len(decoded) == len(inputs) == 20
    Image.new("RGB", (20, 20), "red").save(folder / "apples/new.png")
    resize(folder, tmp_path / "cache")
    assert len(decoded) == 21
    resize(folder, tmp_path / "cache", 9)
    assert len(decoded) == 21 + 21


def test_another_version_of_reading_resizes_again(folder, tmp_path, decoded, monkeypatch):
    resize(folder, tmp_path / "cache")
    monkeypatch.setattr(prepare, "READING_VERSION", 0)
    resize(folder, tmp_path / "cache")
    assert len(decoded) == 40


@pytest.mark.survived("small network: a resized copy is empty, cut or changed")
@pytest.mark.parametrize("damage", [lambda body: b"", lambda body: body[:-1], lambda body: body[:-1] + b"x"])
def test_damaged_copy_is_written_again(folder, tmp_path, decoded, damage):
    resize(folder, tmp_path / "cache")
    copy, *_ = (tmp_path / "cache").glob("resized-*/*")
    content = copy.read_bytes()
    copy.write_bytes(damage(content))
    resize(folder, tmp_path / "cache")
    assert copy.read_bytes() == content
    assert len(decoded) == 21


def test_cached_copy_has_the_pixels_of_the_image(folder, tmp_path):
    resize(folder, tmp_path / "cache")
    images, inputs = resize(folder, tmp_path / "cache")
    for image in images:
        assert np.array_equal(inputs[image.digest], read_image(image.path_in(folder), 32))


def test_temporary_fault_is_not_cached(folder, tmp_path):
    images = digest_files(folder, tmp_path / "cache")
    path = folder / "apples/apple-1.jpeg"
    content = path.read_bytes()
    path.unlink()
    faulty, *_ = prepare.prepare_pixels(images, folder, tmp_path / "cache", 32)
    assert [image.file for image in faulty if image.reason] == ["apples/apple-1.jpeg"]
    assert digest_images(faulty) != digest_images(images)
    path.write_bytes(content)
    repaired, *_ = prepare.prepare_pixels(images, folder, tmp_path / "cache", 32)
    assert repaired == images


def test_broken_link_does_not_change_the_data_digest(folder, tmp_path):
    (folder / "apples/gone.jpeg").symlink_to("nowhere")
    images = digest_files(folder, tmp_path / "cache")
    resized, _ = resize(folder, tmp_path / "cache")
    assert [image.reason for image in images if image.reason] == ["No such file or directory"]
    assert digest_images(resized) == digest_images(images)


def test_interrupted_resizing_leaves_no_partial_file(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resize(folder, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]


def test_small_class_is_refused_with_count_and_reasons(folder, tmp_path):
    for number in range(3, 11):
        (folder / f"oranges/orange-{number}.jpeg").write_text(f"broken {number}")
    images = split_images(resize(folder, tmp_path / "dataset")[0], 0.1, 0.1, 11)
    with pytest.raises(WorkflowError, match=r"oranges has 2 .*orange-10.jpeg: not an image"):
        check_classes(images)


def test_unwritable_cache_is_reported(folder, tmp_path):
    (tmp_path / "dataset").write_text("a file instead of the folder")
    with pytest.raises(WorkflowError, match=r"cannot be written: (File exists|Not a directory)"):
        resize(folder, tmp_path / "dataset")
    with pytest.raises(WorkflowError, match="cannot be written"):
        write_whole(tmp_path / "dataset/image.jpeg", b"")
