"""Hostile folders, names and addresses: none of them controls the program, the terminal or the UIs."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import draw
from support.project import Project, runs_of
from workflow.cli import shell_command
from workflow.data import data_issues
from workflow.data.folder import digest_files, list_images
from workflow.data.source import check_source
from workflow.errors import WorkflowError
from workflow.evaluation import metrics, report_formats
from workflow.records import DataVersion
from workflow.text import from_text, hide_passwords, printable, to_text

import mlflow
import numpy as np
import pytest
from PIL import Image

NEAR_DUPLICATES = b"\n12:00 | [x](y)"  # a class of near-duplicates, so the log and the descriptions mention it
CLASSES = {  # bytes of the folder name: name of the class
    b"a|b|c": "a|b|c",
    b"a:b:c": "a:b:c",
    b"caf\xe9": "caf\\xe9",
    b"x" * 240: "x" * 240,
    NEAR_DUPLICATES: "\n12:00 | [x](y)",
    b"[x](javascript:alert(1)) <img src=x onerror=alert(1)>": "[x](javascript:alert(1)) <img src=x onerror=alert(1)>",
}
ESCAPES = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, prefect, databases) -> tuple[Project, Path, subprocess.CompletedProcess]:
    """A run on a folder with unusual names, at an unusual path, with many files that are not images."""
    project = Project(tmp_path_factory.mktemp("hostile"), databases)
    folder = project.folder / os.fsdecode(b"mi\x1b\nne\xe9")
    folder.mkdir()
    for label, name in enumerate(CLASSES):
        inner = os.fsencode(folder) + b"/" + name
        os.makedirs(inner + b"/nested/deeper")
        for number, place in enumerate((b"", b"\xff", b"nested/", b"nested/deeper/")):
            file = inner + b"/" + place + b"\x1b%d.png" % number
            image = draw.draw("apples", 60, np.random.default_rng([label, 0 if name == NEAR_DUPLICATES else number]))
            image.save(os.fsdecode(file), "PNG", compress_level=number)
    first = folder / "a|b|c"
    (first / f"{ESCAPES}\nforged line.png").write_text("not an image")
    os.mkfifo(first / "pipe.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "loose.jpeg").write_bytes((first / "\x1b0.png").read_bytes())
    (project.home / "secret").write_text("the secret")
    (folder / ".source").symlink_to(project.home / "secret")
    (first / ".source").symlink_to("/dev/zero")
    end = project.run("--source", str(folder), "--epochs", "2", **prefect)
    return project, folder, end


def rows_of(project: Project, file: str) -> list[dict]:
    (run,) = runs_of(project)
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{file}"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.mark.survived(
    "folder: file and folder names that are not UTF-8",
    "folder: photos in subfolders of a class folder",
    "folder: class names of 240 characters, or with characters that MLflow reserves",
    "source: a folder whose path is not UTF-8",
)
def test_photos_are_used_at_any_depth_and_with_any_name(hostile):
    project, _, end = hostile
    assert end.returncode == 0, end.stderr
    rows = rows_of(project, "images.json")
    assert {row["class"] for row in rows} == set(CLASSES.values())
    assert sum(row["split"] is not None for row in rows) == 4 * len(CLASSES)
    (run,) = runs_of(project)
    assert sum(name.startswith("test_recall_") for name in run.data.metrics) == len(CLASSES)


@pytest.mark.survived("folder: a hidden link `.source` to another file", "folder: pipes and loose files")
def test_special_files_are_skipped_and_never_followed(hostile):
    project, folder, end = hostile
    (run,) = runs_of(project)
    assert run.data.tags["source"] == to_text(folder)
    assert "the secret" not in end.stdout + end.stderr + str(run.data)
    skipped = [row for row in rows_of(project, "data_issues.json") if row["issue"] == "skipped"]
    assert {row["file"] for row in skipped} == {"loose.jpeg", "pipe.png", "a|b|c/pipe.png"}


@pytest.mark.slow
@pytest.mark.survived("names: terminal commands, newlines, HTML and Markdown in names")
def test_names_are_printed_as_plain_text(hostile):
    project, folder, end = hostile
    (run,) = runs_of(project)
    (name,) = [model.name for model in mlflow.MlflowClient(run_store(project)).search_registered_models()]
    predicted = project.run(str(folder), "--model", f"models:/{name}/1", script="predict.py")
    for text in (end.stdout, end.stderr, predicted.stdout, predicted.stderr):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert len(predicted.stdout.splitlines()) == 2 + len(list_visible(folder))
    assert "\\x1b]0;owned\\x07\\x1b[2J\\nforged line.png" in predicted.stdout
    report = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html")
    assert "<img src=x" not in report
    assert "onerror" in report


def run_store(project: Project) -> str:
    return f"sqlite:///{project.folder / 'mlflow.db'}"


def list_visible(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names if not name.startswith(".")]


NAMES = b"plain", b"caf\xe9/\xff\xfe.png", b"a\xe9", b"a\\xe9", b"a\\x5cxe9", b"\\xe9\xe9", b"\\\xe9", "ü".encode()


@pytest.mark.survived("names: a name that is not UTF-8 beside one that looks like its escaped form")
def test_printed_name_identifies_its_file(tmp_path):
    folder = tmp_path / os.fsdecode(b"here\xe9")
    for name in NAMES:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(name)
    texts = {to_text(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert len(texts) == len(NAMES)
    for text in texts:
        assert text.encode()
        path = from_text(to_text(folder)) / from_text(text)
        assert path.read_bytes() == os.fsencode(path.relative_to(folder))


def test_printable_text_has_one_line_and_no_escape_sequence():
    assert printable("a b é\n\x1b[2J\udcff") == "a b é\\n\\x1b[2J\\udcff"
    assert str(WorkflowError("one\ntwo")) == "one\\ntwo"


@pytest.mark.refused("folder: already split into train and test")
@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val", "test"), ("train", "test", "unlabelled")])
def test_folder_that_is_already_split_is_refused(tmp_path, photos, names):
    for name in names:
        shutil.copytree(photos, tmp_path / "mine" / name)
    with pytest.raises(WorkflowError, match=f"{names[0]}.*--source"):
        list_images(tmp_path / "mine")


@pytest.mark.refused(
    "source: a password in the URL", "source: neither a folder nor an http(s) URL", "source: a name that is too long"
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://user:hunter2@example.org/photos", "user name"),
        ("ftp://example.org/photos", "ftp://"),
        ("file:///photos", "file://"),
        ("http://", "host"),
        ("x" * 5000, "File name too long"),
        ("~nobody-of-that-name/photos", "~nobody-of-that-name/photos"),
        ("http://[::1/photos", "Invalid IPv6 URL"),
    ],
)
def test_unusable_source_is_refused_without_its_password(source, message):
    with pytest.raises(WorkflowError, match=message) as error:
        check_source(source)
    assert "hunter2" not in str(error.value)


def test_tilde_means_the_home_folder(monkeypatch, photos):
    monkeypatch.setenv("HOME", str(photos.parent))
    check_source(f"~/{photos.name}")


@pytest.mark.refused("source: a photo changes or disappears while the run trains")
@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"other"), lambda path: path.unlink()])
def test_changed_photo_is_an_error_instead_of_a_result(photos, tmp_path, change):
    shutil.copytree(photos, tmp_path / "mine")
    data = DataVersion("", str(tmp_path / "mine"), digest_files(tmp_path / "mine", tmp_path))
    file = data.files[0].file
    assert metrics.read_unchanged(data, file)
    change(tmp_path / "mine" / file)
    with pytest.raises(WorkflowError, match=r"apple-1\.jpeg.*(No such file|changed)"):
        metrics.read_unchanged(data, file)


def test_log_contains_no_control_characters(hostile):
    _, _, end = hostile
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|^12:00 ", end.stdout + end.stderr, re.MULTILINE)
    assert "\\n12:00 | [x](y)" in end.stdout


def test_name_becomes_no_link_in_mlflow(hostile):
    project, _, _ = hostile
    (version,) = mlflow.MlflowClient(run_store(project)).search_model_versions()
    (run,) = runs_of(project)
    for text in (version.description, run.data.tags["mlflow.note.content"]):
        assert "12:00 | \\[x\\](y)" in text


@pytest.mark.survived("names: a link in a class name, in the pages of both UIs")
def test_name_becomes_no_link_in_markdown():
    text = report_formats.escape_markdown("[x](javascript:alert(1)) <img src=x>\n# y")
    assert text == "\\[x\\](javascript:alert(1)) \\<img src=x\\>\\\\n# y"
    assert (
        report_formats.escape_markdown("\\[x]") == "\\\\\\[x\\]"
    )  # otherwise the backslash would unescape the bracket


@pytest.mark.refused("names: a password in the URL of a server")
def test_password_in_a_url_is_never_printed():
    text = hide_passwords("'postgresql://ann:hunter2@db/mlflow' and http://:hunter2@127.0.0.1:5000/#/a@b")
    assert text == "'postgresql://ann@db/mlflow' and http://@127.0.0.1:5000/#/a@b"
    assert (
        hide_passwords("http://ann:p@ss@host/x postgresql+pg://ann:p/w@db")
        == "http://ann@host/x postgresql+pg://ann@db"
    )
    assert hide_passwords("sqlite:///a:b@c tcp://127.0.0.1:8786") == "sqlite:///a:b@c tcp://127.0.0.1:8786"
    assert "hunter2" not in shell_command("x.py", "http://:hunter2@host", NAME="http://ann:hunter2@host")
    assert hide_passwords("http://127.0.0.1:5000/models:/a@champion") == "http://127.0.0.1:5000/models:/a@champion"
    assert "hunter2" not in str(WorkflowError("MLflow at http://ann:hunter2@host does not respond"))


@pytest.mark.slow
def test_password_in_a_server_url_is_never_stored_or_printed(project, photos, prefect):
    with project.mlflow_server():
        url = f"http://ann:hunter2@127.0.0.1:{project.mlflow_port}"
        settings = prefect | {"PREFECT_API_URL": prefect["PREFECT_API_URL"].replace("://", "://ann:hunter2@")}
        end = project.run("--source", str(photos), "--epochs", "2", **settings, MLFLOW_TRACKING_URI=url)
        assert end.returncode == 0, end.stderr
        assert "hunter2" not in end.stdout + end.stderr
        predicted = project.run("photo.jpeg", "--model", "models:/none@x", script="predict.py", MLFLOW_TRACKING_URI=url)
        assert "apples-oranges" in predicted.stderr
        assert "hunter2" not in predicted.stdout + predicted.stderr
    assert b"hunter2" not in (project.folder / "mlflow.db").read_bytes()


@pytest.mark.survived("image: a header that another Pillow plugin accepts as its format")
def test_header_is_read_only_as_an_allowed_format(tmp_path, monkeypatch):
    image = draw.draw("apples", 60, np.random.default_rng(1))
    image.save(tmp_path / "plain.tiff")
    content = (tmp_path / "plain.tiff").read_bytes()
    directory = len(content).to_bytes(4, "little")
    start = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[start : start + 2], "little")
    crafted = bytearray(content + content[start : start + 2 + 12 * count + 4])
    crafted[4:8] = directory
    crafted[8:48] = b"x:y\nFile size (no of images): x\n".ljust(40, b"\0")  # makes Pillow's IM plugin raise
    (tmp_path / "crafted.tiff").write_bytes(crafted)
    Image.init()
    monkeypatch.setattr(Image, "ID", ["IM", "TIFF"])  # the order depends on which plugin was used first
    with pytest.raises((ValueError, DeprecationWarning), match=r"could not convert|IM image format"):
        Image.open(tmp_path / "crafted.tiff")
    assert data_issues.read_header(tmp_path / "crafted.tiff") == ("TIFF", f"{image.width} x {image.height}")
