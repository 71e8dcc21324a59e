import report

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # computed with scipy's binomtest(...).proportion_ci(method="wilson")
    [(0, 2, 0.0, 0.658), (1, 2, 0.095, 0.905), (2, 2, 0.342, 1.0), (95, 100, 0.888, 0.978), (900, 1000, 0.880, 0.917)],
)
def test_interval_is_wilsons(right, total, low, high):
    assert report.interval(right, total) == pytest.approx((low, high), abs=0.001)


def test_answers_and_recall_follow_the_probabilities():
    found = report.answers(["a", "b"], ["1", "2", "3"], [0, 0, 1], np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]))
    assert [image["predicted"] for image in found["images"]] == ["a", "b", "b"]
    assert [image["probability"] for image in found["images"]] == pytest.approx([0.9, 0.8, 0.7])
    assert found["recall"] == {"a": 0.5, "b": 1.0}


@pytest.mark.parametrize("probabilities", [[[0.9, 0.1], [0.2, 0.8]], [[0.1, 0.9], [0.8, 0.2]]])
def test_report_holds_every_part_whatever_the_names(tmp_path, probabilities):
    names, files = ["a$_1_2$|x", "b"], ["a$_1_2$|x/one $ two.jpeg", "b/3.jpeg"]
    results = report.answers(names, files, [0, 1], np.array(probabilities))
    rows = [
        {"file": file, "class": name, "split": "test", "reason": ""} for file, name in zip(files, names, strict=True)
    ]
    rows.append({"file": "b/broken.jpeg", "class": "b", "split": None, "reason": "not an image: unknown format"})
    results |= {"class_names": names, "test_loss": 0.1, "test_accuracy": 1.0}
    results["data"] = {"source": "somewhere", "digest": "d" * 64, "images": rows}
    history = [{"loss": loss, "accuracy": 1, "val_loss": loss + 1, "val_accuracy": 0.5} for loss in (1, 0.5)]
    report.learning_curves(history, tmp_path / "learning_curves.png")
    report.confusion_matrix(results, tmp_path / "confusion_matrix.png")
    report.misjudged_images(results, np.zeros((2, 8, 8, 3), "uint8"), tmp_path / "misjudged_images.png")
    text = report.markdown(results, {"epochs": "2"}, "the decision", tmp_path)
    assert text.startswith("# the decision\n")
    assert text.count("data:image/png;base64,") == 3
    for part in (
        "of 2 test images right",
        "95 % confidence",
        "b/broken.jpeg | not an image",
        "| epochs | 2 |",
        "d" * 64,
    ):
        assert part in text
