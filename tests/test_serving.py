"""The served model: Keras, predict.py, REST and batch predict the same, and unusable input is refused."""

import base64
import inspect
import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lib.mutants import mutate

import ml_workflow
from support.images import encoded, odd_images
from support.project import PROJECT, SECONDS, Project, artifact, runs_of
from workflow import image_classifier
from workflow.data.datasets import ImageDataset
from workflow.data.features import load_features
from workflow.model import backbone
from workflow.model.head import fit_head
from workflow.orchestration import cluster
from workflow.records import SPLITS, Evaluation, Evidence

import keras
import mlflow
import numpy as np
import pytest
import requests
import yaml
from PIL import Image

LAB = PROJECT.parent / "shared/data/img-lab"
TOLERANCE = 1e-4
CLASSES = ["apples", "oranges"]


@pytest.fixture(scope="module")
def endpoint(trained):
    with trained.scoring_server() as url:
        yield url
    log = (trained.home / "mlflow.log").read_text()
    assert "Traceback" not in log
    assert " 500 " not in log


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def post(url: str, contents: list[bytes]) -> requests.Response:
    return requests.post(url, json={"inputs": [base64_of(content) for content in contents]}, timeout=SECONDS)


@pytest.fixture(scope="module")
def images(photos, tmp_path_factory) -> list[Path]:
    """Odd images, the sample images, and the lab's photos if present."""
    odd = tmp_path_factory.mktemp("odd")
    for name, content in odd_images(Image.open(photos / "oranges/orange-1.jpeg")).items():
        (odd / name).write_bytes(content)
    return [
        path for folder in (odd, PROJECT / "sample_images", LAB) for path in sorted(folder.rglob("*.[gjp][ipn][fge]*"))
    ]


@pytest.fixture(scope="module")
def model_folder(trained) -> Path:
    """The files of the champion."""
    (model_file,) = trained.folder.glob("mlartifacts/models/*/artifacts/artifacts/model.keras")
    return model_file.parent


@pytest.fixture(scope="module")
def run_folder(trained) -> Path:
    """The artifacts of the run that trained the champion."""
    return artifact(trained, runs_of(trained)[0], "evaluation.json").parent


@pytest.fixture(scope="module")
def keras_model(model_folder):
    return keras.saving.load_model(model_folder / "model.keras")


class Expected(NamedTuple):
    """The predictions of the bare Keras model with the stored references, one value per image."""

    probabilities: np.ndarray  # (images, classes)
    similarities: np.ndarray
    nearest: list[str]
    unknown: list[bool]
    unsure: list[bool]


@pytest.fixture(scope="module")
def expected(keras_model, model_folder, run_folder, images) -> Expected:
    assert len(images) >= 8 + 48
    pixels = np.stack([image_classifier.read_image(path, backbone.IMAGE_SIZE) for path in images])
    probabilities, features = keras_model.predict(pixels, verbose=0), keras_model.layers[0].predict(pixels, verbose=0)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    with np.load(model_folder / "reference_embeddings.npz") as saved:
        references, files, limit = saved["features"].astype("float32"), saved["files"], float(saved["max_novelty"])
        whitening = image_classifier.fit_whitening(references, saved["labels"], references.shape[1])
    similarities, largest = units @ references.T, probabilities.max(axis=1)
    unknown = 1 - np.max(whitening.compare(units), axis=1) * largest**0.5 > limit
    unsure = largest < Evidence.read(run_folder / "cross_validation.json").unsure_below
    nearest = files[similarities.argmax(axis=1)].tolist()
    return Expected(probabilities, similarities.max(axis=1), nearest, unknown.tolist(), unsure.tolist())


def check(predictions: list[dict], expected: Expected) -> None:
    assert [prediction["label"] for prediction in predictions] == [
        CLASSES[row.argmax()] for row in expected.probabilities
    ]
    rows = [[prediction["probabilities"][name] for name in CLASSES] for prediction in predictions]
    assert np.abs(np.array(rows) - expected.probabilities).max() < TOLERANCE
    assert [prediction["probability"] for prediction in predictions] == [max(row) for row in rows]
    similarity = np.array([prediction["similarity"] for prediction in predictions])
    assert np.abs(similarity - expected.similarities).max() < TOLERANCE
    for name in ("unknown", "unsure", "nearest"):
        assert [prediction[name] for prediction in predictions] == getattr(expected, name)


def test_served_head_is_fitted_to_all_but_the_test_images(model_folder, run_folder, keras_model, trained):
    data = Evaluation.read(run_folder / "evaluation.json").data
    _, rows = load_features(
        data.files, Path(data.folder), trained.folder / "dataset", cluster.workers(None), lambda *_: None
    )
    inputs = {digest: row.features for digest, row in rows.items()}
    train, validation, test = (
        ImageDataset(split, inputs, data, ml_workflow.BATCH_SIZE, ml_workflow.SEED, backbone.NAME) for split in SPLITS
    )
    parameters = {
        name: getattr(ml_workflow, name.upper()) for name in ("epochs", "batch_size", "learning_rate", "seed")
    }
    kernels = []
    for images in (train.merge(validation), train):
        head = fit_head(images.features, images.labels, dropout=ml_workflow.DROPOUT, **parameters)
        kernels.append(head.get_weights()[0])
    (dense,) = (layer for layer in keras_model.layers if isinstance(layer, keras.layers.Dense))
    served = dense.get_weights()[0]
    assert np.allclose(served, kernels[0], atol=1e-5)
    assert not np.allclose(served, kernels[1], atol=1e-3)
    head.load_weights(run_folder / "weights/model.weights.h5")
    assert np.array_equal(head.get_weights()[0], served)
    evidence = Evidence.read(run_folder / "cross_validation.json")
    assert keras_model.get_layer("temperature").scale == pytest.approx(1 / evidence.temperature)
    assert list(evidence.training_images) == [image.digest for image in train.images + validation.images]
    assert evidence.training_images.keys() == rows.keys() - {image.digest for image in test.images}
    with np.load(model_folder / "reference_embeddings.npz") as saved:
        assert saved["files"].tolist() == train.file_names + validation.file_names


@pytest.mark.slow
def test_keras_predict_py_and_rest_predict_the_same(trained, endpoint, images, expected):
    contents = [path.read_bytes() for path in images]
    predicted = json.loads(trained.run("--json", *map(str, images), script="predict.py").stdout)
    check(predicted, expected)
    check([post(endpoint, [content]).json()["predictions"][0] for content in contents], expected)
    check(post(endpoint, contents).json()["predictions"], expected)
    assert {prediction["unknown"] for prediction in predicted} == {True, False}


@pytest.mark.slow
def test_batch_predicts_like_keras(trained, images, expected, tmp_path):
    inputs = [base64_of(path.read_bytes()) for path in images]
    (tmp_path / "in.json").write_text(json.dumps({"inputs": inputs}))
    command = ["mlflow", "models", "predict", "-m", "models:/apples-oranges@champion", "--env-manager", "local"]
    end = trained.execute([*command, "-i", str(tmp_path / "in.json"), "-o", str(tmp_path / "out.json")])
    assert end.returncode == 0, end.stderr
    check(json.loads((tmp_path / "out.json").read_text())["predictions"], expected)


def test_rotated_photo_is_predicted_like_the_upright_one(endpoint):
    photo = Image.new("RGB", (60, 60), "red")
    photo.paste("green", (0, 0, 60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    rotated = photo.transpose(Image.Transpose.ROTATE_90)
    contents = [encoded(photo, "PNG"), encoded(rotated, "PNG", exif=exif), encoded(rotated, "PNG")]
    predictions = post(endpoint, contents).json()["predictions"]
    upright, corrected, sideways = (prediction["probability"] for prediction in predictions)
    assert corrected == pytest.approx(upright, abs=1e-6)
    assert abs(sideways - upright) > 1e-5


def test_every_unusable_image_is_reported_with_its_reason(endpoint, photos):
    good = (photos / "apples/apple-1.jpeg").read_bytes()
    bomb = encoded(Image.new("1", (10_000, 5_000)), "PNG")
    inputs = [base64_of(content) for content in (good, b"text", b"", bomb, good[:2000])]
    response = requests.post(endpoint, json={"inputs": [*inputs, "not base64!", f"data:,{inputs[0]}"]}, timeout=60)
    assert response.status_code == 400
    lines = response.json()["message"].split("; ")
    assert [line.partition(": ")[0] for line in lines] == [f"inputs[{i}]" for i in range(1, 7)]
    reasons = ["unknown format", "file is empty", "fewer than 50,000,000", "truncated", "not base64", "not base64"]
    for line, reason in zip(lines, reasons, strict=True):
        assert reason in line


@pytest.mark.parametrize(
    "body",
    [{}, [], "x", 1, {"inputs": "x" * 9999}, {"inputs": {}}, {"inputs": None}, {"inputs": 1}, {"instances": ["x"]}],
)
def test_malformed_body_is_a_client_error(endpoint, body):
    response = requests.post(endpoint, json=body, timeout=60)
    assert response.status_code == 400
    assert "inputs" in response.json()["message"]
    assert len(response.text) < 1000


def test_item_of_another_type_is_reported_in_few_bytes(endpoint, photos):
    good = base64_of((photos / "apples/apple-1.jpeg").read_bytes())
    response = requests.post(endpoint, json={"inputs": [good, None, {"b64": good}]}, timeout=60)
    assert response.status_code == 400
    assert re.findall(r"inputs\[\d]", response.json()["message"]) == ["inputs[1]", "inputs[2]"]
    assert len(response.text) < 1000


@pytest.mark.slow
def test_large_request_does_not_delay_small_ones(endpoint, photos):
    small = [(photos / "apples/apple-1.jpeg").read_bytes()]
    slow = encoded(Image.new("RGBA", (3000, 3000)).quantize(4), "PNG")
    assert post(endpoint, small).status_code == 200  # the first request is slower
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(post, endpoint, [slow] * 30)
        time.sleep(0.5)
        assert post(endpoint, small).status_code == 200
        assert not large.done()
        assert large.result().status_code == 200


def test_no_images_have_no_predictions(endpoint):
    assert requests.post(endpoint, json={"inputs": []}, timeout=60).json() == {"predictions": []}


def test_base64_with_line_breaks_is_accepted(endpoint, photos):
    content = (photos / "apples/apple-1.jpeg").read_bytes()
    lines = requests.post(endpoint, json={"inputs": [base64.encodebytes(content).decode()]}, timeout=60)
    assert lines.json() == post(endpoint, [content]).json()


@pytest.mark.slow
def test_thousand_images_are_predicted_in_order(endpoint, photos):
    contents = [path.read_bytes() for path in sorted(photos.glob("*/*"))] * 50
    probabilities = [prediction["probability"] for prediction in post(endpoint, contents).json()["predictions"]]
    assert len(probabilities) == 1000
    assert np.abs(np.array(probabilities).reshape(50, 20) - probabilities[:20]).max() < TOLERANCE


@pytest.mark.slow
def test_eight_concurrent_clients_get_their_own_predictions(endpoint, photos):
    contents = [path.read_bytes() for path in sorted(photos.glob("*/*"))]
    alone = [post(endpoint, [content]).json()["predictions"][0]["probability"] for content in contents]
    with ThreadPoolExecutor(8) as clients:
        responses = list(clients.map(lambda content: post(endpoint, [content]), contents * 10))
    assert {response.status_code for response in responses} == {200}
    probabilities = [response.json()["predictions"][0]["probability"] for response in responses]
    assert np.abs(np.array(probabilities).reshape(10, 20) - alone).max() < TOLERANCE


@pytest.mark.slow
def test_mutated_images_have_a_prediction_or_a_reason(trained, endpoint, photos, tmp_path):
    random = np.random.default_rng(7)
    seeds = list(odd_images(Image.open(photos / "apples/apple-1.jpeg").resize((48, 48))).values())
    seeds += [
        encoded(Image.open(photos / "apples/apple-2.jpeg").resize((48, 48)), kind) for kind in ("WEBP", "TIFF", "BMP")
    ]
    contents = [mutate(seeds[i % len(seeds)], random) for i in range(500)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i:03}.jpeg").write_bytes(content)
    end = trained.run("--json", str(tmp_path), script="predict.py")
    predicted = json.loads(end.stdout)
    responses = [post(endpoint, [content]) for content in contents]
    assert 50 < sum(response.status_code == 200 for response in responses) < 450
    for prediction, response in zip(predicted, responses, strict=True):
        if "error" in prediction:
            expected = 400, f"inputs[0]: {prediction['error']}"
            assert (response.status_code, response.json()["message"]) == expected
        else:
            probability = response.json()["predictions"][0]["probability"]
            assert probability == pytest.approx(prediction["probability"], abs=TOLERANCE)


def documented_block(language: str, word: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (PROJECT / "docs/deploy.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block


@pytest.mark.parametrize(("language", "program"), [("bash", ["bash", "-ec"]), ("python", ["python", "-c"])])
def test_documented_requests_work(trained, endpoint, photos, language, program):
    shutil.copy(photos / "oranges/orange-3.jpeg", trained.folder / "photo.jpeg")
    code = documented_block(language, "/invocations").replace("http://127.0.0.1:5001/invocations", endpoint)
    code = code.replace("sample_images/apples/synthetic-apple-09.jpeg", "photo.jpeg")
    end = trained.execute([*program, code])
    assert end.returncode == 0, end.stderr
    assert re.search(r"""["']label["']: ["']oranges["']""", end.stdout)


WRONG = """
import mlflow
from workflow.image_classifier import ImageClassifier

class Wrong(ImageClassifier):
    def classify(self, images):
        predictions = super().classify(images)
        for prediction in predictions:
            prediction.label = min(prediction.probabilities, key=prediction.probabilities.get)
        return predictions

mlflow.models.set_model(Wrong())
"""
BROKEN = """
import mlflow
from workflow.image_classifier import ImageClassifier

class Broken(ImageClassifier):
    def load_context(self, context):
        no_such_package.load()

mlflow.models.set_model(Broken())
"""


def serve_with(project: Project, code: str) -> None:
    """Make the project's runs package this code with the model, instead of image_classifier.py."""
    (project.home / "served.py").write_text(code)
    file = str(project.home / "served.py")
    project.before = f"import ml_workflow; ml_workflow.image_classifier.__file__ = {file!r}"


@pytest.mark.slow
@pytest.mark.refused("model: its serving code and its head disagree")
def test_model_served_differently_is_not_registered(project, photos, prefect):
    serve_with(project, WRONG)
    end = project.run("--source", str(photos), **prefect)
    assert end.returncode == 1
    assert "predict different classes" in end.stderr.splitlines()[-1]
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    assert not client.search_registered_models()


@pytest.mark.slow
@pytest.mark.refused("model: it cannot be served")
def test_unservable_model_is_not_registered(project, photos, prefect):
    serve_with(project, BROKEN)
    end = project.run("--source", str(photos), "--epochs", "1", **prefect)
    assert end.returncode == 1
    assert "name 'no_such_" in end.stderr.splitlines()[-1]
    assert [run.info.status for run in runs_of(project)] == ["FAILED"]
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    assert not client.search_registered_models()


@pytest.mark.slow
def test_mlflow_project_makes_exactly_one_run(project, photos, prefect):
    command = ["mlflow", "run", str(PROJECT), "-P", "epochs=2", "-P", f"source={photos}", "--env-manager", "local"]
    end = project.execute([*command, "--experiment-name", "ml-workflow"], **prefect)
    assert end.returncode == 0, end.stderr
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2"
    assert run.data.tags["prefect_flow_run"] in run.data.tags["prefect_url"]
    assert run.data.metrics["test_accuracy"] >= 0
    assert client.get_model_version("apples-oranges", "1").run_id == run.info.run_id


@pytest.mark.slow
def test_mlflow_project_runs_from_a_git_repository(project, photos, prefect, unused_port):
    if subprocess.run(["git", "-C", str(PROJECT), "rev-parse"], capture_output=True).returncode:
        pytest.skip("needs a git checkout")
    serve = ["daemon", "--listen=127.0.0.1", f"--port={unused_port}", "--export-all", f"--base-path={PROJECT.parent}"]
    daemon = subprocess.Popen(["git", *serve], stderr=subprocess.DEVNULL)
    try:
        address = f"git://127.0.0.1:{unused_port}/{PROJECT.name}"
        command = ["mlflow", "run", address, "-P", "epochs=2", "-P", f"source={photos}", "--env-manager", "local"]
        time.sleep(1)
        end = project.execute([*command, "--experiment-name", "ml-workflow"], **prefect)
    finally:
        daemon.terminate()
        daemon.wait(30)
    assert end.returncode == 0, end.stderr
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ml-workflow").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.source.git.repoURL"] == address


@pytest.mark.slow
def test_docker_build_context_is_complete(trained, tmp_path):
    command = ["mlflow", "models", "generate-dockerfile", "-m", "models:/apples-oranges@champion"]
    end = trained.execute([*command, "-d", str(tmp_path / "context")])
    assert end.returncode == 0, end.stderr
    inside = {
        str(path.relative_to(tmp_path / "context")) for path in (tmp_path / "context").rglob("*") if path.is_file()
    }
    parts = {"MLmodel", "image_classifier.py", "requirements.txt", "artifacts/model.keras"}
    parts.add("artifacts/reference_embeddings.npz")
    assert inside >= {"Dockerfile"} | {f"model_dir/{part}" for part in parts}
    assert "COPY model_dir /opt/ml/model" in (tmp_path / "context/Dockerfile").read_text()
    model = mlflow.pyfunc.load_model(str(tmp_path / "context/model_dir"))
    photo = base64_of(sorted((PROJECT / "sample_images").glob("*/*.jpeg"))[0].read_bytes())
    assert model.predict([photo])[0].label in ("apples", "oranges")


def test_mlflow_project_has_the_defaults_of_the_flow():
    main = yaml.safe_load((PROJECT / "MLproject").read_text())["entry_points"]["main"]
    defaults = {name: parameter["default"] for name, parameter in main["parameters"].items()}
    flow = inspect.signature(ml_workflow.ml_workflow.fn).parameters
    expected = {name: parameter.default for name, parameter in flow.items()} | {"dask": ""}  # MLflow has no None
    del expected["only_new"]  # a served flow has it, but the command line does not
    assert defaults == expected
