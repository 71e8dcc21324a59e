"""Faults of sources: the network fails, images are unusual or broken. Usable images are used, others reported."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

from lib.mutants import mutate

from ml_workflow import FILES
from support.images import ImageServer, closing_server, encoded, odd_images
from support.project import Project, artifact, free_port, prefect_states, runs_of
from workflow.image_classifier import read_image

import mlflow
import numpy as np
import pytest
from PIL import Image

FILE = "apples/apple-5.jpeg"


@pytest.fixture(scope="module")
def network(tmp_path_factory, photos, databases):
    """A project with short download timeouts, a champion, a Prefect server and an image server."""
    project = Project(tmp_path_factory.mktemp("network"), databases)
    project.before = "from workflow.data import download\n"
    project.before += "download.CONNECT_SECONDS, download.READ_SECONDS, download.DOWNLOAD_SECONDS = 1, 1, 2"
    with project.prefect_server() as prefect, closing_server(ImageServer(photos)) as images:
        assert project.run("--source", f"{images.url}/first", "--epochs", "40").returncode == 0
        yield project, prefect, images


def downloaded(project: Project) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (project.folder / "dataset").glob("images-*/*/*")}


def champion(project: Project) -> str:
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    return client.get_model_version_by_alias("apples-oranges", "champion").version


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(faults, id=name, marks=pytest.mark.survived(f"network: {name}, then good"))
        for name, faults in {
            "connection reset": ["reset"],
            "image truncated": ["truncate"],
            "no packet within the timeout": ["stall"],
            "429 with Retry-After": ["429"],
            "500 twice": ["500", "500"],
        }.items()
    ],
)
def test_run_survives_a_temporary_network_fault(network, request, faults):
    project, prefect, images = network
    images.faults[FILE] = list(faults)
    images.requests.clear()
    end = project.run("--source", f"{images.url}/{request.node.callspec.id.replace(' ', '-')}", "--epochs", "1")
    assert end.returncode == 0, end.stderr
    assert sorted(name for _, name in images.requests) == sorted([*FILES, *[FILE] * len(faults)])
    assert runs_of(project)[-1].info.status == "FINISHED"
    assert prefect_states(prefect, "flow_runs")[-1] == "Completed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(fault, reason, id=fault, marks=pytest.mark.refused(f"network: {name}"))
        for fault, name, reason in (
            ("404", "404", "returned 404"),
            ("500", "500 repeatedly", "returned 500"),
            ("html", "HTML instead of an image", "not an image: unknown format"),
            ("empty", "empty file instead of an image", "not an image: the file is empty"),
            ("garbage", "garbage instead of an image", "not an image: unknown format"),
            ("truncate", "image truncated repeatedly", "cut off"),
            ("stall", "no packet, repeatedly", "cut off"),
            ("drip", "slow trickle of bytes", "not complete after 2 s"),
            ("loop", "redirect loop", "redirect"),
            ("endless", "512 MiB without a length", "larger than 50,000,000 bytes"),
            ("reset", "connection reset repeatedly", "is unreachable"),
        )
    ],
)
def test_permanent_network_fault_is_reported_and_harms_no_image(network, photos, fault, reason):
    project, prefect, images = network
    images.faults[FILE] = [fault] * 20
    before, runs, version = downloaded(project), len(runs_of(project)), champion(project)
    end = project.run("--source", f"{images.url}/{fault}-stays")
    images.faults.clear()
    assert end.returncode == 1
    (message,) = [line for line in end.stderr.splitlines() if line.startswith("ml_workflow.py: ")]
    assert re.search(rf"{images.url}/{fault}-stays.*{reason}", message)
    after = downloaded(project)
    assert after.items() >= before.items()
    for path in after.keys() - before.keys():
        assert Path(path).read_bytes() == (photos / "/".join(Path(path).parts[-2:])).read_bytes()
    assert [run.info.status for run in runs_of(project)[runs:]] == ["FAILED"]
    assert prefect_states(prefect, "flow_runs")[-1] == "Failed"
    assert champion(project) == version
    assert images.megabytes < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("name", marks=pytest.mark.refused("network: host without an address (DNS)")),
        pytest.param("refused", marks=pytest.mark.refused("network: connection refused")),
        pytest.param("hang", marks=pytest.mark.refused("network: host that never responds")),
    ],
)
def test_unreachable_host_is_reported(network, kind):
    project, prefect, _ = network
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = {"hang": silent.getsockname()[1]}.get(kind, free_port())
        url = f"http://{'no-such-host.invalid' if kind == 'name' else '127.0.0.1'}:{port}"
        end = project.run("--source", url)
    assert end.returncode == 1
    assert f"ml_workflow.py: {url}/apples/apple-1.jpeg is unreachable" in end.stderr
    assert runs_of(project)[-1].info.status == "FAILED"
    assert prefect_states(prefect, "flow_runs")[-1] == "Failed"


USED = {
    "PNG inside.jpeg": "wrong extension",
    "cmyk.jpeg": "CMYK",
    "gray-16-bit.png": "16 bits per channel",
    "palette-alpha.png": "palette and alpha",
    "turned.jpeg": "EXIF rotation",
    "animated.gif": "animated",
    "one-pixel.png": "one pixel",
    "-rf": "name with a leading dash",
    "é 🍎 $(touch x)": "name with spaces, unicode and shell characters",
    "new\nline": "name with a newline",
    "link.jpeg": "link to a file outside the folder",
}
SKIPPED = {
    "truncated.jpeg": ("truncated", "truncated"),
    "empty.jpeg": ("zero bytes", "not an image: the file is empty"),
    "text.jpeg": ("text", "not an image: unknown format"),
    "bomb.png": ("decompression bomb", "must be fewer than 50,000,000"),
    "large.png": ("implausibly large image", "10000 x 5000 pixels"),
    "copy.jpeg": ("duplicate in a class", "duplicate of apples/apple-1.jpeg"),
    "conflict.jpeg": (
        "same image in two classes",
        "same image in two classes: apples/conflict.jpeg, oranges/conflict.jpeg",
    ),
    "unreadable.jpeg": ("unreadable file", "Permission denied|Input/output error"),
    "nowhere.jpeg": ("broken link", "No such file"),
}


@pytest.fixture(scope="module")
def rows_by_file(tmp_path_factory, photos, prefect, databases) -> dict[str, dict]:
    """Return the rows of images.json of a run on unusual and broken images, by file name."""
    project = Project(tmp_path_factory.mktemp("odd"), databases)
    folder = project.folder / "mine"
    shutil.copytree(photos, folder)
    apples = folder / "apples"
    photo = Image.open(photos / "apples/apple-2.jpeg")
    odd = odd_images(photo.crop((0, 0, 159, 159)))
    odd |= {"-rf": encoded(photo.rotate(1), "PNG"), "é 🍎 $(touch x)": encoded(photo.rotate(2), "PNG")}
    odd |= {"new\nline": encoded(photo.rotate(3), "PNG"), "PNG inside.jpeg": odd.pop("png-inside.jpeg")}
    odd |= {"truncated.jpeg": (apples / "apple-1.jpeg").read_bytes()[:2000], "empty.jpeg": b"", "text.jpeg": b"text"}
    odd["bomb.png"] = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    odd["large.png"] = encoded(Image.new("1", (10_000, 5_000)), "PNG")
    odd |= {"copy.jpeg": (apples / "apple-1.jpeg").read_bytes(), "conflict.jpeg": encoded(photo.rotate(4), "PNG")}
    for name, content in odd.items():
        (apples / name).write_bytes(content)
    (folder / "oranges/conflict.jpeg").write_bytes(odd["conflict.jpeg"])
    (project.home / "outside.jpeg").write_bytes(encoded(photo.rotate(5), "PNG"))
    (apples / "link.jpeg").symlink_to(project.home / "outside.jpeg")
    (apples / ".hidden").write_text("hidden")
    (apples / "nowhere.jpeg").symlink_to(project.home / "none.jpeg")
    if os.geteuid():
        (apples / "unreadable.jpeg").write_bytes(b"")
        (apples / "unreadable.jpeg").chmod(0)
    else:  # root can read files without permissions
        (apples / "unreadable.jpeg").symlink_to("/proc/self/mem")
    rows = run_on_folder(project, folder, prefect)
    assert "apples/.hidden" not in rows
    return rows


def run_on_folder(project: Project, folder: Path, prefect: dict) -> dict[str, dict]:
    """Run the program on a folder, check that no file changed, and return the rows of images.json by file name."""

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.stem != "unreadable"}

    before = contents()
    end = project.run("--source", str(folder), "--epochs", "2", **prefect)
    assert end.returncode == 0, end.stderr
    assert contents() == before
    (run,) = runs_of(project)
    assert run.info.status == "FINISHED"
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/images.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return {row["file"]: row for row in rows}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=fault, marks=pytest.mark.survived(f"image: {fault}")) for name, fault in USED.items()],
)
def test_unusual_image_is_used(rows_by_file, name):
    assert rows_by_file[f"apples/{name}"]["split"] in ("train", "validation", "test")
    assert rows_by_file[f"apples/{name}"]["reason"] == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(name, reason, id=fault, marks=pytest.mark.refused(f"image: {fault}"))
        for name, (fault, reason) in SKIPPED.items()
    ],
)
def test_broken_image_is_skipped_with_a_reason(rows_by_file, name, reason):
    rows = [rows_by_file[file] for file in (f"apples/{name}", f"oranges/{name}") if file in rows_by_file]
    assert len(rows) == (2 if name == "conflict.jpeg" else 1)
    for row in rows:
        assert row["split"] is None
        assert re.search(reason, row["reason"])


@pytest.mark.slow
@pytest.mark.survived("image: HEIC in a training run")
def test_heic_photos_are_trained_on(project, heic_photos, prefect):
    rows = run_on_folder(project, heic_photos, prefect)
    assert {row["split"] for row in rows.values()} == {"train", "validation", "test"}
    (run,) = runs_of(project)
    evaluation = json.loads(artifact(project, run, "evaluation.json").read_text())
    assert len(evaluation["data"]["sessions"]) == len(rows) == 8  # camera and time of every photo were read


def read_fault(path: Path) -> str:
    """Return why an image is unusable, or "" if it is usable."""
    try:
        read_image(path, 64)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of damaged metadata
@pytest.mark.survived("image: 200 mutated files of seven formats as the training folder")
def test_every_unusable_mutated_image_is_reported(project, photos, prefect):
    random = np.random.default_rng(3)
    folder = project.folder / "mutated"
    for kind in ("apples", "oranges"):
        (folder / kind).mkdir(parents=True)
        images = [Image.open(photos / kind / f"{kind[:-1]}-{number}.jpeg").resize((48, 48)) for number in range(1, 11)]
        for number in range(100):
            extension = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")[number % 7]
            content = mutate(encoded(images[number % 10].rotate(number), extension), random)
            (folder / kind / f"{number}.{extension.lower()}").write_bytes(content)
    rows = run_on_folder(project, folder, prefect)
    assert len(rows) == 200
    for file, row in rows.items():
        reason = "" if row["reason"].startswith(("duplicate of ", "same image in two classes")) else row["reason"]
        assert bool(row["split"]) == (row["reason"] == "")
        assert reason in (read_fault(folder / file), "")
        assert read_fault(folder / file) == "" or row["reason"]
    skipped = sum(row["split"] is None for row in rows.values())
    assert 50 < skipped < 175  # otherwise the test is not representative
