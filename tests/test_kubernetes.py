"""The Kubernetes example: its manifests fit the published schemas, and they name what serve.py and the image have."""

import json
import re
import shutil
import subprocess

import serve
from support.environments import make_environment
from support.project import PROJECT
from workflow.serving.access import SHUTDOWN_SECONDS
from workflow.settings import Settings

import pytest
import yaml

EXAMPLE = PROJECT / "examples/kubernetes"
DOCKERFILE = (EXAMPLE / "Dockerfile").read_text()
MANIFESTS = {item["kind"]: item for item in yaml.safe_load_all((EXAMPLE / "kubernetes.yaml").read_text())}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
VALIDATE = """
import sys, yaml, kubernetes_validate
for manifest in yaml.safe_load_all(open(sys.argv[1])):
    if manifest["kind"] != "ServiceMonitor":  # its schema is the operator's, see below
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        print(manifest["kind"])
"""

SCHEMA = "@kubernetes-models/prometheus-operator@6.0.0"
VALIDATE_MONITOR = f"""
import {{ ServiceMonitor }} from "{SCHEMA.rpartition("@")[0]}/monitoring.coreos.com/v1";
new ServiceMonitor(JSON.parse(process.argv[2])).validate();
"""


def test_manifests_refer_to_the_ports_and_routes_of_serve():
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == serve.PORT
    assert f"EXPOSE {serve.PORT}" in DOCKERFILE
    assert f":{serve.PORT}/health" in DOCKERFILE
    probes = [CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == [{"path": "/health", "port": port["name"]}] * 3
    assert MANIFESTS["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    (endpoint,) = MANIFESTS["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["port"]) == ("/metrics", MANIFESTS["Service"]["spec"]["ports"][0]["name"])
    assert POD["terminationGracePeriodSeconds"] > SHUTDOWN_SECONDS


def test_manifests_set_variables_that_exist():
    names = {item["name"] for item in CONTAINER["env"]} | set(
        re.findall(r"\b([A-Z_]+)=", DOCKERFILE.partition("FROM")[2])
    )
    settings = {f"ML_WORKFLOW_{name}".upper() for name in Settings.model_fields}
    assert names <= settings | {"MLFLOW_TRACKING_URI", "MODEL"}
    assert (
        MANIFESTS["ServiceMonitor"]["spec"]["endpoints"][0]["authorization"]["credentials"]
        == (next(item for item in CONTAINER["env"] if item["name"] == "ML_WORKFLOW_TOKEN")["valueFrom"]["secretKeyRef"])
    )


def test_image_contains_existing_files_and_runs_an_accepted_command(monkeypatch):
    for copied in re.findall(r"^COPY (.*) \S+$", DOCKERFILE.partition("WORKDIR")[2], re.MULTILINE):
        assert all((PROJECT / name).exists() for name in copied.split())
    command = re.search(r"exec python (serve\.py .*)\"\]", DOCKERFILE)[1].replace('\\"$MODEL\\"', "models:/m@champion")
    monkeypatch.setattr("sys.argv", command.split())
    arguments = serve.parse_arguments()
    assert (arguments.host, arguments.model) == ("0.0.0.0", "models:/m@champion")
    assert f"USER {POD['securityContext']['runAsUser']}" in DOCKERFILE


@pytest.mark.slow
def test_manifests_fit_the_published_schemas(tmp_path):
    python = make_environment(tmp_path / "venv", "kubernetes-validate==1.37.0", "pyyaml", has_project_packages=False)
    end = subprocess.run([python, "-c", VALIDATE, EXAMPLE / "kubernetes.yaml"], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert end.stdout.split() == ["Deployment", "Service", "HorizontalPodAutoscaler"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_monitor_fits_the_schema_of_the_operator(tmp_path):
    subprocess.run(["npm", "install", "--silent", "--no-audit", SCHEMA], cwd=tmp_path, check=True)
    (tmp_path / "validate.mjs").write_text(VALIDATE_MONITOR)
    monitor = MANIFESTS["ServiceMonitor"]
    for manifest, is_valid in ((monitor, True), ({**monitor, "spec": {"endpoints": [{"port": 1}]}}, False)):
        end = subprocess.run(
            ["node", "validate.mjs", json.dumps(manifest)], cwd=tmp_path, capture_output=True, text=True
        )
        assert (end.returncode == 0) == is_valid, end.stderr
