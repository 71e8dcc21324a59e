"""The deployment to Azure, as far as that goes without an account: Azure's own inference server, and its own loader."""

import base64
import json
import re
import subprocess

from support.environments import make_environment
from support.project import PROJECT, free_port, wait_for

import pytest
import requests
import yaml

AZURE = PROJECT / "examples/azure"
SERVER, LOADER = "azureml-inference-server-http==1.5.1", "azure-ai-ml==1.35.2"
ON_LOOPBACK = """
from azureml_inference_server_http import constants
constants.DEFAULT_HOST = "127.0.0.1"  # it has no option for that
from azureml_inference_server_http.amlserver import run
run()
"""
LOAD = """
import sys
from azure.ai.ml import load_online_deployment, load_online_endpoint
endpoint = load_online_endpoint(sys.argv[1] + "/endpoint.yml")
deployment = load_online_deployment(sys.argv[1] + "/deployment.yml")
assert deployment.endpoint_name == endpoint.name
print(deployment.request_settings.request_timeout_ms, deployment.code_configuration.scoring_script)
"""


def test_environment_has_the_versions_of_the_lock():
    described = yaml.safe_load((AZURE / "environment.yml").read_text())
    ours = [line for line in described["dependencies"][-1]["pip"] if line != SERVER]
    lock = (PROJECT / "constraints.txt").read_text()
    assert len(ours) == 5
    for requirement in ours:
        assert re.search(f"^{re.escape(requirement)}$", lock, re.MULTILINE), requirement


def test_deployment_names_files_that_are_there():
    described = yaml.safe_load((AZURE / "deployment.yml").read_text())
    code, environment = described["code_configuration"], described["environment"]
    assert (AZURE / code["code"] / code["scoring_script"]).is_file()
    assert (AZURE / environment["conda_file"]).is_file()
    assert described["endpoint_name"] == yaml.safe_load((AZURE / "endpoint.yml").read_text())["name"]


@pytest.mark.slow
def test_azures_inference_server_gives_the_answers_of_predict(trained, photos, tmp_path):
    python = make_environment(tmp_path / "environment", SERVER)
    model = tmp_path / "models/apples-oranges/1"  # as Azure lays it
    download = ["mlflow", "artifacts", "download", "-u", "models:/apples-oranges@champion", "-d", str(model)]
    assert trained.execute(download).returncode == 0
    files = sorted(photos.rglob("*.jpeg"))
    predicted = json.loads(trained.run("--json", *map(str, files), script="predict.py").stdout)
    port = free_port()
    options = ["--entry_script", str(AZURE / "onlinescoring/score.py"), "--model_dir", str(tmp_path / "models")]
    with open(tmp_path / "log", "wb") as log:
        command = [str(python), "-c", ON_LOOPBACK, *options, "--port", str(port)]
        server = subprocess.Popen(command, cwd=tmp_path, env=trained.environment(), stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}", server)
        images = [base64.b64encode(path.read_bytes()).decode() for path in files]

        def ask(body: str) -> requests.Response:
            headers = {"Content-Type": "application/json"}
            return requests.post(f"http://127.0.0.1:{port}/score", body, headers=headers, timeout=60)

        answer = ask(json.dumps({"input_data": images}))
        assert answer.status_code == 200, answer.text
        assert len(answer.json()) == len(predicted) == 20
        for ours, its in zip(predicted, answer.json(), strict=True):
            assert its["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-6)
            names = ("label", "unknown", "unsure", "nearest")
            assert [its[name] for name in names] == [ours[name] for name in names]
        for body, reason in (
            (json.dumps({"input_data": [images[0], "aGVsbG8="]}), "inputs[1]: not an image: unknown format"),
            (json.dumps({"input_data": "x"}), "inputs: not a list of images in base64"),
            (json.dumps({"inputs": images}), 'send {"input_data": '),
            ("{", 'send {"input_data": '),
        ):
            refused = ask(body)
            assert refused.status_code == 400
            assert reason in refused.json()["message"]
    finally:
        server.terminate()
        server.wait(30)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_azure_loads_the_endpoint_and_the_deployment(tmp_path):
    python = make_environment(tmp_path / "environment", LOADER, has_project_packages=False)
    (tmp_path / "azure").mkdir()
    subprocess.run(["cp", "-r", f"{AZURE}/.", str(tmp_path / "azure")], check=True)
    (tmp_path / "azure/model").mkdir()  # what the download makes
    end = subprocess.run([python, "-c", LOAD, str(tmp_path / "azure")], capture_output=True, text=True, timeout=120)
    assert end.returncode == 0, end.stderr
    assert end.stdout.split() == ["90000", "score.py"]
