"""The search: real trials on local and on Dask workers, killed ones too. Only what is expected fails here."""

import json
import math
import re
import signal
import sys
from concurrent.futures import Future

import tune
from support.project import SECONDS, Project, dask_cluster, prefect_states, runs_of
from workflow.errors import WorkflowError
from workflow.orchestration import cluster

import distributed
import mlflow
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from prefect.logging import disable_run_logger


@pytest.fixture
def quick(project) -> Project:
    """Programs whose trials take seconds."""
    project.before = "import ml_workflow; ml_workflow.EPOCHS = 4; import tune; tune.FOLDS = 2"
    return project


def family(project: Project) -> tuple[list, list, list]:
    """The runs of searches, their trials, and the ordinary runs, the oldest first."""
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
    """The ordinary run was trained with the best parameters, which are no worse than the defaults."""
    parent, final = family(project)[0][-1], family(project)[2][-1]
    best = study.best_trial
    assert json.loads(parent.data.tags["best"]) == best.params
    assert (
        best.value <= study.trials[0].value == min(t.value for t in study.trials if t.params == study.trials[0].params)
    )
    assert {name: final.data.params[name] for name in best.params} == {k: str(v) for k, v in best.params.items()}
    assert "gate" in final.data.tags
    assert statuses([parent, final]) == ["FINISHED", "FINISHED"]


@pytest.mark.survived("search: a trial fails")
def test_search_ends_well_though_a_trial_fails(quick, photos, prefect):
    quick.before += "\ntune.SPACE['learning_rate'] = tune.FloatDistribution(1e39, 1e40)"  # the defaults come first
    end = quick.run("--source", str(photos), "--trials", "2", script="tune.py", timeout=3 * SECONDS, **prefect)
    assert end.returncode == 0, end.stderr
    (parent,), children, (_,) = family(quick)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.run_name for run in children] == ["trial 0", "trial 1"]
    assert statuses(children) == ["FINISHED", "FAILED"]
    assert children[1].data.tags["outcome"] == "failed: the training diverges: its loss is not a number"
    study = study_of(quick)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    assert [run.data.metrics.get("val_loss") for run in children] == [trial.value for trial in study.trials]
    check_best(quick, study)
    assert "Of 2 trials the parameters of trial 0 have val_loss" in end.stdout


@pytest.mark.slow
@pytest.mark.survived("search: kill -9 of the search", "search: Ctrl-C")
def test_study_goes_on_after_each_end_of_a_search(quick, photos, prefect):
    for number, moment in ((signal.SIGKILL, "trial 0: complete"), (signal.SIGINT, r"trial \d: complete")):
        program = quick.start("--source", str(photos), "--trials", "50", script="tune.py", **prefect)
        program.read_until(moment)
        seconds = program.end(number)
        if number == signal.SIGINT:
            assert seconds < 15, program.output  # 10 on a machine with nothing else to do
    parents, children, _ = family(quick)
    assert statuses(parents) == ["KILLED", "KILLED"]
    assert "RUNNING" not in statuses(children)
    states = [trial.state for trial in study_of(quick).trials]
    finished = [state for state in states if state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(finished) == statuses(children).count("FINISHED") > 1

    end = quick.run("--source", str(photos), "--trials", "2", script="tune.py", **prefect)
    assert end.returncode == 0, end.stderr
    study = study_of(quick)
    assert [trial.state for trial in study.trials[: len(states)] if trial.state == TrialState.RUNNING] == []
    assert len(study.trials) == len(states) + 2
    assert sum(trial.params == study.trials[0].params for trial in study.trials) == 1  # the defaults have their result
    check_best(quick, study)
    assert "Running" not in prefect_states(prefect["PREFECT_API_URL"], "flow_runs")


@pytest.mark.slow
@pytest.mark.survived("search: kill -9 of one of two Dask workers")
def test_trials_run_on_dask_workers_and_outlive_one_of_them(quick, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    with quick.prefect_server() as prefect_url, dask_cluster(quick, folder) as (address, workers):
        search = quick.start("--source", str(photos), "--trials", "8", "--dask", address, script="tune.py")
        search.read_until("trial 3: ")
        workers[0].kill()
        search.end()
        assert search.returncode == 0, search.output
        assert set(prefect_states(prefect_url, "flow_runs")) == {"Completed"}
        tasks = prefect_states(prefect_url, "task_runs")
        assert len(tasks) == 2 + 8 + 5
        assert set(tasks) == {"Completed"}
    (_,), children, (_,) = family(quick)
    assert statuses(children) == ["FINISHED"] * 8
    assert len({run.data.tags["worker"] for run in children}) == 2
    check_best(quick, study_of(quick))


@pytest.mark.parametrize(("losses", "ranked"), [([0.01], None), ([0.01, 0.3], 0.3)], ids=["pruned", "complete"])
def test_only_complete_trial_has_the_metric_of_the_ranking(losses, ranked, tmp_path, tracking_uri):
    client, study = mlflow.MlflowClient(), optuna.create_study()
    child = client.create_run(client.create_experiment("search", (tmp_path / "mlartifacts").as_uri())).info.run_id
    future = Future()
    future.set_result({"val_loss": losses, "val_accuracy": [1.0] * len(losses), "worker": "tcp://127.0.0.1:1"})
    with disable_run_logger():
        tune.end_trial(study, study.ask(), child, future, folds=2)
    metrics = client.get_run(child).data.metrics
    assert metrics.get("val_loss") == ranked
    assert metrics["loss_so_far"] == losses[-1]


def complete(*losses: float, params=tune.DEFAULTS) -> optuna.trial.FrozenTrial:
    return create_trial(
        value=losses[-1], params=params, distributions=tune.SPACE, intermediate_values=dict(enumerate(losses))
    )


def test_trial_is_hopeless_above_the_median_of_complete_ones():
    study = optuna.create_study()
    for first in (0.1, 0.2, 0.4):
        study.add_trial(complete(first, first, 0.3))
    assert tune.limits(study, 3) == [math.inf] * 3
    study.add_trial(complete(0.8, 0.6, 0.3))
    assert tune.limits(study, 3) == pytest.approx([0.3, 0.3, math.inf])


def test_defaults_lie_in_the_search_space():
    assert tune.DEFAULTS.keys() == tune.SPACE.keys()
    assert all(tune.SPACE[name]._contains(tune.DEFAULTS[name]) for name in tune.DEFAULTS)


def test_study_begins_with_the_defaults_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "STUDIES", tmp_path / "tune.db")
    with tune.open_study(["key"], tune.DEFAULTS, 1) as study:
        assert study.ask(tune.SPACE).params == tune.DEFAULTS  # it dies
    with tune.open_study(["key"], tune.DEFAULTS, 1) as study:
        trial = study.ask(tune.SPACE)
        assert trial.params == tune.DEFAULTS
        study.tell(trial, 0.5)
        assert study.ask(tune.SPACE).params != tune.DEFAULTS
    with tune.open_study(["key"], tune.DEFAULTS, 1) as study:
        assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "FAIL"]
    with tune.open_study(["another key"], tune.DEFAULTS, 1) as study:
        assert study.ask(tune.SPACE).params == tune.DEFAULTS
        with (
            pytest.raises(WorkflowError, match="another search is under way"),
            tune.open_study(["key"], tune.DEFAULTS, 1),
        ):
            pass


@pytest.mark.refused("search: tune.db is damaged")
def test_damaged_study_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "STUDIES", tmp_path / "tune.db")
    (tmp_path / "tune.db").write_bytes(b"no database" * 100)
    with (
        pytest.raises(WorkflowError, match=r"tune\.db: .*not a database.*delete it"),
        tune.open_study([], tune.DEFAULTS, 1),
    ):
        pass


@pytest.mark.refused("search: a folder whose name the address of tune.db cannot have")
def test_folder_that_no_study_can_lie_in_starts_nothing(project, photos, prefect):
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.home / 'mlflow.db'}"}
    folder = project.folder / "what?"
    end = project.run("--source", str(photos), script="tune.py", ML_WORKFLOW_STATE=str(folder), **own, **prefect)
    assert end.stderr.startswith(f"tune.py: {folder} has ? in its name, which the address of a database cannot have")
    assert end.stdout == ""
    assert not list(project.folder.iterdir())


@pytest.mark.refused("search: no Dask scheduler at the address")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{}", "127.0.0.1:{}", "carrier-pigeon://{}"])
def test_missing_dask_cluster_ends_in_one_line(address, unused_port, monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS", 1)
    told = pytest.raises(WorkflowError, match=r"no Dask scheduler answers at .*start `dask scheduler`")
    with told, tune.workers(address.format(unused_port), 1):
        pass


@pytest.mark.refused("search: Dask's configuration has no keys for a scheduler at tls://")
def test_scheduler_that_needs_keys_is_told_with_the_settings(unused_port):
    told = r"^tls://127\.0\.0\.1:\d+ needs TLS: set ca-file, client\.key and client\.cert below distributed\.comm\.tls"
    with pytest.raises(WorkflowError, match=told), cluster.connect(f"tls://127.0.0.1:{unused_port}"):
        pass


@pytest.mark.refused("search: code that another user of this machine sends to the local workers")
def test_local_workers_take_code_from_the_search_alone():
    with tune.workers(None, 1) as client:
        address = client.scheduler_info()["address"]
        assert address.startswith("tls://127.0.0.1:")
        with pytest.raises((OSError, TypeError, ValueError)), distributed.Client(address, timeout=2):
            pass
        with pytest.raises(OSError), distributed.Client(address.replace("tls", "tcp"), timeout=2):  # noqa: PT011
            pass
        assert client.submit(sum, [1, 2]).result() == 3


@pytest.mark.refused("search: a wrong option")
@pytest.mark.parametrize("options", [["--trials", "0"], ["--trials", "many"], ["--seed", "-1"], ["--workers", "2"]])
def test_wrong_option_ends_in_one_line_and_status_2(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", *options])
    with pytest.raises(SystemExit) as end:
        tune.parse_arguments()
    assert end.value.code == 2
    assert re.fullmatch(r"tune\.py: .*--help shows the usage\n", capsys.readouterr().err)
