"""The LiteRT export: it predicts what the model predicts."""

import json
import shutil
from types import SimpleNamespace

from support.colors import COLORS, SIZE, load_classifier, save_model
from support.project import PROJECT
from workflow.image_classifier import read_image
from workflow.serving import litert
from workflow.serving.registered_model import RegisteredModel

import numpy as np
import pytest


@pytest.mark.slow
def test_exported_files_predict_what_predict_py_predicts(trained, photos, tmp_path):
    end = trained.run("--export", str(tmp_path / "phone"), script="predict.py")
    assert end.returncode == 0, end.stderr
    assert end.stderr == ""
    about = json.loads((tmp_path / "phone/model.json").read_text())
    assert about["labels"] == (tmp_path / "phone/labels.txt").read_text().split() == ["apples", "oranges"]
    files = sorted(photos.rglob("*.jpeg")) + sorted((PROJECT / "sample_images").glob("*/*.jpeg"))[::6]
    expected = json.loads(trained.run("--json", *map(str, files), script="predict.py").stdout)
    network = litert.open_network(tmp_path / "phone/model.tflite")
    unknown = set()
    for path, prediction in zip(files, expected, strict=True):
        outputs = network(read_image(path, 336)[None].astype("float32"))
        probabilities = dict(zip(about["labels"], outputs["probabilities"][0].tolist(), strict=True))
        assert probabilities == pytest.approx(prediction["probabilities"], abs=1e-3)
        assert outputs["similarity"][0] == pytest.approx(prediction["similarity"], abs=1e-3)
        unknown.add((bool(outputs["novelty"][0] > about["unknown_above"]), prediction["unknown"]))
        assert (max(probabilities.values()) < about["unsure_below"]) == prediction["unsure"]
    assert unknown <= {(True, True), (False, False)}
    agreement = about["compared"]["model.tflite"]
    assert [agreement[name] for name in ("photos", "same label", "same unknown")] == [20, 20, 20]
    if litert.EIGHT_BIT in about["compared"]:
        sizes = [(tmp_path / "phone" / name).stat().st_size for name in (litert.EIGHT_BIT, litert.FLOAT)]
        assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.slow
def test_small_network_is_exported_without_similarity(project, photos, prefect, tmp_path):
    shutil.copytree(photos, tmp_path / "mine")
    end = project.run("--source", str(tmp_path / "mine"), "--backbone", "none", "--epochs", "30", **prefect)
    assert end.returncode == 0, end.stderr
    shutil.rmtree(tmp_path / "mine")
    model = ["--model", "models:/apples-oranges/1"]
    end = project.run("--export", str(tmp_path / "phone"), *model, script="predict.py")
    assert end.returncode == 0, end.stderr
    assert "no photos of the run" in end.stdout
    assert "ms per photo" not in end.stdout
    assert not (tmp_path / "phone/model-8bit.tflite").exists()
    assert json.loads((tmp_path / "phone/model.json").read_text())["unknown_above"] is None


def test_labels_have_a_line_each_and_old_files_are_removed(tmp_path, tracking_uri, monkeypatch):
    import keras

    pixels = keras.Input((8, 8, 3))
    model = keras.Model(pixels, keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(pixels)))
    classifier = SimpleNamespace(image_size=8, model=model)
    served = SimpleNamespace(unwrap_python_model=lambda: classifier, model_config={"class_names": ["a", "b\nc", "d"]})
    registered = RegisteredModel(served, "models:/a/1", "", "none", "")
    litert.export(registered, tmp_path / "phone")
    assert (tmp_path / "phone/labels.txt").read_text() == "a\nb\\nc\nd\n"

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "export", stop)
    with pytest.raises(KeyboardInterrupt):
        litert.export(registered, tmp_path / "phone")
    assert list((tmp_path / "phone").iterdir()) == []


def test_unwritable_folder_is_reported_in_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("")
    end = trained.run("--export", str(tmp_path / "file"), script="predict.py")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith(f"predict.py: {tmp_path / 'file'} cannot be written")


@pytest.mark.parametrize("has_references", [True, False])
def test_exported_network_agrees_with_packaged_code(tmp_path, has_references):
    classifier = load_classifier(save_model(tmp_path), has_references, max_novelty=0.5, unsure_below=0.8)
    litert.build(classifier).export(str(tmp_path / "model.tflite"), format="litert", verbose=False)
    network, max_novelty = litert.open_network(tmp_path / "model.tflite"), litert.get_max_novelty(classifier)
    pixels = [np.full((SIZE, SIZE, 3), colour, "uint8") for colour in COLORS.values()]
    expected = classifier.classify(pixels)
    exported = litert.predict(network, np.stack(pixels), max_novelty if has_references else None)
    probabilities = np.array([[*prediction.probabilities.values()] for prediction in expected])
    assert exported.probabilities == pytest.approx(probabilities, abs=1e-4)
    assert exported.unknown.tolist() == [bool(prediction.unknown) for prediction in expected]
    assert exported.unknown.any() == has_references
    assert (exported.probabilities.max(axis=1) < 0.8).tolist() == [prediction.unsure for prediction in expected]
    if has_references:
        similarities = [network(image[None].astype("float32"))["similarity"][0] for image in pixels]
        assert similarities == pytest.approx([prediction.similarity for prediction in expected], abs=1e-3)


@pytest.mark.parametrize("name", ["references", "known"])
def test_model_of_an_earlier_version_is_exported(tmp_path, name):
    classifier = load_classifier(save_model(tmp_path))
    earlier = SimpleNamespace(model=classifier.model, image_size=SIZE, **{name: classifier.reference_embeddings})
    if name == "references":
        earlier.whitening = tuple(classifier.whitening)
    image = np.full((1, SIZE, SIZE, 3), COLORS["dark red"], "float32")
    outputs, expected = litert.build(earlier)(image), litert.build(classifier)(image)
    assert float(outputs["similarity"][0]) == pytest.approx(float(expected["similarity"][0]))
    novelty = expected["novelty"][0] if name == "references" else 1 - expected["similarity"][0]
    assert float(outputs["novelty"][0]) == pytest.approx(float(novelty))


@pytest.mark.parametrize(
    ("classifier", "max_novelty"),
    [({"max_novelty": 0.4}, 0.4), ({"max_novelty": np.nan}, None), ({"limit": 0.7}, 0.3), ({}, None)],
    ids=["threshold", "no threshold", "version 1.0", "no backbone"],
)
def test_threshold_of_any_version_is_found(classifier, max_novelty):
    assert litert.get_max_novelty(SimpleNamespace(**classifier)) == (max_novelty and pytest.approx(max_novelty))


def test_differing_predictions_are_counted():
    expected = litert.NetworkPredictions(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, False]), 1.0)
    predictions = litert.NetworkPredictions(np.array([[0.4, 0.6], [0.2, 0.8]]), np.array([True, True]), 1.0)
    agreement = litert.compare(expected, predictions)
    assert agreement == {"photos": 2, "same label": 1, "same unknown": 1, "largest difference": pytest.approx(0.5)}
