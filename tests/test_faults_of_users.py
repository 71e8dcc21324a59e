"""Hostile folders, names and addresses: nothing in them steers the program, and what is printed is text."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import draw
from support.project import Project, runs_of
from workflow.data import data_issues
from workflow.data.folder import digest_files, list_images
from workflow.data.source import check_source
from workflow.errors import WorkflowError
from workflow.evaluation import metrics, report_formats
from workflow.servers import shell_command
from workflow.text import from_text, hide_passwords, printable, to_text

import mlflow
import numpy as np
import pytest
from PIL import Image

BURST = b"\n12:00 | [x](y)"  # a class of near-duplicates, which the log and the descriptions name
ODD = {  # class folders, as bytes, and how they are told
    b"a|b|c": "a|b|c",
    b"a:b:c": "a:b:c",
    b"caf\xe9": "caf\\xe9",
    b"x" * 240: "x" * 240,
    BURST: "\n12:00 | [x](y)",
    b"[x](javascript:alert(1)) <img src=x onerror=alert(1)>": "[x](javascript:alert(1)) <img src=x onerror=alert(1)>",
}
ESCAPES = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, prefect) -> tuple[Project, Path, subprocess.CompletedProcess]:
    """A run on a folder in which nearly every name is odd, its own, too, and much is no image."""
    project = Project(tmp_path_factory.mktemp("hostile"))
    folder = project.folder / os.fsdecode(b"mi\x1b\nne\xe9")
    folder.mkdir()
    for label, name in enumerate(ODD):
        inner = os.fsencode(folder) + b"/" + name
        os.makedirs(inner + b"/nested/deeper")
        for number, place in enumerate((b"", b"\xff", b"nested/", b"nested/deeper/")):
            file = inner + b"/" + place + b"\x1b%d.png" % number
            image = draw.draw("apples", 60, np.random.default_rng([label, 0 if name == BURST else number]))
            image.save(os.fsdecode(file), "PNG", compress_level=number)
    first = folder / "a|b|c"
    (first / f"{ESCAPES}\nforged line.png").write_text("no image")
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
    "folder: files and class folders that are no UTF-8",
    "folder: photos in folders inside a class folder",
    "folder: class names of 240 characters, or that MLflow would take for one",
    "source: a folder whose path is no UTF-8",
)
def test_photos_are_used_whatever_their_names_and_depth(hostile):
    project, _, end = hostile
    assert end.returncode == 0, end.stderr
    rows = rows_of(project, "images.json")
    assert {row["class"] for row in rows} == set(ODD.values())
    assert sum(row["split"] is not None for row in rows) == 4 * len(ODD)
    (run,) = runs_of(project)
    assert sum(name.startswith("test_recall_") for name in run.data.metrics) == len(ODD)


@pytest.mark.survived("folder: a hidden file `.source` that leads elsewhere", "folder: pipes and loose files")
def test_nothing_in_a_folder_steers_the_program(hostile):
    project, folder, end = hostile
    (run,) = runs_of(project)
    assert run.data.tags["source"] == to_text(folder)
    assert "the secret" not in end.stdout + end.stderr + str(run.data)
    assert "1 set aside, 3 left out" in end.stdout + end.stderr
    left_out = [row for row in rows_of(project, "data_issues.json") if row["issue"] == "skipped"]
    assert {row["file"]: row["detail"] for row in left_out} == {
        "loose.jpeg": "not in a class folder",
        "pipe.png": "not in a class folder",
        "a|b|c/pipe.png": "not a file",
    }


@pytest.mark.slow
@pytest.mark.survived("names: commands for a terminal, new lines, HTML and Markdown in names")
def test_names_are_printed_as_text_everywhere(hostile):
    project, folder, end = hostile
    (run,) = runs_of(project)
    (name,) = [model.name for model in mlflow.MlflowClient(run_store(project)).search_registered_models()]
    predicted = project.run(str(folder), "--model", f"models:/{name}/1", script="predict.py")
    for text in (end.stdout, end.stderr, predicted.stdout, predicted.stderr):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert len(predicted.stdout.splitlines()) == 2 + len(list_all(folder))
    assert "\\x1b]0;owned\\x07\\x1b[2J\\nforged line.png" in predicted.stdout
    report = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html")
    assert "<img src=x" not in report
    assert "onerror" in report


def run_store(project: Project) -> str:
    return f"sqlite:///{project.folder / 'mlflow.db'}"


def list_all(folder: Path) -> list[str]:
    found = [name for _, _, names in os.walk(folder) for name in names]
    return [name for name in found if not name.startswith(".")]


NAMES = b"plain", b"caf\xe9/\xff\xfe.png", b"a\xe9", b"a\\xe9", b"a\\x5cxe9", b"\\xe9\xe9", b"\\\xe9", "ü".encode()


@pytest.mark.survived("names: a byte that is no UTF-8 beside a name that reads like it")
def test_file_is_found_again_by_its_name_as_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"here\xe9")
    for name in NAMES:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(name)
    texts = {to_text(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert len(texts) == len(NAMES)
    for text in texts:
        assert text.encode()
        found = from_text(to_text(folder)) / from_text(text)
        assert found.read_bytes() == os.fsencode(found.relative_to(folder))


def test_printable_text_has_one_line_and_no_command():
    assert printable("a b é\n\x1b[2J\udcff") == "a b é\\n\\x1b[2J\\udcff"
    assert str(WorkflowError("one\ntwo")) == "one\\ntwo"


@pytest.mark.refused("folder: a ready-made split")
@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val", "test"), ("train", "test", "unlabelled")])
def test_ready_made_split_is_told(tmp_path, photos, names):
    for name in names:
        shutil.copytree(photos, tmp_path / "mine" / name)
    with pytest.raises(WorkflowError, match=r"is already split \(.*--source"):
        list_images(tmp_path / "mine")


@pytest.mark.refused("source: a password in the URL", "source: neither a folder nor http", "source: a name too long")
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("https://user:hunter2@example.org/photos", "has a user name"),
        ("ftp://example.org/photos", "ftp:// is not supported"),
        ("file:///photos", "file:// is not supported"),
        ("http://", "has no host name"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("~nobody-of-that-name/photos", "~nobody-of-that-name/photos is not a folder"),
        ("http://[::1/photos", "Invalid IPv6 URL"),
    ],
)
def test_unusable_source_is_refused_without_its_password(source, told):
    with pytest.raises(WorkflowError, match=told) as refused:
        check_source(source)
    assert "hunter2" not in str(refused.value)


def test_home_folder_is_meant_by_its_sign(monkeypatch, photos):
    monkeypatch.setenv("HOME", str(photos.parent))
    check_source(f"~/{photos.name}")


@pytest.mark.refused("source: a photo is replaced, or gone, while the run trains")
@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"other"), lambda path: path.unlink()])
def test_photo_that_has_changed_since_is_no_verdict_on_the_model(photos, tmp_path, change):
    shutil.copytree(photos, tmp_path / "mine")
    images = digest_files(tmp_path / "mine", tmp_path)
    assert metrics.read_again(images[0].path_in(tmp_path / "mine"), images[0])
    change(tmp_path / "mine" / images[0].file)
    told = r"apple-1\.jpeg(: No such file| has changed since the run began).*repeat the command"
    with pytest.raises(WorkflowError, match=told):
        metrics.read_again(images[0].path_in(tmp_path / "mine"), images[0])


def test_log_of_a_run_has_no_control_characters(hostile):
    _, _, end = hostile
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|^12:00 ", end.stdout + end.stderr, re.MULTILINE)
    assert "\\n12:00 | [x](y)" in end.stdout


def test_descriptions_in_mlflow_have_no_link_of_a_name(hostile):
    project, _, _ = hostile
    (version,) = mlflow.MlflowClient(run_store(project)).search_model_versions()
    (run,) = runs_of(project)
    for text in (version.description, run.data.tags["mlflow.note.content"]):
        assert "12:00 | \\[x\\](y)" in text


@pytest.mark.survived("names: a link in a class name, in the pages of both UIs")
def test_name_becomes_no_link_in_markdown():
    told = report_formats.disarm("too few photos of [x](javascript:alert(1)) <img src=x>\n# y")
    assert told == "too few photos of \\[x\\](javascript:alert(1)) \\<img src=x\\>\\\\n# y"
    assert report_formats.disarm("\\[x]") == "\\\\\\[x\\]"  # else the backslash would free the bracket


@pytest.mark.refused("names: a password in the address of a server")
def test_password_in_an_address_is_not_told():
    told = hide_passwords("'postgresql://ann:hunter2@db/mlflow' and http://:hunter2@127.0.0.1:5000/#/a@b")
    assert told == "'postgresql://ann@db/mlflow' and http://@127.0.0.1:5000/#/a@b"
    assert (
        hide_passwords("http://ann:p@ss@host/x postgresql+pg://ann:p/w@db")
        == "http://ann@host/x postgresql+pg://ann@db"
    )
    assert hide_passwords("sqlite:///a:b@c tcp://127.0.0.1:8786") == "sqlite:///a:b@c tcp://127.0.0.1:8786"
    assert "hunter2" not in shell_command("x.py", "http://:hunter2@host", NAME="http://ann:hunter2@host")
    assert hide_passwords("http://127.0.0.1:5000/models:/a@champion") == "http://127.0.0.1:5000/models:/a@champion"
    assert "hunter2" not in str(WorkflowError("MLflow at http://ann:hunter2@host does not answer"))


@pytest.mark.slow
def test_password_in_the_address_of_mlflow_is_nowhere(project, photos, prefect):
    with project.mlflow_server():
        url = f"http://ann:hunter2@127.0.0.1:{project.mlflow_port}"
        own = prefect | {"PREFECT_API_URL": prefect["PREFECT_API_URL"].replace("://", "://ann:hunter2@")}
        end = project.run("--source", str(photos), "--epochs", "2", **own, MLFLOW_TRACKING_URI=url)
        assert end.returncode == 0, end.stderr
        assert "hunter2" not in end.stdout + end.stderr
        asked = project.run("photo.jpeg", "--model", "models:/none@x", script="predict.py", MLFLOW_TRACKING_URI=url)
        assert "registered models: apples-oranges" in asked.stderr
        assert "hunter2" not in asked.stdout + asked.stderr
    assert b"hunter2" not in (project.folder / "mlflow.db").read_bytes()


@pytest.mark.survived("image: a header that another format's reader takes for its own")
def test_header_is_read_as_the_formats_that_are_allowed(tmp_path, monkeypatch):
    image = draw.draw("apples", 60, np.random.default_rng(1))
    image.save(tmp_path / "plain.tiff")
    content = (tmp_path / "plain.tiff").read_bytes()
    directory = len(content).to_bytes(4, "little")
    start = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[start : start + 2], "little")
    odd = bytearray(content + content[start : start + 2 + 12 * count + 4])
    odd[4:8] = directory
    odd[8:48] = b"x:y\nFile size (no of images): x\n".ljust(40, b"\0")  # for which Pillow's reader of IM raises
    (tmp_path / "odd.tiff").write_bytes(odd)
    Image.init()
    monkeypatch.setattr(Image, "ID", ["IM", "TIFF"])  # the order depends on which was used first
    with pytest.raises((ValueError, DeprecationWarning), match=r"could not convert|IM image format"):
        Image.open(tmp_path / "odd.tiff")
    assert data_issues.read_header(tmp_path / "odd.tiff") == ("TIFF", f"{image.width} x {image.height}")
