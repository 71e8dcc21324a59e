"""The tasks of the pipeline, called as functions, and its command line."""

import json
import sys

import ml_workflow
from ml_workflow import download_data, preprocess_data
from support.features import make_images
from workflow.data.source import describe_source
from workflow.errors import WorkflowError
from workflow.model.head import fit_head
from workflow.records import Evidence

import mlflow
import numpy as np
import pytest
from prefect.logging import disable_run_logger


@pytest.fixture
def here(tmp_path, tracking_uri, monkeypatch):
    """An empty folder for data and tracking, without a run logger, so that tasks can be called as functions."""
    monkeypatch.setattr(ml_workflow, "DATASET", tmp_path / "dataset")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("test", (tmp_path / "mlartifacts").as_uri()))
    with disable_run_logger():
        yield tmp_path
    mlflow.end_run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0'"),
        (["--epochs", "2.5"], "argument --epochs: '2.5'"),
        (["--batch-size", "-1"], "argument --batch-size: '-1'"),
        (["--learning-rate", "nan"], "argument --learning-rate: 'nan'"),
        (["--learning-rate", "0"], "argument --learning-rate: '0'"),
        (["--seed", "-1"], "argument --seed: '-1'"),
        (["--seed", str(2**32)], "argument --seed"),
        (["--epoch-count", "3"], "unrecognized arguments: --epoch-count 3"),
        (["--only_new", "true"], "unrecognized arguments: --only_new true"),
        (["--backbone", "mobilenet"], "argument --backbone: 'mobilenet'"),
        (["--cron", "0 6 * * 1"], "--cron requires --serve"),
        (["--serve", "--cron", "0 6 * *"], "argument --cron: '0 6 * *'"),
        (["--serve", "--cron", ""], "argument --cron: ''"),
    ],
)
def test_misuse_exits_with_status_2_and_a_one_line_error(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ml_workflow.py", *arguments])
    with pytest.raises(SystemExit) as end:
        ml_workflow.main()
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("ml_workflow.py: ")
    assert message in error


def test_download_fetches_only_missing_and_broken_files(here, image_server, photos):
    folder = here / "images"
    download_data.fn(image_server.url, folder)
    downloaded = {name for _, name in image_server.requests}
    assert downloaded == set(ml_workflow.FILES)
    assert all((folder / name).read_bytes() == (photos / name).read_bytes() for name in ml_workflow.FILES)

    (folder / "apples/apple-3.jpeg").unlink()
    (folder / "oranges/orange-9.jpeg").write_bytes((photos / "oranges/orange-9.jpeg").read_bytes()[:3000])
    image_server.requests.clear()
    download_data.fn(image_server.url, folder)
    assert sorted(name for _, name in image_server.requests) == ["apples/apple-3.jpeg", "oranges/orange-9.jpeg"]


def test_unreachable_source_has_no_fallback(here, unused_port):
    with pytest.raises(WorkflowError, match=r"http://127\.0\.0\.1:\d+/apples/apple-1.jpeg is unreachable"):
        download_data.fn(f"http://127.0.0.1:{unused_port}", here / "images")
    assert not (here / "images").exists()


def test_sample_images_are_used_until_the_default_source_is_back(here, image_server, unused_port, monkeypatch):
    folder = here / "images"
    monkeypatch.setattr(ml_workflow, "SOURCE", f"http://127.0.0.1:{unused_port}")
    download_data.fn(ml_workflow.SOURCE, folder)
    sample_files = {path.relative_to(ml_workflow.SAMPLES) for path in ml_workflow.SAMPLES.glob("*/*.jpeg")}
    assert {path.relative_to(folder) for path in folder.glob("*/*")} == sample_files
    assert describe_source(ml_workflow.SOURCE, folder, ml_workflow.SAMPLES).startswith(
        "sample_images, because 127.0.0.1"
    )

    monkeypatch.setattr(ml_workflow, "SOURCE", image_server.url)
    download_data.fn(ml_workflow.SOURCE, folder)
    assert {path.relative_to(folder).as_posix() for path in folder.glob("*/*")} == set(ml_workflow.FILES)
    assert describe_source(image_server.url, folder, ml_workflow.SAMPLES) == image_server.url


def test_sample_images_are_used_when_the_lab_folder_has_moved(here, image_server, monkeypatch):
    monkeypatch.setattr(ml_workflow, "SOURCE", f"{image_server.url}/moved")
    image_server.faults["apples/apple-1.jpeg"] = ["404"]
    download_data.fn(ml_workflow.SOURCE, here / "images")
    assert describe_source(ml_workflow.SOURCE, here / "images", ml_workflow.SAMPLES).startswith("sample_images")


def test_sample_images_are_never_mixed_with_downloaded_photos(here, photos, unused_port, monkeypatch):
    monkeypatch.setattr(ml_workflow, "SOURCE", f"http://127.0.0.1:{unused_port}")
    (here / "images/apples").mkdir(parents=True)
    (here / "images/apples/apple-1.jpeg").write_bytes((photos / "apples/apple-1.jpeg").read_bytes())
    with pytest.raises(WorkflowError, match="is unreachable"):
        download_data.fn(ml_workflow.SOURCE, here / "images")
    assert [path.name for path in (here / "images").glob("*/*")] == ["apple-1.jpeg"]


@pytest.mark.parametrize(
    ("backbone", "shape", "kind"), [("efficientnet-lite0", (1280,), np.float32), ("none", (64, 64, 3), np.uint8)]
)
def test_datasets_contain_every_image_once_with_its_label(here, photos, backbone, shape, kind):
    datasets = preprocess_data.fn(photos, batch_size=4, backbone=backbone)
    files = [file for dataset in datasets for file in dataset.file_names]
    assert sorted(files) == sorted(ml_workflow.FILES)
    for dataset in datasets:
        batches = list(dataset)
        assert all(inputs.shape[1:] == shape and inputs.dtype == kind for inputs, _ in batches)
        assert max(len(labels) for _, labels in batches) <= 4
        assert dataset.class_names == ["apples", "oranges"]
    test = datasets[2]
    labels = np.concatenate([labels for _, labels in test])
    assert [test.class_names[label] for label in labels] == [file.split("/")[0] for file in test.file_names]


@pytest.mark.parametrize("backbone", ml_workflow.BACKBONES)
def test_training_order_depends_on_epoch_and_seed(here, photos, backbone):
    def order(seed):
        train, _, _ = preprocess_data.fn(photos, batch_size=2, seed=seed, backbone=backbone)
        return [[inputs.sum() for inputs, _ in train] for _ in range(2)]

    first = order(1)
    assert first[0] != first[1]
    assert first == order(1)
    assert first != order(2)


HEAD = {"epochs": 4, "batch_size": 4, "learning_rate": 0.03, "seed": 3}


def test_final_head_is_trained_on_all_images(tmp_path):
    images = make_images([[2, 1, 1, 1], [1] * 5], spread=6)
    head, temperature = ml_workflow.refit_head(images, tmp_path, dropout=0.1, **HEAD)
    alike = fit_head(images.features, images.labels, dropout=0.1, **HEAD)
    fewer = fit_head(images.features[1:], images.labels[1:], dropout=0.1, **HEAD)
    assert np.allclose(head.get_weights()[0], alike.get_weights()[0], atol=1e-6)
    assert not np.allclose(head.get_weights()[0], fewer.get_weights()[0], atol=1e-4)
    assert Evidence.read(tmp_path / "cross_validation.json").temperature == temperature
    with np.load(tmp_path / "reference_embeddings.npz") as saved:
        assert saved["files"].tolist() == images.files
        assert np.isfinite(saved["max_novelty"])


def test_head_of_unevaluated_classes_has_no_temperature(tmp_path):
    images = make_images([[4], [3]])
    head, temperature = ml_workflow.refit_head(images, tmp_path, dropout=0.1, **HEAD)
    assert (head(images.features).numpy().argmax(axis=1) == images.labels).all()
    assert temperature == 1
    assert Evidence.read(tmp_path / "cross_validation.json").unevaluated == ["a", "b"]
    with np.load(tmp_path / "reference_embeddings.npz") as saved:
        assert np.isnan(saved["max_novelty"])


def test_run_with_too_small_a_class_still_logs_the_data_set(here, photos):
    (here / "source/apples").mkdir(parents=True)
    (here / "source/oranges").mkdir()
    (here / "source/apples/a.jpeg").write_text("broken")
    (here / "source/oranges/o.jpeg").write_bytes((photos / "oranges/orange-1.jpeg").read_bytes())
    with mlflow.start_run() as run:
        for _ in range(2):  # as in an orchestrator that preprocesses in several steps
            with pytest.raises(WorkflowError, match="class apples"):
                preprocess_data.fn(here / "source")
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/images.json"))
    assert [row[table["columns"].index("file")] for row in table["data"]] == ["apples/a.jpeg", "oranges/o.jpeg"]
    assert len(mlflow.get_run(run.info.run_id).data.params["data_digest"]) == 64


def test_unusual_file_names_are_used_as_names_only(here, photos):
    names = ["-rf", "a b", "é 🍎", "new\nline", "$(touch x)", "..jpeg..", "%2e%2e", "'quote\"", "x" * 200]
    for kind in ("apples", "oranges"):
        (here / "mine" / kind).mkdir(parents=True)
        for number, name in enumerate(names, 1):
            source = photos / kind / f"{kind[:-1]}-{number}.jpeg"
            (here / "mine" / kind / name).write_bytes(source.read_bytes())
    datasets = preprocess_data.fn(here / "mine")
    used = {name for dataset in datasets for name in dataset.file_names}
    assert used == {f"{kind}/{name}" for kind in ("apples", "oranges") for name in names if not name.startswith(".")}
    assert {path.name for path in here.iterdir()} == {"dataset", "mine", "mlflow.db", "mlartifacts"}


def test_download_replaces_a_link_and_keeps_its_target(here, image_server, photos):
    outside = here / "outside.jpeg"
    outside.write_text("precious")
    (here / "images/apples").mkdir(parents=True)
    (here / "images/apples/apple-1.jpeg").symlink_to(outside)
    download_data.fn(image_server.url, here / "images")
    assert outside.read_text() == "precious"
    assert (here / "images/apples/apple-1.jpeg").read_bytes() == (photos / "apples/apple-1.jpeg").read_bytes()
