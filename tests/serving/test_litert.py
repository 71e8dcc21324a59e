"""The export for phones: it gives the answers of the model, and says how to use it."""

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
def test_exported_files_give_the_answers_of_predict(trained, photos, tmp_path):
    end = trained.run("--export", str(tmp_path / "phone"), script="predict.py")
    assert end.returncode == 0, end.stderr
    assert end.stderr == ""
    assert "20 of 20 photos get the same label, 20 are known or unknown as before" in end.stdout
    about = json.loads((tmp_path / "phone/model.json").read_text())
    assert about["labels"] == (tmp_path / "phone/labels.txt").read_text().split() == ["apples", "oranges"]
    files = sorted(photos.rglob("*.jpeg")) + sorted((PROJECT / "sample_images").glob("*/*.jpeg"))[::6]
    expected = json.loads(trained.run("--json", *map(str, files), script="predict.py").stdout)
    network = litert.open_network(tmp_path / "phone/model.tflite")
    unknown = set()
    for path, answer in zip(files, expected, strict=True):
        found = network(read_image(path, 336)[None].astype("float32"))
        probabilities = dict(zip(about["labels"], found["probabilities"][0].tolist(), strict=True))
        assert probabilities == pytest.approx(answer["probabilities"], abs=1e-3)
        assert found["similarity"][0] == pytest.approx(answer["similarity"], abs=1e-3)
        unknown.add((bool(found["novelty"][0] > about["unknown_above"]), answer["unknown"]))
        assert (max(probabilities.values()) < about["unsure_below"]) == answer["unsure"]
    assert unknown <= {(True, True), (False, False)}
    assert about["compared"]["model.tflite"]["photos"] == 20
    if litert.EIGHT_BIT in about["compared"]:
        sizes = [(tmp_path / "phone" / name).stat().st_size for name in (litert.EIGHT_BIT, litert.FLOAT)]
        assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.slow
def test_small_network_is_exported_without_a_similarity(project, photos, prefect, tmp_path):
    shutil.copytree(photos, tmp_path / "mine")
    end = project.run("--source", str(tmp_path / "mine"), "--backbone", "none", "--epochs", "30", **prefect)
    assert end.returncode == 0, end.stderr
    shutil.rmtree(tmp_path / "mine")
    model = ["--model", "models:/apples-oranges/1"]
    end = project.run("--export", str(tmp_path / "phone"), *model, script="predict.py")
    assert end.returncode == 0, end.stderr
    assert "no photo of the run is at hand to compare the answers" in end.stdout
    assert "ms per photo" not in end.stdout
    assert not (tmp_path / "phone/model-8bit.tflite").exists()
    assert json.loads((tmp_path / "phone/model.json").read_text())["unknown_above"] is None


def test_each_label_has_a_line_and_no_other_models_file_stays(tmp_path, tracking_uri, monkeypatch):
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


def test_folder_that_cannot_be_written_is_told(trained, tmp_path):
    (tmp_path / "file").write_text("")
    end = trained.run("--export", str(tmp_path / "file"), script="predict.py")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1] == f"predict.py: {tmp_path / 'file'} cannot be written: File exists"


@pytest.mark.parametrize("has_references", [True, False])
def test_exported_network_agrees_with_the_packaged_code(tmp_path, has_references):
    classifier = load_classifier(save_model(tmp_path), has_references, max_novelty=0.5, unsure_below=0.8)
    litert.build(classifier).export(str(tmp_path / "model.tflite"), format="litert", verbose=False)
    network, limit = litert.open_network(tmp_path / "model.tflite"), litert.get_max_novelty(classifier)
    pixels = [np.full((SIZE, SIZE, 3), colour, "uint8") for colour in COLORS.values()]
    expected = classifier.classify(pixels)
    found = litert.ask(network, np.stack(pixels), limit if has_references else None)
    assert found.probabilities == pytest.approx(np.array([[*one.probabilities.values()] for one in expected]), abs=1e-4)
    assert found.unknown.tolist() == [bool(one.unknown) for one in expected]
    assert found.unknown.any() == has_references
    assert (found.probabilities.max(axis=1) < 0.8).tolist() == [one.unsure for one in expected]
    if has_references:
        similarities = [network(one[None].astype("float32"))["similarity"][0] for one in pixels]
        assert similarities == pytest.approx([one.similarity for one in expected], abs=1e-3)


@pytest.mark.parametrize(
    ("classifier", "limit"),
    [({"max_novelty": 0.4}, 0.4), ({"max_novelty": np.nan}, None), ({"limit": 0.7}, 0.3), ({}, None)],
    ids=["today", "bursts alone", "version 1", "no backbone"],
)
def test_limit_is_that_of_any_version(classifier, limit):
    assert litert.get_max_novelty(SimpleNamespace(**classifier)) == (limit if limit is None else pytest.approx(limit))


def test_answers_that_differ_are_counted():
    own = litert.Answers(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, False]), 1.0)
    other = litert.Answers(np.array([[0.4, 0.6], [0.2, 0.8]]), np.array([True, True]), 1.0)
    told = litert.compare(own, other)
    assert told == {"photos": 2, "same label": 1, "same unknown": 1, "largest difference": pytest.approx(0.5)}
