"""The registry: model names, known images, unusable champions and stored evidence."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

from workflow.data.features import features_key
from workflow.errors import WorkflowError
from workflow.records import Evidence, ImageFile, digest_images
from workflow.serving import registered_model
from workflow.tracking import logging
from workflow.tracking.registry import (
    CHAMPION,
    check_champion,
    find_version_trained_on,
    list_champions,
    model_name,
    read_evidence,
)

import mlflow
import pytest


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (["apples", "oranges"], "apples-oranges"),
        (["cats & dogs", "what?"], "cats _ dogs-what_-"),
        (["a-b", "c"], "a-b-c-"),
        (["a", "b-c"], "a-b-c-"),
        (["x" * 300, "y"], "x" * 60 + "-and-1-more-"),
        (
            [f"fruit number {number}" for number in range(40)],
            "fruit number 0-fruit number 1-fruit number 2-fruit number",
        ),
    ],
)
def test_model_is_named_after_its_classes(classes, name):
    assert model_name(classes).startswith(name)
    assert len(model_name(classes)) < 90
    assert model_name(classes, "chosen") == "chosen"


def test_different_classes_give_different_model_names():
    sets = [["a-b", "c"], ["a", "b-c"], ["a", "b", "c"], ["a?", "b"], ["a!", "b"], ["x" * 300, "y"], ["x" * 300, "z"]]
    sets += [[*"abc", "x" * 70], [*"abc", "y" * 70], [*"abc", "x" * 70, "z"]]
    assert len({model_name(classes) for classes in sets}) == len(sets)


def test_newest_evaluated_version_is_found_by_its_images(tmp_path, tracking_uri):
    def make_images(content: str) -> list[ImageFile]:
        return [ImageFile("", name, content) for name in "bab"]

    def find(content: str) -> str | None:
        return find_version_trained_on(make_images(content))

    assert find("1") is None
    client = mlflow.MlflowClient()
    for name in ("a-b", "a-c"):
        client.create_registered_model(name)
    client.create_model_version("a-b", str(tmp_path), tags={"data_digest": digest_images(make_images("1"))})
    assert find("1") is None  # not evaluated
    client.set_model_version_tag("a-b", "1", "gate", "a-b version 1 was not promoted")
    tags = {"data_digest": digest_images(make_images("2")), "gate": "was promoted"}
    client.create_model_version("a-c", str(tmp_path), tags=tags)
    assert (find("1"), find("2")) == ("a-b version 1", None)
    client.create_model_version("a-b", str(tmp_path), tags=tags)
    assert (find("1"), find("2")) == (None, "a-b version 2")


@pytest.mark.refused("model: the files of the champion are gone")
def test_champion_without_files_is_refused_with_a_remedy(tmp_path, databases):
    folder = tmp_path / "it's `pwd` $HOME"
    folder.mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{shutil.copy(databases / 'mlflow.db', folder)}")
    check_champion(["a", "b"])  # no champion
    client = mlflow.MlflowClient()
    client.create_registered_model("a-b")
    client.create_model_version("a-b", str(tmp_path / "gone"))
    client.set_registered_model_alias("a-b", CHAMPION, "1")
    with pytest.raises(WorkflowError, match="a-b version 1") as error:
        check_champion(["a", "b"])
    command = "python -c " + str(error.value).partition(": python -c ")[2]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    end = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    check_champion(["a", "b"])


OTHER_MODEL = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        return model_input

mlflow.models.set_model(Echo())
"""


@pytest.mark.refused("model: one file of the champion is gone")
def test_champion_without_one_file_is_refused_with_its_name(tmp_path, tracking_uri):
    for name, content in {"model.py": OTHER_MODEL, "model.keras": "no model"}.items():
        (tmp_path / name).write_text(content)
    mlflow.pyfunc.save_model(
        str(tmp_path / "champion"),
        python_model=str(tmp_path / "model.py"),
        artifacts={"model": str(tmp_path / "model.keras")},
        model_config={"class_names": ["a", "b"]},
        pip_requirements=[],
    )
    client = mlflow.MlflowClient()
    client.create_registered_model("a-b")
    client.create_model_version("a-b", str(tmp_path / "champion"))
    client.set_registered_model_alias("a-b", CHAMPION, "1")
    check_champion(["a", "b"])
    (tmp_path / "champion/artifacts/model.keras").unlink()
    with pytest.raises(WorkflowError, match=r"artifacts/model\.keras"):
        check_champion(["a", "b"])


@pytest.mark.refused("model: the champion is somebody else's model")
def test_champion_of_another_kind_is_refused(tmp_path, tracking_uri):
    (tmp_path / "other.py").write_text(OTHER_MODEL)
    mlflow.pyfunc.save_model(str(tmp_path / "other"), python_model=str(tmp_path / "other.py"), pip_requirements=[])
    client = mlflow.MlflowClient()
    client.create_registered_model("a-b")
    client.create_model_version("a-b", str(tmp_path / "other"))
    client.set_registered_model_alias("a-b", CHAMPION, "1")
    with pytest.raises(WorkflowError, match="not a model from this project"):
        check_champion(["a", "b"])
    for content in ("", "flavors: {python_function: {config: {class_names: null}}}", "a: [b"):
        (tmp_path / "other/MLmodel").write_text(content)
        with pytest.raises(WorkflowError, match="a-b version 1"):
            check_champion(["a", "b"])
        with pytest.raises(WorkflowError, match="models:/a-b/1"):
            registered_model.load("models:/a-b/1")


VERSION_1_EVIDENCE = {  # as the first release stored it
    "accuracy": 1.0,
    "loss": 0.1,
    "recall": {"A": 1.0},
    "temperature": 0.5,
    "before": {"error": 0.1, "bins": [{"probability": 0.9, "right": 1.0, "share": 1.0}]},
    "after": {"error": 0.1, "bins": []},
    "curve": [{"images_per_class": 2.0, "accuracy": 1.0, "images": 2}],
    "predictions": [
        {"file": "A", "class_name": "A", "predicted": "A", "probability": 0.9, "probabilities": {"A": 0.9, "b": 0.1}}
    ],
}


def test_evidence_of_a_run_is_read_if_this_release_can_use_it(tmp_path, tracking_uri):
    client = mlflow.MlflowClient()
    run_id = client.create_run(client.create_experiment("e", (tmp_path / "artifacts").as_uri())).info.run_id
    assert read_evidence(run_id) is None
    client.log_dict(run_id, VERSION_1_EVIDENCE, "cross_validation.json")
    assert read_evidence(run_id) is None
    evidence = Evidence(0.9, training_images={"digest": ("a", "digest")}, features_key="of other code")
    client.log_dict(run_id, asdict(evidence), "cross_validation.json")
    assert read_evidence(run_id) is None
    evidence = replace(evidence, features_key=features_key())
    client.log_dict(run_id, asdict(evidence), "cross_validation.json")
    assert read_evidence(run_id) == evidence


def test_model_of_a_run_is_the_last_one_not_deleted(tmp_path, tracking_uri):
    client = mlflow.MlflowClient()
    runs = [client.create_run("0") for _ in range(2)]
    first, second, _ = (
        client.create_logged_model("0", source_run_id=run.info.run_id) for run in (*runs[:1] * 2, runs[1])
    )
    assert logging.find_logged_model(runs[0]) == second.model_id
    client.delete_logged_model(second.model_id)
    assert logging.find_logged_model(runs[0]) == first.model_id
    client.delete_logged_model(first.model_id)
    with pytest.raises(WorkflowError, match="deleted"):
        logging.find_logged_model(runs[0])


@pytest.mark.survived("model: the newest champion was trained on synthetic images")
def test_champions_of_synthetic_images_are_listed_last(tmp_path, tracking_uri):
    client = mlflow.MlflowClient()
    for name, synthetic in (("older", False), ("photos", False), ("drawn", True), ("unpromoted", False)):
        client.create_registered_model(name)
        tags = {"gate": "was promoted", "synthetic": str(synthetic)}
        client.create_model_version(name, str(tmp_path), tags=tags)
        if name != "unpromoted":
            client.set_registered_model_alias(name, CHAMPION, "1")
    assert list_champions() == [f"models:/{name}@champion" for name in ("photos", "older", "drawn")]
    client.create_model_version("older", str(tmp_path), tags={"gate": "was not promoted", "synthetic": "True"})
    assert list_champions() == [f"models:/{name}@champion" for name in ("older", "photos", "drawn")]  # by newest run
