"""The store of features: each image is described once, whatever happens, by this machine or by Dask workers."""

import json
import shutil
import signal
from pathlib import Path

from support.exif import phone
from support.project import Project, dask_cluster, runs_of, weights
from workflow.data import exif, features
from workflow.data.exif import Capture
from workflow.data.folder import digest_files, mark_duplicates
from workflow.errors import WorkflowError
from workflow.model import backbone, backbone_weights
from workflow.orchestration import cluster
from workflow.records import Evaluation, digest_images

import numpy as np
import pytest
from PIL import Image


def load(folder: Path, into: Path, dask: str | None = None, progress=lambda *_: None):
    images = digest_files(folder, into)
    return features.load_features(mark_duplicates(images), folder, into, dask, progress)


@pytest.fixture
def described(monkeypatch) -> list[str]:
    """The digests of all images that are described from now on."""
    digests, describe = [], backbone.compute_items

    def record(items):
        digests.extend(digest for digest, _ in items)
        return describe(items)

    monkeypatch.setattr(backbone, "compute_items", record)
    return digests


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def are_alike(found: features.FeatureTable, known: features.FeatureTable, tolerance: float = 0) -> bool:
    """Whether all features, thumbnails and captures are the same."""
    return (found.rows.keys(), found.captures) == (known.rows.keys(), known.captures) and all(
        np.allclose(found.features[found.rows[digest]], known.features[row], rtol=0, atol=tolerance)
        and np.array_equal(found.thumbnails[found.rows[digest]], known.thumbnails[row])
        for digest, row in known.rows.items()
    )


def test_each_image_is_described_once_also_in_a_folder_that_has_grown(folder, tmp_path, described):
    first = load(folder, tmp_path / "data")
    assert len(described) == len(set(described)) == 20
    again = load(folder, tmp_path / "data")
    assert again[0] == first[0]
    assert are_alike(again[1], first[1])
    shutil.copy(folder / "apples/apple-1.jpeg", folder / "apples/copy.jpeg")
    (folder / "apples/broken.jpeg").write_bytes(b"text")
    images, found = load(folder, tmp_path / "data")
    load(folder, tmp_path / "data")
    assert len(described) == 21
    reasons = {image.file: image.reason for image in images if image.reason}
    assert reasons == {
        "apples/copy.jpeg": "duplicate of apples/apple-1.jpeg",
        "apples/broken.jpeg": "not an image: unknown format",
    }
    assert found.rows.keys() == {image.digest for image in images if image.file != "apples/broken.jpeg"}


def test_camera_and_time_are_read_once_and_kept(folder, tmp_path, described):
    for minute in range(3):
        path = folder / f"apples/apple-{minute + 1}.jpeg"
        image = Image.open(path)
        image.save(path, exif=phone(f"2024:05:01 14:0{minute}:00"))
    images, table = load(folder, tmp_path / "data")
    by_file = {image.file: table.captures[image.digest] for image in images}
    first = exif.parse_time("2024:05:01 14:00:00")
    assert [by_file[f"apples/apple-{n}.jpeg"] for n in (1, 2, 3, 4)] == [
        *(Capture("Apple iPhone 12", first + 60 * minute) for minute in range(3)),
        Capture("", exif.NO_TIME),
    ]
    assert load(folder, tmp_path / "data")[1].captures == table.captures
    assert len(described) == 20


def test_near_duplicates_follow_the_same_image_in_each_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 6)
    first, again = (load(folder, tmp_path / "data")[1] for _ in range(2))
    assert {digest: first.since[row] for digest, row in first.rows.items()} == {
        digest: again.since[row] for digest, row in again.rows.items()
    }
    assert len(set(first.since)) == 4  # of the chunks, in their order


@pytest.mark.survived("features: killed while they are computed")
def test_what_was_described_before_the_end_of_a_process_is_kept(folder, tmp_path, described, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 6)

    def die(done, total):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "data", progress=die)
    before = len(described)
    assert 12 <= before < 20
    told = []
    load(folder, tmp_path / "data", progress=lambda *now: told.append(now))
    assert described[before:]
    assert sorted(set(described)) == sorted({image.digest for image in digest_files(folder, tmp_path)})
    assert told == [(6, 8)]
    assert not [path for path in (tmp_path / "data").rglob("*.part")]


@pytest.mark.survived("features: a file of the store is cut, or is something else")
@pytest.mark.parametrize("damage", [lambda body: body[:1000], lambda body: b"", lambda body: b"x" * 5000])
def test_damaged_store_is_described_anew_without_a_word(folder, tmp_path, described, capsys, damage):
    _, first = load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    file.write_bytes(damage(file.read_bytes()))
    _, again = load(folder, tmp_path / "data")
    assert len(described) == 40
    assert are_alike(again, first)
    assert capsys.readouterr() == ("", "")


@pytest.mark.survived("features: a bit of the store has changed")
def test_changed_bit_of_the_store_is_noticed(folder, tmp_path, described):
    load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    load(folder, tmp_path / "data")
    assert len(described) == 40


@pytest.mark.survived("features: any bit of what a file of the store lists has changed")
def test_no_changed_bit_of_the_list_in_a_file_stops_a_run(folder, tmp_path, described):
    images, _ = load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    body, wanted = file.read_bytes(), [image.digest for image in images]
    for place in range(body.rindex(b"digests.npy") - 46, len(body)):
        file.write_bytes(body[:place] + bytes([body[place] ^ 1 << place % 8]) + body[place + 1 :])
        found = features.FeatureTable.reserve(len(images))
        features.read_store(file.parent, wanted, found)
        assert len(found.rows) in (0, 20)


@pytest.mark.survived("features: a file of the store has arrays of other shapes or types, or lacks one")
@pytest.mark.parametrize("name", ["features", "thumbnails", "reasons", "cameras", "times", "since"])
def test_store_with_other_arrays_is_described_anew(folder, tmp_path, described, name):
    load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    with np.load(file) as saved:
        arrays = dict(saved)
    others = [np.repeat(arrays[name], 2), arrays[name].astype("S")] if name != "since" else [np.array([1, 2])]
    lacking = {other: array for other, array in arrays.items() if other != name}
    for content in (*(arrays | {name: other} for other in others), lacking):
        np.savez(file, **content)
        found = features.FeatureTable.reserve(20)
        features.read_store(file.parent, list(arrays["digests"]), found)
        assert (found.rows, found.reasons) == ({}, {})
        assert not file.exists()


def test_another_backbone_or_way_of_reading_has_a_store_of_its_own(folder, tmp_path, described, monkeypatch):
    load(folder, tmp_path / "data")
    monkeypatch.setattr(backbone_weights, "DIGEST", "0" * 64)
    load(folder, tmp_path / "data")
    assert len(described) == 40
    assert len(list((tmp_path / "data").glob("features-*"))) == 2


@pytest.mark.survived("features: photos cannot be read for a moment: the next run takes the data for other data")
def test_fault_of_the_file_system_is_told_and_not_remembered(folder, tmp_path, described):
    path = folder / "apples/apple-1.jpeg"
    content = path.read_bytes()
    whole = images = digest_files(folder, tmp_path / "data")
    path.unlink()
    (folder / "apples/apple-2.jpeg").write_bytes((folder / "apples/apple-3.jpeg").read_bytes())
    images, _ = features.load_features(images, folder, tmp_path / "data", None, lambda *_: None)
    assert {image.file: image.reason for image in images if image.reason} == {
        "apples/apple-1.jpeg": "No such file or directory",
        "apples/apple-2.jpeg": "its content has changed since this run began",
    }
    assert digest_images(images) != digest_images(whole)
    path.write_bytes(content)
    images, _ = load(folder, tmp_path / "data")
    assert {image.file for image in images if image.reason} == {"apples/apple-3.jpeg"}  # a duplicate by now


@pytest.mark.refused("features: no Dask scheduler at the address")
def test_missing_dask_cluster_ends_in_one_line(folder, tmp_path, unused_port, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(WorkflowError, match=r"no Dask scheduler answers at .*start `dask scheduler`"):
        load(folder, tmp_path / "data", f"tcp://127.0.0.1:{unused_port}")


@pytest.mark.slow
@pytest.mark.survived("features: kill -9 of one of two Dask workers")
@pytest.mark.parametrize("elsewhere", [True, False])
def test_dask_workers_describe_all_images_though_one_dies(project, folder, tmp_path, monkeypatch, elsewhere):
    monkeypatch.setattr(features, "CHUNK", 2)
    if elsewhere:  # the workers do not see the files, so that these have to travel
        monkeypatch.setattr(features, "can_see", lambda *_: False)
    expected = load(folder, tmp_path / "alone")
    told = []
    (tmp_path / "workers").mkdir()
    with dask_cluster(project, tmp_path / "workers") as (address, workers):

        def kill(done, total):
            told.append(done)
            if len(told) == 2:
                workers[0].send_signal(signal.SIGKILL)

        images, found = load(folder, tmp_path / "data", address, kill)
    assert images == expected[0]
    assert are_alike(found, expected[1], tolerance=1e-4)
    assert told == list(range(2, 20, 2))


@pytest.mark.slow
def test_run_with_dask_is_an_ordinary_run(project, photos, prefect, tmp_path):
    with dask_cluster(project, tmp_path) as (address, _):
        end = project.run("--source", str(photos), "--dask", address, **prefect)
    assert end.returncode == 0, end.stderr
    assert "was promoted to champion" in end.stdout
    (run,) = runs_of(project)
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_champion_of_another_network_is_judged_and_asked_as_it_was_logged(tmp_path, photos, prefect):
    project = Project(tmp_path)
    for arguments in (["--backbone", "none", "--epochs", "60"], [], ["--backbone", "none"]):
        end = project.run("--source", str(photos), *arguments, **prefect)
        assert end.returncode == 0, end.stderr
    small, large, last = runs_of(project)
    assert [run.data.params["backbone"] for run in (small, large, last)] == ["none", backbone.NAME, "none"]
    champion = {"1": small, "2": large}

    def evaluation_of(run) -> Evaluation:
        return Evaluation.read(project.folder / "models" / run.info.run_id / "evaluation.json")

    project.before = "from workflow.model import image_classifier; image_classifier.read_image = None"  # not asked
    for run in (large, last):
        results = evaluation_of(run).champion
        own = evaluation_of(champion[results.version]).candidate
        assert results.loss == pytest.approx(own.loss, abs=1e-6)
        files = [str(photos / one.file) for one in own.predictions]
        version = f"models:/apples-oranges/{results.version}"
        end = project.run(*files, "--json", "--model", version, script="predict.py")
        for answer, one in zip(json.loads(end.stdout), results.predictions, strict=True):
            assert answer["probability"] == pytest.approx(one.probability, abs=1e-6)
            assert answer["label"] == one.predicted
    assert weights(project, small) != weights(project, last)
