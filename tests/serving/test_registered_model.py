"""The photos of a run, from the evaluation.json of any version of this project."""

import json
from dataclasses import asdict

from workflow.evaluation.metrics import summarize
from workflow.files import sha256
from workflow.records import DataVersion, Evaluation, ImageFile, Prediction
from workflow.serving.registered_model import read_data

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
