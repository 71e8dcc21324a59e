"""The feature cache: each image is computed once, whatever happens, by this machine or by Dask workers."""

import io
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

from support.exif import phone
from support.project import Project, artifact, dask_cluster, runs_of
from workflow.data import exif, features
from workflow.data.exif import Capture
from workflow.data.features import FeatureRow
from workflow.data.folder import digest_files, mark_duplicates
from workflow.errors import WorkflowError
from workflow.image_classifier import READING_VERSION
from workflow.model import backbone, backbone_weights
from workflow.orchestration import cluster
from workflow.records import Evaluation, digest_images

import numpy as np
import pytest
from PIL import Image

# What the current versions compute for make_photo(). After an intended change, increase the version constant beside the
# changed code, and replace this entry with the values that the failing test prints.
VERSIONS = READING_VERSION, exif.VERSION, backbone.FEATURES_VERSION, features.VERSION
EXPECTED = {
    (2, 2, 1, 3): {
        "pixels": [21, 4, 0, 45, 15, 0, 69, 25, 0, 50, 15, 0, 74, 52, 255, 98, 89, 255, 80, 25, 0, 104, 89, 255, 128],
        "features": [0, 0, 0, 0.2495, 0.0081, 0, 0.0594, 0.0196, 0.1257, 0.0941, 0.3329, 0.0011],
        "thumbnail": [0, 7, 14, 20, 8, 21, 120, 48, 17, 60, 141, 75, 25, 51, 162, 102],
        "capture": ("Apple iPhone 12", 1714572180),
    }
}


def make_photo() -> bytes:
    """Return a PNG file with gradients, a disk and EXIF data."""
    y, x = np.mgrid[:300, :400]
    disk = 255 * ((x - 200) ** 2 + (y - 150) ** 2 < 9000)
    pixels = np.stack([(y // 3 + x // 5) % 256, x * y // 400 % 256, disk], axis=-1).astype("uint8")
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", exif=phone().tobytes())
    return content.getvalue()


def test_features_change_only_with_their_versions():
    content = make_photo()
    digest = features.sha256(content)
    row = features.compute_chunk([(digest, content)], 0)[digest]
    pixels, _ = features.decode(digest, content, backbone.IMAGE_SIZE)
    actual = {
        "pixels": pixels[40::100, 40::100].ravel()[:25].tolist(),
        "features": row.features[::107].tolist(),
        "thumbnail": row.thumbnail[::12, ::12].ravel().tolist(),
        "capture": tuple(row.capture),
    }
    print(VERSIONS, actual)
    expected = EXPECTED[VERSIONS]
    assert actual["pixels"] == pytest.approx(expected["pixels"], abs=1)
    assert actual["features"] == pytest.approx(expected["features"], abs=1e-3)
    assert actual["thumbnail"] == pytest.approx(expected["thumbnail"], abs=1)
    assert actual["capture"] == expected["capture"]


def load(folder: Path, cache: Path, dask: str | None = None, progress=lambda *_: None):
    images = digest_files(folder, cache)
    return features.load_features(mark_duplicates(images), folder, cache, cluster.workers(dask), progress)


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The digests of images whose features are computed during the test."""
    digests, compute_chunk = [], features.compute_chunk

    def record(items, since):
        digests.extend(digest for digest, _ in items)
        return compute_chunk(items, since)

    monkeypatch.setattr(features, "compute_chunk", record)
    return digests


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def are_equal(rows: dict[str, FeatureRow], expected: dict[str, FeatureRow], tolerance: float = 0) -> bool:
    """Return whether all features, thumbnails and captures are the same."""
    return rows.keys() == expected.keys() and all(
        np.allclose(rows[digest].features, row.features, rtol=0, atol=tolerance)
        and np.array_equal(rows[digest].thumbnail, row.thumbnail)
        and rows[digest].capture == row.capture
        for digest, row in expected.items()
    )


def test_each_image_is_computed_once(folder, tmp_path, computed):
    first = load(folder, tmp_path / "data")
    assert len(computed) == len(set(computed)) == 20
    again = load(folder, tmp_path / "data")
    assert again[0] == first[0]
    assert are_equal(again[1], first[1])
    shutil.copy(folder / "apples/apple-1.jpeg", folder / "apples/copy.jpeg")
    (folder / "apples/broken.jpeg").write_bytes(b"text")
    (folder / "apples/broken too.jpeg").write_bytes(b"text")
    images, rows = load(folder, tmp_path / "data")
    load(folder, tmp_path / "data")
    assert len(computed) == 22  # unusable images are not cached
    reasons = {image.file: image.reason for image in images if image.reason}
    assert reasons == {
        "apples/copy.jpeg": "duplicate of apples/apple-1.jpeg",
        "apples/broken too.jpeg": "not an image: unknown format",
        "apples/broken.jpeg": "duplicate of apples/broken too.jpeg",
    }
    assert rows.keys() == {image.digest for image in images if "broken" not in image.file}


def test_camera_and_time_are_read_once_and_kept(folder, tmp_path, computed):
    for minute in range(3):
        path = folder / f"apples/apple-{minute + 1}.jpeg"
        image = Image.open(path)
        image.save(path, exif=phone(f"2024:05:01 14:0{minute}:00"))
    images, rows = load(folder, tmp_path / "data")
    by_file = {image.file: rows[image.digest].capture for image in images}
    first = exif.parse_time("2024:05:01 14:00:00")
    assert [by_file[f"apples/apple-{n}.jpeg"] for n in (1, 2, 3, 4)] == [
        *(Capture("Apple iPhone 12", first + 60 * minute) for minute in range(3)),
        Capture("", exif.NO_TIME),
    ]
    assert are_equal(load(folder, tmp_path / "data")[1], rows)
    assert len(computed) == 20


def test_near_duplicates_follow_the_same_image_in_each_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_CHUNK_IMAGES", 6)
    first, again = (load(folder, tmp_path / "data")[1] for _ in range(2))
    times = {digest: row.since for digest, row in first.items()}
    assert times == {digest: row.since for digest, row in again.items()}
    assert len(set(times.values())) == 4  # chunks


@pytest.mark.survived("features: killed while they are computed")
def test_killed_process_keeps_its_finished_chunks(folder, tmp_path, computed, monkeypatch):
    monkeypatch.setattr(features, "MAX_CHUNK_IMAGES", 6)

    def die(done, total):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "data", progress=die)
    before = len(computed)
    assert 12 <= before < 20
    calls = []
    load(folder, tmp_path / "data", progress=lambda *numbers: calls.append(numbers))
    assert computed[before:]
    assert sorted(set(computed)) == sorted({image.digest for image in digest_files(folder, tmp_path)})
    assert calls == [(6, 8)]
    assert not [path for path in (tmp_path / "data").rglob("*.part")]


@pytest.mark.survived("features: a cache file is truncated, or is not a cache file")
@pytest.mark.parametrize("damage", [lambda body: body[:1000], lambda body: b"", lambda body: b"x" * 5000])
def test_damaged_cache_is_recomputed_silently(folder, tmp_path, computed, capsys, damage):
    _, first = load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    file.write_bytes(damage(file.read_bytes()))
    _, again = load(folder, tmp_path / "data")
    assert len(computed) == 40
    assert are_equal(again, first)
    assert capsys.readouterr() == ("", "")


@pytest.mark.survived("features: a bit of the cache has changed")
def test_changed_bit_of_the_cache_is_detected(folder, tmp_path, computed):
    load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    load(folder, tmp_path / "data")
    assert len(computed) == 40


@pytest.mark.survived("features: any bit of the zip directory of a cache file has changed")
def test_no_changed_bit_of_the_zip_directory_stops_a_run(folder, tmp_path, computed):
    images, _ = load(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("features-*/*.npz")
    body, wanted = file.read_bytes(), [image.digest for image in images]
    for place in range(body.rindex(b"digests.npy") - 46, len(body)):
        file.write_bytes(body[:place] + bytes([body[place] ^ 1 << place % 8]) + body[place + 1 :])
        assert len(features.read_store(file.parent, wanted)) in (0, 20)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (backbone_weights, "DIGEST"),
        (backbone, "FEATURES_VERSION"),
        (exif, "VERSION"),
        (features, "VERSION"),
        (features, "READING_VERSION"),
    ],
)
def test_new_version_recomputes_all_features(folder, tmp_path, computed, monkeypatch, module, name):
    load(folder, tmp_path / "data")
    monkeypatch.setattr(module, name, 0)
    load(folder, tmp_path / "data")
    assert len(computed) == 40
    assert len(list((tmp_path / "data").glob("features-*"))) == 2


@pytest.mark.survived("features: photos are temporarily unreadable: the next run has a different data digest")
def test_temporary_fault_is_reported_and_not_cached(folder, tmp_path, computed):
    path = folder / "apples/apple-1.jpeg"
    content = path.read_bytes()
    whole = images = digest_files(folder, tmp_path / "data")
    path.unlink()
    (folder / "apples/apple-2.jpeg").write_bytes((folder / "apples/apple-3.jpeg").read_bytes())
    images, _ = features.load_features(images, folder, tmp_path / "data", cluster.workers(None), lambda *_: None)
    assert {image.file: image.reason for image in images if image.reason} == {
        "apples/apple-1.jpeg": "No such file or directory",
        "apples/apple-2.jpeg": "its content has changed since the run started",
    }
    assert digest_images(images) != digest_images(whole)
    path.write_bytes(content)
    images, _ = load(folder, tmp_path / "data")
    assert {image.file for image in images if image.reason} == {"apples/apple-3.jpeg"}  # a duplicate by now


def test_remote_workers_get_the_content_of_files(folder, tmp_path, monkeypatch):
    sources, decode = [], features.decode

    def record(digest, source, size):
        sources.append(source)
        return decode(digest, source, size)

    monkeypatch.setattr(features, "decode", record)

    @contextmanager
    def remote_workers():
        with cluster.workers(None) as local:
            yield local._replace(is_remote=True)

    images = digest_files(folder, tmp_path / "data")
    (folder / "apples/apple-1.jpeg").unlink()
    images, _ = features.load_features(images, folder, tmp_path / "data", remote_workers(), lambda *_: None)
    assert sorted({type(source) is bytes for source in sources}) == [False, True]
    assert [image.file for image in images if image.reason] == ["apples/apple-1.jpeg"]


@pytest.mark.refused("features: no Dask scheduler at the address")
def test_missing_dask_cluster_is_reported(folder, tmp_path, unused_port, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(WorkflowError, match="`dask scheduler`"):
        load(folder, tmp_path / "data", f"tcp://127.0.0.1:{unused_port}")


@pytest.mark.slow
@pytest.mark.survived("features: kill -9 of one of two Dask workers")
def test_features_are_complete_although_a_dask_worker_dies(project, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_CHUNK_IMAGES", 2)
    expected = load(folder, tmp_path / "alone")
    counts = []
    (tmp_path / "workers").mkdir()
    with dask_cluster(project, tmp_path / "workers") as (address, workers):

        def kill(done, total):
            counts.append(done)
            if len(counts) == 2:
                workers[0].send_signal(signal.SIGKILL)

        images, rows = load(folder, tmp_path / "data", address, kill)
    assert images == expected[0]
    assert are_equal(rows, expected[1], tolerance=1e-4)
    assert counts == list(range(2, 20, 2))


@pytest.mark.slow
def test_run_with_dask_is_an_ordinary_run(project, photos, prefect, tmp_path):
    with dask_cluster(project, tmp_path) as (address, _):
        end = project.run("--source", str(photos), "--dask", address, **prefect)
    assert end.returncode == 0, end.stderr
    assert "was promoted to champion" in end.stdout
    (run,) = runs_of(project)
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_champion_without_backbone_is_compared_as_logged(tmp_path, photos, prefect):
    project = Project(tmp_path)
    for arguments in (["--backbone", "none", "--epochs", "60"], []):
        end = project.run("--source", str(photos), *arguments, **prefect)
        assert end.returncode == 0, end.stderr
    small, large = runs_of(project)
    assert [run.data.params["backbone"] for run in (small, large)] == ["none", backbone.NAME]
    own, comparison = (Evaluation.read(artifact(project, run, "evaluation.json")) for run in (small, large))
    tested = {prediction.file: prediction for prediction in own.test.predictions}
    assert comparison.comparison.version == "1"
    for prediction in comparison.comparison.champion:
        assert prediction.probability == pytest.approx(tested[prediction.file].probability, abs=1e-6)
