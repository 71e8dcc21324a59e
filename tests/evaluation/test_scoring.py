"""Scores on class folders, and comparisons of two models on the same images."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.evaluation import metrics, scoring
from workflow.evaluation.scoring import Score, find_label

import pytest

CLASSES = ["apples", "oranges"]
FILES = ["apples/1", "apples/2", "apples/3", "oranges/1", "oranges/2"]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("mine/apples/1.jpg", "apples"),
        ("mine/apples/garden/1.jpg", "apples"),
        ("mine/apples/oranges/1.jpg", "apples"),
        ("mine/test/apples/1.jpg", "apples"),
        ("mine/pears/1.jpg", ""),
        ("mine/caf\udce9/1.jpg", "caf\\xe9"),
        ("apples/garden/oranges/1.jpg", "oranges"),
        ("apples/garden/1.jpg", "apples"),
        ("http://host/apples/1.jpg", "apples"),
    ],
)
def test_label_is_the_first_class_on_the_path(tmp_path, monkeypatch, image, label):
    monkeypatch.chdir(tmp_path)
    folders = [(tmp_path / folder).parts for folder in ("mine", "apples")]
    assert find_label(image, folders, ["apples", "oranges", "caf\\xe9"]) == label


def predict(folder: Path, apples: Iterable[float], files=FILES, **fields: Iterable) -> list[dict]:
    """Return predictions for files, given the probability of apples for each; each file has its own content."""
    predictions = []
    for number, (file, probability) in enumerate(zip(files, apples, strict=True)):
        probabilities = {"apples": probability, "oranges": 1 - probability}
        label = max(probabilities, key=probabilities.get)
        prediction = {"image": str(folder / file), "label": label, "probability": probabilities[label]}
        prediction |= {"probabilities": probabilities, "digest": f"digest of {file}"}
        predictions.append(prediction | {name: values[number] for name, values in fields.items()})
    return predictions


def score(folder: Path, predictions: list[dict], uri="models:/a/1", class_names=CLASSES, seen=(), copy_of=()) -> Score:
    folder.mkdir(exist_ok=True)
    return scoring.score(uri, predictions, [str(folder)], class_names, seen, dict(copy_of))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("class_form", ["NFC", "NFD"])
def test_label_is_found_however_its_accents_are_stored(tmp_path, form, class_form):
    name = unicodedata.normalize(class_form, "äpfel")
    image = str(tmp_path / unicodedata.normalize(form, "äpfel") / "1.jpg")
    assert find_label(image, [tmp_path.parts], [name]) == name


@pytest.mark.survived("predict.py --score: smaller or re-encoded copies beside each photo")
def test_copies_of_an_image_count_once(tmp_path):
    predictions = predict(tmp_path / "mine", [0.9, 0.8, 0.4, 0.3, 0.1])
    copies = {item["digest"]: predictions[number // 2]["digest"] for number, item in enumerate(predictions)}
    seen = [predictions[1]["digest"]]
    values = score(tmp_path / "mine", predictions, copy_of=copies, seen=seen).values
    assert (values["images"], values["copies"], values["training_images"]) == (3, 2, 1)
    assert values["interval"] == metrics.confidence_interval(values["correct"], 3)


@pytest.mark.parametrize(
    ("unsure", "sure", "line"),
    [
        ([False, False, True, False, False], {"images": 4, "correct": 4}, "Excluding 1 unsure: 4 of 4 correct"),
        ([False, True, False, True, True], {"images": 2, "correct": 1}, "Excluding 3 unsure: 1 of 2 correct"),
        ([True] * 5, {"images": 0, "correct": 0}, None),
        ([None] * 5, None, None),
    ],
    ids=["one is unsure", "three are unsure", "all are unsure", "no limit"],
)
def test_score_counts_the_correct_sure_predictions(tmp_path, unsure, sure, line):
    unknown = [True, False, False, False, False]
    predictions = predict(tmp_path / "mine", [0.9, 0.8, 0.4, 0.3, 0.1], unsure=unsure, unknown=unknown)
    predictions.append({"image": str(tmp_path / "mine/apples/4"), "error": "damaged"})
    values = score(tmp_path / "mine", predictions).values
    assert (values["images"], values["correct"], values["sure"]) == (5, 4, sure)
    assert values["recall"] == {"apples": pytest.approx(2 / 3), "oranges": 1}
    assert values["confusions"] == [{"class": "apples", "predicted": "oranges", "images": 1}]
    assert (values["unknown"], values["not_readable"], values["in_other_folders"]) == (1, 1, 0)
    described = "\n".join(scoring.describe({"score": values}))
    assert ("Excluding" in described) == (line is not None)
    assert (line or "") in described


@pytest.mark.survived("predict.py --score: copies, a class without images, and training images")
def test_score_lists_its_limitations(tmp_path):
    predictions = predict(tmp_path / "mine", [0.9] * 3, ["apples/1", "apples/copy", "pears/1"])
    predictions[1]["digest"] = predictions[0]["digest"]
    values = score(tmp_path / "mine", predictions, seen={"digest of apples/1"}).values
    counts = {name: values[name] for name in ("images", "copies", "training_images", "in_other_folders")}
    assert counts == {"images": 1, "copies": 1, "training_images": 1, "in_other_folders": 1}
    assert values["classes_without_images"] == ["oranges"]
    assert sum("1 image(s)" in line for line in scoring.describe({"score": values})) == 3


@pytest.mark.refused("predict.py --score: no image is in a class folder")
def test_images_outside_class_folders_cannot_be_scored(tmp_path):
    with pytest.raises(WorkflowError, match="apples or oranges"):
        score(tmp_path, predict(tmp_path, [0.9], ["pears/1"]))


@pytest.mark.refused("predict.py --score: a folder that does not exist")
def test_unreadable_images_cannot_be_scored(tmp_path):
    with pytest.raises(WorkflowError, match="no image is readable"):
        score(tmp_path, [{"image": str(tmp_path / "absent"), "error": "No such file or directory"}])


@pytest.mark.parametrize(
    ("count", "seen", "images", "p", "line"),
    [
        (6, (), 6, 0.03125, "significant"),
        (5, (), 5, 0.0625, "due to chance"),
        (6, ("digest of apples/1",), 5, 0.0625, "due to chance"),
        (1, ("digest of apples/1",), 0, 1.0, "None of these images is new"),
    ],
)
def test_models_are_compared_on_images_new_to_both(tmp_path, count, seen, images, p, line):
    files = [f"apples/{number + 1}" for number in range(count)]
    better = score(tmp_path / "mine", predict(tmp_path / "mine", [0.9] * count, files), seen=seen)
    worse = score(tmp_path / "mine", predict(tmp_path / "mine", [0.1] * count, files), "models:/a/2")
    for one, other, only_correct in ((better, worse, (images, 0)), (worse, better, (0, images))):
        compared = scoring.compare(one, other)
        assert (compared["images"], compared["training_images"]) == (images, count - images)
        assert (compared["only_model_correct"], compared["only_against_correct"]) == only_correct
        assert compared["p"] == p
        assert [row["image"] for row in compared["differences"]] == [str(tmp_path / "mine" / f) for f in files][
            -images:
        ][:images]
    described = scoring.describe({"score": better.values, "against": worse.values, "comparison": compared})
    assert line in described[-1]


def test_many_differences_are_counted(tmp_path):
    count = scoring.MAX_DIFFERENCES + 2
    files = [f"apples/{number}" for number in range(count)]
    first, second = (
        score(tmp_path / "m", predict(tmp_path / "m", [p] * count, files), uri) for uri, p in (("a", 0.9), ("b", 0.1))
    )
    lines = scoring.describe(
        {"score": first.values, "against": second.values, "comparison": scoring.compare(first, second)}
    )
    assert sum(str(tmp_path) in line for line in lines) == scoring.MAX_DIFFERENCES
    assert any(line.startswith("... and 2 more") for line in lines)
