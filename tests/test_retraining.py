"""A deployment that retrains on new images alone, asked through Prefect's own API."""

import re
import shutil
import signal
import time

import draw
from support.project import SECONDS, Project, runs_of

import numpy as np
import pytest
import requests


class Deployment:
    """What a running `ml_workflow.py --serve` says of itself to Prefect's server."""

    def __init__(self, url: str, source: str):
        self.url = url
        deadline = time.monotonic() + SECONDS
        while not (found := [one for one in self.post("deployments/filter") if one["parameters"]["source"] == source]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (self.first_seen,) = found

    def post(self, path: str, **body):
        deadline = time.monotonic() + SECONDS
        while (answer := requests.post(f"{self.url}/{path}", json=body, timeout=30)).status_code == 503:
            assert time.monotonic() < deadline  # its database is busy: Prefect's own client tries again as well
            time.sleep(0.2)
        answer.raise_for_status()
        return answer.json()

    def get(self, path: str) -> dict:
        return requests.get(f"{self.url}/{path}", timeout=30).json()

    def now(self) -> dict:
        return self.get(f"deployments/{self.first_seen['id']}")

    def start(self, **parameters) -> str:
        """The id of a flow run that was asked for with the form."""
        return self.post(f"deployments/{self.first_seen['id']}/create_flow_run", parameters=parameters)["id"]

    def run(self, **parameters) -> dict:
        """The final state of a flow run that was asked for with the form."""
        flow_run, deadline = self.start(**parameters), time.monotonic() + SECONDS
        while (state := self.get(f"flow_runs/{flow_run}")["state"])["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
        return state

    def tasks(self, state: dict) -> list[dict]:
        """The task runs of the flow run that ended in the state."""
        flow_runs = {"id": {"any_": [state["state_details"]["flow_run_id"]]}}
        return self.post("task_runs/filter", flow_runs=flow_runs)


@pytest.fixture
def mine(tmp_path, photos):
    return shutil.copytree(photos, tmp_path / "mine")


def serve(project: Project, *options: str, **settings: str):
    """A served copy of the project that asks Prefect every second for something to do."""
    served = project.start("--serve", *options, PREFECT_RUNNER_POLL_FREQUENCY="1", **settings)
    served.read_until("Served as ml_workflow/retrain")
    return served


@pytest.mark.slow
def test_schedule_trains_new_images_and_skips_known_ones(project, mine, prefect):
    served = serve(project, "--cron", "0 6 * * 1", "--source", str(mine), "--epochs", "1", **prefect)
    try:
        deployment = Deployment(prefect["PREFECT_API_URL"], str(mine))
        assert not deployment.first_seen["paused"]
        (schedule,) = deployment.first_seen["schedules"]
        assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 6 * * 1", True)
        check_form(deployment.first_seen)

        trained = deployment.run()
        assert trained["name"] == "Completed"
        assert len(deployment.tasks(trained)) == 5
        (first,) = runs_of(project)
        assert first.info.status == "FINISHED"
        assert "apples-oranges version 1" in first.data.tags["gate"]

        skipped = deployment.run(epochs=2)
        assert (skipped["type"], skipped["name"]) == ("COMPLETED", "Skipped")
        assert skipped["message"] == "nothing to train: apples-oranges version 1 has these images"
        assert deployment.tasks(skipped) == []
        assert len(runs_of(project)) == 1

        draw.draw("apples", 160, np.random.default_rng(9)).save(mine / "apples/new.png")
        flow_run = deployment.start(epochs=5000)
        served.read_until("epoch 2 of 5000")
    finally:
        served.end(signal.SIGTERM)
    assert served.output.splitlines()[-1] == "ml_workflow.py: stopped"
    assert deployment.now()["paused"]
    assert deployment.get(f"flow_runs/{flow_run}")["state_name"] == "Cancelled"
    first, second = runs_of(project)
    assert second.info.status == "KILLED"
    assert first.data.params["data_digest"] != second.data.params["data_digest"]


def check_form(deployment: dict) -> None:
    """Each parameter has its type, what it means, and what the command line said."""
    fields, values = deployment["parameter_openapi_schema"]["properties"], deployment["parameters"]
    assert fields.keys() == values.keys()
    assert all(field["description"] for field in fields.values())
    types = {"source": "string", "epochs": "integer", "learning_rate": "number", "only_new": "boolean"}
    assert {name: fields[name]["type"] for name in types} == types
    assert (values["epochs"], values["only_new"]) == (1, True)
    assert fields["epochs"]["exclusiveMinimum"] == 0
    assert deployment["enforce_parameter_schema"]


@pytest.mark.slow
def test_flow_is_served_without_a_server(project, mine):
    served = serve(project, "--source", str(mine), "--epochs", "1")
    try:
        url = re.search(r"form and schedule: (http://127.0.0.1:\d+)/deployments", served.output)[1]
        deployment = Deployment(f"{url}/api", str(mine))
        assert deployment.first_seen["schedules"] == []
        states = [deployment.run(only_new=only_new)["name"] for only_new in (True, False, True)]
        assert states == ["Completed", "Completed", "Skipped"]
        shutil.rmtree(mine / "apples")
        failed = deployment.run()
        assert failed["name"] == "Failed"
        assert "has 1 class folder(s)" in failed["message"]
    finally:
        served.end(signal.SIGINT)
    assert served.output.splitlines()[-1] == "ml_workflow.py: stopped"
    assert [run.info.status for run in runs_of(project)] == ["FINISHED"] * 2
    with pytest.raises(requests.ConnectionError):
        deployment.now()
