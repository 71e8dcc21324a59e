"""Files of a folder are listed and digested, and copies are marked."""

import json
import os
import shutil
import stat
import unicodedata
from types import SimpleNamespace

from predict import list_folder, list_sources
from workflow import files
from workflow.data import folder as image_folder
from workflow.data.folder import digest_files, find_skipped, list_images, mark_duplicates
from workflow.data.other_files import explain_stand_in
from workflow.errors import WorkflowError
from workflow.records import ImageFile, digest_images

import pytest


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def test_exact_copies_and_images_in_two_classes_are_skipped():
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
def test_damaged_cache_of_digests_is_rewritten(folder, tmp_path, monkeypatch, damaged):
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


@pytest.mark.refused("folder: only placeholders of a cloud drive, unfinished downloads, shortcuts or raw files")
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([".1.jpg.icloud", ".2.jpg.icloud"], "cloud drive"),
        (["1.jpg.cloud"], "cloud drive"),
        (["1.jpg.nextcloud"], "cloud drive"),
        (["1.jpg"], "cloud drive"),
        (["1.jpg.crdownload"], "unfinished download"),
        (["1.jpg.lnk"], "shortcut"),
        (["1.CR2", "2.NEF"], "JPEG"),
        (["1.MOV"], "video"),
    ],
)
def test_class_of_files_without_photos_is_explained(folder, names, reason):
    shutil.rmtree(folder / "apples")
    (folder / "apples").mkdir()
    for name in names:
        (folder / "apples" / name).touch()
    with pytest.raises(WorkflowError, match=f"apples has no images: .*{reason}"):
        list_images(folder)


@pytest.mark.refused("image: a placeholder of a cloud drive")
@pytest.mark.parametrize("name", [".11.jpg.icloud", "11.jpg.cloud", "sparse.jpg", "empty.jpg"])
def test_placeholder_beside_photos_is_skipped(folder, tmp_path, name):
    path = folder / "apples" / name
    path.touch()
    os.truncate(path, 0 if name == "empty.jpg" else 50_000)
    images = digest_files(folder, tmp_path / "dataset")
    (skipped,) = [image for image in images if image.reason]
    assert skipped.file == f"apples/{name}"
    assert "offline" in skipped.reason


@pytest.mark.parametrize(
    "flags", [{"st_flags": 0x40000000}, {"st_file_attributes": 0x1000}, {"st_file_attributes": 0x00400020}]
)
def test_online_only_file_is_not_read(tmp_path, monkeypatch, flags):
    (tmp_path / "1.jpg").write_bytes(b"x")
    status = SimpleNamespace(st_mode=stat.S_IFREG, st_size=5, **flags)  # as macOS and Windows return it
    monkeypatch.setattr(type(tmp_path), "stat", lambda _: status)
    monkeypatch.setattr("builtins.open", None)
    assert "offline" in explain_stand_in(tmp_path / "1.jpg")


@pytest.mark.survived("folder: thumbnails, deleted photos and other system folders")
@pytest.mark.parametrize(
    "name",
    ["@eaDir", "$RECYCLE.BIN", ".Trashes", "__MACOSX", ".thumbnails", "#recycle", "My Lightroom Previews.lrdata"],
)
def test_system_folders_are_skipped_with_a_reason(folder, tmp_path, name):
    before = digest_files(folder, tmp_path / "dataset")
    for place in (folder, folder / "apples"):
        (place / name / "1.jpeg").mkdir(parents=True)
        shutil.copy(folder / "apples/apple-1.jpeg", place / name / "1.jpeg/SYNOPHOTO_THUMB_XL.jpg")
    assert digest_files(folder, tmp_path / "dataset") == before
    assert {issue.file for issue in find_skipped(folder)} == {name, f"apples/{name}"}
    assert all(issue.detail for issue in find_skipped(folder))
    assert len(list(list_folder(folder))) == 20


@pytest.mark.survived("folder: files that the system or another program stores beside photos")
@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", "1.jpg.supplemental-metadata.json", "1.AAE", "1.xmp"])
def test_system_files_do_not_change_the_data_version(folder, tmp_path, name):
    before = digest_files(folder, tmp_path / "dataset")
    (folder / "apples" / name).write_text("changes when someone looks at the photos")
    assert digest_files(folder, tmp_path / "dataset") == before
    assert [issue.file for issue in find_skipped(folder)] == [f"apples/{name}"]


@pytest.mark.survived("folder: macOS resource forks")
def test_hidden_files_are_ignored(folder, tmp_path):
    before = digest_files(folder, tmp_path / "dataset")
    for name in ("._apple-1.jpeg", ".DS_Store", ".dropbox.attrs"):
        (folder / "apples" / name).write_bytes(b"\0\5\26\7")
    assert digest_files(folder, tmp_path / "dataset") == before


@pytest.mark.survived(
    "folder: links to itself, to a parent or to another class", "predict.py: a pattern over such links"
)
def test_folder_with_links_to_itself_has_each_photo_once(folder, tmp_path, monkeypatch):
    for number, target in enumerate([folder, folder.parent, folder / "apples", folder / "apples/.."]):
        (folder / f"again-{number}").symlink_to(target)
        (folder / "oranges" / f"again-{number}").symlink_to(target)
    (folder / "loop").symlink_to("loop")
    images = list_images(folder)
    assert {name: len(paths) for name, paths in images.items()} == {"apples": 10, "oranges": 10}
    assert {issue.file for issue in find_skipped(folder)} >= {"again-0", "oranges/again-3", "loop"}
    assert len(list(list_folder(folder))) == 20 + 1  # "loop" is reported
    monkeypatch.chdir(folder)
    for pattern in ("**/*.jpeg", f"{folder}/**/*.jpeg", "**", "*/*.jpeg", "../**/ap*.jpeg", "[ao]*/*[0-9].jpeg"):
        assert len(list(list_sources([pattern]))) == (10 if "ap*" in pattern else 20)


@pytest.mark.survived("folder: class folders that are links to hidden folders, as in data version control")
def test_class_may_be_a_link_to_a_hidden_folder(folder):
    (folder / "apples").rename(folder / ".store")
    (folder / "apples").symlink_to(".store")
    assert len(list_images(folder)["apples"]) == 10


@pytest.mark.survived("names: class folders from macOS, whose accents are separate characters")
def test_class_names_are_normalized(folder, tmp_path):
    (folder / "apples").rename(folder / unicodedata.normalize("NFD", "äpfel"))
    images = digest_files(folder, tmp_path / "dataset")
    assert {image.class_name for image in images} == {"äpfel", "oranges"}
    assert not any(image.reason for image in images)
    assert all(image.path_in(folder).exists() for image in images)
    shutil.copytree(folder / "oranges", folder / "äpfel")
    assert len(list_images(folder)["äpfel"]) == 20
