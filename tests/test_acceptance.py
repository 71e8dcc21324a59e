"""The lab's acceptance criteria, one by one, on real runs of the program, through the servers' own APIs."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import draw
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


class Evidence:
    """What the servers of a project say about its runs."""

    def __init__(self, project: Project):
        self.mlflow_url = f"http://127.0.0.1:{project.mlflow_port}"
        self.prefect_url = f"http://127.0.0.1:{project.prefect_port}/api"
        self.client = mlflow.MlflowClient(self.mlflow_url)

    def mlflow_runs(self) -> list:
        """All runs of all experiments, the oldest first."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, order_by=["attributes.start_time"]))

    def prefect(self, path: str, **body) -> list[dict]:
        answer = requests.post(f"{self.prefect_url}/{path}/filter", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def edges(self, flow_run: dict) -> set[tuple[str, str]]:
        """The arrows of a flow run's graph, from task name to task name."""
        graph = requests.get(f"{self.prefect_url}/flow_runs/{flow_run['id']}/graph-v2", timeout=30).json()
        names = {node["id"]: node["label"].rsplit("-", 1)[0] for _, node in graph["nodes"]}
        assert sorted(names.values()) == sorted(TASKS)
        return {(names[node["id"]], names[child["id"]]) for _, node in graph["nodes"] for child in node["children"]}

    def artifact(self, run, name: str) -> bytes:
        """A run's artifact, as the MLflow server hands it to a browser."""
        answer = requests.get(
            f"{self.mlflow_url}/get-artifact", params={"run_uuid": run.info.run_id, "path": name}, timeout=30
        )
        answer.raise_for_status()
        return answer.content


@pytest.fixture(scope="module")
def served(tmp_path_factory, photos):
    """A fresh copy with both servers up and photos on a web server: two executions."""
    project = Project(tmp_path_factory.mktemp("served"))
    with project.prefect_server(), project.mlflow_server(), closing_server(ImageServer(photos)) as images:
        arguments = ["--source", images.url, "--epochs", str(EPOCHS), "--batch-size", str(BATCH_SIZE)]
        ends = [project.run(*arguments) for _ in range(2)]
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
        yield project, Evidence(project), ends


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A fresh copy without servers and without internet: one execution; then both servers, and one more."""
    project = Project(tmp_path_factory.mktemp("alone"))
    settings = {"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}"}  # a proxy that is not there: nothing gets out
    first = project.run("--epochs", str(EPOCHS), **settings)
    assert first.returncode == 0, first.stderr
    with project.prefect_server(), project.mlflow_server():
        second = project.run("--epochs", "1", **settings)
        assert second.returncode == 0, second.stderr
        yield project, Evidence(project), [first, second]


@pytest.fixture(params=["served", "alone"])
def evidence(request) -> tuple[Project, Evidence, list]:
    return request.getfixturevalue(request.param)


def test_flow_runs_are_completed_and_chain_the_five_tasks(evidence):
    _, seen, ends = evidence
    flow_runs = seen.prefect("flow_runs")
    assert [(run["state_type"], len(flow_runs)) for run in flow_runs] == [("COMPLETED", len(ends))] * len(ends)
    assert [flow["name"] for flow in seen.prefect("flows")] == ["ml_workflow"]
    for run in flow_runs:
        edges = seen.edges(run)
        assert set(itertools.pairwise(TASKS)) <= edges
        assert all(TASKS.index(before) < TASKS.index(after) for before, after in edges)
    states = {task["state_type"] for task in seen.prefect("task_runs")}
    assert states == {"COMPLETED"}


def test_each_execution_makes_exactly_one_finished_mlflow_run(evidence):
    _, seen, ends = evidence
    assert [run.info.status for run in seen.mlflow_runs()] == ["FINISHED"] * len(ends)


def test_both_uis_link_to_each_other(evidence):
    _, seen, _ = evidence
    links = {
        artifact["flow_run_id"]: artifact["data"]
        for artifact in seen.prefect("artifacts")
        if artifact["key"] == "mlflow-run"
    }
    for run in seen.mlflow_runs():
        flow_run = run.data.tags["prefect_flow_run"]
        assert flow_run in run.data.tags["mlflow.note.content"]
        assert f"{seen.mlflow_url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in links[flow_run]


def test_every_epoch_has_its_metrics(evidence):
    _, seen, _ = evidence
    for run in seen.mlflow_runs():
        epochs = int(run.data.params["epochs"])
        for metric in ("loss", "accuracy", "val_loss", "val_accuracy"):
            history = seen.client.get_metric_history(run.info.run_id, metric)
            assert sorted(entry.step for entry in history) == list(range(epochs)), metric


def test_parameters_are_logged_as_given(served):
    _, seen, _ = served
    for run in seen.mlflow_runs():
        logged = {name: run.data.params[name] for name in ("epochs", "batch_size", "learning_rate", "seed")}
        given = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "seed": 42}
        assert logged == {name: str(value) for name, value in given.items()}
        assert len(run.data.params["data_digest"]) == 64
        assert run.inputs.dataset_inputs[0].dataset.digest == run.data.params["data_digest"][:12]


def test_system_metrics_are_there_although_the_run_is_short(evidence):
    _, seen, _ = evidence
    for run in seen.mlflow_runs():
        for metric in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
            assert len(seen.client.get_metric_history(run.info.run_id, f"system/{metric}")) >= 3


def test_weights_curves_and_report_are_served_as_artifacts(evidence):
    project, seen, _ = evidence
    for run in seen.mlflow_runs():
        folder = project.folder / "models" / run.info.run_id
        weights = seen.artifact(run, "weights/model.weights.h5")
        assert weights == (folder / "model.weights.h5").read_bytes()
        assert (folder / "model.keras").stat().st_size < 15_000_000
        for picture in ("learning_curves", "confusion_matrix"):
            assert seen.artifact(run, f"{picture}.png").startswith(b"\x89PNG")
        there = {artifact.path for artifact in seen.client.list_artifacts(run.info.run_id)}
        assert ("misjudged_images.png" in there) is (run.data.metrics["test_accuracy"] < 1)
        assert "Total params" in seen.artifact(run, "model_summary.txt").decode()
        report = seen.artifact(run, "report.html").decode()
        shown = [a["data"] for a in seen.prefect("artifacts") if a["flow_run_id"] == run.data.tags["prefect_flow_run"]]
        (summary,) = [text for text in shown if str(text).startswith("# ")]
        for text in (report, summary):
            assert "In cross-validation" in text
            assert "How good is it" in text


def test_model_has_signature_config_and_pinned_requirements(evidence, tmp_path):
    _, seen, _ = evidence
    mlflow.set_tracking_uri(seen.mlflow_url)
    for run in seen.mlflow_runs():
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


def test_every_execution_registers_a_version_with_its_origin(evidence):
    _, seen, _ = evidence
    runs = seen.mlflow_runs()
    versions = sorted(seen.client.search_model_versions("name='apples-oranges'"), key=lambda v: int(v.version))
    assert [version.run_id for version in versions] == [run.info.run_id for run in runs]
    for version, run in zip(versions, runs, strict=True):
        assert version.tags["data_digest"] == run.data.params["data_digest"]
        assert version.tags["source"] == run.data.tags["source"]
        assert version.tags["prefect_flow_run"] == run.data.tags["prefect_flow_run"]
        assert float(version.tags["test_accuracy"]) == run.data.metrics["test_accuracy"]
        assert version.tags["gate"] in version.description


def test_second_execution_does_not_replace_its_equal(served):
    project, seen, _ = served
    first, second = seen.mlflow_runs()
    assert "version 1 was promoted to champion on " in first.data.tags["gate"]
    assert "version 2 was not promoted: " in second.data.tags["gate"]
    evaluated = Evaluation.read(project.folder / "models" / second.info.run_id / "evaluation.json")
    compared, duplicate_of = evaluated.comparison, evaluated.data.duplicate_of
    photos = {duplicate_of.get(image.digest, image.digest) for image in evaluated.data.files if image.split}
    assert (compared.version, compared.training_images, compared.new_images) == (
        "1",
        compared.champion_training_images,
        0,
    )
    for predictions in (compared.candidate, compared.champion):  # all photos, though few are for the test
        assert sorted(one.group for one in predictions) == sorted(photos)
    assert str(seen.client.get_model_version_by_alias("apples-oranges", "champion").version) == "1"


def test_same_seed_gives_the_same_weights(served):
    _, seen, _ = served
    digests = {hashlib.sha256(seen.artifact(run, "weights/model.weights.h5")).hexdigest() for run in seen.mlflow_runs()}
    assert len(digests) == 1


def test_keras_model_inside_the_champion_predicts_new_images(served, tmp_path):
    _, seen, _ = served
    mlflow.set_tracking_uri(seen.mlflow_url)
    uri = "models:/apples-oranges@champion/artifacts/model.keras"
    model = keras.saving.load_model(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    correct = 0
    for label, kind in enumerate(("apples", "oranges")):
        for number in range(10):
            pixels = np.asarray(draw.draw(kind, 160, np.random.default_rng([99, label, number])))[None]
            correct += model.predict(pixels, verbose=0).argmax() == label
    assert correct >= 17


@pytest.mark.slow
def test_predict_takes_any_model_uri_and_leaves_no_copy(served, photos, tmp_path):
    project, seen, _ = served
    run = seen.mlflow_runs()[0]
    uris = [
        "models:/apples-oranges@champion",
        "models:/apples-oranges/1",
        f"models:/{run.outputs.model_outputs[0].model_id}",
    ]
    for uri in uris:
        end = project.run(str(photos / "apples"), "--model", uri, script="predict.py", TMPDIR=str(tmp_path))
        assert end.returncode == 0, end.stderr
        assert f"run {run.info.run_id}, data digest {run.data.params['data_digest'][:12]}" in end.stdout.splitlines()[0]
    assert not list(tmp_path.rglob("*.keras"))


def test_last_lines_say_where_to_look(served, alone):
    for (project, seen, ends), later in ((served, False), (alone, True)):
        run, end = seen.mlflow_runs()[0], ends[0]
        last = end.stdout.strip().splitlines()[-9:]
        assert f"Prefect: http://127.0.0.1:{project.prefect_port}/" in "\n".join(last)
        assert f"/runs/{run.info.run_id}" in "\n".join(last)
        assert any("prefect server start" in line for line in last) is later
        assert any("mlflow server" in line for line in last) is later
        (predict,) = [line for line in last if line.startswith("Predict: ")]
        again = project.execute(["bash", "-c", predict.partition(": ")[2]])
        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith("models:/apples-oranges/")
        assert any(line.startswith("Serve: ") and "mlflow models serve -m models:/apples-" in line for line in last)


def test_first_line_says_which_servers_are_used(served, alone):
    (project, _, ends), (_, _, alone_ends) = served, alone
    first, own = ends[0].stdout.splitlines()[0], alone_ends[0].stdout.splitlines()[0]
    assert first.startswith(f"Prefect: http://127.0.0.1:{project.prefect_port}. MLflow: http://127.0.0.1:")
    assert "To keep to yourself, set ML_WORKFLOW_PREFECT_URL and ML_WORKFLOW_MLFLOW_URL to free ports" in first
    assert own.startswith("Prefect: a server of this run alone. MLflow: sqlite:///")
    assert own.endswith("mlflow.db.")


def test_run_list_and_page_tell_the_result(evidence):
    _, seen, _ = evidence
    for run in seen.mlflow_runs():
        result, _, name = run.info.run_name.partition(" · ")
        assert re.fullmatch(r"v\d( promoted)?: \d\.\d\d, cv \d\.\d\d", result)
        note = run.data.tags["mlflow.note.content"]
        assert run.data.tags["gate"] in note
        assert run.data.params["data_digest"][:12] in note
        assert note.endswith(f"Prefect flow run: [{name}]({run.data.tags['prefect_url']})")


def test_documents_show_what_a_first_run_prints(alone):
    project, _, (first, _) = alone
    lines = [*log_lines(first.stdout + first.stderr), *hide_machine(project, first.stdout).splitlines()]
    printed = {normalize(line) for line in lines}
    for document, name, least in (("README.md", "first run", 6), ("lab_report.md", "log", 12)):
        shown = read_region(document, name).partition("```\n")[2].partition("\n```")[0].splitlines()
        assert {normalize(line) for line in shown} - {"..."} <= printed
        assert len(shown) >= least


@pytest.mark.survived("network: no internet at the first run; no server, of MLflow or Prefect")
def test_samples_that_stand_in_are_told_everywhere(alone):
    _, seen, ends = alone
    told = "sample_images, because raw.githubusercontent.com did not give the lab's photos"
    assert f"Images: {told}" in ends[0].stdout
    assert "WARNING" in ends[0].stdout + ends[0].stderr
    assert seen.mlflow_runs()[0].data.tags["source"] == told
    assert seen.client.get_model_version("apples-oranges", "1").tags["source"] == told


def test_no_output_is_a_python_warning(evidence):
    for end in evidence[2]:
        assert "Warning:" not in end.stdout + end.stderr


@pytest.mark.slow
def test_run_without_servers_uses_what_servers_kept(project, photos):
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
    "made", [["apples"], *(pytest.param(made, marks=pytest.mark.slow) for made in ([], ["apples", "oranges"]))]
)
def test_source_without_two_classes_of_images_starts_nothing(project, made):
    for name in made:
        (project.folder / "mine" / name).mkdir(parents=True)
    end = project.run("--source", "mine")
    assert end.returncode == 1
    assert end.stderr.startswith("ml_workflow.py: mine")
    assert end.stderr.count("\n") == 1
    assert not {"mlflow.db", "prefect_home", "dataset"} & set(os.listdir(project.folder))


@pytest.mark.parametrize(
    "server",
    [
        pytest.param("MLflow", marks=pytest.mark.refused("MLflow: something else on its port")),
        pytest.param("Prefect", marks=pytest.mark.refused("Prefect: something else on its port")),
    ],
)
def test_port_with_something_else_on_it_starts_nothing(project, photos, server):
    with closing_server(ImageServer(photos)) as other:
        setattr(project, f"{server.lower()}_port", other.server_port)
        end = project.run("--source", str(photos))
    assert end.returncode == 1
    assert f"port {other.server_port} is taken by something else than {server}" in end.stderr.splitlines()[-1]
    assert not (project.folder / "dataset").exists()


LAB = PROJECT.parent / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not LAB.exists(), reason="the lab's photos are not here: they are not ours to publish")
def test_lab_photos_are_learned_by_at_least_four_of_five_seeds(tmp_path):
    project = Project(tmp_path)
    command = [sys.executable, LAB / "tools/serve_lab_images.py", "--port", "0"]
    with project.prefect_server(), project.mlflow_server(), subprocess.Popen(command, stdout=subprocess.PIPE) as photos:
        source = f"{photos.stdout.readline().decode().strip()}/{SOURCE.partition('.com/')[2]}"
        ends = [project.run("--source", source, "--seed", str(seed)) for seed in range(1, 6)]
        photos.terminate()
        assert [end.returncode for end in ends] == [0] * 5, [end.stderr for end in ends]
        runs = Evidence(project).mlflow_runs()
    assert sum(run.data.metrics["test_accuracy"] == 1.0 for run in runs) >= 4


def test_help_names_every_option(project):
    end = project.run("--help")
    assert end.returncode == 0
    options = ("--source", "--epochs", "--batch-size", "--learning-rate", "--seed", "--serve", "--cron")
    assert all(option in end.stdout for option in options)
