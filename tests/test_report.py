import re

import report

import numpy as np
import pytest
from scipy.stats import binomtest


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # computed with scipy's binomtest(...).proportion_ci(method="wilson")
    [(0, 2, 0.0, 0.658), (1, 2, 0.095, 0.905), (2, 2, 0.342, 1.0), (95, 100, 0.888, 0.978), (900, 1000, 0.880, 0.917)],
)
def test_interval_is_wilsons(right, total, low, high):
    assert report.interval(right, total) == pytest.approx((low, high), abs=0.001)


@pytest.mark.parametrize(
    ("better", "worse", "needed"), [(0.5, 0, 12), (1, 0, 6), (0.05, 0, 114), (0.1, 0.05, 270), (0.9, 0.1, 9)]
)
def test_images_to_settle_agree_with_the_exact_test(better, worse, needed):
    assert report.images_to_settle(better, worse) == needed
    for share, significant in ((0.8, False), (1.2, True)):
        only_one, only_other = round(share * needed * better), round(share * needed * worse)
        assert (binomtest(only_one, only_one + only_other).pvalue <= 0.05) == significant


@pytest.mark.parametrize(
    ("mine", "its", "told"),
    [
        ("rr", "rw", r"1 image\(s\) only this model has right, 0 only .* version 3\. .* 12 test images show which"),
        ("rw", "wr", r"are right equally often\. To show a difference of 5% takes 114 test images"),
        (
            "wwwwww",
            "rrrrrr",
            r"0 image\(s\) only this model has right, 6 only the champion.*: that shows which is better",
        ),
    ],
)
def test_report_says_how_many_images_settle_the_comparison(mine, its, told):
    def images(answers):
        return [{"label": "r", "predicted": answer} for answer in answers]

    results = {"images": images(mine), "champion": {"version": "3", "images": images(its)}}
    assert re.search(told, report.comparison(results))
    assert report.comparison(results | {"champion": None}) == ""


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
    results |= {"champion": {"version": "1"} | results}
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
