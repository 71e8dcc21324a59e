"""Files of a folder are listed and digested, and copies are marked."""

import json
import os
import shutil

from workflow import files
from workflow.data import folder as image_folder
from workflow.data.folder import digest_files, find_skipped, list_images, mark_duplicates
from workflow.errors import WorkflowError
from workflow.records import ImageFile, digest_images

import pytest


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_exact_copies_are_skipped_and_all_of_a_label_conflict():
    rows = [("a/1", "x"), ("a/2", "x"), ("a/3", "y"), ("b/1", "y"), ("b/2", "z")]
    images = mark_duplicates([ImageFile(file, file[0], digest) for file, digest in rows])
    assert {image.file: image.reason for image in images if image.reason} == {
        "a/2": "duplicate of a/1",
        "a/3": "same image in two classes: a/3, b/1",
        "b/1": "same image in two classes: a/3, b/1",
    }


def test_reason_of_many_copies_is_short():
    rows = [(name, number) for name in "ab" for number in range(5000)]
    images = mark_duplicates([ImageFile(f"{name}/{number}", name, "x") for name, number in rows])
    assert {image.reason for image in images} == {"same image in two classes: a/0, a/1, a/2 and 9997 more"}


@pytest.mark.skipif(os.pathconf("/", "PC_PATH_MAX") < 4096, reason="paths may not be that long")
@pytest.mark.survived("folder: a thousand nested folders")
def test_deeply_nested_folders_are_read(folder):
    deep = folder / "apples"
    for _ in range(1100):
        deep /= "d"
        deep.mkdir()
    try:
        (folder / "apples/apple-1.jpeg").rename(deep / "apple-1.jpeg")
        assert len(list_images(folder)["apples"]) == 10
        assert find_skipped(folder) == []
        (deep / "apple-1.jpeg").unlink()
    finally:
        while deep != folder / "apples":  # shutil.rmtree(), which pytest calls, fails at this depth
            deep.rmdir()
            deep = deep.parent


@pytest.mark.survived("folder: the cache of digests is damaged")
@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"apples/apple-1.jpeg": []}', '{"apples/apple-1.jpeg": null}'])
def test_damaged_cache_of_digests_is_written_again(folder, tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(image_folder, "MIN_AGE_NS", 0)
    first = digest_files(folder, tmp_path / "dataset")
    (file,) = (tmp_path / "dataset").glob("digests-*.json")
    whole = json.loads(file.read_text())
    file.write_text(damaged)
    assert digest_files(folder, tmp_path / "dataset") == first
    assert json.loads(file.read_text()) == whole


@pytest.mark.parametrize("change", ["content", "name", "new", "gone"])
def test_any_change_of_names_or_contents_changes_the_digest(folder, tmp_path, change):
    before = digest_images(digest_files(folder, tmp_path / "dataset"))
    path = folder / "apples/apple-1.jpeg"
    if change == "content":
        path.write_bytes(path.read_bytes() + b" ")
    elif change == "name":
        path.rename(folder / "apples/renamed.jpeg")
    elif change == "new":
        shutil.copy(path, folder / "apples/copy.jpeg")
    else:
        path.unlink()
    assert digest_images(digest_files(folder, tmp_path / "dataset")) != before


def test_file_is_read_again_only_if_size_or_times_changed(folder, tmp_path, monkeypatch):
    read = []

    def record(path):
        read.append(path.name)
        return files.digest_file(path)

    monkeypatch.setattr(image_folder, "digest_file", record)
    first = digest_files(folder, tmp_path)
    assert digest_files(folder, tmp_path) == first
    assert len(read) == 40  # too recent to be trusted
    monkeypatch.setattr(image_folder, "MIN_AGE_NS", 0)
    assert digest_files(folder, tmp_path) == digest_files(folder, tmp_path) == first
    assert len(read) == 60
    path = folder / "apples/apple-3.jpeg"
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # like a program that hides the change
    assert digest_images(digest_files(folder, tmp_path)) != digest_images(first)
    assert read[60:] == ["apple-3.jpeg"]
    (cache,) = tmp_path.glob("digests-*.json")
    cache.write_text("damaged")
    assert digest_images(digest_files(folder, tmp_path)) != digest_images(first)


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (None, "is not a folder"),
        ([], r"0 class folder\(s\)"),
        (["apples"], r"1 class folder\(s\)"),
        (["apples", "oranges"], "apples has no images"),
    ],
)
def test_folder_without_two_classes_of_images_is_refused(tmp_path, folders, reason):
    for name in folders or []:
        (tmp_path / "source" / name).mkdir(parents=True)
    if folders == []:
        (tmp_path / "source").mkdir()
    with pytest.raises(WorkflowError, match=reason):
        list_images(tmp_path / "source")
