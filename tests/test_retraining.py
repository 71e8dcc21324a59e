"""A deployment that retrains only on new images, controlled through Prefect's API."""

import re
import shutil
import signal
import time

import draw
from support.project import SECONDS, Project, runs_of

import numpy as np
import psutil
import pytest
import requests


class Deployment:
    """The deployment of a running `ml_workflow.py --serve`, as Prefect's server sees it."""

    def __init__(self, url: str, source: str):
        self.url = url
        deadline = time.monotonic() + SECONDS
        while not (deployments := self.find_deployments(source)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (self.initial,) = deployments

    def find_deployments(self, source: str) -> list[dict]:
        """Return the deployments with a source."""
        deployments = self.post("deployments/filter")
        return [deployment for deployment in deployments if deployment["parameters"]["source"] == source]

    def post(self, path: str, **body):
        deadline = time.monotonic() + SECONDS
        while (response := requests.post(f"{self.url}/{path}", json=body, timeout=30)).status_code == 503:
            assert time.monotonic() < deadline  # the database is busy; Prefect's client retries, too
            time.sleep(0.2)
        response.raise_for_status()
        return response.json()

    def get(self, path: str) -> dict:
        return requests.get(f"{self.url}/{path}", timeout=30).json()

    def refresh(self) -> dict:
        """Return the current state of the deployment."""
        return self.get(f"deployments/{self.initial['id']}")

    def start(self, **parameters) -> str:
        """Start a flow run as the form does, and return its id."""
        return self.post(f"deployments/{self.initial['id']}/create_flow_run", parameters=parameters)["id"]

    def run(self, **parameters) -> dict:
        """Start a flow run as the form does, and return its final state."""
        flow_run, deadline = self.start(**parameters), time.monotonic() + SECONDS
        while (state := self.get(f"flow_runs/{flow_run}")["state"])["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
        return state

    def tasks(self, state: dict) -> list[dict]:
        """Return the task runs of the flow run with this final state."""
        flow_runs = {"id": {"any_": [state["state_details"]["flow_run_id"]]}}
        return self.post("task_runs/filter", flow_runs=flow_runs)


@pytest.fixture
def folder(tmp_path, photos):
    return shutil.copytree(photos, tmp_path / "photos")


def serve(project: Project, *options: str, **settings: str):
    """Serve the flow; it polls Prefect every second."""
    served = project.start("--serve", *options, PREFECT_RUNNER_POLL_FREQUENCY="1", **settings)
    served.read_until("ml_workflow/retrain")
    return served


@pytest.mark.slow
def test_schedule_trains_on_new_images_and_skips_known_ones(project, folder, prefect):
    served = serve(project, "--cron", "0 6 * * 1", "--source", str(folder), "--epochs", "1", **prefect)
    try:
        deployment = Deployment(prefect["PREFECT_API_URL"], str(folder))
        assert not deployment.initial["paused"]
        (schedule,) = deployment.initial["schedules"]
        assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 6 * * 1", True)
        check_form(deployment.initial)
        memory = {mapping.path for mapping in psutil.Process(served.pid).memory_maps()}
        assert not any("tensorflow" in path for path in memory)  # runs are started in other processes

        trained = deployment.run()
        assert trained["name"] == "Completed"
        assert len(deployment.tasks(trained)) == 5
        (first,) = runs_of(project)
        assert first.info.status == "FINISHED"
        assert "apples-oranges version 1" in first.data.tags["gate"]

        skipped = deployment.run(epochs=2)
        assert (skipped["type"], skipped["name"]) == ("COMPLETED", "Cached")
        assert "apples-oranges version 1" in skipped["message"]
        assert deployment.tasks(skipped) == []
        assert len(runs_of(project)) == 1

        draw.draw("apples", 160, np.random.default_rng(9)).save(folder / "apples/new.png")
        flow_run = deployment.start(epochs=5000)
        served.read_until("epoch 2 of 5000")
    finally:
        served.end(signal.SIGTERM)
    assert served.output.splitlines()[-1] == "ml_workflow.py: stopped"
    assert deployment.refresh()["paused"]
    assert deployment.get(f"flow_runs/{flow_run}")["state_name"] == "Cancelled"
    first, second = runs_of(project)
    assert second.info.status == "KILLED"
    assert first.data.params["data_digest"] != second.data.params["data_digest"]


def check_form(deployment: dict) -> None:
    """Check that the form has the type, description and command-line value of each parameter."""
    fields, values = deployment["parameter_openapi_schema"]["properties"], deployment["parameters"]
    assert fields.keys() == values.keys()
    assert all(field["description"] for field in fields.values())
    types = {"source": "string", "epochs": "integer", "learning_rate": "number", "only_new": "boolean"}
    assert {name: fields[name]["type"] for name in types} == types
    assert (values["epochs"], values["only_new"]) == (1, True)
    assert fields["epochs"]["exclusiveMinimum"] == 0
    assert deployment["enforce_parameter_schema"]


@pytest.mark.slow
def test_serve_works_without_a_server(project, folder):
    served = serve(project, "--source", str(folder), "--epochs", "1")
    try:
        url = re.search(r"(http://127\.0\.0\.1:\d+)/deployments", served.output)[1]
        deployment = Deployment(f"{url}/api", str(folder))
        assert deployment.initial["schedules"] == []
        states = [deployment.run(only_new=only_new)["name"] for only_new in (True, False, True)]
        assert states == ["Completed", "Completed", "Cached"]
        shutil.rmtree(folder / "apples")
        failed = deployment.run()
        assert failed["name"] == "Failed"
        assert "class" in failed["message"]
    finally:
        served.end(signal.SIGINT)
    assert served.output.splitlines()[-1] == "ml_workflow.py: stopped"
    assert [run.info.status for run in runs_of(project)] == ["FINISHED"] * 2
    with pytest.raises(requests.ConnectionError):
        deployment.refresh()
