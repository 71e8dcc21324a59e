"""The photos of a run, from the evaluation.json of any version of this project."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.evaluation.metrics import summarize
from workflow.files import sha256
from workflow.records import DataVersion, Evaluation, ImageFile, Prediction
from workflow.serving.registered_model import find_champions, load, read_data
from workflow.tracking.connection import connect_mlflow
from workflow.tracking.registry import check_champion

import mlflow
import pytest

RESULTS = {  # as stored by version 1
    "loss": 0.1,
    "accuracy": 1.0,
    "recall": {"a": 1.0},
    "predictions": [
        {"file": "a/1.jpeg", "class_name": "a", "predicted": "a", "probability": 0.9, "probabilities": {"a": 0.9}}
    ],
    "version": None,
    "drawn": False,
}


def log_evaluation(folder, content: dict) -> str:
    """Return the id of a run with this evaluation.json."""
    experiment = mlflow.create_experiment("photos", (folder / "artifacts").as_uri())
    (folder / "evaluation.json").write_text(json.dumps(content))
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_artifact(str(folder / "evaluation.json"))
    return run.info.run_id


@pytest.mark.parametrize("version", [1, 2])
def test_photos_of_a_run_of_any_version_are_found(tmp_path, tracking_uri, version):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpeg").write_bytes(b"a photo")
    data = DataVersion("", str(tmp_path), [ImageFile("a/1.jpeg", "a", sha256(b"a photo"), split="test")])
    predictions = [Prediction("a/1.jpeg", "a", "a", 0.9, {"a": 0.9})]
    content = asdict(Evaluation(summarize(predictions), predictions, None, data, []))
    if version == 1:
        old = {name: content["data"][name] for name in ("source", "folder", "files", "duplicate_of")}
        old |= {"findings": [], "drawn": False}
        content = {"candidate": RESULTS, "champion": RESULTS | {"version": "1"}, "data": old, "findings": []}
    photos = read_data(log_evaluation(tmp_path, content))
    assert photos.by_file.keys() == {"a/1.jpeg"}
    assert photos.read("a/1.jpeg") == b"a photo"
    (tmp_path / "a/1.jpeg").write_bytes(b"another photo")
    for file in ("../evaluation.json", "a/1.jpeg"):
        with pytest.raises(OSError, match=r"not an image|has changed"):
            photos.read(file)


def test_run_without_a_usable_evaluation_has_no_photos(tmp_path, tracking_uri):
    assert read_data(log_evaluation(tmp_path, {"findings": []})).files == []
    assert read_data("none").files == []


@pytest.fixture
def copied_store(trained, tmp_path, monkeypatch) -> Path:
    """A copy of a project with a champion, as the current tracking store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = shutil.copytree(trained.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("prefect_home", "home"))
    connect_mlflow("http://127.0.0.1:9", store)
    return store


@pytest.mark.survived("MLflow: the champion was copied to another name, and the original was deleted")
def test_copied_version_is_a_champion_of_its_own(copied_store):
    client = mlflow.MlflowClient()
    copied = client.copy_model_version("models:/apples-oranges/1", "production")
    client.set_registered_model_alias("production", "champion", copied.version)
    client.delete_registered_model("apples-oranges")
    assert find_champions() == ["models:/production@champion"]
    registered = load("models:/production@champion")
    assert (registered.runtime, registered.class_names) == ("LiteRT", ["apples", "oranges"])
    check_champion(["apples", "oranges"], "production")


@pytest.mark.refused("MLflow: the registered model was deleted")
def test_deleted_registered_model_is_reported(copied_store):
    mlflow.MlflowClient().delete_registered_model("apples-oranges")
    with pytest.raises(WorkflowError, match=r"ml_workflow\.py"):
        find_champions()
    with pytest.raises(WorkflowError, match="apples-oranges"):
        load("models:/apples-oranges@champion")
    check_champion(["apples", "oranges"])  # the next version will be the first one


@pytest.mark.slow
@pytest.mark.refused("MLflow: the champion's logged model was deleted, and then its files by mlflow gc")
def test_deleted_logged_model_is_reported_with_a_remedy(copied_store):
    client = mlflow.MlflowClient()
    model = load("models:/apples-oranges@champion", "Keras")
    client.delete_logged_model(model.model_id)
    gc = "gc", "--backend-store-uri", mlflow.get_tracking_uri(), "--tracking-uri", mlflow.get_tracking_uri()
    subprocess.run([sys.executable, "-m", "mlflow", *gc], check=True, cwd=copied_store, capture_output=True)
    with pytest.raises(WorkflowError, match="models:/apples-oranges"):
        load("models:/apples-oranges@champion")
    with pytest.raises(WorkflowError, match="delete_registered_model_alias"):
        check_champion(["apples", "oranges"])
