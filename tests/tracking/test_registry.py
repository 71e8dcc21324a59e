"""The registered models: other classes have another model, and known images are recognised."""

import shlex
import shutil
import subprocess
import sys

from workflow.errors import WorkflowError
from workflow.records import ImageFile, digest_images, metric_name
from workflow.serving import registered_model
from workflow.tracking import logging
from workflow.tracking.registry import check_champion, describe_newest_version, model_name

import mlflow
import pytest


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (["apples", "oranges"], "apples-oranges"),
        (["cats & dogs", "what?"], "cats _ dogs-what_-"),
        (["a-b", "c"], "a-b-c-"),
        (["a", "b-c"], "a-b-c-"),
        (["x" * 300, "y"], "x" * 200 + "-"),
    ],
)
def test_model_is_named_after_its_classes(classes, name):
    assert model_name(classes).startswith(name)


def test_other_classes_give_another_model_name():
    sets = [["a-b", "c"], ["a", "b-c"], ["a", "b", "c"], ["a?", "b"], ["a!", "b"], ["x" * 300, "y"], ["x" * 300, "z"]]
    assert len({model_name(classes) for classes in sets}) == len(sets)


def test_images_are_known_when_the_newest_version_has_them_all(tmp_path, tracking_uri):
    def images(content: str) -> list[ImageFile]:
        return [ImageFile("", name, content) for name in "bab"]

    def known(content: str) -> str | None:
        return describe_newest_version(images(content))

    assert known("1") is None
    client = mlflow.MlflowClient()
    for name in ("a-b", "a-c"):
        client.create_registered_model(name)
    client.create_model_version("a-b", str(tmp_path), tags={"data_digest": digest_images(images("1"))})
    assert known("1") is None  # its run died before the gate
    client.set_model_version_tag("a-b", "1", "gate", "a-b version 1 was not promoted")
    other = {"data_digest": digest_images(images("2")), "gate": "was promoted"}
    client.create_model_version("a-c", str(tmp_path), tags=other)
    assert (known("1"), known("2")) == ("a-b version 1", None)
    client.create_model_version("a-b", str(tmp_path), tags=other)
    assert (known("1"), known("2")) == (None, "a-b version 2")


def test_other_classes_give_other_metrics_that_mlflow_takes():
    classes = ["a", "c+", "c#", "a|b|c", "a:b:c", "x" * 240, "x" * 241, "a/b"]
    names = [metric_name(name) for name in classes]
    assert names[0] == "a"
    assert len(set(names)) == len(classes)
    assert all(len(f"test_recall_{name}") <= 250 for name in names)


@pytest.mark.refused("model: the files of the champion are gone")
def test_champion_without_files_is_told_with_the_remedy(tmp_path, empty_database):
    folder = tmp_path / "it's `pwd` $HOME"
    folder.mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{shutil.copy(empty_database, folder)}")
    check_champion(["a", "b"], "champion")  # there is none
    client = mlflow.MlflowClient()
    client.create_registered_model("a-b")
    client.create_model_version("a-b", str(tmp_path / "gone"))
    client.set_registered_model_alias("a-b", "champion", "1")
    with pytest.raises(WorkflowError, match=r"a-b version 1, the champion, cannot be used") as told:
        check_champion(["a", "b"], "champion")
    command = str(told.value).partition("go on without it: ")[2]
    assert command.startswith("python -c ")
    command = command.replace("python", shlex.quote(sys.executable), 1)
    end = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    check_champion(["a", "b"], "champion")


OTHER_MODEL = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        return model_input

mlflow.models.set_model(Echo())
"""


@pytest.mark.refused("model: one file of the champion is gone")
def test_champion_without_one_file_is_told_with_its_name(tmp_path, tracking_uri):
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
    client.set_registered_model_alias("a-b", "champion", "1")
    check_champion(["a", "b"], "champion")
    (tmp_path / "champion/artifacts/model.keras").unlink()
    with pytest.raises(
        WorkflowError, match=r"cannot be used \(artifacts/model\.keras is gone from where MLflow keeps it"
    ):
        check_champion(["a", "b"], "champion")


@pytest.mark.refused("model: the champion is somebody else's model")
def test_champion_that_is_another_kind_of_model_is_told(tmp_path, tracking_uri):
    (tmp_path / "other.py").write_text(OTHER_MODEL)
    mlflow.pyfunc.save_model(str(tmp_path / "other"), python_model=str(tmp_path / "other.py"), pip_requirements=[])
    client = mlflow.MlflowClient()
    client.create_registered_model("a-b")
    client.create_model_version("a-b", str(tmp_path / "other"))
    client.set_registered_model_alias("a-b", "champion", "1")
    with pytest.raises(WorkflowError, match="it is no model of this project for these classes"):
        check_champion(["a", "b"], "champion")
    for content in ("", "flavors: {python_function: {config: {class_names: null}}}", "a: [b"):
        (tmp_path / "other/MLmodel").write_text(content)
        with pytest.raises(WorkflowError, match=r"a-b version 1, the champion, cannot be used"):
            check_champion(["a", "b"], "champion")
        with pytest.raises(WorkflowError, match=r"models:/a-b/1 cannot be loaded: "):
            registered_model.load("models:/a-b/1")


def test_model_of_a_run_is_the_last_one_that_was_not_deleted(tmp_path, tracking_uri):
    client = mlflow.MlflowClient()
    runs = [client.create_run("0") for _ in range(2)]
    first, second, _ = (
        client.create_logged_model("0", source_run_id=run.info.run_id) for run in (*runs[:1] * 2, runs[1])
    )
    assert logging.find_logged_model(runs[0]) == second.model_id
    client.delete_logged_model(second.model_id)
    assert logging.find_logged_model(runs[0]) == first.model_id
    client.delete_logged_model(first.model_id)
    with pytest.raises(WorkflowError, match="was deleted in MLflow: repeat the command"):
        logging.find_logged_model(runs[0])
