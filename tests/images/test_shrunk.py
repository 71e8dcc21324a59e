"""The shrunk copies of images: each is made once, whole or not at all."""

import json
import shutil
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.files import write_whole
from workflow.images import shrunk
from workflow.images.folder import check_classes, digest_files
from workflow.images.shrunk import load_shrunk
from workflow.images.split import split_images
from workflow.records import ImageFile

import pytest
from PIL import Image


def shrink(folder: Path, into: Path, size: int = 32) -> tuple[list[ImageFile], dict[str, Path]]:
    """The image files of a folder, and their shrunk copies."""
    return load_shrunk(digest_files(folder, into)[1], folder, into, size)


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_same_content_gives_the_same_digest_and_is_shrunk_only_once(folder, tmp_path, monkeypatch):
    first = shrink(folder, tmp_path / "dataset")
    monkeypatch.setattr(shrunk, "read_image", None)  # a second shrinking would fail
    assert shrink(folder, tmp_path / "dataset") == first


def test_only_what_is_new_in_a_folder_is_shrunk(folder, tmp_path, monkeypatch):
    images, first = shrink(folder, tmp_path / "work", 8)
    read_now = []
    read = shrunk.read_image
    monkeypatch.setattr(shrunk, "read_image", lambda path, size: read_now.append(path.name) or read(path, size))
    Image.new("RGB", (20, 20), "red").save(folder / "apples/new.png")
    _, second = shrink(folder, tmp_path / "work", 8)
    assert read_now == ["new.png"]
    for image in images:
        assert second[image.digest].read_bytes() == first[image.digest].read_bytes()
    shrink(folder, tmp_path / "work", 9)
    assert len(read_now) == 1 + len(images) + 1


def test_interrupted_shrinking_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shrunk, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shrink(folder, tmp_path / "dataset")
    assert list((tmp_path / "dataset").iterdir()) == []


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


def test_every_usable_image_has_a_copy_and_a_reason_is_kept_for_each_file(folder, tmp_path):
    images, copies = shrink(folder, tmp_path / "dataset")
    (prepared,) = {path.parent for path in copies.values()}
    assert json.loads((prepared / "reasons.json").read_text()) == [""] * len(images)
    assert {path.stem for path in prepared.glob("*.bmp")} == copies.keys() == {image.digest for image in images}
