import html
import re

from workflow.images import folder_check
from workflow.judging import evaluation, report
from workflow.model import served_model

import pytest
from PIL import Image
from scipy.stats import binomtest


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),  # from the paper's formula, with z = 1.959964
    [(0, 2, 0.0, 0.710), (1, 2, 0.095, 0.905), (2, 2, 0.290, 1.0), (95, 100, 0.885, 0.981), (900, 1000, 0.880, 0.917)],
)
def test_interval_is_that_of_agresti_and_coull_and_holds_wilsons(right, total, low, high):
    assert (found := evaluation.interval(right, total)) == pytest.approx((low, high), abs=0.001)
    wilson = binomtest(right, total).proportion_ci(method="wilson")
    assert found[0] <= wilson.low + 1e-6
    assert found[1] >= wilson.high - 1e-6


@pytest.mark.parametrize(
    ("better", "worse", "needed"), [(0.5, 0, 12), (1, 0, 6), (0.05, 0, 114), (0.1, 0.05, 270), (0.9, 0.1, 9)]
)
def test_images_to_settle_agree_with_the_exact_test(better, worse, needed):
    assert evaluation.images_to_settle(better, worse) == needed
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


def rows(answers: list[tuple[str, str, dict | str]]) -> list[dict]:
    """A row for each file, class, and probabilities or reason of a model that refuses the file."""
    told = []
    for file, label, chances in answers:
        if isinstance(chances, dict):
            best = max(chances, key=chances.get)
            chances = {"label": best, "probability": chances[best], "probabilities": chances}
        told.append(evaluation.answered(file, label, chances))
    return told


def test_score_counts_right_answers_recall_and_confusions_and_a_refused_image_is_wrong():
    found = rows(
        [
            ("1", "a", {"a": 0.9, "b": 0.1}),
            ("2", "a", {"a": 0.2, "b": 0.8}),
            ("3", "b", {"a": 0.3, "b": 0.7}),
            ("4", "a", "not an image"),
            ("5", "a", {"a": 0.4, "b": 0.6}),
        ]
    )
    assert [row["predicted"] for row in found] == ["a", "b", "b", "", "b"]
    assert evaluation.count_right(found) == 2
    assert evaluation.recall(found) == {"a": 0.25, "b": 1.0}
    assert evaluation.confusions(found) == [("a", "b", 2), ("a", "", 1)]
    assert "2 of 5 test images are right. So few images only show" in evaluation.evidence(found)
    assert "That shows" in evaluation.evidence(found * 20)


def test_file_that_is_too_large_is_refused_with_its_name_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(served_model, "MAX_FILE_BYTES", 10)
    (tmp_path / "large.jpeg").write_bytes(bytes(11))
    with pytest.raises(OSError, match="11 bytes: more than 10 are refused") as refused:
        served_model.read_file(tmp_path / "large.jpeg")
    assert refused.value.filename == str(tmp_path / "large.jpeg")


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("crossed", [True, False])
def test_report_holds_every_part_and_names_come_out_as_they_are(tmp_path, right, crossed):
    names = ["a|b $x_1$ <b>`*", "b"]
    files = [f"{names[0]}/one\n$ two.jpeg", "b/3.jpeg"]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    sure = {True: 0.9, False: 0.1}
    chances = [{name: sure[(name == label) is right] for name in names} for label in names]
    answers = rows(list(zip(files, names, chances, strict=True)))
    results = {"images": answers, "recall": evaluation.recall(answers)}
    images = [
        {"file": file, "class": name, "split": "test", "reason": ""} for file, name in zip(files, names, strict=True)
    ]
    images.append({"file": "b/broken.jpeg", "class": "b", "split": None, "reason": "not an image: unknown format"})
    results |= {"champion": {"version": "1"} | results}
    results |= {"class_names": names, "test_loss": 0.1, "test_accuracy": 1.0}
    results["data"] = {"source": "somewhere", "digest": "d" * 64, "folder": str(tmp_path), "images": images}
    history = [{"loss": loss, "accuracy": 1, "val_loss": loss + 1, "val_accuracy": 0.5} for loss in (1, 0.5)]
    result = {"expected_calibration_error": 0.05, "bins": [{"probability": 0.9, "right": 1.0, "share": 1.0}]}
    points = [{"images_per_class": count, "accuracy": 0.8 + count / 100, "images": 20} for count in (2, 4, 9)]
    assessed = {"images": answers, "recall": results["recall"], "curve": points, "temperature": 0.5}
    assessed["calibration"] = {"before": result, "after": result}
    report.learning_curves(history, tmp_path / "learning_curves.png")
    report.confusion_matrix(results, tmp_path / "confusion_matrix.png")
    report.misjudged_images(results, tmp_path / "misjudged_images.png")
    report.evidence_curves(assessed, tmp_path / "evidence_curves.png")
    results["findings"] = folder_check.find_wrong_labels(answers)
    sections = report.build(results, assessed if crossed else None, {"epochs": "2"}, "the decision: a reason", tmp_path)
    page, text = report.as_html("apples", sections), report.as_markdown(sections)
    assert text.startswith("# the decision\n")
    assert page.count("data:image/png;base64,") == text.count("data:image/png;base64,") == 2 + crossed
    assert ("data:image/jpeg;base64," in page) is not right
    said = [
        "of 2 test images are right",
        "95 % confidence",
        "b/broken.jpeg",
        "not an image",
        "d" * 64,
        names[0],
        "Why: a reason.",
    ]
    said += [
        "In cross-validation" if crossed else "Cross-validation is left out",
        "Nothing was found" if right else "2 findings (label: 2)",
    ]
    if crossed:
        said.append(
            "From 4 to 9 photos per class to learn from, it gained 5 points of accuracy: more photos are likely"
        )
    shown = html.unescape(re.sub("<[^>]+>", " ", page))
    for part in said:
        assert part in shown
        assert " ".join(part.split()) in re.sub(r"\\(.)", r"\1", text)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.fullmatch(r"\|( (\\.|[^|\\])* \||---\|)+", line) for line in tables), tables
