"""ZIP files are unpacked whole, once and only into their folder, or refused."""

import os
import random
import stat
import zipfile
from contextlib import suppress
from pathlib import Path

from support.project import fill
from workflow.data import archive
from workflow.data.archive import archive_folder, unpack
from workflow.data.folder import list_images
from workflow.data.source import check_source, resolve_source
from workflow.errors import WorkflowError

import pytest

NAMES = [f"{kind}/{number}.jpeg" for kind in ("apples", "oranges") for number in range(3)]


def create(path: Path, names=NAMES, content=b"photo of ", **options) -> Path:
    """Create a ZIP file whose files have their names as content."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, content + str(name).encode())
    return path


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.survived("source: a ZIP of class folders, perhaps below one folder, with system files")
@pytest.mark.parametrize("top", ["", "photos/", "./", "export/my photos/"])
def test_archive_of_class_folders_is_unpacked(tmp_path, top):
    junk = [
        "__MACOSX/apples/._0.jpeg",
        ".DS_Store",
        f"{top}apples/@eaDir/0.jpeg/SYNOPHOTO_THUMB_M.jpg",
        f"{top}._apples",
    ]
    path = create(tmp_path / "photos.zip", [*(top + name for name in NAMES), *junk, f"{top}apples/"])
    check_source(str(path))
    assert unpack(path, tmp_path / "state/zip") == 6
    assert files_in(tmp_path / "state/zip") == set(NAMES)
    assert {name: len(files) for name, files in list_images(tmp_path / "state/zip").items()} == {
        "apples": 3,
        "oranges": 3,
    }
    assert os.listdir(tmp_path / "state") == ["zip"]


@pytest.mark.refused("source: a ZIP whose paths lead out of its folder, collide or are links")
@pytest.mark.parametrize(
    "name",
    [
        *("../x", "apples/../../x", "/etc/x", "C:/x", "c:x", "..\\x", "apples\\..\\..\\x", "\\\\host\\x", "//host/x"),
        *("APPLES/0.jpeg", "apples/0.JPEG", "apples/0.jpeg/x", "apples/0.jpeg", "apples\\0.jpeg", "oranges"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unsafe_archive_is_refused(tmp_path, name):
    path = create(tmp_path / "photos.zip", [*NAMES, name])
    with pytest.raises(WorkflowError, match=r"photos\.zip contains .*unpack it yourself"):
        check_source(str(path))
    with pytest.raises(WorkflowError):
        unpack(path, tmp_path / "state/zip")
    assert os.listdir(tmp_path) == ["photos.zip"]


def test_link_in_an_archive_becomes_a_file(tmp_path):
    link = zipfile.ZipInfo("apples/link.jpeg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    path = create(tmp_path / "photos.zip")
    with zipfile.ZipFile(path, "a") as changed:
        changed.writestr(link, "/etc/passwd")
    unpack(path, tmp_path / "zip")
    assert not (tmp_path / "zip/apples/link.jpeg").is_symlink()
    assert (tmp_path / "zip/apples/link.jpeg").read_text() == "/etc/passwd"


def set_flags(path: Path, flags: int) -> None:
    """Set flags of all files in the directory of a ZIP file."""
    content = bytearray(path.read_bytes())
    start = -1
    while (start := content.find(b"PK\1\2", start + 1)) >= 0:
        content[start + 8 : start + 10] = flags.to_bytes(2, "little")
    path.write_bytes(content)


@pytest.mark.refused("source: a ZIP that is damaged, protected, empty, too large or uses an unsupported method")
@pytest.mark.parametrize("fault", ["truncated", "bytes", "not a ZIP", "empty", "password", "bomb", "many", "Deflate64"])
def test_unusable_archive_is_refused_and_leaves_no_files(tmp_path, monkeypatch, fault):
    path = create(tmp_path / "photos.zip", compression=zipfile.ZIP_DEFLATED)
    words = "damaged|cannot be read"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif fault == "bytes":
        content = bytearray(path.read_bytes())
        content[60:70] = b"0123456789"
        path.write_bytes(content)
    elif fault == "not a ZIP":
        path.write_bytes(b"Rar!")
    elif fault == "empty":
        create(path, [])
        words = "no files"
    elif fault == "password":
        set_flags(path, 1)
        words = "password.*folder"
    elif fault == "bomb":
        monkeypatch.setattr(archive, "SMALL_BYTES", 1000)
        create(path, content=bytes(1_000_000), compression=zipfile.ZIP_DEFLATED)
        words = "would grow"
    elif fault == "many":
        monkeypatch.setattr(archive, "MAX_FILES", 5)
        words = "limits"
    else:
        content = path.read_bytes().replace(b"\0\0\x08\0", b"\0\0\x09\0")
        path.write_bytes(content)
        words = "compression.*folder"
    with pytest.raises(WorkflowError, match=words):
        unpack(path, tmp_path / "state/zip")
    assert os.listdir(tmp_path) == ["photos.zip"] or os.listdir(tmp_path / "state") == []


@pytest.mark.survived("source: a ZIP with names in UTF-8 without its flag, in code page 437, or composed differently")
def test_names_are_decoded_whatever_program_wrote_them(tmp_path):
    names = ["Äpfel/größe 1.jpeg", "Äpfel/2.jpeg", "أحمر/1.jpeg"]
    path = create(tmp_path / "mac.zip", names)
    set_flags(path, 0)
    content = path.read_bytes().replace(b"\x14\0\0\x08\0\0", b"\x14\0\0\0\0\0")  # in the files' headers as well
    path.write_bytes(content)
    unpack(path, tmp_path / "mac")
    assert files_in(tmp_path / "mac") == set(names)
    dos = tmp_path / "dos.zip"
    with zipfile.ZipFile(dos, "w") as written:
        written.writestr("apfel_/1.jpeg", b"1")
        written.writestr("orange/1.jpeg", b"2")
    dos.write_bytes(dos.read_bytes().replace(b"apfel_", b"\x8epfel_"))
    unpack(dos, tmp_path / "dos")
    assert files_in(tmp_path / "dos") == {"Äpfel_/1.jpeg", "orange/1.jpeg"}


def test_backslashes_and_forbidden_characters_are_replaced(tmp_path):
    path = create(tmp_path / "photos.zip", ["a\\1.jpeg", "b/12:30?.jpeg", "b/dot./2.jpeg"])
    unpack(path, tmp_path / "zip")
    assert files_in(tmp_path / "zip") == {"a/1.jpeg", "b/12_30_.jpeg", "b/dot_/2.jpeg"}


@pytest.mark.refused("source: a ZIP without class folders, or with a split")
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["train/cats/1.jpeg", "train/dogs/1.jpeg", "test/cats/1.jpeg", "test/dogs/1.jpeg"], "already split"),
        (["all/train/cats/1.jpeg", "all/test/cats/1.jpeg"], "already split"),
        (["images/1.jpeg", "labels/1.txt"], "labels or masks"),
        (["cats/1.jpeg", "cats/2.jpeg"], "create at least two"),
        (["1.jpeg", "2.jpeg"], "create at least two"),
        (["cats/1.jpeg", "dogs/1.mov"], "a video"),
        (["cats/1.jpeg", "dogs/1.jpeg", "test/1.jpeg"], "rename it"),
    ],
)
def test_layout_is_checked_before_unpacking(tmp_path, names, reason):
    path = create(tmp_path / "photos.zip", [*names, "__MACOSX/._1.jpeg"])
    with pytest.raises(WorkflowError, match=rf"photos\.zip.*{reason}"):
        check_source(str(path))


@pytest.mark.survived("source: the folder of a ZIP is incomplete, or a run was killed while it unpacked")
def test_archive_is_unpacked_once_and_again_if_files_are_gone(tmp_path):
    path = create(tmp_path / "photos.zip")
    folder = archive_folder(path, tmp_path / "state")
    assert resolve_source(str(path), "http://lab", tmp_path / "state/images") == (str(path), folder)
    unpack(path, folder)
    before = (folder / NAMES[0]).stat()
    unpack(path, folder)
    assert (folder / NAMES[0]).stat() == before
    (folder / NAMES[0]).unlink()
    leftover = folder.with_name(f"{folder.name}.killed.part")
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    unpack(path, folder)
    assert files_in(tmp_path / "state") == {f"{folder.name}/{name}" for name in NAMES}
    create(path, NAMES[:-1])
    assert archive_folder(path, tmp_path / "state") != folder


@pytest.mark.refused("source: the disk is full while a ZIP is unpacked")
def test_full_disk_leaves_no_files(tmp_path, small_disk):
    path = create(tmp_path / "photos.zip", content=random.Random(1).randbytes(1_000_000))
    fill(small_disk)
    with pytest.raises(WorkflowError, match="No space left"):
        unpack(path, small_disk / "zip")
    assert os.listdir(small_disk) == ["filler"]


@pytest.mark.parametrize("name", ["photos.rar", "photos.tar.gz", "photo.jpeg"])
def test_file_that_is_not_an_archive_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(WorkflowError, match=r"is not a folder.*ZIP"):
        check_source(str(tmp_path / name))
    with pytest.raises(WorkflowError, match="download it"):
        check_source("https://example.org/photos.zip")


def test_any_damage_raises_workflow_error(tmp_path):
    whole = create(tmp_path / "photos.zip", compression=zipfile.ZIP_DEFLATED).read_bytes()
    generator = random.Random(2)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path = tmp_path / "damaged.zip"
        path.write_bytes(content)
        with suppress(WorkflowError):  # any other exception fails the test
            unpack(path, tmp_path / f"state/{generator.random()}")
    assert not list((tmp_path / "state").glob("*.part"))
