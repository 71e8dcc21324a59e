"""The LiteRT export: it predicts what the model predicts."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from support.colors import COLORS, SIZE, load_classifier, save_model
from support.project import PROJECT
from workflow.errors import WorkflowError
from workflow.image_classifier import ImagePrediction, encode_jpeg, read_image
from workflow.serving import litert
from workflow.serving.litert_classifier import DESCRIPTION, FLOAT, FOLDER, LiteRTClassifier, load_export
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
    maps = ["--explain", str(tmp_path / "maps")]  # with Keras
    expected = json.loads(trained.run("--json", *map(str, files), *maps, script="predict.py").stdout)
    classifier = LiteRTClassifier((tmp_path / "phone/model.tflite").read_bytes(), about)
    for path, prediction in zip(files, expected, strict=True):
        (exported,) = classifier.classify([read_image(path, 336)])
        assert exported.probabilities == pytest.approx(prediction["probabilities"], abs=1e-3)
        assert exported.similarity == pytest.approx(prediction["similarity"], abs=1e-3)
        names = "label", "unknown", "nearest", "unsure"
        assert [getattr(exported, name) for name in names] == [prediction[name] for name in names]
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
    assert "no photos from the run" in end.stdout
    assert "ms per photo" not in end.stdout
    assert not (tmp_path / "phone/model-8bit.tflite").exists()
    assert json.loads((tmp_path / "phone/model.json").read_text())["unknown_above"] is None


def register(classifier, **fields) -> RegisteredModel:
    return RegisteredModel(classifier, "Keras", "models:/a/1", "", "none", "", **fields)


def test_labels_have_a_line_each_and_old_files_are_removed(tmp_path, tracking_uri, monkeypatch):
    import keras

    classifier = load_classifier(save_model(tmp_path), has_references=False)
    classifier.class_names = ["a", "b\nc"]
    lines = litert.export(register(classifier), tmp_path / "phone")
    assert (tmp_path / "phone/labels.txt").read_text() == "a\nb\\nc\n"
    assert "not stored in MLflow" in lines[-1]

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "export", stop)
    with pytest.raises(KeyboardInterrupt):
        litert.export(register(classifier), tmp_path / "phone")
    assert list((tmp_path / "phone").iterdir()) == []


def test_unwritable_folder_is_reported_in_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("")
    end = trained.run("--export", str(tmp_path / "file"), script="predict.py")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith(f"predict.py: {tmp_path / 'file'} cannot be written")


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    """A folder with an export of the model in support/colors.py, compared on photos of its colors."""
    folder = tmp_path_factory.mktemp("colors")
    write_export(load_classifier(save_model(folder), max_novelty=0.5, unsure_below=0.8), folder / FOLDER)
    return folder


def write_export(classifier, folder: Path) -> list[ImagePrediction]:
    """Write an export to a folder, and return its predictions for COLORS."""
    folder.mkdir()
    photos = [encode_jpeg(np.full((SIZE, SIZE, 3), color, "uint8")) for color in COLORS.values()]
    expected = litert.predict(classifier, photos)
    predictions, agreement = litert.convert(register(classifier), folder / FLOAT, photos, expected)
    litert.write_description(register(classifier), folder, {FLOAT: agreement})
    return predictions.predictions


@pytest.mark.parametrize("has_references", [True, False])
def test_exported_network_agrees_with_packaged_code(tmp_path, has_references):
    classifier = load_classifier(save_model(tmp_path), has_references, max_novelty=0.5, unsure_below=0.8)
    exported = write_export(classifier, tmp_path / "export")
    photos = [encode_jpeg(np.full((SIZE, SIZE, 3), color, "uint8")) for color in COLORS.values()]
    expected = litert.predict(classifier, photos).predictions
    for one, other in zip(exported, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
        assert (one.label, one.unknown, one.unsure) == (other.label, other.unknown, other.unsure)
        assert (one.similarity is not None) == has_references
        assert one.similarity == pytest.approx(other.similarity, abs=1e-3)
    assert any(prediction.unknown for prediction in exported) == has_references


def change(folder: Path, **fields) -> None:
    """Change fields of an export's model.json."""
    description = json.loads((folder / DESCRIPTION).read_bytes())
    (folder / DESCRIPTION).write_text(json.dumps(description | fields))


@pytest.mark.parametrize("difference", [0.0009, 0.0011])
def test_export_is_used_where_its_comparison_holds(tmp_path, colors, difference):
    shutil.copytree(colors, tmp_path / "model")
    agreement = json.loads((colors / FOLDER / DESCRIPTION).read_bytes())["compared"][FLOAT]
    change(tmp_path / "model" / FOLDER, compared={FLOAT: agreement | {"largest difference": difference}})
    assert isinstance(load_export(str(tmp_path / "model")), LiteRTClassifier) == (difference < 0.001)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (FLOAT, None, "no LiteRT export"),
        (DESCRIPTION, None, "no LiteRT export"),
        (FLOAT, b"truncated", "damaged"),
        (DESCRIPTION, b"{", "damaged"),
        (DESCRIPTION, b"[]", "damaged"),
        (DESCRIPTION, b"{}", "damaged"),
    ],
)
@pytest.mark.survived("predict: a damaged or missing LiteRT export")
def test_damaged_export_is_not_used(tmp_path, colors, file, content, reason):
    shutil.copytree(colors, tmp_path / "model")
    if content is None:
        (tmp_path / "model" / FOLDER / file).unlink()
    else:
        (tmp_path / "model" / FOLDER / file).write_bytes(content)
    assert reason in load_export(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("reading_version", 0, "another version"),
        ("photos", 0, "not compared"),
        ("same label", 3, "differs"),
        ("same unknown", 3, "differs"),
    ],
)
def test_export_that_may_differ_is_not_used(tmp_path, colors, field, value, reason):
    shutil.copytree(colors, tmp_path / "model")
    agreement = json.loads((colors / FOLDER / DESCRIPTION).read_bytes())["compared"][FLOAT]
    fields = {field: value} if field == "reading_version" else {"compared": {FLOAT: agreement | {field: value}}}
    change(tmp_path / "model" / FOLDER, **fields)
    assert reason in load_export(str(tmp_path / "model"))


def test_threads_classify_at_the_same_time(colors):
    classifier = load_export(str(colors))
    images = [np.full((SIZE, SIZE, 3), color, "uint8") for color in COLORS.values()]
    expected = classifier.classify(images)
    with ThreadPoolExecutor(4) as threads:
        for predictions in threads.map(classifier.classify, [images] * 20):
            assert predictions == expected
    assert classifier.classify([]) == []


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
    def prediction(probability: float, unknown: bool) -> ImagePrediction:
        probabilities = {"a": probability, "b": 1 - probability}
        label = max(probabilities, key=probabilities.__getitem__)
        return ImagePrediction(label=label, probability=probability, probabilities=probabilities, unknown=unknown)

    expected, predictions = [prediction(0.9, True), prediction(0.2, False)], [prediction(0.4, True)] * 2
    agreement = litert.compare(expected, predictions)
    assert agreement == {"photos": 2, "same label": 1, "same unknown": 1, "largest difference": pytest.approx(0.5)}


@pytest.mark.refused("predict.py --export: the folder has the user's own labels.txt")
@pytest.mark.parametrize("description", [None, "", "[1]", "7", '{"labels": []}'])
def test_files_that_no_export_wrote_are_not_replaced(tmp_path, description):
    (tmp_path / "notes.txt").write_text("mine")
    litert.check_folder(tmp_path)
    litert.check_folder(tmp_path / "new")
    (tmp_path / "labels.txt").write_text("mine")
    if description is not None:
        (tmp_path / "model.json").write_text(description)
    with pytest.raises(WorkflowError, match="another folder"):
        litert.check_folder(tmp_path)
    (tmp_path / "model.json").write_text('{"compared": {}}')
    litert.check_folder(tmp_path)
