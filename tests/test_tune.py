"""Real searches on local and on Dask workers, some of them killed."""

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import ml_workflow
import tune
from support.project import SECONDS, Project, dask_cluster, prefect_states, runs_of
from workflow.errors import WorkflowError
from workflow.orchestration import cluster
from workflow.records import Artifact, DataVersion

import distributed
import mlflow
import optuna
import pytest
from optuna.trial import TrialState


@pytest.fixture
def quick(project) -> Project:
    """Return a project whose trials take seconds."""
    project.before = "import ml_workflow; ml_workflow.EPOCHS = 4; import tune; tune.FOLDS = 2"
    return project


def list_runs(project: Project) -> tuple[list, list, list]:
    """Return the runs of searches, of trials and of the pipeline, each the oldest first."""
    runs = runs_of(project)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in runs if run.info.run_name.startswith("tune ")]
    return parents, children, [run for run in runs if run not in children + parents]


def statuses(runs: list) -> list[str]:
    return [run.info.status for run in runs]


def study_of(project: Project) -> optuna.Study:
    storage = f"sqlite:///{project.folder / 'tune.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def check_best(project: Project, study: optuna.Study) -> None:
    """Check that the last run used the best parameters, which are no worse than the defaults."""
    parent, final = list_runs(project)[0][-1], list_runs(project)[2][-1]
    best = study.best_trial
    assert json.loads(parent.data.tags["best"]) == best.params
    (baseline,) = [
        trial for trial in study.trials if trial.params == study.trials[0].params and trial.value is not None
    ]
    assert best.value <= baseline.value
    assert {name: final.data.params[name] for name in best.params} == {k: str(v) for k, v in best.params.items()}
    assert "gate" in final.data.tags
    assert statuses([parent, final]) == ["FINISHED", "FINISHED"]


@pytest.mark.slow
@pytest.mark.survived("search: a trial fails")
def test_search_succeeds_though_a_trial_fails(quick, photos, prefect):
    quick.before += "\ntune.SPACE['learning_rate'] = tune.FloatDistribution(1e39, 1e40)"  # the defaults come first
    end = quick.run("--source", str(photos), "--trials", "2", script="tune.py", timeout=3 * SECONDS, **prefect)
    assert end.returncode == 0, end.stderr
    (parent,), children, (_,) = list_runs(quick)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.run_name for run in children] == ["trial 0", "trial 1"]
    assert statuses(children) == ["FINISHED", "FAILED"]
    assert "diverged" in children[1].data.tags["outcome"]
    study = study_of(quick)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    assert [run.data.metrics.get("val_loss") for run in children] == [trial.value for trial in study.trials]
    check_best(quick, study)
    assert parent.data.tags["result"] in end.stdout


@pytest.mark.slow
@pytest.mark.survived("search: kill -9 of the search", "search: Ctrl-C")
def test_next_search_continues_a_stopped_study(quick, photos, prefect):
    for number, moment in ((signal.SIGKILL, "trial 0: complete"), (signal.SIGINT, r"trial \d: complete")):
        program = quick.start("--source", str(photos), "--trials", "50", script="tune.py", **prefect)
        program.read_until(moment)
        seconds = program.end(number)
        if number == signal.SIGINT:
            assert seconds < 15, program.output  # 10 on an idle machine
    parents, children, _ = list_runs(quick)
    assert statuses(parents) == ["KILLED", "KILLED"]
    assert "RUNNING" not in statuses(children)
    states = [trial.state for trial in study_of(quick).trials]
    assert states.count(TrialState.COMPLETE) == statuses(children).count("FINISHED") > 1

    end = quick.run("--source", str(photos), "--trials", "2", script="tune.py", **prefect)
    assert end.returncode == 0, end.stderr
    study = study_of(quick)
    assert TrialState.RUNNING not in [trial.state for trial in study.trials]
    assert len(study.trials) == len(states) + 2
    assert sum(trial.params == study.trials[0].params for trial in study.trials) == 1  # the defaults are not repeated
    check_best(quick, study)
    assert "Running" not in prefect_states(prefect["PREFECT_API_URL"], "flow_runs")


@pytest.mark.slow
@pytest.mark.survived("search: kill -9 of one of two Dask workers")
def test_search_survives_a_killed_dask_worker(quick, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    with quick.prefect_server() as prefect_url, dask_cluster(quick, folder) as (address, workers):
        search = quick.start("--source", str(photos), "--trials", "8", "--dask", address, script="tune.py")
        search.read_until("trial 3: ")
        workers[0].kill()
        search.end()
        assert search.returncode == 0, search.output
        assert set(prefect_states(prefect_url, "flow_runs")) == {"Completed"}
        tasks = prefect_states(prefect_url, "task_runs")
        with distributed.Client(address, set_as_default=False) as client:
            (survivor,) = client.scheduler_info(n_workers=-1)["workers"]
        assert len(tasks) == 2 + 8 + 5
        assert set(tasks) == {"Completed"}
    (_,), children, (_,) = list_runs(quick)
    assert statuses(children) == ["FINISHED"] * 8
    assert children[-1].data.tags["worker"] == survivor
    check_best(quick, study_of(quick))


@pytest.mark.slow
@pytest.mark.refused("search: the Dask scheduler stops")
def test_search_without_its_dask_scheduler_ends_in_one_line(quick, photos, prefect, tmp_path):
    with dask_cluster(quick, tmp_path) as (address, _):
        arguments = ("--source", str(photos), "--trials", "100", "--dask", address)
        search = quick.start(*arguments, script="tune.py", **prefect)
        search.read_until("trial 1: ")
        with distributed.Client(address, set_as_default=False) as client:
            client.shutdown()
        search.end()
    assert search.returncode == 1
    assert search.output.splitlines()[-1].startswith("tune.py: the Dask scheduler")
    parent, children, _ = list_runs(quick)
    assert statuses(parent) == ["FAILED"]
    assert "RUNNING" not in statuses(children)


def test_defaults_lie_in_the_search_space():
    assert tune.DEFAULTS.keys() == tune.SPACE.keys()
    assert all(tune.SPACE[name]._contains(tune.DEFAULTS[name]) for name in tune.DEFAULTS)


def test_study_tries_the_defaults_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "STUDIES", tmp_path / "tune.db")
    with tune.open_study(["key"], 1) as study:
        assert study.ask(tune.SPACE).params == tune.DEFAULTS  # left running, as by a killed process
    with tune.open_study(["key"], 1) as study:
        trial = study.ask(tune.SPACE)
        assert trial.params == tune.DEFAULTS
        study.tell(trial, 0.5)
        assert study.ask(tune.SPACE).params != tune.DEFAULTS
    with tune.open_study(["key"], 1) as study:
        assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "FAIL"]
    with tune.open_study(["another key"], 1) as study:
        assert study.ask(tune.SPACE).params == tune.DEFAULTS
        with (
            pytest.raises(WorkflowError, match="another search is running"),
            tune.open_study(["key"], 1),
        ):
            pass


@pytest.mark.refused("search: tune.db is damaged")
def test_damaged_study_is_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "STUDIES", tmp_path / "tune.db")
    (tmp_path / "tune.db").write_bytes(b"no database" * 100)
    with (
        pytest.raises(WorkflowError, match=r"tune\.db: .*not a database.*delete it"),
        tune.open_study([], 1),
    ):
        pass


@pytest.mark.refused("search: a folder whose name a database URL cannot contain")
def test_unusable_state_folder_starts_nothing(tmp_path, photos, prefect):
    project = Project(tmp_path)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.home / 'mlflow.db'}"}
    folder = project.folder / "what?"
    end = project.run("--source", str(photos), script="tune.py", ML_WORKFLOW_STATE=str(folder), **store, **prefect)
    assert end.stderr.startswith(f"tune.py: {folder} ")
    assert end.stdout == ""
    assert not list(project.folder.iterdir())


@pytest.mark.refused("search: no Dask scheduler at the address")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{}", "127.0.0.1:{}", "carrier-pigeon://{}"])
def test_missing_dask_cluster_ends_in_one_line(address, unused_port, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    refusal = pytest.raises(WorkflowError, match="start `dask scheduler`")
    with refusal, cluster.connect(address.format(unused_port)):
        pass


@pytest.mark.refused("search: Dask's configuration has no keys for a scheduler at tls://")
def test_missing_tls_keys_are_named_in_the_error(unused_port):
    address = f"tls://127.0.0.1:{unused_port}"
    with pytest.raises(WorkflowError, match=rf"{address} .*ca-file, client\.key"), cluster.connect(address):
        pass


def test_without_a_cluster_tasks_run_in_one_local_thread():
    with cluster.workers(None) as (executor, max_tasks, is_remote):
        assert executor.submit(sum, [1, 2]).result() == 3
    assert (max_tasks, is_remote) == (1, False)


@pytest.mark.slow
def test_cluster_workers_run_two_tasks_per_thread(project, tmp_path):
    with dask_cluster(project, tmp_path) as (address, _), cluster.workers(address) as (executor, max_tasks, is_remote):
        assert executor.submit(sum, [1, 2]).result() == 3
        assert (max_tasks, is_remote) == (8, True)  # two workers with two threads


@pytest.mark.refused("search: code that another user of this machine sends to the local workers")
def test_local_workers_refuse_clients_without_the_key():
    with cluster.start_local(1) as client:
        address = client.scheduler_info()["address"]
        assert address.startswith("tls://127.0.0.1:")
        with pytest.raises((OSError, TypeError, ValueError)), distributed.Client(address, timeout=2):
            pass
        with pytest.raises(OSError), distributed.Client(address.replace("tls", "tcp"), timeout=2):  # noqa: PT011
            pass
        assert client.submit(sum, [1, 2]).result() == 3


@pytest.mark.refused("search: a wrong option", "search: --backbone none")
@pytest.mark.parametrize(
    ("option", "value"),
    [("--trials", "0"), ("--trials", "many"), ("--seed", "-1"), ("--workers", "2"), ("--backbone", "none")],
)
def test_wrong_option_ends_in_one_line_and_status_2(option, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", option, value])
    with pytest.raises(SystemExit) as end:
        tune.parse_arguments()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line


def find_source(monkeypatch, *options: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["tune.py", *options])
    return tune.find_source(tune.parse_arguments())


def log_run(folder: Path, source: str, name: str = "", **tags: str) -> None:
    """Log a run as the pipeline does, with the photos and the model name that it used."""
    data = DataVersion(source, str(folder), [], model_name=name)
    with mlflow.start_run(tags={"source": source} | tags):
        mlflow.log_text(json.dumps({"data": asdict(data)}), Artifact.EVALUATION)


@pytest.mark.survived("search: without --source, after runs on other photos")
def test_default_source_and_name_are_those_of_the_newest_run(tmp_path, photos, tracking_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    assert find_source(monkeypatch) == (ml_workflow.SOURCE, "")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("ml-workflow", (tmp_path / "files").as_uri()))
    log_run(tmp_path, str(photos), "fruit", gate="v1 was promoted")
    log_run(tmp_path, "/a search/has no/tag gate")
    assert find_source(monkeypatch) == (str(photos), "fruit")
    assert find_source(monkeypatch, "--name", "other") == (str(photos), "other")
    assert find_source(monkeypatch, "--source", "http://host/photos") == ("http://host/photos", "")
    log_run(tmp_path, "sample_images, because host did not provide the lab's photos", gate="v2 was promoted")
    assert find_source(monkeypatch) == (ml_workflow.SOURCE, "")
    log_run(tmp_path, str(tmp_path / "deleted"), gate="v3 was promoted")
    with pytest.raises(WorkflowError, match=r"newest run.*pass --source"):
        find_source(monkeypatch)
