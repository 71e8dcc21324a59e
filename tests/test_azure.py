"""The Azure example, without an account: Azure's inference server and its loader of YAML files."""

import base64
import json
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
constants.DEFAULT_HOST = "127.0.0.1"  # it has no option for this
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


def test_environment_has_the_pinned_versions():
    environment = yaml.safe_load((AZURE / "environment.yml").read_text())
    requirements = {line for line in environment["dependencies"][-1]["pip"] if line != SERVER}
    assert len(requirements) == 5
    assert requirements <= set((PROJECT / "constraints.txt").read_text().splitlines())


def test_deployment_refers_to_existing_files():
    deployment = yaml.safe_load((AZURE / "deployment.yml").read_text())
    code, environment = deployment["code_configuration"], deployment["environment"]
    assert (AZURE / code["code"] / code["scoring_script"]).is_file()
    assert (AZURE / environment["conda_file"]).is_file()
    assert deployment["endpoint_name"] == yaml.safe_load((AZURE / "endpoint.yml").read_text())["name"]


@pytest.mark.slow
def test_azure_inference_server_predicts_like_predict_py(trained, photos, tmp_path):
    python = make_environment(tmp_path / "environment", SERVER)
    model = tmp_path / "models/apples-oranges/1"  # as in Azure
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

        def send(body: str) -> requests.Response:
            headers = {"Content-Type": "application/json"}
            return requests.post(f"http://127.0.0.1:{port}/score", body, headers=headers, timeout=60)

        response = send(json.dumps({"input_data": images}))
        assert response.status_code == 200, response.text
        assert len(response.json()) == len(predicted) == 20
        for expected, prediction in zip(predicted, response.json(), strict=True):
            assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
            names = ("label", "unknown", "unsure", "nearest")
            assert [prediction[name] for name in names] == [expected[name] for name in names]
        for body, reason in (
            (json.dumps({"input_data": [images[0], "aGVsbG8="]}), "inputs[1]: not an image: unknown format"),
            (json.dumps({"input_data": "x"}), "inputs: not a list"),
            (json.dumps({"inputs": images}), "input_data"),
            ("{", "input_data"),
        ):
            response = send(body)
            assert response.status_code == 400
            assert reason in response.json()["message"]
    finally:
        server.terminate()
        server.wait(30)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_azure_loads_the_endpoint_and_the_deployment(tmp_path):
    python = make_environment(tmp_path / "environment", LOADER, has_project_packages=False)
    (tmp_path / "azure").mkdir()
    subprocess.run(["cp", "-r", f"{AZURE}/.", str(tmp_path / "azure")], check=True)
    (tmp_path / "azure/model").mkdir()  # created by the download
    end = subprocess.run([python, "-c", LOAD, str(tmp_path / "azure")], capture_output=True, text=True, timeout=120)
    assert end.returncode == 0, end.stderr
    assert end.stdout.split() == ["90000", "score.py"]
