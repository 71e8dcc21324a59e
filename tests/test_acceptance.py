"""The lab's acceptance criteria, checked on real runs through the APIs of the servers."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import draw
import grade
from make_docs import hide_machine, log_lines, normalize, read_region
from ml_workflow import LEARNING_RATE, SOURCE
from support.images import ImageServer, closing_server
from support.project import PROJECT, Project, free_port, runs_of
from workflow.records import Evaluation

import keras
import mlflow
import numpy as np
import pytest
import requests
from mlflow.types import DataType

TASKS = ["download_data", "preprocess_data", "train_model", "evaluate_model", "register_model"]
EPOCHS, BATCH_SIZE = 50, 4


class Servers:
    """The data that the servers of a project have about its runs."""

    def __init__(self, project: Project):
        self.mlflow_url = f"http://127.0.0.1:{project.mlflow_port}"
        self.prefect_url = f"http://127.0.0.1:{project.prefect_port}/api"
        self.client = mlflow.MlflowClient(self.mlflow_url)

    def mlflow_runs(self) -> list:
        """Return all runs of all experiments, the oldest first."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, order_by=["attributes.start_time"]))

    def prefect(self, kind: str) -> list[dict]:
        """Return all objects of a kind, such as `flow_runs`."""
        response = requests.post(f"{self.prefect_url}/{kind}/filter", json={}, timeout=30)
        response.raise_for_status()
        return response.json()

    def edges(self, flow_run: dict) -> set[tuple[str, str]]:
        """Return the arrows of a flow run's graph as pairs of task names."""
        graph = requests.get(f"{self.prefect_url}/flow_runs/{flow_run['id']}/graph-v2", timeout=30).json()
        names = {node["id"]: node["label"].rsplit("-", 1)[0] for _, node in graph["nodes"]}
        assert sorted(names.values()) == sorted(TASKS)
        return {(names[node["id"]], names[child["id"]]) for _, node in graph["nodes"] for child in node["children"]}

    def artifact(self, run, name: str) -> bytes:
        """Return an artifact of a run, as the MLflow server sends it to a browser."""
        response = requests.get(
            f"{self.mlflow_url}/get-artifact", params={"run_uuid": run.info.run_id, "path": name}, timeout=30
        )
        response.raise_for_status()
        return response.content


@pytest.fixture(scope="module")
def served(tmp_path_factory, photos, databases):
    """A new project with both servers and photos on a web server, after two runs."""
    project = Project(tmp_path_factory.mktemp("served"), databases)
    with project.prefect_server(), project.mlflow_server(), closing_server(ImageServer(photos)) as images:
        project.lab_url = images.url
        arguments = ["--epochs", str(EPOCHS), "--batch-size", str(BATCH_SIZE)]
        ends = [project.run(*arguments, "--require-champion") for _ in range(2)]
        assert [end.returncode for end in ends] == [0, 3], ends[0].stderr + ends[1].stderr
        yield project, Servers(project), ends


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A new project without internet, with both servers started after a run without servers."""
    project = Project(tmp_path_factory.mktemp("offline"))
    settings = {"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}"}  # nothing listens there
    first = project.run("--epochs", str(EPOCHS), **settings)
    assert first.returncode == 0, first.stderr
    with project.prefect_server(), project.mlflow_server():
        yield project, Servers(project), [first]


@pytest.fixture(params=["served", "offline"])
def project_and_servers(request) -> tuple[Project, Servers, list]:
    return request.getfixturevalue(request.param)


def test_flow_runs_are_completed_and_chain_the_five_tasks(project_and_servers):
    _, servers, ends = project_and_servers
    flow_runs = servers.prefect("flow_runs")
    assert [(run["state_type"], len(flow_runs)) for run in flow_runs] == [("COMPLETED", len(ends))] * len(ends)
    assert [flow["name"] for flow in servers.prefect("flows")] == ["ml_workflow"]
    for run in flow_runs:
        edges = servers.edges(run)
        assert set(itertools.pairwise(TASKS)) <= edges
        assert all(TASKS.index(before) < TASKS.index(after) for before, after in edges)
    states = {task["state_type"] for task in servers.prefect("task_runs")}
    assert states == {"COMPLETED"}


def test_each_flow_run_makes_one_finished_mlflow_run(project_and_servers):
    _, servers, ends = project_and_servers
    assert [run.info.status for run in servers.mlflow_runs()] == ["FINISHED"] * len(ends)


def test_grade_of_this_project_meets_all_criteria(served):
    _, servers, _ = served
    checks = grade.grade(PROJECT, servers.prefect_url.removesuffix("/api"), servers.mlflow_url)
    assert [check for check in checks if not check.is_met] == []


def test_both_uis_link_to_each_other(project_and_servers):
    _, servers, _ = project_and_servers
    links = {
        artifact["flow_run_id"]: artifact["data"]
        for artifact in servers.prefect("artifacts")
        if artifact["key"] == "mlflow-run"
    }
    for run in servers.mlflow_runs():
        flow_run = run.data.tags["prefect_flow_run"]
        assert flow_run in run.data.tags["mlflow.note.content"]
        assert f"{servers.mlflow_url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in links[flow_run]


def test_every_epoch_has_its_metrics(project_and_servers):
    _, servers, _ = project_and_servers
    for run in servers.mlflow_runs():
        epochs = int(run.data.params["epochs"])
        for metric in ("loss", "accuracy", "val_loss", "val_accuracy"):
            history = servers.client.get_metric_history(run.info.run_id, metric)
            assert sorted(entry.step for entry in history) == list(range(epochs)), metric


def test_parameters_are_logged_as_given(served):
    _, servers, _ = served
    for run in servers.mlflow_runs():
        logged = {name: run.data.params[name] for name in ("epochs", "batch_size", "learning_rate", "seed")}
        given = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "seed": 42}
        assert logged == {name: str(value) for name, value in given.items()}
        assert len(run.data.params["data_digest"]) == 64
        assert run.inputs.dataset_inputs[0].dataset.digest == run.data.params["data_digest"][:12]


def test_short_run_has_system_metrics(project_and_servers):
    _, servers, _ = project_and_servers
    for run in servers.mlflow_runs():
        for metric in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
            assert len(servers.client.get_metric_history(run.info.run_id, f"system/{metric}")) >= 3


def test_weights_plots_and_report_are_artifacts(project_and_servers):
    project, servers, _ = project_and_servers
    for run in servers.mlflow_runs():
        assert servers.artifact(run, "weights/model.weights.h5").startswith(b"\x89HDF")
        assert not (project.folder / "models" / run.info.run_id).exists()
        for picture in ("learning_curves", "confusion_matrix"):
            assert servers.artifact(run, f"{picture}.png").startswith(b"\x89PNG")
        artifacts = {artifact.path for artifact in servers.client.list_artifacts(run.info.run_id)}
        assert ("misclassified_images.png" in artifacts) is (run.data.metrics["test_accuracy"] < 1)
        assert "Total params" in servers.artifact(run, "model_summary.txt").decode()
        report = servers.artifact(run, "report.html").decode()
        flow_run = run.data.tags["prefect_flow_run"]
        (summary,) = [
            artifact["data"]
            for artifact in servers.prefect("artifacts")
            if (artifact["flow_run_id"], artifact["key"]) == (flow_run, "report")
        ]
        assert all("How good is it" in text for text in (report, summary))


def test_model_has_signature_config_and_pinned_requirements(project_and_servers, tmp_path):
    _, servers, _ = project_and_servers
    mlflow.set_tracking_uri(servers.mlflow_url)
    for run in servers.mlflow_runs():
        uri = f"models:/{run.outputs.model_outputs[0].model_id}"
        model = mlflow.models.get_model_info(uri)
        assert model.signature.inputs.input_types() == [DataType.string]
        assert "probabilities: Map(str -> DataType.double)" in str(model.signature.outputs)
        config = model.flavors["python_function"]["config"]
        limit = run.data.metrics["unsure_below"]
        assert config == {"class_names": ["apples", "oranges"], "image_size": 336, "unsure_below": limit}
        assert model.metadata["data_digest"] == run.data.params["data_digest"]
        folder = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / run.info.run_id))
        requirements = (Path(folder) / "requirements.txt").read_text().splitlines()
        assert not [path for path in Path(folder).rglob("*") if path.suffix in (".pkl", ".pickle")]
        assert {line.split("==")[0] for line in requirements} == {"mlflow", "tensorflow", "keras", "numpy", "pillow"}
        assert all("==" in line for line in requirements)


def test_every_run_registers_a_version_with_its_origin(project_and_servers):
    _, servers, _ = project_and_servers
    runs = servers.mlflow_runs()
    versions = sorted(servers.client.search_model_versions("name='apples-oranges'"), key=lambda v: int(v.version))
    assert [version.run_id for version in versions] == [run.info.run_id for run in runs]
    for version, run in zip(versions, runs, strict=True):
        assert version.tags["data_digest"] == run.data.params["data_digest"]
        assert version.tags["source"] == run.data.tags["source"]
        assert version.tags["prefect_flow_run"] == run.data.tags["prefect_flow_run"]
        assert float(version.tags["test_accuracy"]) == run.data.metrics["test_accuracy"]
        assert version.tags["gate"] in version.description


def test_equal_candidate_is_not_promoted(served):
    _, servers, _ = served
    first, second = servers.mlflow_runs()
    assert "version 1 was promoted" in first.data.tags["gate"]
    assert "version 2 was not promoted" in second.data.tags["gate"]
    evaluated = Evaluation.from_json(servers.artifact(second, "evaluation.json"))
    compared, duplicate_of = evaluated.comparison, evaluated.data.duplicate_of
    photos = {duplicate_of.get(image.digest, image.digest) for image in evaluated.data.files if image.split}
    assert (compared.version, compared.training_images, compared.new_images) == (
        "1",
        compared.champion_training_images,
        0,
    )
    for predictions in (compared.candidate, compared.champion):  # cross-validation covers all photos
        assert sorted(prediction.group for prediction in predictions) == sorted(photos)
    assert str(servers.client.get_model_version_by_alias("apples-oranges", "champion").version) == "1"


def test_same_seed_gives_the_same_weights(served):
    _, servers, _ = served
    digests = {
        hashlib.sha256(servers.artifact(run, "weights/model.weights.h5")).hexdigest() for run in servers.mlflow_runs()
    }
    assert len(digests) == 1


def test_keras_model_inside_the_champion_predicts_new_images(served, tmp_path):
    _, servers, _ = served
    mlflow.set_tracking_uri(servers.mlflow_url)
    uri = "models:/apples-oranges@champion/artifacts/model.keras"
    model = keras.saving.load_model(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    correct = 0
    for label, kind in enumerate(("apples", "oranges")):
        for number in range(10):
            pixels = np.asarray(draw.draw(kind, 160, np.random.default_rng([99, label, number])))[None]
            correct += model.predict(pixels, verbose=0).argmax() == label
    assert correct >= 17


@pytest.mark.slow
def test_predict_accepts_every_model_uri_and_leaves_no_copy(served, photos, tmp_path):
    project, servers, _ = served
    run = servers.mlflow_runs()[0]
    uris = [
        "models:/apples-oranges@champion",
        "models:/apples-oranges/1",
        f"models:/{run.outputs.model_outputs[0].model_id}",
    ]
    for uri in uris:
        end = project.run(str(photos / "apples"), "--model", uri, script="predict.py", TMPDIR=str(tmp_path))
        assert end.returncode == 0, end.stderr
        assert run.info.run_id in end.stdout.splitlines()[0]
    assert not list(tmp_path.rglob("*.keras"))


def test_last_lines_link_to_the_results(served, offline):
    for (project, servers, ends), is_offline in ((served, False), (offline, True)):
        run, end = servers.mlflow_runs()[0], ends[0]
        last = end.stdout.strip().splitlines()[-9:]
        assert f"Prefect: http://127.0.0.1:{project.prefect_port}/" in "\n".join(last)
        assert f"/runs/{run.info.run_id}" in "\n".join(last)
        assert any("prefect server start" in line for line in last) is is_offline
        assert any("mlflow server" in line for line in last) is is_offline
        assert any(line.startswith("Serve: ") and "mlflow models serve -m models:/apples-" in line for line in last)
    (predict,) = [line for line in last if line.startswith("Predict: ")]
    predicted = project.execute(["bash", "-c", predict.partition(": ")[2]])
    assert predicted.returncode == 0, predicted.stderr
    assert ["not the new version" in end.stdout for end in served[2][:2]] == [False, True]


def test_first_line_names_the_servers(served, offline):
    (project, _, ends), (_, _, offline_ends) = served, offline
    with_servers, without = ends[0].stdout.splitlines()[0], offline_ends[0].stdout.splitlines()[0]
    assert f"http://127.0.0.1:{project.prefect_port}" in with_servers
    assert f"http://127.0.0.1:{project.mlflow_port}" in with_servers
    assert "sqlite:///" in without
    assert "http://" not in without


def test_run_name_and_description_contain_the_result(project_and_servers):
    _, servers, _ = project_and_servers
    for run in servers.mlflow_runs():
        result, _, name = run.info.run_name.partition(" · ")
        assert re.fullmatch(r"v\d( promoted)?: \d\.\d\d, cv \d\.\d\d", result)
        note = run.data.tags["mlflow.note.content"]
        assert run.data.tags["gate"] in note
        assert run.data.params["data_digest"][:12] in note
        assert note.endswith(f"Prefect flow run: [{name}]({run.data.tags['prefect_url']})")


def test_documents_show_what_a_first_run_prints(served, offline):
    printed = set()  # by a run with the lab's files, or by one without servers
    for project, _, (first, *_) in (served, offline):
        lines = [*log_lines(first.stdout + first.stderr), *hide_machine(project, first.stdout).splitlines()]
        printed |= {normalize(line) for line in lines}
    for name in ("first run", "log"):
        documented = read_region(name).partition("```\n")[2].partition("\n```")[0].splitlines()
        of_photos = "The weakest class", "Data issue"
        lines = {normalize(line) for line in documented if not line.startswith(of_photos)}
        assert lines - {"..."} <= printed


@pytest.mark.survived("network: no internet and no servers at the first run")
def test_fallback_to_sample_images_is_recorded_everywhere(offline):
    _, servers, ends = offline
    assert "Images: sample_images" in ends[0].stdout
    assert "WARNING" in ends[0].stdout + ends[0].stderr
    for tags in (servers.mlflow_runs()[0].data.tags, servers.client.get_model_version("apples-oranges", "1").tags):
        assert tags["source"].startswith("sample_images")


def test_run_prints_no_python_warning(project_and_servers):
    for end in project_and_servers[2]:
        assert "Warning:" not in end.stdout + end.stderr


@pytest.mark.slow
def test_run_without_servers_continues_their_history(project, photos):
    with project.prefect_server(), project.mlflow_server():
        first = project.run("--source", str(photos), "--epochs", "1")
        assert first.returncode == 0, first.stderr
    mine = project.folder / "my images"
    for old, new in (("apples", "it's 5 $_1_$ & more?"), ("oranges", "b-c")):
        shutil.copytree(photos / old, mine / new)
    without = project.run("--source", "my images", "--epochs", "1")
    assert without.returncode == 0, without.stderr
    assert [run.info.status for run in runs_of(project)] == ["FINISHED"] * 2


@pytest.mark.parametrize(
    "names", [["apples"], *(pytest.param(names, marks=pytest.mark.slow) for names in ([], ["apples", "oranges"]))]
)
def test_source_without_two_classes_of_images_starts_nothing(tmp_path, names):
    project = Project(tmp_path)
    for name in names:
        (project.folder / "mine" / name).mkdir(parents=True)
    end = project.run("--source", "mine")
    assert end.returncode == 1
    assert end.stderr.startswith("ml_workflow.py: mine")
    assert end.stderr.count("\n") == 1
    assert not {"mlflow.db", "prefect_home", "dataset"} & set(os.listdir(project.folder))


@pytest.mark.parametrize(
    "server",
    [
        pytest.param("MLflow", marks=[pytest.mark.slow, pytest.mark.refused("MLflow: another program on its port")]),
        pytest.param("Prefect", marks=pytest.mark.refused("Prefect: another program on its port")),
    ],
)
def test_port_used_by_another_program_starts_nothing(project, photos, server):
    with closing_server(ImageServer(photos)) as program:
        setattr(project, f"{server.lower()}_port", program.server_port)
        end = project.run("--source", str(photos))
    assert end.returncode == 1
    assert f"port {program.server_port} " in end.stderr.splitlines()[-1]
    assert not (project.folder / "dataset").exists()


LAB = PROJECT.parent / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not LAB.exists(), reason="needs the lab's photos, which are not published here")
def test_at_least_four_of_five_seeds_learn_the_lab_photos(tmp_path):
    project = Project(tmp_path)
    command = [sys.executable, LAB / "tools/serve_lab_images.py", "--port", "0"]
    with project.prefect_server(), project.mlflow_server(), subprocess.Popen(command, stdout=subprocess.PIPE) as photos:
        source = f"{photos.stdout.readline().decode().strip()}/{SOURCE.partition('.com/')[2]}"
        ends = [project.run("--source", source, "--seed", str(seed)) for seed in range(1, 6)]
        photos.terminate()
        assert [end.returncode for end in ends] == [0] * 5, [end.stderr for end in ends]
        runs = Servers(project).mlflow_runs()
    assert sum(run.data.metrics["test_accuracy"] == 1.0 for run in runs) >= 4
