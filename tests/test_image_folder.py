import hashlib
import json
import os
import shutil
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.images import image_folder
from workflow.images.image_folder import (
    check_classes,
    digest_files,
    find_duplicates,
    list_images,
    load_shrunk,
    split_by_content,
    split_images,
)

import pytest
from PIL import Image


def shrink(folder: Path, into: Path, size: int = 32) -> tuple[list[dict], dict[str, Path]]:
    """The rows of a folder, and its shrunk images."""
    return load_shrunk(digest_files(folder, into)[1], folder, into, size)


SHARES = {"test_share": 0.1, "validation_share": 0.1, "salt": 11}


def digests(count: int, start: int = 0) -> list[str]:
    return [image_folder.sha256(number) for number in range(start, start + count)]


@pytest.mark.parametrize("count", [3, 4, 5, 10, 50])
def test_every_split_of_every_class_has_an_image(count):
    for start in range(0, 5000, 100):
        splits = split_by_content(digests(count, start), **SHARES)
        assert set(splits) == set(digests(count, start))
        assert set(splits.values()) == {"train", "validation", "test"}


def test_large_class_is_split_by_the_shares():
    splits = list(split_by_content(digests(20_000), **SHARES).values())
    assert 0.09 < splits.count("test") / 20_000 < 0.11
    assert 0.09 < splits.count("validation") / 20_000 < 0.11


def test_fewer_than_three_images_are_not_split():
    assert split_by_content(digests(2), **SHARES) == {}


def test_new_images_move_none_out_of_train_but_the_tenth_and_none_at_all_in_a_large_class():
    for start in range(0, 3000, 100):
        before = split_by_content(digests(5, start), **SHARES)
        for count in range(6, 60):
            after = split_by_content(digests(count, start), **SHARES)
            moved = [after[digest] for digest in before if before[digest] == "train" != after[digest]]
            assert moved in ([], ["validation"] if count == 10 else [])  # the tenth image brings a second test image
            before = after
    assert split_by_content(digests(500), **SHARES).items() <= split_by_content(digests(900), **SHARES).items()


def test_split_ignores_order_and_names():
    shuffled = sorted(digests(30), reverse=True)
    assert split_by_content(shuffled, **SHARES) == split_by_content(digests(30), **SHARES)


def row(file: str, digest: str) -> dict:
    return {"file": file, "class": file.split("/")[0], "digest": digest}


def test_duplicate_in_a_class_is_counted_once_and_a_label_conflict_not_at_all():
    images = [row("a/1", "x"), row("a/2", "x"), row("a/3", "y"), row("b/1", "y"), row("b/2", "z")]
    assert find_duplicates(images) == {
        "a/2": "duplicate of a/1",
        "a/3": "one image in two classes: a/3, b/1",
        "b/1": "one image in two classes: a/3, b/1",
    }


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_same_content_gives_the_same_digest_and_is_shrunk_only_once(folder, tmp_path, monkeypatch):
    first = shrink(folder, tmp_path / "dataset")
    monkeypatch.setattr(image_folder, "read_image", None)  # a second shrinking would fail
    assert shrink(folder, tmp_path / "dataset") == first


@pytest.mark.parametrize("change", ["content", "name", "new", "gone"])
def test_any_change_of_names_or_contents_changes_the_digest(folder, tmp_path, change):
    before, _ = digest_files(folder, tmp_path / "dataset")
    path = folder / "apples/apple-1.jpeg"
    if change == "content":
        path.write_bytes(path.read_bytes() + b" ")
    elif change == "name":
        path.rename(folder / "apples/renamed.jpeg")
    elif change == "new":
        shutil.copy(path, folder / "apples/copy.jpeg")
    else:
        path.unlink()
    assert digest_files(folder, tmp_path / "dataset")[0] != before


def test_file_is_read_again_only_when_its_size_or_times_have_changed(folder, tmp_path, monkeypatch):
    read = []
    file_digest = hashlib.file_digest

    def record(file, name):
        read.append(Path(file.name).name)
        return file_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", record)
    first = digest_files(folder, tmp_path)
    assert digest_files(folder, tmp_path) == first
    assert len(read) == 40  # too young to be sure
    monkeypatch.setattr(image_folder, "CERTAIN", 0)
    assert digest_files(folder, tmp_path) == digest_files(folder, tmp_path) == first
    assert len(read) == 60
    path = folder / "apples/apple-3.jpeg"
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a program may that hides the change
    assert digest_files(folder, tmp_path)[0] != first[0]
    assert read[60:] == ["apple-3.jpeg"]
    (memory,) = tmp_path.glob("digests-*.json")
    memory.write_text("damaged")
    assert digest_files(folder, tmp_path)[0] != first[0]


def test_only_what_is_new_in_a_folder_is_shrunk(folder, tmp_path, monkeypatch):
    images, first = shrink(folder, tmp_path / "work", 8)
    shrunk = []
    read = image_folder.read_image
    monkeypatch.setattr(image_folder, "read_image", lambda path, size: shrunk.append(path.name) or read(path, size))
    Image.new("RGB", (20, 20), "red").save(folder / "apples/new.png")
    _, second = shrink(folder, tmp_path / "work", 8)
    assert shrunk == ["new.png"]
    for image in images:
        assert second[image["digest"]].read_bytes() == first[image["digest"]].read_bytes()
    shrink(folder, tmp_path / "work", 9)
    assert len(shrunk) == 1 + len(images) + 1


def test_interrupted_shrinking_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_folder, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shrink(folder, tmp_path / "dataset")
    assert list((tmp_path / "dataset").iterdir()) == []


def test_too_small_class_is_named_with_its_count_and_reasons(folder, tmp_path):
    for number in range(3, 11):
        (folder / f"oranges/orange-{number}.jpeg").write_text(f"broken {number}")
    images = split_images(shrink(folder, tmp_path / "dataset")[0], **SHARES)
    with pytest.raises(WorkflowError, match=r"class oranges has 2 usable image\(s\).*orange-10.jpeg: not an image"):
        check_classes(images)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (None, "is not a folder"),
        ([], r"0 class folder\(s\)"),
        (["apples"], r"1 class folder\(s\)"),
        (["apples", "oranges"], "apples has no images"),
    ],
)
def test_folder_without_two_classes_of_images_is_refused(tmp_path, made, reason):
    for name in made or []:
        (tmp_path / "source" / name).mkdir(parents=True)
    if made == []:
        (tmp_path / "source").mkdir()
    with pytest.raises(WorkflowError, match=reason):
        list_images(tmp_path / "source")


def test_folder_that_cannot_be_written_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "dataset").write_text("a file where the folder should be")
    with pytest.raises(WorkflowError, match=r"cannot be written: (File exists|Not a directory)"):
        shrink(folder, tmp_path / "dataset")
    with pytest.raises(WorkflowError, match="cannot be written"):
        image_folder.write_whole(tmp_path / "dataset/image.jpeg", b"")


def test_rows_survive_the_way_through_json(folder, tmp_path):
    images, shrunk = shrink(folder, tmp_path / "dataset")
    (prepared,) = {path.parent for path in shrunk.values()}
    assert json.loads((prepared / "images.json").read_text()) == images
    assert {path.stem for path in prepared.glob("*.bmp")} == shrunk.keys() == {image["digest"] for image in images}
