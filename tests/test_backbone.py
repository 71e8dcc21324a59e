import functools
import http.server
import json

import ml_workflow
import network
from tracking import WorkflowError
from conftest import closing_server, runs_of

import keras
import numpy as np
import pytest

WEIGHTS = "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5"


def test_backbone_takes_raw_pixels_and_only_its_last_layer_learns(monkeypatch):
    monkeypatch.setattr(network, "pretrained", functools.partial(network.pretrained, weights=None))
    model = network.build_model(3, 64, ml_workflow.FILTERS, ml_workflow.DROPOUT, "mobilenet")
    probabilities = model(np.full((2, 31, 90, 3), 255, "uint8"), training=False).numpy()
    assert probabilities.shape == (2, 3)
    assert np.allclose(probabilities.sum(1), 1)
    assert [weights.shape for weights in model.trainable_weights] == [(576, 3), (3,)]


@pytest.fixture
def weights_url(tmp_path, monkeypatch):
    """A loopback server in the place of Keras's; its file of weights is not the one that Keras knows."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / WEIGHTS).write_bytes(b"other weights")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.log_message = lambda *_: None
    with closing_server(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr("keras.src.applications.mobilenet_v3.BASE_WEIGHT_PATH", url)
        yield url


@pytest.mark.refused("backbone: weights that are not those of Keras")
def test_weights_with_another_digest_are_refused_in_one_line(weights_url):
    with pytest.raises(WorkflowError, match=r"weights of the backbone cannot be had .*ncomplete or corrupted"):
        network.pretrained(ml_workflow.BACKBONE_SIZE)


@pytest.mark.refused("backbone: the kept weights are damaged, and Keras is out of reach")
def test_damaged_weights_in_the_cache_are_fetched_again_not_used(weights_url, tmp_path, unused_port, monkeypatch):
    monkeypatch.setattr("keras.src.applications.mobilenet_v3.BASE_WEIGHT_PATH", f"http://127.0.0.1:{unused_port}/")
    kept = tmp_path / "keras" / "models" / WEIGHTS
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"damaged")
    with pytest.raises(WorkflowError, match=r"URL fetch failure .*: check the network, or do without --backbone"):
        network.pretrained(ml_workflow.BACKBONE_SIZE)


@pytest.mark.slow
@pytest.mark.refused("backbone: no internet")
def test_backbone_without_internet_ends_in_one_line_and_a_failed_run(project, photos, prefect, unused_port):
    settings = prefect | {"HTTPS_PROXY": f"http://127.0.0.1:{unused_port}", "KERAS_HOME": str(project.home / "keras")}
    end = project.run("--source", str(photos), "--backbone", "mobilenet", **settings)
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith("ml_workflow.py: the weights of the backbone cannot be had (")
    assert [run.info.status for run in runs_of(project)] == ["FAILED"]


@pytest.mark.slow
def test_model_with_a_backbone_is_registered_and_predicts(project, photos, prefect):
    project.replace("network.py", 'weights: str | None = "imagenet"', "weights: str | None = None")
    project.replace("gate.py", "return accuracy > count / total, (", "return True, (")  # nobody learned anything
    end = project.run("--source", str(photos), "--backbone", "mobilenet", "--epochs", "2", **prefect)
    assert end.returncode == 0, end.stderr
    (run,) = runs_of(project)
    assert run.data.params["backbone"] == "mobilenet"
    answers = project.run(str(photos), "--json", script="predict.py")
    assert answers.returncode == 0, answers.stderr
    assert len(json.loads(answers.stdout)) == 20
    model = keras.saving.load_model(project.folder / "models" / run.info.run_id / "model.keras")
    assert model.get_layer(index=0).output.shape == (None, ml_workflow.BACKBONE_SIZE, ml_workflow.BACKBONE_SIZE, 3)
